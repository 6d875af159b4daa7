"""User-mode Linux on the disk under test: another kernel-side front-end, which polls and kicks in its own way."""

from __future__ import annotations

import sys

from . import diskcheck
from .diskcheck import MIB, RING_PACKED
from .peers import Disk, needs_disk, serve_disk, start_backend
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

    def test_in_band(self) -> None:
        """Kicks and calls as messages, which it uses whenever they are offered: no eventfd at all."""
        program = (
            "import sys; from vhost_user import VhostUserProtocolFeatures as P; from devices import blk; "
            "blk.Blk.protocol_features = P.INBAND_NOTIFICATIONS; sys.exit(blk.main())"
        )
        image, socket = self.image("disk.img", SIZE), self.dir / "disk.sock"
        argv = [sys.executable, "-c", program, "--socket-path", str(socket), "--blk-file", str(image), "--log-level", "debug"]
        backend = start_backend(self, argv, socket)
        guest = UmlGuest(self.dir, socket, BLOCK, "virtio_blk")
        self.addCleanup(guest.kill)
        guest.wait_ready()
        guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=128 conv=fsync")
        diskcheck.same_content(guest, image)
        self.assertEqual(guest.power_off(), 0)
        trace = backend.log.read_text()
        for seen in "<- VRING_KICK ring 0", "-> VRING_CALL ring 0":
            self.assertIn(seen, trace)
        self.assertNotIn("SET_VRING_KICK", trace)

    def test_split(self) -> None:
        self.exercise(packed=False)

    def test_packed(self) -> None:
        needs_disk("packed")
        self.exercise(packed=True)
