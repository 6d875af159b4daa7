"""A disk over a real socket, driven and verified: shows in a few seconds that all of this works here, with Python alone.

    python3 -m tools.demo

A child process serves an image file (devices/blk.py). This process is its front-end: what a VMM and its guest's driver do together. For
the split and then the packed ring it negotiates, writes the whole disk, reads it back in another order and other sizes, compares every
byte, and takes figures. Exit status 0 means that every byte was right.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vhost_user import Frontend, FrontendQueue, VhostUserError
from vring import VringError

ROOT = Path(__file__).resolve().parent.parent
SECTOR = 512
T_IN, T_OUT, T_FLUSH = 0, 1, 4  # virtio 1.3 §5.2.6
STATUS_NEVER = 0xFF  # what the status byte holds until the device writes it
MIB = 1 << 20
TIMEOUT = 20.0

FEATURE_NAMES = {  # of the block device (virtio 1.3 §5.2.3) and of all devices (§6); bit 30 is vhost-user's
    1: "SIZE_MAX",
    2: "SEG_MAX",
    4: "GEOMETRY",
    5: "RO",
    6: "BLK_SIZE",
    9: "FLUSH",
    10: "TOPOLOGY",
    11: "CONFIG_WCE",
    12: "MQ",
    13: "DISCARD",
    14: "WRITE_ZEROES",
    28: "INDIRECT_DESC",
    29: "EVENT_IDX",
    30: "PROTOCOL_FEATURES",
    32: "VERSION_1",
    34: "RING_PACKED",
    35: "IN_ORDER",
    40: "RING_RESET",
}
BLK_FEATURES = sum(1 << bit for bit in (1, 2, 5, 6, 9, 10, 11, 13, 14))


class DemoError(Exception):
    """What was to be shown isn't so."""


# ---------------------------------------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------------------------------------


class Screen:
    """Lines for whoever watches; on a terminal with a bar that moves and a little colour, in a pipe plain."""

    BAR = 28

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._colour = self._terminal and "NO_COLOR" not in os.environ
        self._width = shutil.get_terminal_size().columns
        self._drawn = 0.0
        self._bar = False

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def title(self, text: str) -> None:
        """A heading."""
        self.line()
        self.line(self._paint("1", text))

    def line(self, text: str = "") -> None:
        """A line that stays."""
        self._clear()
        print(text, flush=True)

    def fact(self, name: str, value: str) -> None:
        """A name and what it is, wrapped under itself."""
        room = max(40, (self._width if self._terminal else 110) - 20)
        lines: list[str] = [""]
        for word in value.split(" "):
            if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
                lines.append("")
            lines[-1] += (" " if lines[-1] else "") + word
        for number, text in enumerate(lines):
            self.line(f"  {name if not number else '':<16}{text}")

    def done(self, name: str, value: str) -> None:
        """Something that went well."""
        self.line(f"  {self._paint('32', 'ok')}  {name:<32}{value}")

    def failed(self, text: str) -> None:
        """What went wrong."""
        self.line(f"  {self._paint('31', 'FAILED')}  {text}")

    def progress(self, name: str, part: float) -> None:
        """A bar that the next line replaces; nothing in a pipe."""
        now = time.monotonic()
        if not self._terminal or now - self._drawn < 0.05:
            return
        self._drawn = now
        self._bar = True
        full = int(min(part, 1.0) * self.BAR)
        print(f"\r\x1b[K  ..  {name:<32}{'█' * full}{'░' * (self.BAR - full)}", end="", flush=True)

    def _clear(self) -> None:
        if self._bar:
            print("\r\x1b[K", end="")
            self._bar = False


# ---------------------------------------------------------------------------------------------------------------------------
# The disk's process
# ---------------------------------------------------------------------------------------------------------------------------


class Server:
    """devices/blk.py in a child process."""

    def __init__(self, image: Path, socket: Path) -> None:
        self.socket = socket
        words = [sys.executable, "-m", "devices.blk", "--socket-path", str(socket), "--blk-file", str(image)]
        # A session of its own: Ctrl-C is for us, and we end it.
        self._child = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
        self.pid = self._child.pid

    def connect(self) -> Frontend:
        """A front-end connected to it. Raises DemoError when the process has ended."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                return Frontend.connect(self.socket, timeout=0.2)
            except OSError as error:
                if self._child.poll() is not None:
                    raise DemoError(f"the disk's process ended with status {self._child.returncode}") from None
                if time.monotonic() > deadline:
                    raise DemoError(f"the disk's process doesn't listen: {error}") from None

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> int:
        """End it as a service manager does; its exit status."""
        self._child.terminate()
        try:
            return self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()


# ---------------------------------------------------------------------------------------------------------------------------
# The driver
# ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """Room in guest memory for one request: header, status and data, with what is under way there."""

    header: memoryview
    status: memoryview
    data: memoryview
    header_at: int
    status_at: int
    data_at: int
    kind: int = 0
    offset: int = 0
    length: int = 0


class Driver:
    """A block device's driver in few lines: `depth` requests in flight, each of up to `largest` bytes."""

    HEADER = struct.Struct("<IIQ")  # type, reserved, sector

    def __init__(self, frontend: Frontend, queue: FrontendQueue, depth: int, largest: int) -> None:
        self._queue = queue
        start, room = frontend.arena
        start = -(-start // 4096) * 4096
        if depth * (largest + 4096) > room - 4096:
            raise DemoError(f"no room for {depth} requests of {largest} bytes")
        view = frontend.memory.view
        self._slots: list[Slot] = []
        for number in range(depth):
            at = start + number * (largest + 4096)
            self._slots.append(Slot(view(at, 16), view(at + 16, 1), view(at + 4096, largest), at, at + 16, at + 4096))

    def run(self, requests: Iterator[tuple[int, int, int]], fill: Callable[[Slot], object], done: Callable[[Slot], object]) -> int:
        """Keep the queue full until `requests` (type, offset, length) end. `fill` sees each before it goes, `done` afterwards. Returns
        how many there were. Raises DemoError when one fails."""
        idle, count = list(self._slots), 0
        add, driver, wait = self._queue.driver.add, self._queue, self._queue.wait
        while True:
            while idle:
                request = next(requests, None)
                if request is None:
                    break
                slot = idle.pop()
                slot.kind, slot.offset, slot.length = request
                self._prepare(slot, fill, add)
            driver.publish()
            if len(idle) == len(self._slots):
                return count
            for token, _ in wait(TIMEOUT):
                assert isinstance(token, Slot)
                if token.status[0]:
                    raise DemoError(f"request {token.kind} at byte {token.offset} failed with status {token.status[0]}")
                done(token)
                idle.append(token)
                count += 1

    def _prepare(self, slot: Slot, fill: Callable[[Slot], object], add: Callable[..., int]) -> None:
        slot.status[0] = STATUS_NEVER
        self.HEADER.pack_into(slot.header, 0, slot.kind, 0, slot.offset // SECTOR)
        data = [(slot.data_at, slot.length)] if slot.length else []
        if slot.kind == T_OUT:
            fill(slot)
            add([(slot.header_at, 16), *data], [(slot.status_at, 1)], slot)
        else:
            add([(slot.header_at, 16)], [*data, (slot.status_at, 1)], slot)


def nothing(slot: Slot) -> None:
    """For those who needn't look."""


# ---------------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """A load to take figures of."""

    name: str
    block: int
    depth: int


@dataclass(frozen=True)
class Figures:
    """What a load came to."""

    ring: str
    load: Load
    requests: int
    seconds: float
    cpu: float

    def row(self) -> str:
        """A line of the table under `HEAD`."""
        rate = self.requests / self.seconds
        micros, cpu = 1e6 / rate, self.cpu / self.requests * 1e6
        return f"  {self.ring:<8}{self.load.name:<30}{rate:>10,.0f}{rate * self.load.block / 1e6:>10,.0f}{micros:>12.1f}{cpu:>16.1f}"


HEAD = f"  {'ring':<8}{'load':<30}{'IOPS':>10}{'MB/s':>10}{'µs/request':>12}{'back-end CPU µs':>16}"
LOADS = (
    Load("4 KiB random reads, 1 deep", 4096, 1),
    Load("4 KiB random reads, 32 deep", 4096, 32),
    Load("128 KiB reads, 8 deep", 131072, 8),
)


class Demo:
    """The whole of it; `run` returns the exit status."""

    def __init__(self, screen: Screen, folder: Path, arguments: argparse.Namespace) -> None:
        self._screen = screen
        self._image = folder / "disk.img"
        self._size: int = arguments.size * MIB
        self._seconds: float = arguments.seconds
        self._break: bool = arguments.break_data
        self._figures: list[Figures] = []
        self._random = random.Random(1)  # the same order each time
        with open(self._image, "wb") as file:
            file.truncate(self._size)
        self._socket = folder / "disk.sock"

    def run(self) -> int:
        """Show everything. Returns the exit status."""
        screen = self._screen
        screen.line(
            f"A disk in pure Python: {platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
        )
        server = Server(self._image, self._socket)
        try:
            screen.title("The device")
            screen.fact("served by", f"python3 -m devices.blk, process {server.pid}")
            screen.fact("socket", str(self._socket))
            screen.fact("image", f"{self._image}, {self._size // MIB} MiB")
            for packed in (False, True):
                self._ring(server, packed)
        finally:
            status = server.stop()
        if status:
            raise DemoError(f"the disk's process ended with status {status}")
        self._summary()
        return 0

    def _ring(self, server: Server, packed: bool) -> None:
        name = "packed" if packed else "split"
        self._screen.title(f"The {name} ring")
        with server.connect() as frontend:
            queue = frontend.setup(1, 256, features=Frontend.RING_FEATURES | BLK_FEATURES, packed=packed)[0]
            self._tell(frontend, queue)
            self._verify(frontend, queue, salt=1 + packed)
            for load in LOADS:
                self._measure(server, frontend, queue, name, load)
            base = frontend.stop_queue(queue)
            self._screen.done("ring stopped", f"nothing in flight, at position {base & 0x7FFF if packed else base}")

    def _tell(self, frontend: Frontend, queue: FrontendQueue) -> None:
        bits = [bit for bit in range(64) if frontend.features >> bit & 1]
        capacity = int.from_bytes(frontend.get_config(0, 8), "little")
        region = frontend.memory.regions[0]
        self._screen.fact("virtio features", " ".join(FEATURE_NAMES.get(bit, f"bit {bit}") for bit in bits))
        self._screen.fact("protocol", " ".join(flag.name or "" for flag in type(frontend.protocol_features) if flag & frontend.protocol_features))
        self._screen.fact("config space", f"capacity {capacity} sectors, {capacity * SECTOR // MIB} MiB")
        self._screen.fact("guest memory", f"{region.size // MIB} MiB at {region.guest_addr:#x}, shared as a memfd")
        self._screen.fact("queue", f"{queue.driver.size} entries, of {frontend.queue_num()} queue(s) that the device has")
        if capacity * SECTOR != self._size:
            raise DemoError(f"the disk says it has {capacity} sectors, the image has {self._size // SECTOR}")

    # Verification

    def _expected(self, offset: int, length: int, salt: int) -> bytes:
        """What is written there: each sector differs from each other, and from what the other ring wrote."""
        first = offset // SECTOR
        return b"".join((salt << 56 | sector).to_bytes(8, "big") * (SECTOR // 8) for sector in range(first, first + length // SECTOR))

    def _verify(self, frontend: Frontend, queue: FrontendQueue, salt: int) -> None:
        content = self._expected(0, self._size, salt)

        def fill(slot: Slot) -> None:
            slot.data[: slot.length] = content[slot.offset : slot.offset + slot.length]

        def compare(slot: Slot) -> None:
            if slot.data[: slot.length] != content[slot.offset : slot.offset + slot.length]:
                raise DemoError(f"{slot.length} bytes read at byte {slot.offset} are not those that were written")

        driver = Driver(frontend, queue, 16, MIB)
        count = driver.run(self._all("writing", T_OUT, 256 << 10), fill, nothing)
        driver.run(iter([(T_FLUSH, 0, 0)]), nothing, nothing)
        self._screen.done("written and flushed", f"{self._size // MIB} MiB in {count} requests, 16 in flight")
        if self._break:
            self._break_image()
        for block in (64 << 10, 4 << 10):
            count = driver.run(self._all("reading back", T_IN, block), nothing, compare)
            self._screen.done("read back, every byte right", f"{count} requests of {block >> 10} KiB, 16 in flight, in random order")
        if self._image.read_bytes() != content:
            raise DemoError("the image file is not what was written")
        self._screen.done("image file compared", "the same bytes")

    def _all(self, name: str, kind: int, block: int) -> Iterator[tuple[int, int, int]]:
        """Each block of the disk once, in random order."""
        offsets = list(range(0, self._size, block))
        self._random.shuffle(offsets)
        for number, offset in enumerate(offsets):
            self._screen.progress(name, number / len(offsets))
            yield kind, offset, block

    def _break_image(self) -> None:
        """Change one byte behind the device's back."""
        with open(self._image, "r+b") as file:
            file.seek(self._size // 2 + 1234)
            file.write(b"\xee")
        self._screen.line(f"  ..  one byte changed at {self._size // 2 + 1234}, as --break-data asks")

    # Figures

    def _measure(self, server: Server, frontend: Frontend, queue: FrontendQueue, ring: str, load: Load) -> None:
        driver = Driver(frontend, queue, load.depth, load.block)
        cpu, start = server.cpu(), time.perf_counter()
        count = driver.run(self._timed(load, start), nothing, nothing)
        figures = Figures(ring, load, count, time.perf_counter() - start, server.cpu() - cpu)
        self._figures.append(figures)
        self._screen.done(load.name, f"{count} requests in {figures.seconds:.2f} s")

    def _timed(self, load: Load, start: float) -> Iterator[tuple[int, int, int]]:
        blocks = self._size // load.block
        choose = self._random.randrange
        order = [choose(blocks) * load.block for _ in range(1000)]
        while True:
            part = (time.perf_counter() - start) / self._seconds
            if part >= 1:
                return
            self._screen.progress(load.name, part)
            for offset in order[:: max(1, load.block // 16384)]:
                yield T_IN, offset, load.block

    def _summary(self) -> None:
        screen = self._screen
        screen.title("Figures")
        screen.line(HEAD)
        for figures in self._figures:
            screen.line(figures.row())
        screen.line("  Both ends are Python here, and share the machine: `python3 -m tools.bench` measures the device alone.")
        screen.title("The same device in a VM")
        for line in qemu_command():
            screen.line(f"  {line}")
        screen.title("All bytes were right.")


def qemu_command() -> list[str]:
    """How to attach a VM to the disk."""
    return [
        "In one terminal:",
        "    truncate -s 1G disk.img",
        "    python3 -m devices.blk --socket-path /tmp/disk.sock --blk-file disk.img",
        "In another one, with what your VM boots from:",
        "    qemu-system-x86_64 -m 1G -machine q35,memory-backend=mem \\",
        "        -object memory-backend-memfd,id=mem,size=1G,share=on \\",
        "        -chardev socket,id=disk,path=/tmp/disk.sock \\",
        "        -device vhost-user-blk-pci,chardev=disk,num-queues=1",
    ]


# ---------------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------------


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # as Ctrl-C: everything is cleaned up on the way out


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.7, help="how long each of the six loads runs (default %(default)s)")
    parser.add_argument("--size", type=int, default=32, metavar="MIB", help="size of the disk in MiB (default %(default)s)")
    parser.add_argument("--break-data", action="store_true", help="change a byte on the way, to see that it is noticed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    arguments = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without µ is no reason to fail
    screen = Screen()
    signal.signal(signal.SIGTERM, _end)
    try:
        with tempfile.TemporaryDirectory(prefix="vhost-user-demo-") as folder:
            return Demo(screen, Path(folder), arguments).run()
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            screen.line("  ..  interrupted; the disk's process and its files are gone")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: nothing more to say, at exit either
        return 1
    except (DemoError, VhostUserError, VringError, OSError) as error:
        screen.failed(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
