"""The README's entropy device, read through /dev/hwrng in a guest: the device API is what it claims."""

from __future__ import annotations

import sys
import zlib

from .diskcheck import RING_PACKED
from .guest import NEWEST, OLDEST, Device, Machine, QemuGuest
from .peers import serve_rng, start_backend
from .support import InteropTest, wait_for


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

    def test_requests_to_the_front_end(self) -> None:
        """QEMU 11.1 asks for shared memory regions; it maps and unmaps in them, refuses an overlap, and knows shared objects.

        It looks an object up without saying which, so none is found: the connection must survive that."""
        socket = self.dir / "rng.sock"
        argv = [sys.executable, "-m", "interop.asking_rng", "--log-level", "debug", "--socket-path", str(socket)]
        backend = start_backend(self, argv, socket)
        guest = QemuGuest(NEWEST, self.dir, [Device("vhost-user-rng-pci", socket, {}, name="rng0")])
        self.addCleanup(guest.kill)
        guest.wait_ready()
        output = socket.with_suffix(".log")
        wait_for(lambda: "remove:" in output.read_text(), "the device to have asked everything")
        lines = output.read_text().splitlines()
        self.assertTrue(any("<- GET_SHMEM_CONFIG  -> region 0: 0x10000 bytes, region 2: 0x4000 bytes" in line for line in lines))
        answers = [line for line in lines if ": " in line and " vhost_user: " not in line]
        wanted = ["map read-only: True", "map over it: False", "map: True", "unmap: True", "map again: True", "add: True", "remove: True"]
        self.assertEqual([line for line in answers if not line.startswith("found:")], wanted)
        self.assertEqual(len(bytes.fromhex(guest.run("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | xxd -p | tr -d '\\n'"))), 64)
        self.assertTrue(backend.running())
