"""Our disk beside qemu-storage-daemon and the Rust crate's, in one run, under the same load.

    python3 -m interop.bench [--quick] [--rounds N] [--time S] [--only WORK] [--peers NAME,NAME] [--json FILE] [--svg FILE]
    python3 -m interop.bench --from FILE [--svg FILE]        table and plot of figures that --json has saved

Two load generators: vublk-load.c, and `qemu-img bench` over virtio-blk-vhost-user. The load has one core, the back-end another; only in the work
named `queues` the back-end has both, to show what two cores allow. The works named `aio` are ours alone, in all its ways to transfer, and run when
they are asked for. Every round goes once through all peers for one kind of work, so that a noisy neighbour meets all of them; the table has
medians, with the lowest and highest IOPS beside them.

A ratio is ours to the peer's that keeps its data in the same place: above 1 in IOPS, below 1 in CPU and latency, ours is ahead.

In reading order: the peers, the works, one measurement, all rounds, the table, the plot, the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from . import peers, sid
from .support import wait_for

SIZE_MIB = 512
LOAD_CORE, BACKEND_CORE, BOTH_CORES = "0", "1", "0,1"

# ---------------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------------

# Both of a ratio keep their data in the same place: a file in memory, a file on a disk, or memory of their own.
FILE, DISK, RAM = "file", "disk", "ram"

Command = Callable[["Work", Path, Path], list[str]]  # the command line, from the work, the image and the socket


@dataclass(frozen=True)
class Peer:
    """A back-end with all its options: one row of a table."""

    name: str
    family: str  # what --peers chooses it by
    place: str
    command: Command
    queues: int = 1
    reference: bool = False  # the one of ours that its place's other rows are compared with


def _ours(*arguments: str) -> Command:
    def command(work: Work, image: Path, socket: Path) -> list[str]:
        where = () if "--ram" in arguments else ("--blk-file", str(image))
        return [sys.executable, "-m", "devices.blk", "--socket-path", str(socket), *where, *arguments, *work.ours.split()]

    return command


def _storage_daemon(queues: int = 1) -> Command:
    def command(work: Work, image: Path, socket: Path) -> list[str]:
        return sid.command(peers.storage_daemon(peers.Disk(image, num_queues=queues), socket, poll_max_ns=work.daemon_poll_ns))

    return command


def _rust(queues: int = 1) -> Command:
    return lambda work, image, socket: peers.rust_peer(peers.Disk(image, num_queues=queues), socket)


def _rust_ram(work: Work, image: Path, socket: Path) -> list[str]:
    return [str(peers.build_rust_peer()), "--socket", str(socket), "--ram", str(SIZE_MIB)]


PEERS = (
    Peer("ours", "ours", FILE, _ours(), reference=True),
    Peer("storage-daemon", "storage-daemon", FILE, _storage_daemon()),
    Peer("rust", "rust", FILE, _rust()),
    Peer("ours-ram", "ours-ram", RAM, _ours("--ram", f"{SIZE_MIB}M"), reference=True),
    Peer("rust-ram", "rust-ram", RAM, _rust_ram),
)
FAMILIES = tuple(peer.family for peer in PEERS)
QUEUES_PEERS = (
    Peer("ours-1-queue", "ours", FILE, _ours()),
    Peer("ours-2-queues", "ours", FILE, _ours("--num-queues", "2"), queues=2),
    Peer("ours-2-queues-2-processes", "ours", FILE, _ours("--num-queues", "2", "--processes", "2"), queues=2, reference=True),
    Peer("storage-daemon-2-queues", "storage-daemon", FILE, _storage_daemon(2), queues=2),
    Peer("rust-2-queues", "rust", FILE, _rust(2), queues=2),
)
AIO_PEERS = (
    Peer("memory-sync", "ours", FILE, _ours("--aio", "sync")),
    Peer("memory-io_uring", "ours", FILE, _ours("--aio", "io_uring")),
    Peer("memory-mmap", "ours", FILE, _ours("--aio", "mmap"), reference=True),
    Peer("disk-sync", "ours", DISK, _ours("--aio", "sync")),
    Peer("disk-io_uring", "ours", DISK, _ours("--aio", "io_uring"), reference=True),
    Peer("disk-mmap", "ours", DISK, _ours("--aio", "mmap")),
    Peer("disk-direct-sync", "ours", DISK, _ours("--aio", "sync", "--direct")),
    Peer("disk-direct-io_uring", "ours", DISK, _ours("--aio", "io_uring", "--direct")),
)

# ---------------------------------------------------------------------------------------------------------------------------
# Works
# ---------------------------------------------------------------------------------------------------------------------------

VUBLK_LOAD, QEMU_IMG = "vublk-load", "qemu-img bench"


@dataclass(frozen=True)
class Work:
    """One kind of load, and what the back-ends are told for it: one table."""

    name: str
    options: str  # the load generator's
    generator: str = VUBLK_LOAD
    ours: str = ""  # our program's further arguments
    daemon_poll_ns: int = 32768  # how long the storage daemon polls before it sleeps; QEMU's default
    cores: str = BACKEND_CORE
    peers: tuple[Peer, ...] = PEERS
    on_request: bool = False  # not without --only

    def told(self) -> str:
        """The load's command line, and what is other than usual with the back-ends."""
        ours = f"; ours {self.ours}" if self.ours else ""
        return f"{self.generator} {self.options}{ours}" + (f"; back-end on cores {self.cores}" if self.cores != BACKEND_CORE else "")


WORKS = (
    Work("randread-4k-qd32", "--rw randread --bs 4096 --qd 32"),
    Work("randwrite-4k-qd32", "--rw randwrite --bs 4096 --qd 32"),
    Work("randread-128k-qd8", "--rw randread --bs 131072 --qd 8"),
    # One at a time: the back-ends poll, nobody does, or the load does too. The Rust crate cannot poll.
    Work("randread-4k-qd1", "--rw randread --bs 4096 --qd 1", ours="--poll-us 100", daemon_poll_ns=100_000),
    Work("randread-4k-qd1-asleep", "--rw randread --bs 4096 --qd 1", daemon_poll_ns=0),
    Work("randread-4k-qd1-all-poll", "--rw randread --bs 4096 --qd 1 --poll", ours="--poll-us 100", daemon_poll_ns=100_000),
    Work("randread-4k-qd32-fresh", "--rw randread --bs 4096 --qd 32 --indirect --fresh"),
    # One block after the other: qemu-img bench has no random ones.
    Work("qemu-img-4k-qd32", "-d 32 -s 4096", QEMU_IMG),
    Work("queues", "--rw randread --bs 4096 --qd 32", cores=BOTH_CORES, peers=QUEUES_PEERS),
    # Ours alone, by --aio. The ratios are the default's.
    Work("aio-randread-4k-qd32", "--rw randread --bs 4096 --qd 32", peers=AIO_PEERS, on_request=True),
    Work("aio-randwrite-4k-qd32", "--rw randwrite --bs 4096 --qd 32", peers=AIO_PEERS, on_request=True),
    Work("aio-read-4k-qd32", "--rw read --bs 4096 --qd 32", peers=AIO_PEERS, on_request=True),
    Work("aio-randread-128k-qd8", "--rw randread --bs 131072 --qd 8", peers=AIO_PEERS, on_request=True),
)
WORK = {work.name: work for work in WORKS}
# Writes each block once: memory that nobody has touched is no memory yet, and reads of it cost less, writes more.
TOUCH = Work("touch", "--rw write --bs 131072 --qd 8 --verify")
TOUCH_SECONDS = 30.0  # at most; it ends when all is written
# Reads each block: what a back-end does for the first time, such as looking at a page of a mapping, is not what it costs later.
WARM = Work("warm", "--rw read --bs 131072 --qd 8")
WARM_SECONDS = 0.4
QEMU_IMG_PER_SECOND = 300_000  # requests; qemu-img is told how many, not for how long

# ---------------------------------------------------------------------------------------------------------------------------
# One measurement
# ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Of one peer in one round; latencies in µs, where the load generator tells."""

    iops: float
    mb: float  # 10⁶ bytes per second
    cpu: float  # µs of the back-end's CPU per request
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


class Bench:
    """What all measurements share: a folder, and images in memory and on a disk."""

    def __init__(self, folder: Path, on_disk: Path, seconds: float) -> None:
        self.folder = folder
        self.images = {FILE: folder / "disk.img", DISK: on_disk / "disk.img"}
        self.seconds = seconds
        for image in self.images.values():
            with open(image, "wb") as f:
                for _ in range(SIZE_MIB):
                    f.write(os.urandom(1 << 20))  # no peer may get away with a hole

    def measure(self, peer: Peer, work: Work) -> Figures:
        if peer.place == DISK:
            subprocess.run(["cat", str(self.images[DISK])], stdout=subprocess.DEVNULL, check=True)  # into the page cache, from which O_DIRECT took it
        with self._backend(peer, work) as (backend, socket):
            if peer.place == RAM:
                self._vublk_load(backend, socket, TOUCH, peer, TOUCH_SECONDS)
            else:
                self._vublk_load(backend, socket, WARM, peer, WARM_SECONDS)
            return GENERATORS[work.generator](self, backend, socket, work, peer, self.seconds)

    @contextmanager
    def _backend(self, peer: Peer, work: Work) -> Iterator[tuple[peers.Process, Path]]:
        """The peer on its cores, and its socket."""
        socket = self.folder / f"{peer.name}.sock"
        backend = peers.Process(
            ["taskset", "-c", work.cores, *peer.command(work, self.images.get(peer.place, self.folder), socket)], self.folder / f"{peer.name}.log"
        )
        try:
            wait_for(lambda: peers.is_listening(socket) or not backend.running(), f"{peer.name} listens")
            if not backend.running():
                raise AssertionError(f"{work.name}: {backend.died()}")
            yield backend, socket
        finally:
            backend.stop()
            socket.unlink(missing_ok=True)

    def _vublk_load(self, backend: peers.Process, socket: Path, work: Work, peer: Peer, seconds: float) -> Figures:
        argv = [str(peers.build_load()), "--socket", str(socket), "--pid", str(backend.pid), "--queues", str(peer.queues)]
        text = self._load([*argv, *work.options.split(), "--time", str(seconds), "--json"], backend, work, peer, seconds)
        found: dict[str, float] = json.loads(text)
        mb = found["iops"] * found["bs"] / 1e6
        return Figures(found["iops"], mb, found["cpu_us_per_io"], found["p50_us"], found["p90_us"], found["p99_us"])

    def _qemu_img(self, backend: peers.Process, socket: Path, work: Work, peer: Peer, seconds: float) -> Figures:
        count = max(1000, int(seconds * QEMU_IMG_PER_SECOND))
        disk = f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"
        argv = sid.command(["qemu-img", "bench", "-t", "none", "--image-opts", disk, "-c", str(count), *work.options.split()])
        before = cpu_seconds(backend.pid)
        text = self._load(argv, backend, work, peer, seconds)
        cpu = cpu_seconds(backend.pid) - before
        if (took := re.search(r"Run completed in ([\d.]+) seconds", text)) is None or float(took[1]) == 0:
            raise AssertionError(f"{work.name}, {peer.name}: qemu-img bench says\n{text}")
        iops = count / float(took[1])
        block = int(work.options.split()[work.options.split().index("-s") + 1])
        return Figures(iops, iops * block / 1e6, cpu / count * 1e6)

    def _load(self, argv: Sequence[str], backend: peers.Process, work: Work, peer: Peer, seconds: float) -> str:
        """Runs a load generator on its core, and returns its output."""
        log = self.folder / "load.log"
        log.unlink(missing_ok=True)
        load = peers.Process(["taskset", "-c", LOAD_CORE, *argv], log)
        try:
            wait_for_one_to_end((load, backend), seconds + 60)
            if load.running():
                raise AssertionError(f"{work.name}: " + (f"the load on {peer.name} does not end" if backend.running() else backend.died()))
            if load.wait():
                raise AssertionError(f"{work.name}, {peer.name}: {load.died()}")
        finally:
            load.kill()
        return log.read_text(encoding="utf-8")


GENERATORS = {VUBLK_LOAD: Bench._vublk_load, QEMU_IMG: Bench._qemu_img}


def wait_for_one_to_end(processes: Iterable[peers.Process], timeout: float) -> None:
    """Without looking every now and then, which would take time from what is measured."""
    poll = select.poll()
    with ExitStack() as stack:
        for process in processes:
            fd = os.pidfd_open(process.pid)
            stack.callback(os.close, fd)
            poll.register(fd, select.POLLIN)
        poll.poll(timeout * 1000)


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process and its descendants: also of threads that have ended, as those of a connection have when its front-end is gone."""
    try:
        total = time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3)
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text(encoding="ascii").split()]
    except OSError:  # it has ended
        return 0.0
    return total + sum(map(cpu_seconds, children))


# ---------------------------------------------------------------------------------------------------------------------------
# All rounds
# ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """What --json saves. `works`: by the names of work and peer, the figures of each round."""

    machine: dict[str, str]
    rounds: int
    seconds: float
    works: dict[str, dict[str, list[Figures]]]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises ValueError when the file has something else in it."""
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            works = {
                work: {peer: [Figures(**figures) for figures in rounds] for peer, rounds in rows.items()} for work, rows in saved["works"].items()
            }
            results = cls(saved["machine"], saved["rounds"], saved["seconds"], works)
            for work, rows in works.items():
                known = {peer.name for peer in WORK[work].peers}
                if unknown := rows.keys() - known:
                    raise ValueError(f"{', '.join(sorted(unknown))} in {work}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} was not saved by this program's --json: {error!r}") from None
        return results


def machine() -> dict[str, str]:
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "storage-daemon": output(sid.command(["qemu-storage-daemon", "--version"])).partition("\n")[0],
        "qemu-img": output(sid.command(["qemu-img", "--version"])).partition("\n")[0],
        "rust": "vhost-user-backend " + output(sid.command(["dpkg-query", "-W", "-f", "${Version}", "librust-vhost-user-backend-dev"])),
    }


def cpu_model() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{names[0] if names else 'unknown'} ({platform.machine()})"


def output(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"unknown: {done.stderr.strip()}"


def run(options: argparse.Namespace) -> Results:
    """Measures, prints each work's table when it is done, and saves what there is by then."""
    sid.ensure()
    results = Results(machine(), options.rounds, options.time, {})
    print(heading(results), flush=True)
    with ExitStack() as stack:
        folder, on_disk = (Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vu-bench-", dir=where))) for where in ("/dev/shm", sid.CACHE))
        bench = Bench(folder, on_disk, options.time)
        for work in (WORK[name] for name in options.only or [work.name for work in WORKS if not work.on_request]):
            chosen = [peer for peer in work.peers if peer.family in options.peers]
            if not chosen:
                continue
            rows: dict[str, list[Figures]] = {peer.name: [] for peer in chosen}
            for _ in range(options.rounds):
                for peer in chosen:
                    rows[peer.name].append(bench.measure(peer, work))
            results.works[work.name] = rows
            print(table(work, rows), flush=True)
            if options.json:
                results.save(options.json)
    return results


# ---------------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------------

COLUMNS = f"{'':26}{'IOPS':>9} {'lowest-highest':>15}{'MB/s':>9}{'CPU µs/IO':>10}{'p50 µs':>8}{'p99 µs':>8} {'IOPS x':>8}{'CPU x':>8}{'p50 x':>8}"


def heading(results: Results) -> str:
    about = results.machine
    return (
        f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, {about['python']}\n"
        f"storage-daemon: {about['storage-daemon']}; rust: {about['rust']}; qemu-img: {about['qemu-img']}\n"
        f"Medians of {results.rounds} rounds of {results.seconds:g} s; load on core {LOAD_CORE}, back-end on {BACKEND_CORE} unless said otherwise.\n"
        "x: ours to the peer's on data in the same place. Above 1 in IOPS, below 1 in CPU and latency: ours is ahead."
    )


def middle(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure."""

    def of(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    iops, mb, cpu = (median(values) for values in zip(*((f.iops, f.mb, f.cpu) for f in rounds)))
    return Figures(iops, mb, cpu, of(f.p50 for f in rounds), of(f.p90 for f in rounds), of(f.p99 for f in rounds))


def table(work: Work, rows: Mapping[str, Sequence[Figures]]) -> str:
    lines = [f"\n{work.name}: {work.told()}", COLUMNS]
    middles = {name: middle(rounds) for name, rounds in rows.items()}
    shown = [peer for peer in work.peers if peer.name in rows]
    references = {peer.place: peer for peer in shown if peer.reference}
    for peer in shown:
        f = middles[peer.name]
        spread = f"{min(r.iops for r in rows[peer.name]):.0f}-{max(r.iops for r in rows[peer.name]):.0f}"
        line = f"{peer.name:26}{f.iops:9.0f} {spread:>15}{f.mb:9.0f}{f.cpu:10.2f}{number(f.p50, 8, 0)}{number(f.p99, 8, 0)}"
        ours = references.get(peer.place)
        if ours not in (None, peer):
            o = middles[ours.name]
            line += " " + "".join(number(ratio(a, b), 8, 2) for a, b in ((o.iops, f.iops), (o.cpu, f.cpu), (o.p50, f.p50)))
        lines.append(line)
    return "\n".join(lines)


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


# ---------------------------------------------------------------------------------------------------------------------------
# The plot
# ---------------------------------------------------------------------------------------------------------------------------

WIDTH, MARGIN = 900, 20
BAR, ROW, TITLE, PLACE_GAP = 11, 17, 36, 5  # heights; TITLE is a work's, with the line above it
IOPS_AT, IOPS_WIDTH, IOPS_TEXT = 200, 270, 545  # where bars begin, the longest one, where the figures beside them end
CPU_AT, CPU_WIDTH, CPU_TEXT = 585, 230, 880
COLOURS = {"ours": "#0072b2", "storage-daemon": "#e69f00", "rust": "#009e73", "ours-ram": "#56b4e9", "rust-ram": "#7fd1b9"}
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 } .work { font-weight: 600 } .soft { fill: #59636e } .end { text-anchor: end }
.panel { fill: #ffffff; stroke: #d1d9e0 } .rule { stroke: #d1d9e0 } .spread { stroke: #1f2328 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .soft { fill: #9198a1 } .panel { fill: #0d1117; stroke: #3d444d } .rule { stroke: #3d444d } .spread { stroke: #f0f6fc }
}
"""


class Drawing:
    """An SVG of fixed width that grows downwards."""

    def __init__(self, label: str) -> None:
        self.root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": label})
        ET.SubElement(self.root, "style").text = STYLE
        self._panel = ET.SubElement(self.root, "rect", {"class": "panel", "x": "0.5", "y": "0.5", "rx": "8"})

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        ET.SubElement(self.root, "text", {"x": f"{x:g}", "y": f"{y:g}", **({"class": kind} if kind else {})}).text = text

    def bar(self, x: float, y: float, length: float, colour: str) -> None:
        size = {"width": f"{max(length, 1):.1f}", "height": str(BAR)}
        ET.SubElement(self.root, "rect", {"x": f"{x:g}", "y": f"{y:g}", **size, "rx": "2", "fill": colour})

    def line(self, x: float, y: float, x2: float, kind: str) -> None:
        ET.SubElement(self.root, "line", {"class": kind, "x1": f"{x:.1f}", "x2": f"{x2:.1f}", "y1": f"{y:g}", "y2": f"{y:g}"})

    def finish(self, height: float) -> str:
        self.root.attrib.update(width=str(WIDTH), height=f"{height:g}", viewBox=f"0 0 {WIDTH} {height:g}")
        self._panel.attrib.update(width=str(WIDTH - 1), height=f"{height - 1:g}")
        ET.indent(self.root, " ")
        return ET.tostring(self.root, encoding="unicode") + "\n"


def plot(results: Results) -> str:
    """Each work has a scale of its own: what bars tell is how the peers compare."""
    drawing = Drawing("IOPS and CPU per request of three vhost-user disks")
    drawing.text(MARGIN, 32, "Disks over vhost-user, each under the same load", "title")
    about = results.machine
    for line, told in enumerate(
        (
            f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, {about['python']}",
            f"{about['storage-daemon'].partition(' (')[0]}; rust: {about['rust']}; {about['qemu-img'].partition(' (')[0]}",
            f"Medians of {results.rounds} rounds of {results.seconds:g} s; lines are lowest to highest. Each work has a scale of its own.",
        )
    ):
        drawing.text(MARGIN, 52 + 16 * line, told, "soft")
    y = draw_legend(drawing, 108)
    drawing.text(IOPS_AT, y + 26, "Requests per second (longer is better)", "soft")
    drawing.text(CPU_AT, y + 26, "CPU µs per request (shorter is better)", "soft")
    y += 24
    for name, rows in results.works.items():
        y = draw_work(drawing, y, WORK[name], rows)
    return drawing.finish(y + MARGIN / 2)


def draw_legend(drawing: Drawing, y: float) -> float:
    for n, (family, colour) in enumerate(COLOURS.items()):
        x = MARGIN + n * 170
        drawing.bar(x, y - BAR + 1, BAR, colour)
        drawing.text(x + BAR + 6, y, family.replace("-ram", ", data in its RAM"))
    return y


def draw_work(drawing: Drawing, y: float, work: Work, rows: Mapping[str, Sequence[Figures]]) -> float:
    """Draws below `y`, and returns where the next one begins."""
    drawing.line(MARGIN, y + 12, WIDTH - MARGIN, "rule")
    drawing.text(MARGIN, y + 28, work.name, "work")
    drawing.text(IOPS_AT, y + 28, work.told(), "soft")
    y += TITLE
    shown = [peer for peer in work.peers if peer.name in rows]
    most = max(f.iops for rounds in rows.values() for f in rounds) or 1
    dearest = max(middle(rounds).cpu for rounds in rows.values()) or 1
    for before, peer in zip([shown[0], *shown], shown):
        y += PLACE_GAP if peer.place != before.place else 0
        f = middle(rows[peer.name])
        low, high = (choose(r.iops for r in rows[peer.name]) / most * IOPS_WIDTH for choose in (min, max))
        drawing.text(MARGIN, y + BAR - 1, peer.name)
        drawing.bar(IOPS_AT, y, f.iops / most * IOPS_WIDTH, COLOURS[peer.family])
        drawing.line(IOPS_AT + low, y + BAR / 2, IOPS_AT + high, "spread")
        drawing.text(IOPS_TEXT, y + BAR - 1, f"{f.iops:,.0f}", "end")
        drawing.bar(CPU_AT, y, f.cpu / dearest * CPU_WIDTH, COLOURS[peer.family])
        drawing.text(CPU_TEXT, y + BAR - 1, f"{f.cpu:.2f}", "end")
        y += ROW
    return y


# ---------------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m interop.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round: whether it works, not how fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time", type=float, default=3.0, help="seconds of load per round and peer")
    parser.add_argument("--only", choices=list(WORK), action="append", help="this work; may be repeated")
    parser.add_argument("--peers", default=",".join(FAMILIES), help="of: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures of all rounds, and what the machine is")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a plot")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="saved", help="measure nothing: table and plot of what --json has saved")
    options = parser.parse_args(argv)
    options.peers = options.peers.split(",")
    if unknown := set(options.peers).difference(FAMILIES):
        parser.error(f"--peers: there is no {', '.join(sorted(unknown))}, only {', '.join(FAMILIES)}")
    if options.rounds < 1 or options.time <= 0:
        parser.error("--rounds and --time must be above 0")
    if options.quick:
        options.rounds, options.time = 1, 0.3
    return options


def show(results: Results) -> Results:
    print(heading(results))
    for name, rows in results.works.items():
        print(table(WORK[name], rows))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        results = show(Results.load(options.saved)) if options.saved else run(options)
        if options.svg:
            options.svg.write_text(plot(results), encoding="utf-8")
    except (AssertionError, OSError, ValueError, sid.SidError, unittest.SkipTest) as error:
        print(f"{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # `timeout` ends a run with SIGTERM: as an interrupt it unwinds, and peers and folder go with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
