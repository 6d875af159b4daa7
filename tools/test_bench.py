"""Tests of tools/bench.py: that it runs and says what it should. No test of speed: machines are noisy."""

from __future__ import annotations

import contextlib
import io
import json
import re
import unittest

from devices.blk import Blk, RamImage
from tools import bench
from vring import PackedDriverQueue, SplitDriverQueue


def output_of(*words: str) -> str:
    """What the program prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = bench.main(words)
    if status:
        raise AssertionError(f"status {status}")
    return printed.getvalue()


class Benchmark(unittest.TestCase):
    """The program, in this process."""

    def test_for_programs(self) -> None:
        found = json.loads(output_of("--json", "--rounds", "1"))
        results = found["results"]
        self.assertEqual([result["work"] for result in results[:4]], ["preadv", "ring", "RAM", "file"])
        self.assertEqual(len({(r["ring"], r["chain"], r["buffers"], r["work"]) for r in results}), 25)
        self.assertEqual(results[0]["ratio"], 1)
        for result in results:
            self.assertGreater(result["lowest_ns"], 0)
            self.assertLessEqual(result["lowest_ns"], result["median_ns"])

    def test_for_people(self) -> None:
        lines = output_of("--rounds", "1", "--depth", "5").splitlines()
        self.assertIn("5 requests at a time", lines[0])
        self.assertEqual([len(line.split()) for line in lines[-8:]], [9] * 8)

    def test_the_disk_as_a_program(self) -> None:
        lines = output_of("--program", "--quick").splitlines()
        self.assertIn("guest of 64 GiB", lines[0])
        resident = re.findall(r"(Rss\w+) ([\d.]+) MiB", lines[1])
        self.assertEqual([kind for kind, _ in resident], ["RssAnon", "RssFile"])
        self.assertLess(sum(float(mib) for _, mib in resident), 40)
        self.assertEqual(sum("of the first" in line for line in lines), 6)

    def test_a_failed_read_is_noticed(self) -> None:
        small = Blk(RamImage(4096))  # most of what is read lies behind its end
        rig = bench.Rig(bench.guest_memory(), 0, SplitDriverQueue, False, False, 4, small.process_queue)
        rig.once()
        with self.assertRaisesRegex(RuntimeError, "failed"):
            rig.check_reads()

    def test_a_lost_request_is_noticed(self) -> None:
        rig = bench.Rig(bench.guest_memory(), 0, PackedDriverQueue, True, True, 4, lambda ring: None)
        with self.assertRaisesRegex(RuntimeError, "0 of 4 requests came back"):
            rig.once()

    def test_fresh_buffers_are_fresh(self) -> None:
        pages = bench._pages(32, fresh=True)
        first = [next(pages) for _ in range(bench.DATA_PAGES)]
        self.assertEqual(len(set(first)), bench.DATA_PAGES)
        reused = bench._pages(32, fresh=False)
        self.assertEqual([next(reused) for _ in range(32)], [next(reused) for _ in range(32)])


if __name__ == "__main__":
    unittest.main()
