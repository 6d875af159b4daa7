"""What a request costs, beside what the kernel's own read of 4 KiB costs.

    python3 -m tools.bench [--quick] [--json] [--depth N] [--rounds N]
    python3 -m tools.bench --program [--quick] [--rounds N]

For each ring format, kind of chain and use of buffers, three things are timed in this process: the ring alone (a device that does
nothing but complete each chain), and devices/blk.py reading 4 KiB from RAM and from a file in the page cache. A driver fills a ring with
`--depth` requests; what is timed is the device's side of it, from the look at the available index to the armed notification.
No thread, socket or eventfd is in it: those cost per wake-up, not per request (interop/bench.py has the whole).

    direct, indirect   a chain of three descriptors (header, data, status) in the ring, or in an indirect table
    reused, fresh      the driver uses its buffers again and again, or each request has data at another address than
                       all the ones before it, as the page cache of a guest gives

With `--program` the disk runs as a program instead, for a guest of 64 GiB (sparse): how long it takes until its ring is set up beyond what
Python itself takes, its own memory, and how fast 1 and 2 queues in 1 and 2 processes are. For the latter the front-end fills the rings beforehand;
what is timed is from the kick to the last used entry, when the front-end sleeps: all cores are the back-end's.

Machines are noisy. So all cases take turns, round by round, with `os.preadv` among them: `ratio` is the median over the rounds of
a case's time by that of preadv in the same round. The times are the lowest of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle, product
from pathlib import Path
from statistics import median

from devices.blk import Blk, FileImage, Image, RamImage
from guest_memory import GuestMemoryAtomic, GuestMemoryMmap
from vhost_user import Frontend, FrontendQueue
from vring import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
    Buffer,
    DriverQueue,
    PackedDriverQueue,
    SplitDriverQueue,
    VringMutex,
    VringT,
)

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 4096
QUEUE_SIZE = 256
RIGS_AT = 1 << 20  # guest address of the first rig's area: ring, request headers, indirect tables
RIG_BYTES = 256 << 10
REQUESTS, TABLES = 32 << 10, 64 << 10  # offsets in the area
DATA_AT = 1 << 30
DATA_PAGES = 20_011  # more than the ring remembers, and prime: a fresh buffer is fresh again when its turn comes, with another header
IMAGE_SIZE = 64 << 20
STATUS_OK = 0
RIGS = 24
BATCHES = 16  # drains of one case in one round, of which the fastest counts

Process = Callable[[VringT], object]

# ---------------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One thing that is timed."""

    ring: str
    chain: str
    buffers: str
    work: str
    once: Callable[[], float]  # one batch: seconds per request
    rounds: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        """One round."""
        self.rounds.append(min(self.once() for _ in range(BATCHES)))


class Rig:
    """A ring with its driver in this process, and a device behind it."""

    def __init__(
        self, memory: GuestMemoryMmap, number: int, kind: type[DriverQueue], indirect: bool, fresh: bool, depth: int, process: Process
    ) -> None:
        features = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_EVENT_IDX | 1 << VIRTIO_F_INDIRECT_DESC
        if kind is PackedDriverQueue:
            features |= 1 << VIRTIO_F_RING_PACKED
        area = RIGS_AT + number * RIG_BYTES
        desc, driver, device = (area + offset for offset in kind.layout(QUEUE_SIZE)[1])
        self._memory = memory
        self._requests = area + REQUESTS
        self._driver = kind(memory, QUEUE_SIZE, (desc, driver, device), features, area + TABLES if indirect else None)
        self._ring = VringMutex(GuestMemoryAtomic(memory), QUEUE_SIZE)
        self._ring.set_queue_features(features)
        self._ring.set_queue_size(QUEUE_SIZE)
        self._ring.set_queue_info(desc, driver, device)
        self._ring.set_queue_ready(True)
        self._ring.set_enabled(True)
        self._ring.start()
        self._depth = depth
        self._process = process
        self._pages = _pages(depth, fresh)
        self._sectors = cycle(random.Random(2).sample(range(0, IMAGE_SIZE // 512, 8), 4096))

    def once(self) -> float:
        """A batch of requests through the ring: seconds per request. Raises RuntimeError when one did not come back as it should."""
        add, write, depth = self._driver.add, self._memory.write, self._depth
        for slot in range(depth):
            request, page = self._requests + 32 * slot, DATA_AT + next(self._pages) * BLOCK
            write(request, (next(self._sectors) << 64).to_bytes(16, "little") + b"\xff")  # type IN, reserved, sector; status
            readable: list[Buffer] = [(request, 16)]
            add(readable, [(page, BLOCK), (request + 16, 1)], slot)
        self._driver.publish()
        start = time.perf_counter()
        self._ring.drain(self._process)
        seconds = time.perf_counter() - start
        back = self._driver.used()
        if len(back) != depth or any(length != BLOCK + 1 for _, length in back):
            raise RuntimeError(f"{len(back)} of {depth} requests came back")
        return seconds / depth

    def check_reads(self) -> None:
        """Raise RuntimeError unless the requests of the last batch succeeded."""
        for slot in range(self._depth):
            if self._memory.read(self._requests + 32 * slot + 16, 1)[0] != STATUS_OK:
                raise RuntimeError(f"the read in slot {slot} failed")


def guest_memory() -> GuestMemoryMmap:
    """Room for all rigs, who take turns with the data pages."""
    memory = GuestMemoryMmap.from_ranges([(RIGS_AT, RIGS * RIG_BYTES), (DATA_AT, DATA_PAGES * BLOCK)])
    memory.regions[1].view[::BLOCK] = bytes(DATA_PAGES)  # a guest's pages are there already
    return memory


def _pages(depth: int, fresh: bool) -> Iterator[int]:
    """The data page of each request, without end."""
    order = list(range(DATA_PAGES))
    random.Random(3).shuffle(order)
    return cycle(order if fresh else order[:depth])


def complete(ring: VringT) -> None:
    """The device that does nothing."""
    add_used = ring.add_used
    for chain in ring:
        add_used(chain, BLOCK + 1)


class Preadv:
    """What all is compared with: os.preadv of random blocks of the same file into the same buffers, one call for each."""

    def __init__(self, fd: int, depth: int) -> None:
        self._fd = fd
        self._buffers = [[memoryview(bytearray(BLOCK))] for _ in range(depth)]
        self._offsets = cycle(random.Random(4).sample(range(0, IMAGE_SIZE, BLOCK), 4096))

    def once(self) -> float:
        """A batch: seconds per call."""
        preadv, fd = os.preadv, self._fd
        calls = [(buffers, next(self._offsets)) for buffers in self._buffers]
        start = time.perf_counter()
        for buffers, offset in calls:
            preadv(fd, buffers, offset)
        return (time.perf_counter() - start) / len(calls)


def make_cases(file: FileImage, ram: Image, depth: int) -> list[Case]:
    """All of them, preadv first, each tried once."""
    cases = [Case("", "", "", "preadv", Preadv(file.fd, depth).once)]
    memory = guest_memory()
    devices: dict[str, Process] = {"ring": complete, "RAM": Blk(ram).process_queue, "file": Blk(file).process_queue}
    formats: dict[str, type[DriverQueue]] = {"split": SplitDriverQueue, "packed": PackedDriverQueue}
    kinds = product(formats, ("direct", "indirect"), ("reused", "fresh"), devices)
    for number, (ring, chain, buffers, work) in enumerate(kinds):
        rig = Rig(memory, number, formats[ring], chain == "indirect", buffers == "fresh", depth, devices[work])
        rig.once()
        if work != "ring":
            rig.check_reads()
        cases.append(Case(ring, chain, buffers, work, rig.once))
    return cases


# ---------------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a case came to: times in nanoseconds per request, and its ratio to preadv."""

    ring: str
    chain: str
    buffers: str
    work: str
    lowest_ns: float
    median_ns: float
    ratio: float

    @property
    def row(self) -> tuple[str, str, str]:
        """Which row of the table it is in."""
        return self.ring, self.chain, self.buffers


def measure(cases: Sequence[Case], rounds: int) -> list[Result]:
    """Take all cases through all rounds, in turn."""
    for _ in range(rounds):
        for case in cases:
            case.take_turn()
    base = cases[0].rounds
    return [
        Result(
            *(case.ring, case.chain, case.buffers, case.work),
            lowest_ns=min(case.rounds) * 1e9,
            median_ns=median(case.rounds) * 1e9,
            ratio=median(mine / read for mine, read in zip(case.rounds, base)),
        )
        for case in cases
    ]


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the table."""
    works = ("ring", "RAM", "file")
    base, rest = results[0], results[1:]
    yield f"os.preadv of 4 KiB: {base.lowest_ns:,.0f} ns (median {base.median_ns:,.0f})"
    yield ""
    yield f"{'':26}" + "".join(f"{title:^20}" for title in ("ring alone", "4 KiB from RAM", "4 KiB from a file")).rstrip()
    yield f"{'ring':8}{'chain':10}{'buffers':8}" + f"{'ns':>10}{'ratio':>8}  " * len(works)
    for row in dict.fromkeys(result.row for result in rest):
        found = {result.work: result for result in rest if result.row == row}
        cells = "".join(f"{found[work].lowest_ns:>10,.0f}{found[work].ratio:>8.2f}  " for work in works)
        yield f"{row[0]:8}{row[1]:10}{row[2]:8}{cells}".rstrip()


def as_json(results: Sequence[Result], arguments: argparse.Namespace) -> str:
    """The same for programs."""
    return json.dumps(
        {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "depth": arguments.depth,
            "rounds": arguments.rounds,
            "results": [vars(result) for result in results],
        },
        indent=2,
    )


# ---------------------------------------------------------------------------------------------------------------------------
# The disk as a program
# ---------------------------------------------------------------------------------------------------------------------------

GUEST = 64 << 30
ENTRIES = 1024
SPREADS = ((1, 1), (2, 1), (2, 2))  # queues, processes


class Program:
    """devices/blk.py as a program, with a front-end; what it took to start, in seconds."""

    def __init__(self, folder: Path, queues: int = 1, processes: int = 1, memory: int = GUEST) -> None:
        path, notify = folder / "disk.sock", folder / "notify.sock"
        argv = [sys.executable, "-m", "devices.blk", "--socket-path", str(path), "--blk-file", str(folder / "disk.img")]
        argv += [f"--num-queues={queues}", f"--processes={processes}"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(notify))
            start = time.perf_counter()
            self._child = subprocess.Popen(argv, cwd=ROOT, env=dict(os.environ, NOTIFY_SOCKET=str(notify)), stdin=subprocess.DEVNULL)
            ready.settimeout(30)
            ready.recv(16)
        notify.unlink()
        self.frontend = Frontend.connect(path)
        self.queues = self.frontend.setup(queues, ENTRIES, memory=memory)
        self.seconds = time.perf_counter() - start
        self._taken = 0  # used index of each ring

    def read_all(self, size: int, count: int) -> float:
        """`count` random reads of `size` bytes in each queue: requests per second."""
        for queue in self.queues:
            self._fill(queue, size, count)
            queue.driver.publish()
        start = time.perf_counter()
        for queue in self.queues:
            queue.kick()
        self._taken = self._taken + count & 0xFFFF
        for queue in self.queues:
            while self.frontend.memory.read(queue.driver.areas[2] + 2, 2) != self._taken.to_bytes(2, "little"):
                time.sleep(0.0002)
        seconds = time.perf_counter() - start
        if any(len(queue.driver.used()) != count for queue in self.queues):
            raise RuntimeError("requests did not come back")
        return len(self.queues) * count / seconds

    def _fill(self, queue: FrontendQueue, size: int, count: int) -> None:
        at = self.frontend.arena[0] + queue.index * (count * (size + 32) + 4096)
        for request in range(count):
            header = at + 32 * request
            data = at + 32 * count + size * request
            self.frontend.memory.write(header, (random.randrange(0, IMAGE_SIZE - size, size) // 512 << 64).to_bytes(16, "little"))
            queue.driver.add([(header, 16)], [(data, size), (header + 16, 1)], None)

    def resident(self) -> dict[str, int]:
        """Its own resident memory in KiB by kind, without guest memory that it shares."""
        with open(f"/proc/{self._child.pid}/status", encoding="ascii") as status:
            return {line.split(":")[0]: int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssFile"))}

    def close(self) -> None:
        """End it."""
        self.frontend.close()
        self._child.terminate()
        self._child.wait()


def _python_alone() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", ""], cwd=ROOT, stdin=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def programs(folder: Path, rounds: int) -> Iterator[str]:
    """The lines of the report."""
    _image(folder).close()
    beyond, alone = [], []
    resident: dict[str, int] = {}
    for _ in range(max(3, rounds // 4)):
        alone.append(_python_alone())
        program = Program(folder)
        beyond.append(program.seconds - alone[-1])
        program.read_all(BLOCK, 64)
        resident = program.resident()
        program.close()
    yield f"guest of {GUEST >> 30} GiB: Python alone {median(alone) * 1e3:.0f} ms, until the ring is set up {median(beyond) * 1e3:.0f} ms more"
    yield "resident: " + ", ".join(f"{name} {kib / 1024:.1f} MiB" for name, kib in resident.items())
    for size, count in (4096, 1000), (131072, 1000):
        rates: dict[tuple[int, int], list[float]] = {spread: [] for spread in SPREADS}
        for _ in range(max(3, rounds // 8)):
            for spread in SPREADS:
                program = Program(folder, *spread, memory=1 << 30)
                program.read_all(size, count)
                rates[spread].append(median(program.read_all(size, count) for _ in range(8)))
                program.close()
        for (queues, processes), found in rates.items():
            ratio = median(mine / one for mine, one in zip(found, rates[SPREADS[0]], strict=True))
            yield f"reads of {size:6}, {queues} queues in {processes} processes: {median(found):9,.0f}/s, {ratio:.2f} of the first"


# ---------------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------------


def _image(folder: Path) -> FileImage:
    path = folder / "disk.img"
    path.write_bytes(os.urandom(1 << 20) * (IMAGE_SIZE >> 20))  # no holes: they cost less to read
    return FileImage(str(path), aio="sync")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: whether it works, not how fast")
    parser.add_argument("--program", action="store_true", help="the disk as a program: start-up, memory, processes")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--depth", type=int, default=32, help=f"requests in the ring at a time, up to {QUEUE_SIZE // 3} (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.depth <= QUEUE_SIZE // 3:
        parser.error(f"--depth must be 1 to {QUEUE_SIZE // 3}: a direct chain takes three entries of {QUEUE_SIZE}")
    if arguments.quick:
        arguments.rounds = 3
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    arguments = parse(argv)
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # the page cache alone, whatever the disks do
    with tempfile.TemporaryDirectory(prefix="vhost-user-bench-", dir=shm) as folder, ExitStack() as stack:
        if arguments.program:
            print("\n".join(programs(Path(folder), arguments.rounds)))
            return 0
        file, ram = _image(Path(folder)), RamImage(IMAGE_SIZE)
        stack.callback(file.close)
        ram.write([memoryview(os.urandom(1 << 20))] * (IMAGE_SIZE >> 20), 0)
        results = measure(make_cases(file, ram, arguments.depth), arguments.rounds)
    if arguments.json:
        print(as_json(results, arguments))
    else:
        python = f"{platform.python_implementation()} {platform.python_version()}"
        print(f"{python} on {platform.machine()}, {arguments.depth} requests at a time, {arguments.rounds} rounds")
        print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
