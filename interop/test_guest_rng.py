"""The README's entropy device, read through /dev/hwrng in a guest: the device API is what it claims."""

from __future__ import annotations

import zlib

from .diskcheck import RING_PACKED
from .guest import NEWEST, OLDEST, Device, Machine, QemuGuest
from .peers import serve_rng
from .support import InteropTest


class Rng(InteropTest):
    def read_hwrng(self, machine: Machine, *, packed: bool) -> None:
        socket = self.dir / "rng.sock"
        backend = serve_rng(self, socket)
        device = Device("vhost-user-rng-pci", socket, {}, name="rng0")
        guest = QemuGuest(machine, self.dir, [device])
        self.addCleanup(guest.kill)
        guest.wait_ready()
        self.assertIn("virtio_rng", guest.run("cat /sys/class/misc/hw_random/rng_current"))
        bits = guest.run("cat /sys/bus/virtio/drivers/virtio_rng/virtio*/features")
        self.assertEqual(bits[RING_PACKED] == "1", packed)
        data = bytes.fromhex(guest.run("dd if=/dev/hwrng bs=512 count=32 2>/dev/null | xxd -p | tr -d '\\n'"))
        self.assertGreaterEqual(len(data), 8192)
        self.assertGreater(len(zlib.compress(data)), len(data), "that is not random")
        self.assertGreater(len(set(data)), 250, "that is not random")
        self.assertTrue(backend.running())

    def test_newest(self) -> None:
        """QEMU 11.1 passes on whatever this device offers, asked for or not: packed rings in order."""
        self.read_hwrng(NEWEST, packed=True)

    def test_oldest(self) -> None:
        self.read_hwrng(OLDEST, packed=False)
