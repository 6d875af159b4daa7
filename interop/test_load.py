"""vublk-load on the disk under test: a front-end of few lines that keeps a queue full, and checks what it reads."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from .diskcheck import MIB
from .peers import Disk, build_load, needs_disk, serve_disk
from .support import PATIENCE, InteropTest, overwrite

SIZE = 16 * MIB

# Which features it takes, how deep, how many queues, and whether it polls (then it wants no notification at all).
WAYS = (
    "--bs 4096 --qd 32",
    "--bs 4096 --qd 1",
    "--bs 4096 --qd 32 --no-event-idx",
    "--bs 4096 --qd 64 --indirect",
    "--bs 4096 --qd 32 --indirect --fresh",
    "--bs 65536 --qd 8 --poll",
    "--bs 131072 --qd 85",
    "--bs 512 --qd 4 --qsize 16",
    "--bs 4096 --qd 32 --queues 2",
    "--bs 4096 --qd 32 --queues 2 --no-event-idx",
    "--bs 4096 --qd 4 --queues 2 --poll",
)


class Load(InteropTest):
    def test_every_block_written_and_read_back(self) -> None:
        self.write_and_read(Disk(self.image("disk.img", SIZE), num_queues=2), WAYS)

    def test_queues_in_processes_of_their_own(self) -> None:
        needs_disk("processes")
        self.write_and_read(Disk(self.image("disk.img", SIZE), num_queues=2, processes=2), [way for way in WAYS if "--queues" in way])

    def write_and_read(self, disk: Disk, ways: Sequence[str]) -> None:
        load = build_load()
        backend = serve_disk(self, disk, self.dir / "disk.sock")
        for way in ways:
            overwrite(disk.image, bytes(SIZE))  # so that what is read was written this way
            with self.subTest(way):
                self.load(load, "write", way)
                self.assertNotIn(bytes(512), {disk.image.read_bytes()[at : at + 512] for at in range(512, SIZE, MIB)})
                self.load(load, "read", way)
        self.assertTrue(backend.running())

    def load(self, program: Path, kind: str, way: str) -> None:
        argv = [str(program), "--socket", str(self.dir / "disk.sock"), "--rw", kind, *way.split(), "--time", "60", "--verify"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
