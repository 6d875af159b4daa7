"""Tests against peers that nobody here wrote, and the benchmark beside them.

    python3 -m interop [-v] [NAME …]                 all tests, or those named: test_uml, test_guest_blk.Newest …
    python3 -m interop.sid                           build the chroot with the newest peers ahead of time
    python3 -m interop.bench                         our disk beside qemu-storage-daemon and the Rust crate

The peers come from Debian 12's own packages (packages.txt; QEMU 7.2: the oldest) and from a chroot of Debian sid
(sid.py; QEMU 11.1, Linux 7.2, User-mode Linux 7.2, libblkio: the newest). What is missing is a skip that names it; with
VHOST_USER_INTEROP_REQUIRED=1 it is a failure. VHOST_USER_INTEROP_DISK=ours|qsd picks the disk under test, so that
the tests can be tried on a back-end that is known to be good.

In reading order, each uses those above it:

    sid.py          the chroot: built when missing, commands run inside
    support.py      the tests' base class: folder, clean-up, logs shown after a failure, what is missing
    peers.py        processes: our devices, qemu-storage-daemon, rust-peer/, vublk-load.c
    initramfs.py    what a guest boots: kernel, modules, busybox, fio, e2fsprogs, and the agent that runs commands
    guest.py        guests under QEMU: boot, commands, QMP
    uml.py          the same under User-mode Linux
    diskcheck.py    what is asked of a disk inside any guest
    traces.py       which front-end was seen to send what
    test_*.py       one subject each; test_traces.py, the last one, holds README.md against what was seen
    bench.py        figures, side by side in one run
"""

from __future__ import annotations

import signal
import sys
import unittest
from pathlib import Path


def main() -> None:
    """Run the tests named on the command line, or all; the options are unittest's."""
    # `timeout` and CI end a run with SIGTERM: as an interrupt it unwinds, and folders and guests go with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    names = names or sorted((path.stem for path in Path(__file__).parent.glob("test_*.py")), key=lambda name: (name == "test_traces", name))
    unittest.main(None, argv=["python3 -m interop", *options, *(f"interop.{name}" for name in names)])


if __name__ == "__main__":
    main()
