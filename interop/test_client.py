"""QEMU listens, and the disk connects: before QEMU is there, again when it was killed, and to the next QEMU."""

from __future__ import annotations

import random
import time
from dataclasses import replace

from . import diskcheck
from .diskcheck import MIB
from .guest import NEWEST, OLDEST, Machine, QemuGuest, disk_device
from .peers import Disk, needs_disk, serve_disk
from .support import InteropTest
from .test_recovery import LOAD

SIZE = 48 * MIB
KILLS = 5


class Client(InteropTest):
    """The disk's `--client --reconnect`."""

    def test_newest(self) -> None:
        self.lives(NEWEST)

    def test_oldest(self) -> None:
        self.lives(OLDEST)

    def lives(self, machine: Machine) -> None:
        needs_disk("client")
        disk, socket = Disk(self.image("disk.img", SIZE), client=True), self.dir / "disk.sock"
        backend = serve_disk(self, disk, socket)
        for life in range(2):
            guest = QemuGuest(machine, self.dir, [replace(disk_device(socket), listens=True)])
            self.addCleanup(guest.kill)
            guest.wait_ready()
            diskcheck.filesystem(guest)
            if not life:
                guest.run(LOAD)
                for _ in range(KILLS):
                    time.sleep(random.uniform(0.1, 0.5))
                    backend.kill()
                    backend = serve_disk(self, disk, socket)
                output = guest.run("touch /tmp/stop; for i in $(seq 600); do [ -e /tmp/done ] && break; sleep 0.1; done; cat /tmp/done /tmp/fio")
                self.assertRegex(output, r"^\d+ runs")
                self.assertIn("err= 0", output)
            diskcheck.same_content(guest, disk.image)
            guest.kill()
        self.assertTrue(backend.running())
