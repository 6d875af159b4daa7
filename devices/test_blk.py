"""Tests of devices/blk.py: `python3 -m unittest devices.test_blk`.

A real daemon over a real socket, driven with `Frontend`; most tests run on each kind of image (a file read by system calls, a file in memory
read through a mapping, memory of the process) and with each ring layout. Every test counts what it leaves behind. The random test prints its
seed when it fails; VHOST_USER_SEED=N runs that one again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import json
import logging
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from devices import blk
from devices.blk import SECTOR, Blk, FileImage, Image, RamImage, SizeWatch, parse_size
from devices.io_uring import OP_FSYNC, OP_READ, OP_READV, OP_WRITE, OP_WRITEV, REASONS, RWF_DSYNC, IoUring
from guest_memory import survive_truncation, truncation
from vhost_user import U64, Empty, Frontend, FrontendQueue, Payload, Refused, VhostUserBackend, VhostUserDaemon

ROOT = Path(__file__).resolve().parent.parent
SHM = "/dev/shm"
PATIENCE = 10.0
MIB = 1 << 20

FLUSH, RO, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES = (1 << bit for bit in (9, 5, 11, 12, 13, 14))
EVERYTHING = Frontend.RING_FEATURES | (1 << 24) - 1  # the device type's own features are bits 0 to 23
IN, OUT, T_FLUSH, GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
GUARD = 0xA5


# ---------------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------------


class Parts:
    """One chain in guest memory: pieces with bytes between them that belong to nobody."""

    GAP = 3

    def __init__(self, frontend: Frontend, at: int, readable: Sequence[bytes], writable: Sequence[int]) -> None:
        self._memory = frontend.memory
        self.start = at
        self.readable: list[tuple[int, int]] = []
        self.writable: list[tuple[int, int]] = []
        expected = bytearray([GUARD]) * (sum(map(len, readable)) + sum(writable) + self.GAP * (len(readable) + len(writable)))
        for piece in readable:
            expected[at - self.start : at - self.start + len(piece)] = piece
            self.readable.append((at, len(piece)))
            at += len(piece) + self.GAP
        for length in writable:
            self.writable.append((at, length))
            at += length + self.GAP
        self.end = at
        self._expected = expected
        self._memory.write(self.start, bytes(expected))

    def result(self) -> bytes:
        """What is in the writable parts. Nothing else may have changed."""
        now = bytearray(self._memory.read(self.start, len(self._expected)))
        found = b""
        for address, length in self.writable:
            span = slice(address - self.start, address - self.start + length)
            found += now[span]
            now[span] = self._expected[span]
        assert now == self._expected, "the device wrote outside of the writable parts"
        return found


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """`data` in pieces of these sizes, and the rest."""
    pieces, at = [], 0
    for size in [*sizes, len(data)]:
        if data[at : at + size]:
            pieces.append(data[at : at + size])
        at += size
    return pieces


class Driver:
    """A device served over a socket, and a front-end's one request at a time."""

    def __init__(self, backend: VhostUserBackend, folder: str, **setup: Any) -> None:
        self.daemon = VhostUserDaemon("test", backend)
        path = os.path.join(folder, f"socket-{time.monotonic_ns()}")
        self.daemon.start(path)
        try:
            self.frontend = Frontend.connect(path)
        except BaseException:
            self.daemon.shutdown()
            raise
        try:
            self.queues = list(self.frontend.setup(**{"features": EVERYTHING, "memory": 8 * MIB, **setup}))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.queues = []
        self.frontend.close()
        self.daemon.shutdown()
        self.daemon.wait()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def chain(self, readable: Sequence[bytes], writable: Sequence[int], queue: int = 0, at: int | None = None) -> Parts:
        """Make a chain available, not yet published."""
        parts = Parts(self.frontend, self.frontend.arena[0] if at is None else at, readable, writable)
        self.queues[queue].driver.add(parts.readable, parts.writable, parts)
        return parts

    def collect(self, count: int, queue: int = 0) -> list[tuple[Parts, int]]:
        """Publish, and wait for `count` chains to come back."""
        self.queues[queue].publish()
        found: list[tuple[Parts, int]] = []
        while len(found) < count:
            for parts, length in self.queues[queue].wait(PATIENCE):
                assert isinstance(parts, Parts)
                found.append((parts, length))
        assert len(found) == count
        return found

    def exchange(self, readable: Sequence[bytes], writable: Sequence[int]) -> tuple[int, bytes]:
        """One chain: the length that the device told, and the writable bytes."""
        parts = self.chain(readable, writable)
        ((token, length),) = self.collect(1)
        assert token is parts
        return length, parts.result()


class Disk(Driver):
    """A disk on an image of one kind."""

    def __init__(self, image: Image, folder: str, path: str, *, setup: dict[str, Any] | None = None, **options: Any) -> None:
        self.image = image
        self.path = path
        self.blk = Blk(image, **options)
        super().__init__(self.blk, folder, **(setup or {}))

    def content(self) -> bytes:
        """All of the image, behind the device's back."""
        if self.path:
            return Path(self.path).read_bytes()
        found = bytearray(self.image.size())
        assert self.image.read([memoryview(found)], 0) == len(found)
        return bytes(found)

    def request(
        self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, read_cut: Sequence[int] = (16,), write_cut: Sequence[int] | None = None
    ) -> tuple[int, bytes]:
        """A request's status, and the data that came in. The cuts say how long the first pieces are."""
        pieces = cut(struct.pack("<IIQ", kind, 0, sector) + out, read_cut)
        sizes = [len(piece) for piece in cut(bytes(into + 1), (into,) if write_cut is None else write_cut)]
        length, data = self.exchange(pieces, sizes)
        assert length == into + 1, length
        return data[-1], data[:-1]

    def read(self, sector: int, length: int) -> bytes:
        """What an IN that succeeds gives."""
        status, data = self.request(IN, sector, into=length)
        assert status == OK, status
        return data


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.exceptions: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if record.exc_info and record.exc_info[1] is not None:
            self.exceptions.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


def leftovers() -> tuple[dict[int, str], int, set[threading.Thread]]:
    """File descriptors, shared mappings and threads of this process."""
    gc.collect()
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    fds = {fd: link for fd, link in fds.items() if not link.endswith(f"/proc/{os.getpid()}/fd")}
    with open("/proc/self/maps") as maps:
        mappings = sum(line.split()[1].endswith("s") for line in maps)
    return fds, mappings, set(threading.enumerate())


def mapped_bytes(path: str) -> int:
    """How much of the file this process has mapped."""
    found = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if path in line:
                start, end = line.split()[0].split("-")
                found += int(end, 16) - int(start, 16)
    return found


class DeviceTest(unittest.TestCase):
    """A test that leaves nothing behind, and whose device code raises nothing."""

    @classmethod
    def setUpClass(cls) -> None:
        survive_truncation()  # as the program does

    def setUp(self) -> None:
        self.log = _Log()
        logger = logging.getLogger("vhost_user")
        before = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self.log)
        then = leftovers()

        def check() -> None:
            logger.removeHandler(self.log)
            logger.level, logger.propagate = before
            deadline = time.monotonic() + PATIENCE
            while leftovers() != then and time.monotonic() < deadline:
                time.sleep(0.01)
            now = leftovers()
            self.assertEqual(now[0], then[0], "file descriptors are left over")
            self.assertEqual(now[1], then[1], "mappings are left over")
            self.assertEqual({thread.name for thread in now[2] - then[2]}, set(), "threads are left over")
            self.assertEqual(self.log.exceptions, [], "exceptions were logged")

        self.addCleanup(check)
        folder = tempfile.TemporaryDirectory(prefix="vhost-user-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self._memory_folder: str | None = None

    def path(self, kind: str, content: bytes) -> str:
        """A new image file: "file", or "mapped" for one in memory."""
        folder = self.folder
        if kind == "mapped":
            if self._memory_folder is None:
                made = tempfile.TemporaryDirectory(prefix="vhost-user-", dir=SHM)
                self.addCleanup(made.cleanup)
                self._memory_folder = made.name
            folder = self._memory_folder
        fd, path = tempfile.mkstemp(prefix="disk-", dir=folder)
        with open(fd, "wb") as file:
            file.write(content)
        return path

    @contextlib.contextmanager
    def disk(self, kind: str, content: bytes, packed: bool = False, image: Callable[[str], Image] | None = None, **options: Any) -> Iterator[Disk]:
        """A disk of a kind with this content, connected."""
        path = ""
        if kind == "ram":
            behind: Image = RamImage(len(content))
            behind.write([memoryview(content)], 0)
        else:
            path = self.path(kind, content)
            behind = image(path) if image else IMAGES[kind](path, options.get("read_only", False), AIO[kind])
        setup = {"packed": packed, **options.pop("setup", {})}
        try:
            with Disk(behind, self.folder, path, setup=setup, **options) as disk:
                yield disk
        finally:
            behind.close()


@contextlib.contextmanager
def made_durable() -> Iterator[list[object]]:
    """Counts what makes data durable: fdatasync, by system call or io_uring, and writes that are durable when they are done."""
    found: list[object] = []
    prepare, fdatasync = IoUring.prepare, os.fdatasync

    def noted_prepare(ring: IoUring, operation: int, file: int, address: int, length: int, offset: int, flags: int, token: int) -> None:
        if operation == OP_FSYNC or (operation in (OP_WRITE, OP_WRITEV) and flags & RWF_DSYNC):
            found.append(operation)
        prepare(ring, operation, file, address, length, offset, flags, token)

    def noted_fdatasync(fd: int) -> None:
        found.append(fd)
        fdatasync(fd)

    with mock.patch.object(IoUring, "prepare", noted_prepare), mock.patch("os.fdatasync", noted_fdatasync):
        yield found


def has_io_uring() -> bool:
    try:
        IoUring(1, [0]).close()
    except OSError:
        return False
    return True


class Cold(FileImage):
    """With nothing in the page cache, as it seems: all transfers go through io_uring."""

    def __init__(self, path: str, read_only: bool = False, aio: str = "io_uring") -> None:
        super().__init__(path, read_only, aio)
        self.read_cached, self.cached = None, False


IMAGES: dict[str, type[FileImage]] = {"file": FileImage, "cached": FileImage, "uring": Cold, "mapped": FileImage}
AIO = {"file": "sync", "cached": "io_uring", "uring": "io_uring", "mapped": "mmap"}
KINDS = ("file", *(("cached", "uring") if has_io_uring() else ()), *(("mapped",) if os.path.isdir(SHM) else ()), "ram")
# Containers' filters and kernel.io_uring_disabled forbid io_uring, and a chroot may have no /dev/shm: users run these tests there too, and are
# told what was not tried. CI has both, and runs them whatever it finds.
_IN_CI = "CI" in os.environ
needs_uring = unittest.skipUnless(_IN_CI or "uring" in KINDS, "no io_uring here")
needs_shm = unittest.skipUnless(_IN_CI or "mapped" in KINDS, f"no {SHM}")

FILES = [kind for kind in KINDS if kind != "ram"]


def content_of(sectors: int, seed: int = 1) -> bytes:
    """Random content."""
    return random.Random(seed).randbytes(sectors * SECTOR)


def on_every_disk(sectors: int = 64, kinds: Sequence[str] = KINDS, **options: Any) -> Callable[[Callable[[Any, Disk], None]], Callable[[Any], None]]:
    """Run the test on each kind of image and with each ring layout."""

    def decorate(test: Callable[[Any, Disk], None]) -> Callable[[Any], None]:
        @functools.wraps(test)
        def run(self: DeviceTest) -> None:
            for kind in kinds:
                for packed in False, True:
                    with self.subTest(image=kind, packed=packed), self.disk(kind, content_of(sectors), packed, **options) as disk:
                        test(self, disk)

        return run

    return decorate


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """struct virtio_blk_discard_write_zeroes"""
    return struct.pack("<QII", sector, sectors, flags)


# ---------------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------------


class Requests(DeviceTest):
    """Each type, as drivers send it."""

    @on_every_disk()
    def test_read(self, disk: Disk) -> None:
        before = disk.content()
        for sector, count in (0, 1), (3, 8), (63, 1), (0, 64):
            self.assertEqual(disk.read(sector, count * SECTOR), before[sector * SECTOR : (sector + count) * SECTOR])
        self.assertEqual(disk.content(), before)

    @on_every_disk()
    def test_write(self, disk: Disk) -> None:
        model = bytearray(disk.content())
        for number, (sector, count) in enumerate(((0, 1), (3, 8), (63, 1), (17, 30))):
            data = content_of(count, number + 2)
            self.assertEqual(disk.request(OUT, sector, data), (OK, b""))
            model[sector * SECTOR : (sector + count) * SECTOR] = data
            self.assertEqual(disk.content(), model)
            self.assertEqual(disk.read(sector, len(data)), data)

    @on_every_disk()
    def test_no_data(self, disk: Disk) -> None:
        """Nothing to read or write is in range up to the end."""
        before = disk.content()
        for sector, status in (0, OK), (64, OK), (65, IOERR):
            self.assertEqual(disk.request(IN, sector), (status, b""))
            self.assertEqual(disk.request(OUT, sector), (status, b""))
        self.assertEqual(disk.content(), before)

    @on_every_disk(kinds=[kind for kind in KINDS if kind != "ram"])
    def test_flush(self, disk: Disk) -> None:
        with made_durable() as synced:
            self.assertEqual(disk.request(OUT, 0, bytes(SECTOR)), (OK, b""))
            self.assertEqual(len(synced), 0)
            self.assertEqual(disk.request(T_FLUSH), (OK, b""))
            self.assertEqual(len(synced), 1)

    @on_every_disk(serial="A serial number")
    def test_get_id(self, disk: Disk) -> None:
        self.assertEqual(disk.request(T_FLUSH), (OK, b""))
        identity = b"A serial number".ljust(20, b"\0")
        self.assertEqual(disk.request(GET_ID, into=20), (OK, identity))
        self.assertEqual(disk.request(GET_ID, into=20, write_cut=(1, 7, 9)), (OK, identity))
        self.assertEqual(disk.request(GET_ID, into=7), (OK, identity[:7]))
        self.assertEqual(disk.request(GET_ID, into=0), (OK, b""))
        status, longer = disk.request(GET_ID, into=30)
        self.assertEqual((status, longer[:20]), (OK, identity))

    def test_serial_defaults_to_the_name(self) -> None:
        with self.disk("file", content_of(8)) as disk:
            name = os.path.basename(disk.path).encode()
            self.assertEqual(disk.request(GET_ID, into=20), (OK, name[:20].ljust(20, b"\0")))
        with self.disk("ram", content_of(8), serial="far more than twenty bytes") as disk:
            self.assertEqual(disk.request(GET_ID, into=20), (OK, b"far more than twenty"))

    @on_every_disk(sectors=2048)
    def test_discard_and_write_zeroes(self, disk: Disk) -> None:
        """All of them read as zeroes here, at any alignment, in one segment or several; nothing else changes."""
        model = bytearray(disk.content())
        for kind, flags in (T_DISCARD, 0), (T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, 1):
            for ranges in ([(0, 8)], [(3, 1)], [(9, 30), (50, 70), (200, 1)], [(1000, 0)], [(2040, 8)]):
                base = (kind + flags) % 3 * 300 if ranges[0][0] not in (0, 2040, 1000) else 0
                segments = b"".join(segment(base + sector, count, flags) for sector, count in ranges)
                self.assertEqual(disk.request(kind, 77, segments, read_cut=(16, 5)), (OK, b""))
                for sector, count in ranges:
                    start = (base + sector) * SECTOR
                    model[start : start + count * SECTOR] = bytes(count * SECTOR)
                self.assertEqual(disk.content(), model)
        self.assertEqual(disk.read(0, 2048 * SECTOR), model)

    @on_every_disk(sectors=8192, kinds=[kind for kind in KINDS if kind != "ram"])
    def test_blocks(self, disk: Disk) -> None:
        """A discarded range, and a zeroed one that may be unmapped, takes no space any more; one that may not stays allocated."""
        if not disk.image.can_discard:
            self.skipTest("this file system has no holes")

        def blocks() -> int:
            with open(disk.path, "rb") as file:
                os.fsync(file.fileno())
            return os.stat(disk.path).st_blocks

        full = blocks()
        self.assertGreaterEqual(full, 8192)
        self.assertEqual(disk.request(T_WRITE_ZEROES, 0, segment(0, 2048)), (OK, b""))
        self.assertGreaterEqual(blocks(), 8192)
        self.assertEqual(disk.request(T_WRITE_ZEROES, 0, segment(2048, 2048, 1)), (OK, b""))
        self.assertLessEqual(blocks(), full - 2048)
        self.assertEqual(disk.request(T_DISCARD, 0, segment(4096, 2048)), (OK, b""))
        self.assertLessEqual(blocks(), full - 4096)
        self.assertEqual(disk.content(), bytes(6144 * SECTOR) + content_of(8192)[6144 * SECTOR :])

    @on_every_disk()
    def test_unknown_type(self, disk: Disk) -> None:
        before = disk.content()
        for kind in 2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 26, 0x80000000, 0xFFFFFFFF:
            self.assertEqual(disk.request(kind, 0, bytes(SECTOR)), (UNSUPP, b""), kind)
            self.assertEqual(disk.request(kind, 0, into=SECTOR)[0], UNSUPP, kind)
        self.assertEqual(disk.content(), before)
        self.assertEqual(disk.read(0, SECTOR), before[:SECTOR])


class Shapes(DeviceTest):
    """Framing is the driver's choice (virtio 1.3 §2.7.4)."""

    READ_CUTS = ((), (1,), (15,), (17,), (8, 8), (4, 4, 4, 4), (16,), (16, 1), (10, 10, 10), (1,) * 16, (16 + 511,), (3, 600, 1))
    WRITE_CUTS = ((), (1,), (511,), (512,), (513,), (1023,), (1024,), (1, 1, 1), (7, 400, 3, 600), (333,) * 3)

    def shapes(self, disk: Disk) -> None:
        model = bytearray(disk.content())
        for number, cuts in enumerate(self.READ_CUTS):
            with self.subTest(readable=cuts):
                data = content_of(2, 100 + number)
                self.assertEqual(disk.request(OUT, number, data, read_cut=cuts), (OK, b""))
                model[number * SECTOR : (number + 2) * SECTOR] = data
                self.assertEqual(disk.content(), model)
        for cuts in self.WRITE_CUTS:
            for header in (16,), (5, 6), (), (4,):
                with self.subTest(writable=cuts, header=header):
                    expected = bytes(model[SECTOR : 3 * SECTOR])
                    self.assertEqual(disk.request(IN, 1, into=1024, read_cut=header, write_cut=cuts), (OK, expected))

    @on_every_disk()
    def test_indirect(self, disk: Disk) -> None:
        self.shapes(disk)

    @on_every_disk(setup={"indirect": False})
    def test_direct(self, disk: Disk) -> None:
        self.shapes(disk)

    @on_every_disk(setup={"indirect": False, "size": 1024})
    def test_as_many_pieces_as_the_ring_has(self, disk: Disk) -> None:
        before = disk.content()
        # Status in the last of 1023 writable pieces, together with data
        self.assertEqual(disk.request(IN, 0, into=8192, write_cut=(8,) * 1022), (OK, before[:8192]))
        data = content_of(16, 5)
        self.assertEqual(disk.request(OUT, 8, data, read_cut=(16, *(8,) * 1021)), (OK, b""))
        self.assertEqual(disk.content(), before[: 8 * SECTOR] + data + before[24 * SECTOR :])

    @on_every_disk(setup={"indirect": False})
    def test_same_buffers_again(self, disk: Disk) -> None:
        """What is kept about a chain's parts says nothing of the request: one pair of buffers, other requests."""
        before = disk.content()
        for kind, sector, status in (IN, 0, OK), (IN, 5, OK), (99, 5, UNSUPP), (IN, 64, IOERR), (IN, 63, OK), (GET_ID, 0, OK), (OUT, 0, IOERR):
            got, data = disk.request(kind, sector, into=SECTOR)
            self.assertEqual(got, status, kind)
            if kind == IN and status == OK:
                self.assertEqual(data, before[sector * SECTOR : (sector + 1) * SECTOR])
        self.assertEqual(disk.content(), before)

    def test_random(self) -> None:
        """Random requests in random shapes against a model of the disk."""
        seed = int(os.environ.get("VHOST_USER_SEED") or random.SystemRandom().randrange(1 << 32))
        for kind in KINDS:
            for packed in False, True:
                for indirect in False, True:
                    with self.subTest(seed=seed, image=kind, packed=packed, indirect=indirect):
                        setup = {"indirect": indirect}
                        with self.disk(kind, content_of(64), packed, setup=setup) as disk:
                            self.random_requests(disk, random.Random(seed))

    def random_requests(self, disk: Disk, rng: random.Random) -> None:
        model = bytearray(disk.content())
        end = len(model) // SECTOR

        def pieces(total: int) -> list[int]:
            return [rng.choice((1, 2, 15, 16, 17, 100, 511, 512, 513, rng.randint(1, 2000))) for _ in range(rng.randint(0, 12))] if total else []

        for _ in range(80):
            kind = rng.choice((IN, IN, OUT, OUT, T_FLUSH, T_DISCARD, T_WRITE_ZEROES, 33))
            sector, count = rng.randrange(end + 2), rng.choice((0, 1, 1, 2, 7, 16))
            inside = sector + count <= end
            span = slice(sector * SECTOR, (sector + count) * SECTOR)
            odd = 1 if rng.random() < 0.1 else 0
            out, into, expected = b"", 0, OK if inside and not odd else IOERR
            if kind == IN:
                into = count * SECTOR + odd
            elif kind == OUT:
                out = rng.randbytes(count * SECTOR + odd)
            elif kind in (T_DISCARD, T_WRITE_ZEROES):
                out = segment(sector, count) + bytes(odd)
            else:
                expected = OK if kind == T_FLUSH else UNSUPP
            status, data = disk.request(kind, sector, out, into, pieces(16 + len(out)), pieces(into + 1))
            about = f"request {kind} at {sector}, {count} sectors, odd {odd}"
            self.assertEqual(status, expected, about)
            if status == OK and kind == IN:
                self.assertEqual(data, model[span], about)
            elif status == OK and kind == OUT:
                model[span] = out
            elif status == OK and kind in (T_DISCARD, T_WRITE_ZEROES):
                model[span] = bytes(count * SECTOR)
        self.assertEqual(disk.content(), model)


class BadRequests(DeviceTest):
    """A driver's mistakes: a status, the data untouched, and the ring lives."""

    @on_every_disk()
    def test_bad(self, disk: Disk) -> None:
        before = disk.content()
        full, most = bytes(SECTOR), 2**64 - 1
        wrap = 2**64 // SECTOR  # whose offset in bytes is 0 again in 64 bits
        cases: list[tuple[str, int, int, bytes, int, int]] = [
            ("IN at the end", IN, 64, b"", SECTOR, IOERR),
            ("IN over the end", IN, 63, b"", 2 * SECTOR, IOERR),
            ("IN beyond", IN, 1000, b"", SECTOR, IOERR),
            ("IN at 2**64 - 1", IN, most, b"", SECTOR, IOERR),
            ("IN that wraps as bytes", IN, wrap, b"", SECTOR, IOERR),
            ("IN that wraps as sectors", IN, most, b"", 2 * SECTOR, IOERR),
            ("IN of no whole sectors", IN, 0, b"", SECTOR - 1, IOERR),
            ("IN of a few bytes", IN, 0, b"", 20, IOERR),
            ("IN with readable data", IN, 0, full, SECTOR, IOERR),
            ("IN with readable data only", IN, 0, full, 0, IOERR),
            ("OUT at the end", OUT, 64, full, 0, IOERR),
            ("OUT over the end", OUT, 63, 2 * full, 0, IOERR),
            ("OUT beyond", OUT, 1000, full, 0, IOERR),
            ("OUT at 2**64 - 1", OUT, most, full, 0, IOERR),
            ("OUT that wraps as bytes", OUT, wrap, full, 0, IOERR),
            ("OUT of no whole sectors", OUT, 0, full[1:], 0, IOERR),
            ("OUT of one byte", OUT, 0, b"x", 0, IOERR),
            ("OUT with writable data", OUT, 0, full, SECTOR, IOERR),
            ("OUT with writable data only", OUT, 0, b"", SECTOR, IOERR),
        ]
        for kind in T_DISCARD, T_WRITE_ZEROES:
            good = segment(0, 1)
            cases += [
                (f"{kind} without segments", kind, 0, b"", 0, IOERR),
                (f"{kind} with part of a segment", kind, 0, good[:-1], 0, IOERR),
                (f"{kind} with a segment and a part", kind, 0, good + good[:8], 0, IOERR),
                (f"{kind} with too many segments", kind, 0, good * (blk.MAX_SEGMENTS + 1), 0, IOERR),
                (f"{kind} at the end", kind, 0, segment(64, 1), 0, IOERR),
                (f"{kind} over the end", kind, 0, segment(63, 2), 0, IOERR),
                (f"{kind} of too many sectors", kind, 0, segment(0, blk.MAX_SEGMENT_SECTORS + 1), 0, IOERR),
                (f"{kind} of 2**32 - 1 sectors", kind, 0, segment(0, 2**32 - 1), 0, IOERR),
                (f"{kind} at 2**64 - 1", kind, 0, segment(most, 1), 0, IOERR),
                (f"{kind} that wraps", kind, 0, segment(wrap, 1), 0, IOERR),
                (f"{kind} with a bad segment after a good one", kind, 0, good + segment(64, 1), 0, IOERR),
                (f"{kind} with flag 2", kind, 0, segment(0, 1, 2), 0, UNSUPP),
                (f"{kind} with flag 31", kind, 0, segment(0, 1, 1 << 31), 0, UNSUPP),
                (f"{kind} with a flag in the second segment", kind, 0, good + segment(0, 1, 2), 0, UNSUPP),
            ]
        cases.append(("DISCARD with unmap", T_DISCARD, 0, segment(0, 1, 1), 0, UNSUPP))
        for what, kind, sector, out, into, expected in cases:
            with self.subTest(what):
                status, data = disk.request(kind, sector, out, into)
                self.assertEqual(status, expected)
                self.assertEqual(data, bytes([GUARD]) * into, "data was given with an error")
                self.assertEqual(disk.content(), before)
        self.assertEqual(disk.read(0, SECTOR), before[:SECTOR])

    def test_segments_at_their_limits(self) -> None:
        """The most segments, and the longest one."""
        path = self.path("file", b"")
        os.truncate(path, blk.MAX_SEGMENT_SECTORS * SECTOR + MIB)
        image = FileImage(path)
        self.addCleanup(image.close)
        with Disk(image, self.folder, path) as disk:
            self.assertEqual(disk.request(T_DISCARD, 0, segment(0, blk.MAX_SEGMENT_SECTORS)), (OK, b""))
            self.assertEqual(disk.request(T_DISCARD, 0, segment(0, blk.MAX_SEGMENT_SECTORS + 1)), (IOERR, b""))
            self.assertEqual(disk.request(T_WRITE_ZEROES, 0, segment(1, 1) * blk.MAX_SEGMENTS), (OK, b""))

    @on_every_disk()
    def test_no_request(self, disk: Disk) -> None:
        before = disk.content()
        header = struct.pack("<IIQ", OUT, 0, 0)
        for length in 1, 8, 15:
            self.assertEqual(disk.exchange([header[:length]], [1]), (1, bytes([IOERR])))
        self.assertEqual(disk.exchange([b"1", b"2"], [4, 2]), (6, bytes([GUARD] * 5 + [IOERR])))
        self.assertEqual(disk.exchange([], [SECTOR + 1]), (SECTOR + 1, bytes([GUARD] * SECTOR + [IOERR])), "no header")
        self.assertEqual(disk.exchange([header, bytes(SECTOR)], []), (0, b""), "no status byte")
        self.assertEqual(disk.exchange([b"x"], []), (0, b""))
        self.assertEqual(disk.content(), before)
        self.assertEqual(disk.read(0, SECTOR), before[:SECTOR])

    def test_read_only(self) -> None:
        for kind in KINDS:
            for packed in False, True:
                with self.subTest(image=kind, packed=packed), self.disk(kind, content_of(64), packed, read_only=True) as disk:
                    before = disk.content()
                    self.assertTrue(disk.frontend.features & RO)
                    self.assertFalse(disk.frontend.features & (DISCARD | WRITE_ZEROES))
                    self.assertEqual(disk.request(OUT, 0, bytes(SECTOR)), (IOERR, b""))
                    self.assertEqual(disk.request(OUT, 0), (IOERR, b""))
                    self.assertEqual(disk.request(T_DISCARD, 0, segment(0, 1)), (IOERR, b""))
                    self.assertEqual(disk.request(T_WRITE_ZEROES, 0, segment(0, 1)), (IOERR, b""))
                    self.assertEqual(disk.request(T_FLUSH), (OK, b""))
                    self.assertEqual(disk.read(1, SECTOR), before[SECTOR : 2 * SECTOR])
                    self.assertEqual(disk.content(), before)
                    if isinstance(disk.image, FileImage):
                        with self.assertRaises(OSError):
                            os.pwrite(disk.image.fd, b"x", 0)

    def test_writable_is_not_read_only(self) -> None:
        with self.disk("file", content_of(8)) as disk:
            self.assertFalse(disk.frontend.features & RO)
            self.assertTrue(disk.frontend.features & WRITE_ZEROES)


# ---------------------------------------------------------------------------------------------------------------------------
# Config space and durability
# ---------------------------------------------------------------------------------------------------------------------------


class ConfigSpace(DeviceTest):
    """struct virtio_blk_config (virtio 1.3 §5.2.4)."""

    WRITEBACK = 32

    def test_fields(self) -> None:
        for block_size, exponent, minimum in (512, 3, 8), (1024, 2, 4), (4096, 0, 1), (8192, 0, 1):
            with self.subTest(block_size=block_size), self.disk("ram", content_of(64), num_queues=3, block_size=block_size) as disk:
                space = disk.frontend.get_config(0, 60)
                expected = {
                    ("capacity", 0, "<Q"): 64,
                    ("size_max", 8, "<I"): 4 * MIB,
                    ("seg_max", 12, "<I"): 126,
                    ("geometry", 16, "<I"): 0,
                    ("blk_size", 20, "<I"): block_size,
                    ("physical_block_exp", 24, "<B"): exponent,
                    ("alignment_offset", 25, "<B"): 0,
                    ("min_io_size", 26, "<H"): minimum,
                    ("opt_io_size", 28, "<I"): 0,
                    ("writeback", 32, "<B"): 1,
                    ("unused0", 33, "<B"): 0,
                    ("num_queues", 34, "<H"): 3,
                    ("max_discard_sectors", 36, "<I"): 131072,
                    ("max_discard_seg", 40, "<I"): 32,
                    ("discard_sector_alignment", 44, "<I"): block_size // 512,
                    ("max_write_zeroes_sectors", 48, "<I"): 131072,
                    ("max_write_zeroes_seg", 52, "<I"): 32,
                    ("write_zeroes_may_unmap", 56, "<B"): 1,
                }
                found = {field: struct.unpack_from(field[2], space, field[1])[0] for field in expected}
                self.assertEqual(found, expected)
                self.assertEqual(space[57:], bytes(3))
                self.assertEqual(disk.frontend.get_config(self.WRITEBACK, 4), space[32:36])
                self.assertEqual(disk.frontend.get_config(56, 8), b"\1" + bytes(7))
                self.assertEqual(disk.frontend.get_config(200, 56), bytes(56), "beyond the end")
                self.assertEqual(disk.frontend.queue_num(), 3)
                self.assertTrue(disk.frontend.features & MQ)

    def test_odd_sizes(self) -> None:
        """The last bytes that make no sector are not there for the driver."""
        for kind in KINDS:
            for size in 511, 513, 1535, 5000:
                with self.subTest(image=kind, size=size), self.disk(kind, bytes([7]) * size) as disk:
                    sectors = size // SECTOR
                    self.assertEqual(disk.frontend.get_config(0, 8), struct.pack("<Q", sectors))
                    self.assertEqual(disk.read(0, sectors * SECTOR), bytes([7]) * sectors * SECTOR)
                    self.assertEqual(disk.request(IN, sectors, into=SECTOR)[0], IOERR)
                    self.assertEqual(disk.request(OUT, sectors, bytes(SECTOR))[0], IOERR)
                    self.assertEqual(disk.content(), bytes([7]) * size)

    def test_only_writeback_can_be_written(self) -> None:
        with self.disk("file", content_of(8)) as disk:
            before = disk.frontend.get_config(0, 60)
            for offset, data in (0, bytes(8)), (31, b"\0"), (33, b"\0"), (34, b"\1"), (32, b"\0\0"), (31, b"\0\0"), (32, b"\2"), (32, b"\xff"):
                with self.subTest(offset=offset, data=data), self.assertRaises(Refused):
                    disk.frontend.set_config(offset, data)
                self.assertEqual(disk.frontend.get_config(0, 60), before)
            for value in 0, 1, 0:
                disk.frontend.set_config(self.WRITEBACK, bytes([value]))
                self.assertEqual(disk.frontend.get_config(0, 60), before[:32] + bytes([value]) + before[33:])
            disk.frontend.set_config(self.WRITEBACK, b"\1")
            self.assertEqual(disk.frontend.get_config(0, 60), before)

    def writes(self, disk: Disk) -> list[int]:
        """How often a write, a discard and a write of zeroes are made durable."""
        counts = []
        for kind, data in (OUT, content_of(1)), (T_DISCARD, segment(0, 1)), (T_WRITE_ZEROES, segment(0, 1)), (T_WRITE_ZEROES, segment(0, 1, 1)):
            with made_durable() as synced:
                self.assertEqual(disk.request(kind, 0, data), (OK, b""))
                counts.append(len(synced))
        with made_durable() as synced:
            disk.read(0, SECTOR)
            disk.request(OUT, 8, bytes(SECTOR))
            self.assertEqual(len(synced), 0, "nothing was written")
        return counts

    def test_write_through_without_flush(self) -> None:
        for kind in FILES:
            with self.subTest(kind), self.disk(kind, content_of(8), setup={"features": EVERYTHING & ~FLUSH}) as disk:
                self.assertEqual(self.writes(disk), [1, 1, 1, 1])
                self.assertEqual(disk.frontend.get_config(self.WRITEBACK, 1), b"\0")

    def test_write_through_when_asked(self) -> None:
        for kind in FILES:
            with self.subTest(kind), self.disk(kind, content_of(8)) as disk:
                self.assertEqual(self.writes(disk), [0, 0, 0, 0])
                with made_durable() as synced:
                    disk.frontend.set_config(self.WRITEBACK, b"\0")
                    self.assertEqual(len(synced), 1, "what was written before is durable as well")
                self.assertEqual(self.writes(disk), [1, 1, 1, 1])
                disk.frontend.set_config(self.WRITEBACK, b"\1")
                self.assertEqual(self.writes(disk), [0, 0, 0, 0])

    def test_write_through_stays(self) -> None:
        """Features are set again while rings run, as when a migration begins; the driver's choice of the cache mode outlives that."""
        with self.disk("file", content_of(8)) as disk:
            disk.frontend.set_config(self.WRITEBACK, b"\0")
            disk.frontend.negotiate(disk.frontend.features, int(disk.frontend.protocol_features) & ~(1 << 5))
            self.assertEqual(disk.frontend.get_config(self.WRITEBACK, 1), b"\0")
            self.assertEqual(self.writes(disk), [1, 1, 1, 1])

    def test_next_front_end(self) -> None:
        """What the driver has set stays when the front-end comes back."""
        with self.disk("file", content_of(8)) as disk:
            disk.frontend.set_config(self.WRITEBACK, b"\0")
            path = disk.frontend.connection.socket.getpeername()
            disk.frontend.close()
            disk.frontend = Frontend.connect(path)
            disk.queues = list(disk.frontend.setup(features=EVERYTHING, memory=8 * MIB))
            self.assertEqual(disk.frontend.get_config(self.WRITEBACK, 1), b"\0")
            self.assertEqual(self.writes(disk), [1, 1, 1, 1])

    def test_next_front_end_with_worker_processes(self) -> None:
        """Which are new for each front-end."""
        path = os.path.join(self.folder, "sock")
        with VhostUserDaemon("disk", Blk(RamImage(MIB, shared=True), num_queues=2), processes=2) as daemon:
            daemon.start(path)
            for before, chosen in (b"\1", b"\0"), (b"\0", b"\0"), (b"\0", b"\1"), (b"\1", b"\1"):
                with Frontend.connect(path) as frontend:
                    frontend.negotiate(EVERYTHING)
                    self.assertEqual(frontend.get_config(self.WRITEBACK, 1), before)
                    frontend.set_config(self.WRITEBACK, chosen)

    def test_write_through_outlives_a_reset(self) -> None:
        """The driver may not have noticed: QEMU resets the device when the VM is stopped, and says nothing when it goes on."""
        for name, payload in ("RESET_DEVICE", Empty()), ("SET_STATUS", U64(0)):
            with self.subTest(name), self.disk("file", content_of(8)) as disk:
                disk.frontend.set_config(self.WRITEBACK, b"\0")
                self.again(disk, name, payload, EVERYTHING)
                self.assertEqual(self.writes(disk), [1, 1, 1, 1])
                self.again(disk, name, payload, EVERYTHING & ~FLUSH)
                self.assertEqual(self.writes(disk), [1, 1, 1, 1])
                self.again(disk, name, payload, EVERYTHING & ~CONFIG_WCE)
                self.assertEqual(self.writes(disk), [0, 0, 0, 0], "it flushes whatever was chosen before")
                self.again(disk, name, payload, EVERYTHING)
                self.assertEqual(disk.frontend.get_config(self.WRITEBACK, 1), b"\0", "what it can read and believe")
                disk.frontend.set_config(self.WRITEBACK, b"\1")
                self.again(disk, name, payload, EVERYTHING)
                self.assertEqual(self.writes(disk), [0, 0, 0, 0])

    def test_firmware_that_cannot_flush_leaves_the_driver_write_back(self) -> None:
        with self.disk("file", content_of(8), setup={"features": EVERYTHING & ~FLUSH & ~CONFIG_WCE}) as disk:
            self.assertEqual(self.writes(disk), [1, 1, 1, 1])
            self.again(disk, "SET_STATUS", U64(0), EVERYTHING)
            self.assertEqual(self.writes(disk), [0, 0, 0, 0])

    def again(self, disk: Disk, name: str, payload: Payload, features: int) -> None:
        """Reset the device, and start it with these features."""
        while disk.frontend.queues:
            disk.frontend.stop_queue(disk.frontend.queues[0])
        disk.frontend.request(name, payload)
        disk.queues = list(disk.frontend.setup(features=features, memory=8 * MIB, protocol_features=~(1 << 5)))

    def test_writeback_is_only_there_with_its_feature(self) -> None:
        for without in CONFIG_WCE, FLUSH:
            with self.disk("file", content_of(8), setup={"features": EVERYTHING & ~without}) as disk:
                for value in b"\0", b"\1":
                    with self.assertRaises(Refused):
                        disk.frontend.set_config(self.WRITEBACK, value)
                self.assertEqual(self.writes(disk), [int(without == FLUSH)] * 4)


# ---------------------------------------------------------------------------------------------------------------------------
# Several at once
# ---------------------------------------------------------------------------------------------------------------------------


class InFlight(DeviceTest):
    """Many requests on several queues."""

    def test_two_queues(self) -> None:
        for kind in KINDS:
            for threads in 1, 2:
                for packed in False, True:
                    setup = {"queues": 2, "size": 64}
                    with self.subTest(image=kind, threads=threads, packed=packed):
                        before = content_of(256)
                        with self.disk(kind, before, packed, setup=setup, num_queues=2, threads=threads) as disk:
                            self.assertEqual(len(disk.daemon.get_epoll_handlers()), threads)
                            self.both(disk)

    def both(self, disk: Disk) -> None:
        """60 requests on each queue: writes, then reads of what the other queue wrote."""
        model = b"".join(content_of(2, 1000 + number) for number in range(120)) + content_of(256)[240 * SECTOR :]
        area = disk.frontend.arena[0]
        for kind in OUT, IN:
            for queue in 0, 1:
                for number in range(60):
                    slot = queue * 60 + number if kind == OUT else (1 - queue) * 60 + number
                    header = struct.pack("<IIQ", kind, 0, 2 * slot)
                    data = model[2 * slot * SECTOR : 2 * (slot + 1) * SECTOR]
                    if kind == OUT:
                        disk.chain([header, data], [1], queue, area + 4096 * slot)
                    else:
                        disk.chain([header], [2 * SECTOR, 1], queue, area + 4096 * slot)
            for queue in 0, 1:
                disk.queues[queue].publish()
            for queue in 0, 1:
                for parts, _ in disk.collect(60, queue):
                    found = parts.result()
                    self.assertEqual(found[-1], OK)
                    if kind == IN:
                        slot = (parts.start - area) // 4096
                        self.assertEqual(found[:-1], model[2 * slot * SECTOR : 2 * (slot + 1) * SECTOR])
        self.assertEqual(disk.content(), model)

    def batch(self, disk: Disk, requests: Sequence[tuple[int, int, bytes, int]]) -> list[tuple[int, bytes]]:
        """Requests (kind, sector, data out, bytes in) that the device finds all at once: status and data of each."""
        area = disk.frontend.arena[0]
        all_parts = []
        for number, (kind, sector, out, into) in enumerate(requests):
            pieces = [struct.pack("<IIQ", kind, 0, sector), *([out] if out else [])]
            all_parts.append(disk.chain(pieces, [*([into] if into else []), 1], at=area + 65536 * number))
        with disk.daemon.vrings[0].get_mut() as ring:  # whose worker may still be learning from the batch before
            ring._chunk = len(requests)
        disk.collect(len(requests))
        return [(found[-1], found[:-1]) for found in (parts.result() for parts in all_parts)]

    @contextlib.contextmanager
    def transfers(self, disk: Disk) -> Iterator[list[tuple[str, int, int]]]:
        """What reaches the kernel meanwhile: (name, offset, buffers)."""
        found: list[tuple[str, int, int]] = []
        image, prepare = disk.image, IoUring.prepare
        read, write = image.read, image.write

        def noted(name: str, transfer: Callable[[Sequence[memoryview], int], int]) -> Callable[[Sequence[memoryview], int], int]:
            def noting(views: Sequence[memoryview], offset: int) -> int:
                found.append((name, offset, len(views)))
                return transfer(views, offset)

            return noting

        def noted_prepare(ring: IoUring, operation: int, file: int, address: int, length: int, offset: int, flags: int, token: int) -> None:
            names = {OP_READ: ("read", 1), OP_READV: ("read", length), OP_WRITE: ("write", 1), OP_WRITEV: ("write", length)}
            name, buffers = names.get(operation, ("flush", 0))
            found.append((name, offset, buffers))
            prepare(ring, operation, file, address, length, offset, flags, token)

        read_cached = image.read_cached
        image.read, image.write = noted("read", read), noted("write", write)
        image.read_cached = noted("read", read_cached) if read_cached else None
        with mock.patch.object(IoUring, "prepare", noted_prepare):
            yield found
        image.read, image.write, image.read_cached = read, write, read_cached

    def test_neighbours_in_a_batch_are_one_transfer(self) -> None:
        """Requests that follow one another on the disk, of the same direction, up to 1 MiB. A flush between them is for what was done before."""
        for kind in FILES:
            with self.subTest(kind), self.disk(kind, content_of(4096)) as disk:
                data = [content_of(8, seed) for seed in range(5)]
                requests = [(OUT, 16 + 8 * number, data[number], 0) for number in range(4)]
                requests += [(T_FLUSH, 0, b"", 0), (OUT, 48, data[4], 0), (OUT, 100, data[0], 0), (OUT, 99, data[1][:SECTOR], 0)]
                with self.transfers(disk) as found:
                    self.assertEqual(self.batch(disk, requests), [(OK, b"")] * 8)
                writes = [("write", 16 * SECTOR, 5), ("write", 100 * SECTOR, 1), ("write", 99 * SECTOR, 1)]
                if kind != "mapped":
                    self.assertEqual([transfer for transfer in found if transfer[0] == "write"], writes)
                if kind in ("cached", "uring"):
                    self.assertEqual([transfer[0] for transfer in found].count("flush"), 1)
                model = disk.content()
                self.assertEqual(model[16 * SECTOR : 56 * SECTOR], b"".join(data))
                self.assertEqual(model[99 * SECTOR : 108 * SECTOR], data[1][:SECTOR] + data[0])
                reads = [(IN, 8 * number, b"", 4096) for number in range(20)]
                with self.transfers(disk) as found:
                    answers = self.batch(disk, [*reads, (OUT, 160, data[0], 0), (IN, 200, b"", 512), (IN, 201, b"", 1024)])
                self.assertEqual(answers[:20], [(OK, model[4096 * number : 4096 * (number + 1)]) for number in range(20)])
                self.assertEqual(answers[20:], [(OK, b""), (OK, model[200 * SECTOR :][:512]), (OK, model[201 * SECTOR :][:1024])])
                if kind != "mapped":
                    self.assertEqual(found, [("read", 0, 20), ("write", 160 * SECTOR, 1), ("read", 200 * SECTOR, 2)])
                if kind != "mapped":
                    with self.transfers(disk) as found:
                        self.batch(disk, [(IN, 120 * number, b"", 120 * SECTOR) for number in range(20)])
                    self.assertEqual([buffers for _, _, buffers in found], [17, 3], "1 MiB at most")

    def test_each_request_of_a_transfer_that_fails_has_its_own_status(self) -> None:
        """Only the last read's part of the file is gone."""
        for kind in [kind for kind in FILES if kind != "mapped"]:
            with self.subTest(kind), self.disk(kind, content_of(64)) as disk:
                before = disk.content()
                os.truncate(disk.path, 24 * SECTOR)
                answers = self.batch(disk, [(IN, 8, b"", 4096), (IN, 16, b"", 4096), (IN, 24, b"", 4096), (OUT, 0, bytes(4096), 0)])
                self.assertEqual(answers[:2], [(OK, before[4096:8192]), (OK, before[8192:12288])])
                self.assertEqual((answers[2][0], answers[3][0]), (IOERR, OK))

    def test_threads_share_the_queues(self) -> None:
        image = RamImage(SECTOR)
        self.addCleanup(image.close)
        for queues, threads, masks in (1, 1, [1]), (4, 2, [0b0101, 0b1010]), (2, 9, [1, 2]), (3, 2, [0b101, 0b010]):
            self.assertEqual(list(Blk(image, num_queues=queues, threads=threads).queues_per_thread()), masks)
        wrong: list[dict[str, Any]] = [{"num_queues": 0}, {"num_queues": 257}, {"threads": 0}, *({"block_size": size} for size in (256, 1000, 0))]
        for options in wrong:
            with self.subTest(**options), self.assertRaises(ValueError):
                Blk(image, **options)


# ---------------------------------------------------------------------------------------------------------------------------
# Storage that changes or fails
# ---------------------------------------------------------------------------------------------------------------------------


class Resize(DeviceTest):
    """The image becomes longer, or shorter."""

    def told(self, disk: Disk) -> int:
        """The capacity, after the driver was told that config space has changed."""
        self.assertEqual(disk.frontend.next_backend_request().name, "CONFIG_CHANGE_MSG")
        return int(struct.unpack("<Q", disk.frontend.get_config(0, 8))[0])

    def untold(self, disk: Disk) -> None:
        with self.assertRaises(TimeoutError):
            disk.frontend.next_backend_request(0.02)

    @on_every_disk(kinds=FILES)
    def test_grow(self, disk: Disk) -> None:
        data = content_of(4, 9)
        disk.daemon.reload()
        self.untold(disk)  # the size is what it was
        os.truncate(disk.path, 128 * SECTOR + 5)
        self.assertEqual(disk.request(IN, 64, into=SECTOR)[0], IOERR)
        disk.daemon.reload()
        self.assertEqual(self.told(disk), 128)
        self.assertEqual(disk.read(60, 8 * SECTOR), content_of(64)[60 * SECTOR :] + bytes(4 * SECTOR))
        self.assertEqual(disk.request(OUT, 124, data), (OK, b""))
        self.assertEqual(disk.read(124, 4 * SECTOR), data)
        self.assertEqual(disk.request(IN, 128, into=SECTOR)[0], IOERR)
        disk.daemon.reload()
        self.untold(disk)
        if mapped_bytes(disk.path):
            self.assertEqual(mapped_bytes(disk.path), -(-(128 * SECTOR + 5) // mmap.PAGESIZE) * mmap.PAGESIZE, "the new range is not mapped")

    @on_every_disk(kinds=FILES)
    def test_shrink(self, disk: Disk) -> None:
        os.truncate(disk.path, 16 * SECTOR)
        disk.daemon.reload()
        self.assertEqual(self.told(disk), 16)
        self.assertEqual(disk.read(0, 16 * SECTOR), content_of(16))
        for sector in 15, 16, 60:
            self.assertEqual(disk.request(IN, sector, into=2 * SECTOR)[0], IOERR)
            self.assertEqual(disk.request(OUT, sector, bytes(2 * SECTOR))[0], IOERR)
        self.assertEqual(disk.content(), content_of(16))
        os.truncate(disk.path, 0)
        disk.daemon.reload()
        self.assertEqual(self.told(disk), 0)
        self.assertEqual(disk.request(IN, 0, into=SECTOR)[0], IOERR)
        self.assertEqual(disk.request(OUT, 0, bytes(SECTOR))[0], IOERR)
        self.assertEqual(disk.content(), b"")

    @on_every_disk(sectors=8 * mmap.PAGESIZE // SECTOR, kinds=FILES)
    def test_cut_short_unseen(self, disk: Disk) -> None:
        """The file is shorter than anybody has told: what is not there is an error, and what comes back later is what is in the file."""
        page = mmap.PAGESIZE // SECTOR
        os.truncate(disk.path, mmap.PAGESIZE)
        self.assertEqual(disk.request(IN, page, into=SECTOR)[0], IOERR)
        self.assertEqual(disk.request(IN, page - 1, into=2 * SECTOR)[0], IOERR)
        self.assertEqual(disk.request(IN, 3 * page, into=2 * mmap.PAGESIZE)[0], IOERR)
        self.assertEqual(disk.read(0, mmap.PAGESIZE), content_of(page))
        later = content_of(8 * page, 77)
        Path(disk.path).write_bytes(later)
        self.assertEqual(disk.read(page, 2 * mmap.PAGESIZE), later[mmap.PAGESIZE : 3 * mmap.PAGESIZE])
        disk.daemon.reload()
        self.untold(disk)
        self.assertEqual(disk.read(0, len(later)), later)

    @on_every_disk(sectors=8 * mmap.PAGESIZE // SECTOR, kinds=FILES)
    def test_written_where_it_was_cut_short(self, disk: Disk) -> None:
        """The file has it then."""
        page = mmap.PAGESIZE // SECTOR
        os.truncate(disk.path, mmap.PAGESIZE)
        data = content_of(2 * page, 78)
        self.assertEqual(disk.request(OUT, 3 * page, data)[0], OK)
        self.assertEqual(disk.read(3 * page, len(data)), data)
        self.assertEqual(disk.content(), content_of(8 * page)[: mmap.PAGESIZE] + bytes(2 * mmap.PAGESIZE) + data)

    @needs_shm
    def test_a_mapping_is_written_only_where_that_cannot_end_the_process(self) -> None:
        for survived, read_only in (True, False), (True, True), (False, False):
            with self.subTest(survived=survived, read_only=read_only), mock.patch.object(truncation, "survived", survived):
                image = FileImage(self.path("mapped", content_of(8)), read_only)
                self.addCleanup(image.close)
                self.assertEqual((image.copies_reads, image.copies_writes), (True, survived and not read_only))
                if not read_only:
                    self.assertEqual(image.write([memoryview(b"abcd"), memoryview(b"ef")], 5), 6)
                    self.assertEqual(Path(image.path).read_bytes(), content_of(8)[:5] + b"abcdef" + content_of(8)[11:])
        image = FileImage(self.path("file", content_of(8)), aio="mmap")
        self.addCleanup(image.close)
        self.assertEqual((image.copies_reads, image.copies_writes), (True, blk._in_memory(image.fd)))

    def test_watch(self) -> None:
        """The driver is told without anybody's asking; the watch ends when the file has gone. What comes before it begins is seen as well."""
        arm, before = SizeWatch._arm, [16 * SECTOR]

        def grow_and_arm(watch: SizeWatch) -> None:
            if before:
                os.truncate(watch._path, before.pop())
            arm(watch)

        with mock.patch.object(SizeWatch, "_arm", grow_and_arm), self.disk("file", content_of(8), watch=True) as disk:
            self.assertEqual(disk.frontend.get_config(0, 8), struct.pack("<Q", 16))
            os.truncate(disk.path, 32 * SECTOR)
            self.assertEqual(self.told(disk), 32)
            self.assertEqual(disk.read(8, 24 * SECTOR), bytes(24 * SECTOR))
            os.unlink(disk.path)
        deadline = time.monotonic() + PATIENCE
        while any(thread.name == "size-watch" for thread in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertIn("no longer watched", self.log.lines[-1])

    def test_watch_of_nothing(self) -> None:
        with self.assertRaises(OSError):
            SizeWatch(os.path.join(self.folder, "missing"), lambda: None)


class Failing(FileImage):
    """Storage that fails while `broken`."""

    broken = False

    def __init__(self, path: str) -> None:
        super().__init__(path, aio="sync")
        self._read_all, self._write_all = self.read, self.write
        self.read = self._failing_read
        self.write = self._failing_write

    def _check(self) -> None:
        if self.broken:
            raise OSError(errno.EIO, "this disk is broken")

    def _failing_read(self, views: Sequence[memoryview], offset: int) -> int:
        self._check()
        return self._read_all(views, offset)

    def _failing_write(self, views: Sequence[memoryview], offset: int) -> int:
        self._check()
        return self._write_all(views, offset)

    def flush(self) -> None:
        self._check()
        super().flush()

    def discard(self, offset: int, length: int) -> None:
        self._check()
        super().discard(offset, length)

    def zero(self, offset: int, length: int) -> None:
        self._check()
        super().zero(offset, length)


class Slow(FileImage):
    """Storage that transfers a few bytes at a time."""

    def __init__(self, path: str) -> None:
        super().__init__(path, aio="sync")
        self.calls = 0
        self.read = lambda views, offset: os.preadv(self.fd, self._some(views), offset)
        self.write = lambda views, offset: os.pwritev(self.fd, self._some(views), offset)

    def _some(self, views: Sequence[memoryview]) -> list[memoryview]:
        self.calls += 1
        left, some = 700 + self.calls % 3, []
        for view in views:
            some.append(view[:left])
            left -= len(some[-1])
        return some


class Elsewhere(Cold):
    """Whose transfers go to another file: one that has nothing to read yet."""

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path)
        self.uring_fd = fd


class Storage(DeviceTest):
    """What is under the disk misbehaves."""

    def test_errors(self) -> None:
        for packed in False, True:
            with self.subTest(packed=packed), self.disk("file", content_of(16), packed, Failing) as disk:
                assert isinstance(disk.image, Failing)
                requests: list[tuple[int, bytes, int]] = [
                    (IN, b"", SECTOR),
                    (OUT, content_of(1, 3), 0),
                    (T_FLUSH, b"", 0),
                    (T_DISCARD, segment(0, 1), 0),
                    (T_WRITE_ZEROES, segment(0, 1), 0),
                    (T_WRITE_ZEROES, segment(0, 1, 1), 0),
                ]
                before = disk.content()
                disk.image.broken = True
                for kind, out, into in requests:
                    self.assertEqual(disk.request(kind, 0, out, into)[0], IOERR, kind)
                    self.assertRegex(self.log.lines[-1], "this disk is broken|flush failed: Input/output error")
                self.assertEqual(disk.request(GET_ID, into=20)[0], OK)
                self.assertEqual(disk.content(), before)
                disk.image.broken = False
                for kind, out, into in requests:
                    self.assertEqual(disk.request(kind, 0, out, into)[0], OK, kind)

    def test_short_transfers(self) -> None:
        for packed in False, True:
            with self.subTest(packed=packed), self.disk("file", content_of(64), packed, Slow) as disk:
                assert isinstance(disk.image, Slow)
                cuts: tuple[int, ...]
                for cuts in (), (512,) * 8, (1, 2, 3, 5000, 7), (699, 1, 1, 1, 700):
                    status, data = disk.request(IN, 3, into=40 * SECTOR, write_cut=cuts)
                    self.assertEqual((status, data == content_of(64)[3 * SECTOR : 43 * SECTOR]), (OK, True))
                self.assertGreater(disk.image.calls, 100)
                model = bytearray(disk.content())
                for number, cuts in enumerate(((16,), (), (16, 512, 512), (7, 1000, 1, 1, 1, 3000))):
                    data = content_of(20, 30 + number)
                    self.assertEqual(disk.request(OUT, number, data, read_cut=cuts), (OK, b""))
                    model[number * SECTOR : (number + 20) * SECTOR] = data
                    self.assertEqual(disk.content(), model)
                os.truncate(disk.path, 10 * SECTOR)
                self.assertEqual(disk.request(IN, 0, into=20 * SECTOR)[0], IOERR, "the file ends")

    @needs_uring
    def test_io_uring_with_errors(self) -> None:
        """A file that cannot be written, and one that cannot be read past the cache at odd addresses: what has to fail does, for good reason."""
        with self.disk("uring", content_of(64), read_only=True) as disk:
            disk.blk.read_only = False  # so that it is tried
            self.assertEqual(disk.request(OUT, 0, bytes(SECTOR))[0], IOERR)
            self.assertIn("Bad file descriptor", self.log.lines[-1])
            self.assertEqual(disk.read(3, SECTOR), content_of(64)[3 * SECTOR : 4 * SECTOR])

    @needs_uring
    def test_what_is_not_in_the_page_cache(self) -> None:
        """It goes through io_uring, the rest of its batch too; the next batch is looked for in the page cache again."""

        def missing(views: Sequence[memoryview], offset: int) -> int:
            tried.append(offset)
            if offset < 8 * SECTOR:
                raise BlockingIOError(errno.EAGAIN, "not in memory")
            return cached(views, offset)

        tried: list[int] = []
        with self.disk("cached", content_of(64)) as disk:
            cached = disk.image.read
            disk.image.read_cached = missing
            for _ in range(2):
                tried.clear()
                with mock.patch.object(IoUring, "prepare", autospec=True, side_effect=IoUring.prepare) as prepared:
                    for first in 40, 0, 24:
                        for number, sector in enumerate((first + 5, first, first + 16)):
                            disk.chain([struct.pack("<IIQ", IN, 0, sector)], [SECTOR, 1], at=disk.frontend.arena[0] + 4096 * number)
                        for parts, _ in disk.collect(3):
                            sector = (first + 5, first, first + 16)[(parts.start - disk.frontend.arena[0]) // 4096]
                            self.assertEqual(parts.result(), content_of(64)[sector * SECTOR : (sector + 1) * SECTOR] + bytes([OK]))
                self.assertEqual(prepared.call_count, 3)
                self.assertEqual([offset // SECTOR for offset in tried], [45, 40, 56, 5, 29, 24, 40])

    @needs_uring
    @needs_shm
    def test_io_uring_is_not_asked_where_nothing_waits(self) -> None:
        with self.disk("mapped", content_of(64), image=lambda path: FileImage(path, aio="io_uring")) as disk:
            self.assertIsNotNone(disk.image.uring_fd)
            with mock.patch.object(IoUring, "prepare", autospec=True, side_effect=IoUring.prepare) as prepared:
                self.assertEqual(disk.read(3, SECTOR), content_of(64)[3 * SECTOR : 4 * SECTOR])
                self.assertEqual(disk.request(OUT, 3, content_of(1, 9))[0], OK)
            self.assertEqual(prepared.call_count, 0)

    @needs_uring
    def test_file_system_that_cannot_tell_what_is_cached(self) -> None:
        """All reads go through io_uring."""
        preadv = os.preadv

        def without(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
            if flags:
                raise OSError(errno.EOPNOTSUPP, "no such flag")
            return preadv(fd, views, offset)

        with mock.patch("os.preadv", without):
            image = FileImage(self.path("file", content_of(8)), aio="io_uring")
        self.addCleanup(image.close)
        self.assertEqual((image.read_cached, image.uring_fd), (None, image.fd))

    @needs_uring
    def test_more_transfers_than_the_ring_has_room_for(self) -> None:
        with mock.patch.object(blk.Uring, "_ENTRIES", 2), self.disk("uring", content_of(512)) as disk:
            area = disk.frontend.arena[0]
            for number in range(64):  # none next to another
                disk.chain([struct.pack("<IIQ", IN, 0, 504 - 8 * number)], [8 * SECTOR, 1], at=area + 8192 * number)
            for parts, _ in disk.collect(64):
                sector = 504 - 8 * ((parts.start - area) // 8192)
                self.assertEqual(parts.result(), content_of(512)[sector * SECTOR : (sector + 8) * SECTOR] + bytes([OK]))

    def begun(self, disk: Disk, index: int = 0) -> blk.Uring:
        """The transfers of a ring. Its worker may be slower to begin than a front-end is to connect."""
        deadline = time.monotonic() + PATIENCE
        while index not in disk.blk._transfers and time.monotonic() < deadline:
            time.sleep(0.001)
        return disk.blk._transfers[index]

    @needs_uring
    def test_transfers_that_take_their_time(self) -> None:
        """They come later, in any order, and are waited for when the ring stops, the front-end leaves, or the program ends."""

        def stop(disk: Disk) -> None:
            disk.frontend.stop_queue(disk.queues.pop())

        def leave(disk: Disk) -> None:
            disk.frontend.close()

        for end in None, stop, leave, Disk.close:
            with self.subTest(end), tempfile.TemporaryDirectory(prefix="vhost-user-") as folder:
                pipe = os.path.join(folder, "pipe")
                os.mkfifo(pipe)
                ours = os.open(pipe, os.O_RDWR)
                self.addCleanup(os.close, ours)
                with self.disk("uring", content_of(64), image=functools.partial(Elsewhere, fd=ours)) as disk:
                    ring = self.begun(disk)._ring
                    parts = disk.chain([struct.pack("<IIQ", IN, 0, 0)], [SECTOR, 1])
                    disk.queues[0].publish()
                    disk.queues[0].kick()
                    deadline = time.monotonic() + PATIENCE
                    while not ring.flying and time.monotonic() < deadline:
                        time.sleep(0.001)
                    self.assertEqual(disk.frontend.queue_num(), 1, "the control socket answers")
                    self.assertEqual(disk.queues[0].driver.used(), [])
                    threading.Timer(0.05, os.write, (ours, b"x" * SECTOR)).start()
                    if end:
                        end(disk)
                    else:
                        disk.collect(1)
                    if end is stop or not end:
                        self.assertEqual(parts.result(), b"x" * SECTOR + bytes([OK]))

    @needs_uring
    def test_front_end_that_leaves_while_a_worker_begins(self) -> None:
        with self.disk("uring", content_of(64), num_queues=2, threads=2) as disk:
            for worker in disk.daemon.get_epoll_handlers():
                self.begun(disk, worker.vrings[0].index)
            transfers = disk.blk._transfers
            late = transfers.pop(1)
            with mock.patch.object(transfers[0], "wait", side_effect=lambda index: transfers.setdefault(1, late)) as waited:
                disk.close()
            self.assertEqual(waited.call_count, 1)

    @needs_uring
    def test_io_uring_that_is_taken_away(self) -> None:
        """The disk goes on by system calls."""
        with self.disk("uring", content_of(64)) as disk:
            self.begun(disk)
            with mock.patch.object(IoUring, "_call", side_effect=OSError(errno.EPERM, "a filter")):
                for number in range(3):
                    disk.chain([struct.pack("<IIQ", IN, 0, 10 * number)], [SECTOR, 1], at=disk.frontend.arena[0] + 4096 * number)
                for parts, _ in disk.collect(3):
                    sector = 10 * ((parts.start - disk.frontend.arena[0]) // 4096)
                    self.assertEqual(parts.result(), content_of(64)[sector * SECTOR : (sector + 1) * SECTOR] + bytes([OK]))
            self.assertIn("io_uring failed: [Errno 1] a filter", self.log.lines)
            self.assertEqual(disk.read(3, SECTOR), content_of(64)[3 * SECTOR : 4 * SECTOR])

    def test_without_io_uring(self) -> None:
        """What the kernel does not give is done by system calls, and the log says why."""
        for code, reason in (errno.EPERM, "kernel.io_uring_disabled"), (errno.ENOSYS, "the kernel has none"), (errno.ENOMEM, "ulimit -l"):
            with self.subTest(reason), mock.patch.object(IoUring, "__init__", side_effect=OSError(code, REASONS[code])):
                for aio in "io_uring", "auto":
                    with self.disk("file", content_of(8), image=functools.partial(FileImage, aio=aio)) as disk:
                        self.assertIsNone(disk.image.uring_fd)
                        self.assertEqual(disk.read(3, SECTOR), content_of(8)[3 * SECTOR : 4 * SECTOR])
                    self.assertIn(reason, self.log.lines[-3] + self.log.lines[0])

    def test_past_the_page_cache(self) -> None:
        """With `direct`, also for buffers and lengths that the storage cannot take."""
        for aio in "sync", "io_uring", "auto":
            with self.subTest(aio), self.disk("file", content_of(64), image=functools.partial(FileImage, aio=aio, direct=True)) as disk:
                model = bytearray(content_of(64))
                for sector, length, at in (0, 4096, 4096), (8, 8192, 8192), (3, 512, 4096), (8, 4096, 4099), (1, 1024, 12345):
                    start = disk.frontend.arena[0] // 4096 * 4096 + at
                    data = content_of(length // SECTOR, at)
                    header, status = disk.frontend.arena[0] + (1 << 20), disk.frontend.arena[0] + (1 << 20) + 64
                    for kind in OUT, IN:
                        disk.frontend.memory.write(header, struct.pack("<IIQ", kind, 0, sector) + bytes(48) + b"\xff")
                        disk.frontend.memory.write(start, data if kind == OUT else bytes(length))
                        data_part = [(start, length)]
                        readable = [(header, 16), *(data_part if kind == OUT else [])]
                        disk.queues[0].submit(readable, [*(data_part if kind == IN else []), (status, 1)])
                        disk.queues[0].wait(PATIENCE)
                        self.assertEqual(disk.frontend.memory.read(status, 1), b"\0")
                    self.assertEqual(disk.frontend.memory.read(start, length), data)
                    model[sector * SECTOR : sector * SECTOR + length] = data
                self.assertEqual(disk.content(), model)
        with self.assertRaisesRegex(ValueError, "page cache"):
            FileImage(self.path("file", content_of(8)), aio="mmap", direct=True)

    def test_past_the_page_cache_by_the_piece(self) -> None:
        """A request of any length, as long as a driver likes, takes no more memory than MAX_RUN."""
        taken: list[int] = []

        plain = mmap.mmap

        def room(fileno: int, length: int) -> mmap.mmap:
            taken.append(length)
            return plain(fileno, length)

        length = 2 * blk.MAX_RUN + 8 * SECTOR
        with self.disk("file", content_of(8), image=functools.partial(FileImage, aio="sync", direct=True)) as disk:
            os.truncate(disk.path, 4 * blk.MAX_RUN)
            at = -(-disk.frontend.arena[0] // 4096) * 4096
            data, header = content_of(length // SECTOR, 3), at - 64
            disk.blk.reload()
            for kind in OUT, IN:
                disk.frontend.memory.write(header, struct.pack("<IIQ", kind, 0, 8) + b"\xff")
                disk.frontend.memory.write(at + 1, data if kind == OUT else bytes(length))
                parts = [(at + 1, length // 2), (at + 1 + length // 2, length // 2)]
                with mock.patch("mmap.mmap", room):
                    disk.queues[0].submit([(header, 16), *(parts if kind == OUT else [])], [*(parts if kind == IN else []), (header + 16, 1)])
                    disk.queues[0].wait(PATIENCE)
                self.assertEqual(disk.frontend.memory.read(header + 16, 1), b"\0")
            self.assertEqual(disk.frontend.memory.read(at + 1, length), data)
            self.assertEqual(disk.content()[8 * SECTOR : 8 * SECTOR + length], data)
        self.assertEqual(max(taken), blk.MAX_RUN)

    def test_discarded_memory_that_processes_share(self) -> None:
        """It reads as zeroes as well."""
        image = RamImage(64 * SECTOR, shared=True)
        self.addCleanup(image.close)
        content = content_of(64)
        for action in image.discard, image.zero:
            image.write([memoryview(content)], 0)
            action(SECTOR, 60 * SECTOR)
            self.assertEqual(bytes(image.content()), content[:SECTOR] + bytes(60 * SECTOR) + content[61 * SECTOR :])

    def test_close(self) -> None:
        """A closed image has nothing open or mapped, also while something refers to it."""
        for aio in "sync", "mmap", "io_uring":
            path = self.path("file", content_of(64))
            image = FileImage(path, aio=aio)
            self.assertEqual(mapped_bytes(path) > 0, aio == "mmap")
            fd = image.fd
            image.close()
            self.assertEqual(mapped_bytes(path), 0)
            with self.assertRaises(OSError):
                os.fstat(fd)

    def test_images(self) -> None:
        """What cannot be an image."""
        with self.assertRaises(ValueError):
            RamImage(0)
        with self.assertRaises(ValueError):
            RamImage(-1)
        with self.assertRaises(FileNotFoundError):
            FileImage(os.path.join(self.folder, "missing"))
        with self.assertRaises(IsADirectoryError):
            FileImage(self.folder)
        with self.assertRaisesRegex(ValueError, "neither a file nor a block device"):
            FileImage(self.folder, read_only=True)
        with self.assertRaisesRegex(ValueError, "neither a file nor a block device"):
            FileImage("/dev/null")


# ---------------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------------


class Program(DeviceTest):
    """`python3 -m devices.blk`."""

    def start(self, *words: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "devices.blk", *words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def end() -> None:
            child.kill()
            child.communicate()

        self.addCleanup(end)
        return child

    @contextlib.contextmanager
    def serving(self, *words: str, complaint: str = "") -> Iterator[tuple[subprocess.Popen[str], Frontend, FrontendQueue]]:
        """The program, a front-end and its queue. In the end it has written nothing, or to stderr what is the pattern of a complaint."""
        path = os.path.join(self.folder, f"program-{time.monotonic_ns()}")
        child = self.start("--socket-path", path, *words)
        with Frontend.connect(path) as frontend:
            (queue,) = frontend.setup(features=EVERYTHING, memory=8 * MIB)
            yield child, frontend, queue
        child.send_signal(signal.SIGTERM)
        output, errors = child.communicate(timeout=PATIENCE)
        self.assertEqual((child.returncode, output), (0, ""), errors)
        self.assertRegex(errors, rf"\A({complaint})?\Z")

    def one(self, frontend: Frontend, queue: FrontendQueue, kind: int, sector: int, into: int) -> bytes:
        parts = Parts(frontend, frontend.arena[0], [struct.pack("<IIQ", kind, 0, sector)], [into, 1])
        queue.submit(parts.readable, parts.writable)
        queue.wait(PATIENCE)
        data = parts.result()
        self.assertEqual(data[-1], OK)
        return data[:-1]

    def test_command_lines_that_make_no_sense(self) -> None:
        image = self.path("file", bytes(4096))
        fifo = os.path.join(self.folder, "fifo")
        os.mkfifo(fifo)
        where = ("--socket-path", os.path.join(self.folder, "never"))
        cases: list[tuple[tuple[str, ...], int, str]] = [
            (where, 1, "one of --blk-file and --ram is needed"),
            ((*where, "--blk-file", image, "--ram", "1M"), 1, "one of --blk-file and --ram is needed"),
            (("--blk-file", image), 2, "--socket-path and --fd"),
            ((*where, "--blk-file", os.path.join(self.folder, "missing")), 1, "No such file or directory.*missing"),
            ((*where, "--blk-file", self.folder), 1, "Is a directory"),
            ((*where, "--blk-file", self.folder, "--read-only"), 1, "neither a file nor a block device"),
            ((*where, "--blk-file", fifo), 1, "neither a file nor a block device"),
            ((*where, "--blk-file", ""), 1, "No such file"),
            ((*where, "--ram", "0"), 1, "a disk of 0 bytes"),
            ((*where, "--ram", "many"), 2, "--ram.*many"),
            ((*where, "--ram", "99999999T"), 1, "memory|too large|disk of"),
            ((*where, "--ram", "1M", "--num-queues", "0"), 1, "0 queues"),
            ((*where, "--ram", "1M", "--num-queues", "257"), 1, "257 queues"),
            ((*where, "--ram", "1M", "--threads", "-1"), 1, "-1 threads"),
            ((*where, "--ram", "1M", "--block-size", "1000"), 1, "block size of 1000"),
            ((*where, "--blk-file", image, "--aio", "uring"), 2, "--aio"),
            ((os.path.join(self.folder, "x"), "--ram", "1M"), 2, "usage"),
        ]
        for words, status, pattern in cases:
            with self.subTest(words=words):
                ended, logged = outcome(words)
                self.assertEqual(ended, status, logged)
                self.assertRegex(logged, f"(?s){pattern}")
                self.assertNotIn("Traceback", logged)
                self.assertFalse(os.path.exists(where[1]))
        child = self.start(*where)  # one of them as the program
        output = child.communicate(timeout=PATIENCE)
        self.assertEqual((child.returncode, output[0]), (1, ""))
        self.assertRegex(output[1], r"one of --blk-file and --ram is needed\n$")

    def test_capabilities(self) -> None:
        child = self.start("--print-capabilities")
        output, errors = child.communicate(timeout=PATIENCE)
        self.assertEqual((child.returncode, errors), (0, ""))
        self.assertEqual(json.loads(output), {"type": "block", "features": ["read-only", "blk-file"]})

    def test_aio_serial_and_sighup(self) -> None:
        """How the file is read; its serial number; a growth that SIGHUP tells of. The file has no name any more, so that no watch tells of it: that
        ends, if the program runs for another second."""
        for kind in FILES:
            for aio in "sync", "mmap", "auto":
                path = self.path(kind, content_of(64))
                words, complaint = ("--blk-file", path, "--aio", aio, "--serial", "S1"), ".* is no longer watched: .*\n"
                with self.subTest(image=kind, aio=aio), self.serving(*words, complaint=complaint) as (child, frontend, queue):
                    mapped = aio == "mmap" or (aio == "auto" and kind == "mapped")
                    self.assertEqual(path in Path(f"/proc/{child.pid}/maps").read_text(), mapped)
                    self.assertEqual(self.one(frontend, queue, IN, 3, SECTOR), content_of(64)[3 * SECTOR : 4 * SECTOR])
                    self.assertEqual(self.one(frontend, queue, GET_ID, 0, 20), b"S1".ljust(20, b"\0"))
                    with open(path, "r+b") as file:
                        os.unlink(path)
                        file.truncate(96 * SECTOR)
                    child.send_signal(signal.SIGHUP)
                    self.assertEqual(frontend.next_backend_request().name, "CONFIG_CHANGE_MSG")
                    self.assertEqual(frontend.get_config(0, 8), struct.pack("<Q", 96))
                    self.assertEqual(self.one(frontend, queue, IN, 95, SECTOR), bytes(SECTOR))

    def test_parse_size(self) -> None:
        for text, size in ("512", 512), ("1K", 1024), ("1k", 1024), ("512M", 512 * MIB), ("2G", 2 << 30), ("3T", 3 << 40), ("0", 0):
            self.assertEqual(parse_size(text), size)
        for text in "", "K", "1KM", "1KK", "-1", "1.5G", "1 G", "1GB", "0x10", "M1", "²", "1_000":
            with self.subTest(text), self.assertRaises(ValueError):
                parse_size(text)


def outcome(words: Sequence[str]) -> tuple[int, str]:
    """The exit status of a command line that fails, and what is written to stderr; in this process, since it fails before anything is changed."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), mock.patch.object(sys, "argv", ["blk", *words]), mock.patch("logging.basicConfig"):
        try:
            status = blk.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return status, errors.getvalue()


if __name__ == "__main__":
    unittest.main()
