"""Guests under User-mode Linux 7.2: a real kernel as a process, with virtio_uml as the front-end.

It ignores SIGTERM and waits for ever on a silent back-end; `Process.kill` ends it, and its children with it. Its own
files stay in the test's folder.
"""

from __future__ import annotations

import socket
from pathlib import Path

from . import initramfs, sid
from .guest import Guest
from .peers import Process
from .support import needs, needs_sid


class UmlGuest(Guest):
    """A guest with one vhost-user device of the virtio type `device_id`."""

    def __init__(self, folder: Path, device: Path, device_id: int, *modules: str) -> None:
        needs("setpriv")
        needs_sid()
        releases = sorted((sid.ROOT / "usr/lib/uml/modules").iterdir())
        initrd = initramfs.build(releases[-1], modules, tools=("mkfs.ext4", "e2fsck"))
        agent, far = socket.socketpair()
        argv = [
            *("linux.uml", "mem=128M", f"initrd={initrd}", "rdinit=/init", f"uml_dir={folder}/", "umid=uml"),
            f"virtio_uml.device={device}:{device_id}",
            *("con=null", "con0=null,fd:1", "ssl=null", f"ssl0=fd:{far.fileno()},fd:{far.fileno()}"),
            *("agent=/dev/ttyS0", "root=/dev/ram0"),
        ]
        console = folder / "console.log"
        with far:
            process = Process(sid.command(argv, binds=[folder, sid.CACHE]), console, pass_fds=[far.fileno()])
        super().__init__(process, console, agent)

    def power_off(self) -> int:
        """Cleanly, from inside; returns the exit status."""
        self.post("poweroff -f")
        return self.process.wait()
