"""User-mode Linux on the disk under test: another kernel-side front-end, which polls and kicks in its own way."""

from __future__ import annotations

from . import diskcheck
from .diskcheck import MIB, RING_PACKED
from .peers import Disk, needs_disk, serve_disk
from .support import InteropTest
from .uml import UmlGuest

BLOCK = 2  # the virtio device type
SIZE = 32 * MIB


class UserModeLinux(InteropTest):
    def exercise(self, *, packed: bool) -> None:
        """It acknowledges all that is offered, so the ring's kind is the back-end's to say."""
        image = self.image("disk.img", SIZE)
        backend = serve_disk(self, Disk(image, packed=packed), self.dir / "disk.sock")
        guest = UmlGuest(self.dir, self.dir / "disk.sock", BLOCK, "virtio_blk")
        self.addCleanup(guest.kill)
        guest.wait_ready()
        diskcheck.expect_features(guest, [RING_PACKED] * packed, [RING_PACKED] * (not packed))
        guest.run(
            "dd if=/dev/urandom of=/tmp/data bs=64k count=128 && dd if=/tmp/data of=/dev/vda bs=64k conv=fsync"
            " && echo 3 >/proc/sys/vm/drop_caches && dd if=/dev/vda bs=64k count=128 | cmp - /tmp/data"
            " && dd if=/dev/vda bs=4k count=2048 iflag=direct | cmp - /tmp/data"
        )
        diskcheck.same_content(guest, image)
        diskcheck.filesystem(guest)
        diskcheck.same_content(guest, image)
        self.assertEqual(guest.power_off(), 0)
        self.assertTrue(backend.running())

    def test_split(self) -> None:
        self.exercise(packed=False)

    def test_packed(self) -> None:
        needs_disk("packed")
        self.exercise(packed=True)
