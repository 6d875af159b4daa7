"""A disk behind the guest's own IOMMU: QEMU's intel-iommu, with device IOTLBs (ATS), and a Linux guest that uses it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from . import diskcheck
from .diskcheck import ACCESS_PLATFORM, MIB, RING_PACKED
from .guest import NEWEST, QemuGuest, disk_device
from .peers import Disk, serve_disk
from .support import InteropTest

SIZE = 48 * MIB


class BehindTheIommu(InteropTest):
    """QEMU 11.1 and Linux 7.2."""

    def exercise(self, **properties: bool | int) -> None:
        NEWEST.require()
        image, socket = self.image("disk.img", SIZE), self.dir / "disk.sock"
        serve_disk(self, Disk(image, iommu=True, log_level="debug"), socket)
        device = disk_device(socket, iommu_platform=True, ats=True, **properties)
        guest = QemuGuest(NEWEST, self.dir, [device], iommu=True)
        self.addCleanup(guest.kill)
        guest.wait_ready()
        diskcheck.expect_features(guest, (ACCESS_PLATFORM, *((RING_PACKED,) if properties.get("packed") else ())), ())
        diskcheck.filesystem(guest)
        diskcheck.fio_verify(guest)
        diskcheck.same_content(guest, image)
        seen = iotlb_messages(socket.with_suffix(".log"))
        for kind in "-> miss", "<- update", "<- invalidate":
            self.assertGreater(seen[kind], 10, seen)

    def test_split(self) -> None:
        self.exercise()

    def test_packed(self) -> None:
        self.exercise(packed=True)


def iotlb_messages(log: Path) -> Counter[str]:
    """How many of each kind the back-end has sent (->) and got (<-)."""
    return Counter(f"{way} {kind}" for way, kind in re.findall(r"(->|<-) IOTLB_MSG (\w+(?: fail)?)", log.read_text(encoding="utf-8")))
