"""Memory that is plugged into a running guest and out of it again, while its disk is under load."""

from __future__ import annotations

import contextlib
import re
import time

from .diskcheck import MIB, same_content
from .guest import NEWEST, GuestError, QemuGuest, disk_device
from .peers import Disk, serve_disk
from .support import PATIENCE, InteropTest
from .test_recovery import LOAD

SIZE = 32 * MIB
MODULE = 256 * MIB

_TOTAL = "awk '/MemTotal/ {print $2}' /proc/meminfo"
# A file in memory takes up more than there was before, and is written to the disk from where it lies.
_FILL = "dd if=/dev/urandom of=/tmp/filler bs=1M count=200 2>/dev/null; md5sum </tmp/filler"


class MemoryHotplug(InteropTest):
    """QEMU 11.1 and Linux 7.2: regions come and go (ADD_MEM_REG, REM_MEM_REG) while rings run."""

    def test_under_load(self) -> None:
        NEWEST.require()
        image, socket = self.image("disk.img", SIZE), self.dir / "disk.sock"
        backend = serve_disk(self, Disk(image), socket)
        guest = QemuGuest(NEWEST, self.dir, [disk_device(socket)], cpus=2, slots=2)
        self.addCleanup(guest.kill)
        guest.wait_ready()
        guest.run(LOAD)
        before = int(guest.run(_TOTAL))
        for round in range(2):
            guest.qmp.execute("object-add", **{"qom-type": "memory-backend-memfd", "id": f"m{round}", "size": MODULE, "share": True})
            guest.qmp.execute("device_add", driver="pc-dimm", id=f"d{round}", memdev=f"m{round}")
            guest.wait(f"[ $({_TOTAL}) -gt {before + MODULE // 2048} ]")
            filled = guest.run(_FILL, timeout=PATIENCE)
            self.assertEqual(guest.run("md5sum </tmp/filler; rm /tmp/filler"), filled)
            self.unplug(guest, f"d{round}")
            guest.qmp.execute("object-del", id=f"m{round}")
        output = guest.run("touch /tmp/stop; for i in $(seq 600); do [ -e /tmp/done ] && break; sleep 0.1; done; cat /tmp/done /tmp/fio")
        self.assertRegex(output, r"^\d+ runs")
        self.assertIn("err= 0", output)
        same_content(guest, image)
        self.assertTrue(backend.running())
        log = socket.with_suffix(".log").read_text()
        for way in "ADD_MEM_REG", "REM_MEM_REG":
            self.assertGreaterEqual(len(re.findall(rf"<- {way} {MODULE:#x} bytes", log)), 2, way)

    def unplug(self, guest: QemuGuest, name: str) -> None:
        """The guest has to move away what lies there, which it may refuse for a moment."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(GuestError):  # it is on its way, or has just gone
                guest.qmp.execute("device_del", id=name)
            time.sleep(1)
            if name not in {device["data"].get("id") for device in guest.qmp.execute("query-memory-devices")}:
                return
        raise AssertionError(f"{name} is still there")
