"""Tests of devices/rng.py: `python3 -m unittest devices.test_rng`."""

from __future__ import annotations

import json
import subprocess
import sys
import unittest

from devices.rng import Rng
from devices.test_blk import GUARD, PATIENCE, ROOT, DeviceTest, Driver


class RngTest(DeviceTest):
    """Random bytes for whoever hands out room for them."""

    def device(self, packed: bool) -> Driver:
        return Driver(Rng(), self.folder, packed=packed)

    def test_fills_all_of_it(self) -> None:
        for packed in False, True:
            for pieces in [1], [64], [4096], [1, 2, 3], [63, 1, 1000, 4096, 5]:
                with self.subTest(packed=packed, pieces=pieces), self.device(packed) as device:
                    total = sum(pieces)
                    seen = set()
                    left = set(range(total))  # bytes that were always what they had been
                    for _ in range(8):
                        length, data = device.exchange([], pieces)
                        self.assertEqual(length, total)
                        seen.add(data)
                        left -= {at for at in left if data[at] != GUARD}
                    self.assertEqual(left, set())  # by chance once in 2**64 / total
                    self.assertGreater(len(seen), 1)
                    if total >= 64:
                        self.assertEqual(len(seen), 8)
                        self.assertTrue(all(len(set(data)) > total // 4 or len(set(data)) > 128 for data in seen), "not random")

    def test_several_buffers_at_once(self) -> None:
        for packed in False, True:
            with self.subTest(packed=packed), self.device(packed) as device:
                area = device.frontend.arena[0]
                for number in range(200):
                    device.chain([], [32, 32], at=area + 128 * number)
                found = device.collect(200)
                self.assertEqual({length for _, length in found}, {64})
                self.assertEqual(len({parts.result() for parts, _ in found}), 200)

    def test_readable_parts(self) -> None:
        """Data for the device is none of its business; without room for an answer there is none."""
        for packed in False, True:
            with self.subTest(packed=packed), self.device(packed) as device:
                self.assertEqual(device.exchange([b"data", b"more"], []), (0, b""))
                length, data = device.exchange([b"data"], [64])
                self.assertEqual(length, 64)
                self.assertNotEqual(data, bytes([GUARD]) * 64)
                self.assertEqual(device.exchange([b"data"], []), (0, b""))

    def test_no_config_space(self) -> None:
        with self.device(False) as device:
            self.assertFalse(device.frontend.features & (1 << 24) - 1, "features of the device type")
            self.assertEqual(device.frontend.queue_num(), 1)

    def test_program(self) -> None:
        words = [sys.executable, "-m", "devices.rng", "--print-capabilities"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
        self.assertEqual(json.loads(done.stdout), {"type": "rng", "features": []})


if __name__ == "__main__":
    unittest.main()
