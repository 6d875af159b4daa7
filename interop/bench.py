"""Our disk beside qemu-storage-daemon and the Rust crate's, in one run, under the same load.

    python3 -m interop.bench [--quick] [--rounds N] [--time S] [--only WORK] [--peers NAME,NAME]

The load (vublk-load.c) has one core, the back-end another. Every round goes once through all peers for one kind of
work, so that a noisy neighbour meets all of them; the table has medians, with the lowest and highest IOPS beside them.
A ratio compares ours with a peer that keeps its data in the same place: above 1 in IOPS, below 1 in CPU, ours is ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import peers, sid
from .support import wait_for

SIZE_MIB = 512
LOAD_CORE, BACKEND_CORE = "0", "1"
# Both of a ratio keep their data in the same place: a file's page cache, or memory of their own.
FILE, RAM = "file", "ram"


@dataclass(frozen=True)
class Peer:
    name: str
    place: str
    command: Callable[[Path, Path], list[str]]  # of the image and the socket


def _ours(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "devices.blk", *arguments]


PEERS = (
    Peer("ours", FILE, lambda image, s: _ours("--socket-path", str(s), "--blk-file", str(image))),
    Peer("storage-daemon", FILE, lambda image, s: sid.command(peers.storage_daemon(peers.Disk(image), s))),
    Peer("rust", FILE, lambda image, s: peers.rust_peer(peers.Disk(image), s)),
    Peer("ours-ram", RAM, lambda _, s: _ours("--socket-path", str(s), "--ram", f"{SIZE_MIB}M")),
    Peer("rust-ram", RAM, lambda _, s: [str(peers.build_rust_peer()), "--socket", str(s), "--ram", str(SIZE_MIB)]),
)

WORK = {
    "randread-4k-qd32": "--rw randread --bs 4096 --qd 32",
    "randread-128k-qd8": "--rw randread --bs 131072 --qd 8",
    "randwrite-4k-qd32": "--rw randwrite --bs 4096 --qd 32",
    "randread-4k-qd1": "--rw randread --bs 4096 --qd 1",
    "randread-4k-qd32-fresh": "--rw randread --bs 4096 --qd 32 --indirect --fresh",
}
# Writes each block once: memory that nobody has touched is no memory yet, and reads of it cost less, writes more.
TOUCH = "--rw write --bs 131072 --qd 8 --verify"


@dataclass(frozen=True)
class Figures:
    iops: float
    mib: float
    cpu: float  # µs of the back-end's CPU per request
    p99: float  # µs


@contextmanager
def backend(peer: Peer, image: Path, folder: Path) -> Iterator[tuple[Path, int]]:
    """The peer on its core; its socket and process id."""
    socket = folder / f"{peer.name}.sock"
    process = peers.Process(["taskset", "-c", BACKEND_CORE, *peer.command(image, socket)], folder / f"{peer.name}.log")
    try:
        wait_for(lambda: peers.is_listening(socket) or not process.running(), f"{peer.name} listens")
        if not process.running():
            raise AssertionError(process.died())
        yield socket, process.pid
    finally:
        process.stop()
        socket.unlink(missing_ok=True)


def load(socket: Path, pid: int, options: str, seconds: float) -> dict[str, float]:
    """One run of vublk-load on its core."""
    program = ["taskset", "-c", LOAD_CORE, str(peers.build_load()), "--socket", str(socket), "--pid", str(pid)]
    argv = [*program, *options.split(), "--time", str(seconds), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode:
        raise AssertionError(f"{options}: status {done.returncode}\n{done.stdout}{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(peer: Peer, work: str, seconds: float, image: Path, folder: Path) -> Figures:
    with backend(peer, image, folder) as (socket, pid):
        if peer.place == RAM:
            load(socket, pid, TOUCH, 30)
        result = load(socket, pid, WORK[work], seconds)
    return Figures(result["iops"], result["mibs"], result["cpu_us_per_io"], result["p99_us"])


def rounds(chosen: Sequence[Peer], work: str, options: argparse.Namespace, folder: Path) -> dict[str, list[Figures]]:
    image = folder / "disk.img"
    found: dict[str, list[Figures]] = {peer.name: [] for peer in chosen}
    for _ in range(options.rounds):
        for peer in chosen:
            found[peer.name].append(measure(peer, work, options.time, image, folder))
    return found


def rows(chosen: Sequence[Peer], found: dict[str, list[Figures]]) -> Iterator[str]:
    iops = {name: median(f.iops for f in figures) for name, figures in found.items()}
    cpu = {name: median(f.cpu for f in figures) for name, figures in found.items()}
    for peer in chosen:
        figures = found[peer.name]
        ours = "ours" if peer.place == FILE else "ours-ram"
        compared = ours in found and peer.name != ours
        ratio = f"{iops[ours] / iops[peer.name]:8.2f} {cpu[ours] / cpu[peer.name]:8.2f}" if compared else ""
        spread = f"{min(f.iops for f in figures):.0f}-{max(f.iops for f in figures):.0f}"
        mib, p99 = median(f.mib for f in figures), median(f.p99 for f in figures)
        yield f"{peer.name:16}{iops[peer.name]:9.0f} {spread:>15}{mib:9.0f}{cpu[peer.name]:10.2f}{p99:8.0f} {ratio}"


HEAD = f"{'':16}{'IOPS':>9} {'lowest-highest':>15}{'MiB/s':>9}{'CPU µs/IO':>10}{'p99 µs':>8} {'IOPS x':>8} {'CPU x':>8}"


def fill(image: Path) -> None:
    """Random content: no peer may get away with a hole."""
    with open(image, "wb") as f:
        for _ in range(SIZE_MIB):
            f.write(os.urandom(1 << 20))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m interop.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round: whether it works, not how fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time", type=float, default=2.0, help="seconds of load per round and peer")
    parser.add_argument("--only", choices=list(WORK), action="append", help="this work; may be repeated")
    parser.add_argument("--peers", default=",".join(p.name for p in PEERS), help="of: %(default)s")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.time = 1, 0.3
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    chosen = [p for p in PEERS if p.name in options.peers.split(",")]
    sid.ensure()
    with tempfile.TemporaryDirectory(prefix="vu-bench-", dir="/dev/shm") as name:
        folder = Path(name)
        fill(folder / "disk.img")
        print(f"{options.rounds} rounds of {options.time} s; load on core {LOAD_CORE}, back-end on {BACKEND_CORE}")
        for work in options.only or WORK:
            print(f"\n{work}: {WORK[work]}\n{HEAD}", flush=True)
            for row in rows(chosen, rounds(chosen, work, options, folder)):
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
