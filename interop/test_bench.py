"""The benchmark: every kind of work gives figures, and what it saves is read again. How high they are is nobody's business here."""

from __future__ import annotations

import contextlib
import io
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

from . import bench, peers
from .support import PATIENCE, InteropTest, needs_sid

WORKS = ("randread-4k-qd32", "qemu-img-4k-qd32", "queues")
TEXT = "{http://www.w3.org/2000/svg}text"


def figures(rounds: int, iops: float) -> list[bench.Figures]:
    return [bench.Figures(iops + n, iops * 4096 / 1e6, 1e6 / iops, 10, 20, 30) for n in range(rounds)]


class Measured(InteropTest):
    def test_quick_run_of_ours(self) -> None:
        needs_sid()
        saved, drawn = self.dir / "bench.json", self.dir / "bench.svg"
        only = [word for work in WORKS for word in ("--only", work)]
        status, text, _ = self.bench("--quick", "--peers", "ours", *only, "--json", str(saved), "--svg", str(drawn))
        self.assertEqual(status, 0)
        results = bench.Results.load(saved)
        self.assertEqual(list(results.works), list(WORKS))
        for work, rows in results.works.items():
            self.assertEqual(list(rows), [peer.name for peer in bench.WORK[work].peers if peer.family == "ours"])
            for name, rounds in rows.items():
                with self.subTest(work, peer=name):
                    self.assertEqual(len(rounds), 1)
                    self.assertGreater(min(rounds[0].iops, rounds[0].mb, rounds[0].cpu), 0)
                    self.assertEqual(rounds[0].p99 is None, bench.WORK[work].generator == bench.QEMU_IMG)
        again = self.bench("--from", str(saved), "--svg", str(self.dir / "again.svg"))
        self.assertEqual(again, (0, text, ""))
        self.assertEqual((self.dir / "again.svg").read_bytes(), drawn.read_bytes())

    def test_peer_that_does_not_start(self) -> None:
        needs_sid()
        folders = set(Path("/dev/shm").glob("vu-bench-*"))
        broken = bench.Work("broken", "", ours="--no-such-option", peers=bench.PEERS[:1])
        bench.WORK["broken"] = broken
        self.addCleanup(bench.WORK.pop, "broken")
        status, _, error = self.bench("--quick", "--only", "broken")
        self.assertEqual(status, 1)
        self.assertIn("broken: ours ended with status 2:", error)
        self.assertIn("--no-such-option", error)
        self.assertEqual(set(Path("/dev/shm").glob("vu-bench-*")), folders)

    def test_more_queues_than_there_are(self) -> None:
        image = self.image("disk.img", 1 << 20)
        peers.serve_disk(self, peers.Disk(image), self.dir / "disk.sock")
        argv = [str(peers.build_load()), "--socket", str(self.dir / "disk.sock"), "--queues", "2"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
        self.assertEqual((done.returncode, done.stderr), (1, "--queues 2: the back-end has 1\n"))

    def bench(self, *arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = bench.main(arguments)
        return status, out.getvalue(), err.getvalue()


class Shown(InteropTest):
    """Of made-up figures."""

    def test_ratios_compare_with_ours_in_the_same_place(self) -> None:
        rows = {"ours": figures(3, 100), "rust": figures(3, 200), "ours-ram": figures(3, 400), "rust-ram": figures(3, 100)}
        lines = bench.table(bench.WORK["randread-4k-qd32"], rows).splitlines()
        ratios = {line.split()[0]: line.split()[7:] for line in lines[3:]}
        self.assertEqual(ratios, {"ours": [], "rust": ["0.50", "2.00", "1.00"], "ours-ram": [], "rust-ram": ["3.97", "0.25", "1.00"]})

    def test_plot_names_every_peer(self) -> None:
        works = {work.name: {peer.name: figures(2, 1000 + n) for n, peer in enumerate(work.peers)} for work in bench.WORKS}
        about = dict.fromkeys(("cpu", "cores", "kernel", "python", "storage-daemon", "qemu-img", "rust"), "<some>")
        root = ET.fromstring(bench.plot(bench.Results(about, 2, 1.0, works)))
        texts = {element.text for element in root.iter(TEXT)}
        self.assertLessEqual({peer.name for work in bench.WORKS for peer in work.peers} | set(works), texts)

    def test_file_of_something_else(self) -> None:
        for content in ("", "[]", '{"machine": {}, "rounds": 1, "seconds": 1, "works": {"unknown": {}}}'):
            path = self.dir / "bench.json"
            path.write_text(content, encoding="utf-8")
            with self.subTest(content), self.assertRaisesRegex(ValueError, "bench.json was not saved by"):
                bench.Results.load(path)
