"""Tests of the framework: `python3 -m unittest` where this file lies, or `python3 -m unittest test_all`.

Vendor it with the three modules, flat or inside a package (`python3 -m unittest myapp._vendor.test_all`). With VHOST_USER_BUNDLE=FILE in the
environment the tests run against that one file in place of the modules. Through `load_tests` the tests of `devices/` and `tools/` come
along where those folders are.

Nothing is mocked: a real daemon over a real socket, with real eventfds and shared memory. Front-ends are `Frontend` for what is right
and `Peer`, raw bytes, for what is wrong; drivers likewise the driver sides of `vring` and `RawRing`. Every test counts what it leaves
behind (file descriptors, mappings, threads), and fails for device code that raised an exception unless it expected that.

In reading order: helpers, guest memory, rings alone, the wire and each request, rings of a daemon, the daemon's life, programs. Random tests
print their seed when they fail; VHOST_USER_SEED=N runs that one again.

`rule N` is one of RULES, which implementations of vhost-user have got wrong.
"""

# mypy: disable-error-code="func-returns-value"
# A lambda that notes its call and goes on: (calls.append(argument), go_on(argument))[1].

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import logging
import os
import random
import re
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from unittest import mock
from uuid import UUID


def _load_bundle(path: str) -> None:
    """Take the one-file build at `path` for all three modules."""
    spec = importlib.util.spec_from_file_location("vhost_user", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    for name in "vhost_user", "vring", "guest_memory":
        sys.modules[name] = module
    spec.loader.exec_module(module)


BUNDLE = os.environ.get("VHOST_USER_BUNDLE")
if BUNDLE and sys.modules.get("vhost_user") is not sys.modules.get("vring", sys):
    _load_bundle(BUNDLE)

if TYPE_CHECKING or BUNDLE or not __package__:
    import vhost_user
    from guest_memory import (
        ACCESS_READ,
        MAX_REGIONS,
        DirtyLog,
        Fence,
        GuestMemoryAtomic,
        GuestMemoryError,
        GuestMemoryMmap,
        GuestRegionMmap,
        Iotlb,
        IotlbMiss,
        IovaMemory,
        Userfault,
        atomic_or,
        map_shared,
    )
    from vhost_user import (
        BACKEND_REQUESTS,
        FEATURES,
        GPU_REQUESTS,
        PROTOCOL_FEATURES,
        REQUESTS,
        U64,
        AsymmetricSession,
        BackendChannel,
        BackendMessage,
        Config,
        Connection,
        CryptoSession,
        DeviceState,
        Disconnected,
        Empty,
        Frontend,
        FrontendQueue,
        Inflight,
        IotlbMessage,
        Listener,
        Log,
        MemReg,
        MemRegion,
        MemTable,
        ProtocolError,
        Refused,
        Shared,
        ShmemMap,
        SymmetricSession,
        VhostUserBackend,
        VhostUserBackendMut,
        VhostUserDaemon,
        VhostUserProtocolFeatures,
        VringAddr,
        VringArea,
        VringFd,
        VringStatePayload,
    )
    from vring import (
        DescriptorChain,
        DriverQueue,
        FlatRequest,
        PackedDriverQueue,
        PackedInflight,
        Parts,
        Queue,
        RequestBatch,
        SplitDriverQueue,
        SplitInflight,
        SplitQueue,
        VringError,
        VringMutex,
        VringRwLock,
        VringState,
        VringT,
    )
else:
    from . import vhost_user
    from .guest_memory import (
        ACCESS_READ,
        MAX_REGIONS,
        DirtyLog,
        Fence,
        GuestMemoryAtomic,
        GuestMemoryError,
        GuestMemoryMmap,
        GuestRegionMmap,
        Iotlb,
        IotlbMiss,
        IovaMemory,
        Userfault,
        atomic_or,
        map_shared,
    )
    from .vhost_user import (
        BACKEND_REQUESTS,
        FEATURES,
        GPU_REQUESTS,
        PROTOCOL_FEATURES,
        REQUESTS,
        U64,
        AsymmetricSession,
        BackendChannel,
        BackendMessage,
        Config,
        Connection,
        CryptoSession,
        DeviceState,
        Disconnected,
        Empty,
        Frontend,
        FrontendQueue,
        Inflight,
        IotlbMessage,
        Listener,
        Log,
        MemReg,
        MemRegion,
        MemTable,
        ProtocolError,
        Refused,
        Shared,
        ShmemMap,
        SymmetricSession,
        VhostUserBackend,
        VhostUserBackendMut,
        VhostUserDaemon,
        VhostUserProtocolFeatures,
        VringAddr,
        VringArea,
        VringFd,
        VringStatePayload,
    )
    from .vring import (
        DescriptorChain,
        DriverQueue,
        FlatRequest,
        PackedDriverQueue,
        PackedInflight,
        Parts,
        Queue,
        RequestBatch,
        SplitDriverQueue,
        SplitInflight,
        SplitQueue,
        VringError,
        VringMutex,
        VringRwLock,
        VringState,
        VringT,
    )


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """Take in the tests of the devices and tools beside this file. Discovery doesn't look into those folders, which are no packages."""
    here = os.path.dirname(os.path.abspath(__file__))
    if not __package__ and not BUNDLE:
        for folder in "devices", "tools":
            for name in sorted(os.listdir(os.path.join(here, folder))) if os.path.isdir(os.path.join(here, folder)) else ():
                if re.fullmatch(r"test_\w+\.py", name):
                    tests.addTests(unittest.defaultTestLoader.loadTestsFromName(f"{folder}.{name[:-3]}"))
    return tests


# ---------------------------------------------------------------------------------------------------------------------------
# Helpers: waiting, counting, logs
# ---------------------------------------------------------------------------------------------------------------------------

PATIENCE = 10.0
"""Seconds after which something that should happen is said not to."""
MOMENT = 0.03
"""Seconds in which something that should not happen would have."""

PF = VhostUserProtocolFeatures
PAGE = os.sysconf("SC_PAGESIZE")
BRIM = 2**64 - 2
"""The most an eventfd counts to: the next write blocks."""

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
INDIRECT, EVENT_IDX, PROTOCOL, VERSION_1, ACCESS_PLATFORM, PACKED, IN_ORDER, RING_RESET = (1 << bit for bit in (28, 29, 30, 32, 33, 34, 35, 40))


def wait_until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait for the condition, within reason."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience} s for {what}")
        time.sleep(0.001)


def open_fds() -> dict[int, str]:
    """What this process has open."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: link for fd, link in found.items() if not link.endswith(f"/proc/{os.getpid()}/fd")}


def shared_mappings() -> list[str]:
    """The shared mappings of this process."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if line.split()[1].endswith("s")]


def mapping_count() -> int:
    """How many shared mappings there are, with garbage collected."""
    gc.collect()
    return len(shared_mappings())


def is_readable(fd: int | socket.socket, seconds: float = 0.0) -> bool:
    """Whether there is something to read within that time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class _Log(logging.Handler):
    """All that was logged. Keeps text only: a traceback would keep its frames, and all that they hold, alive."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            text += f" [{type(record.exc_info[1]).__name__}: {record.exc_info[1]}]"
        self.lines.append(text)


class CoreTest(unittest.TestCase):
    """A test that leaves nothing behind, and whose device code raises nothing it did not expect."""

    def setUp(self) -> None:
        self._log = _Log()
        self._expected: list[str] = []
        logger = logging.getLogger("vhost_user")
        before = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self._log)
        fds, mappings, threads = open_fds(), len(shared_mappings()), set(threading.enumerate())

        def check() -> None:
            logger.removeHandler(self._log)
            logger.level, logger.propagate = before
            with contextlib.suppress(AssertionError):
                wait_for = (fds, mappings, threads)
                deadline = time.monotonic() + PATIENCE
                while (open_fds(), len(shared_mappings()), set(threading.enumerate())) != wait_for and time.monotonic() < deadline:
                    gc.collect()
                    time.sleep(0.005)
            leftover = [f"{fd}: {link}" for fd, link in open_fds().items() if fd not in fds]
            self.assertEqual(leftover, [], "file descriptors are left over")
            self.assertEqual(open_fds().keys(), fds.keys(), "file descriptors that are not the test's own were closed")
            self.assertLessEqual(len(shared_mappings()), mappings, f"mappings are left over: {shared_mappings()}")
            self.assertEqual([t.name for t in set(threading.enumerate()) - threads], [], "threads are left over")
            unexpected = [line for line in self._log.lines if line.endswith("]") and not any(re.search(e, line) for e in self._expected)]
            self.assertEqual(unexpected, [], "exceptions were logged")

        self.addCleanup(check)

    def expect_log(self, pattern: str, times: int | None = None) -> None:
        """Something that matches was logged, or will be at once; just `times` times, if given."""
        self._expected.append(pattern)
        try:
            wait_until(lambda: any(re.search(pattern, line) for line in self._log.lines), f"the log to say {pattern!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it says {self._log.lines}") from None
        if times is not None:
            self.assertEqual(len([line for line in self._log.lines if re.search(pattern, line)]), times, pattern)

    def raises(self, error: type[BaseException], pattern: str) -> Any:
        """The block raises `error`, whose message matches."""
        return self.assertRaisesRegex(error, pattern)

    def folder(self) -> str:
        """A temporary folder for the length of the test."""
        folder = tempfile.TemporaryDirectory(prefix="vhost-user-")
        self.addCleanup(folder.cleanup)
        return folder.name

    def eventfd(self, count: int = 0, flags: int = os.EFD_CLOEXEC | os.EFD_NONBLOCK) -> int:
        """An eventfd for the length of the test."""
        fd = os.eventfd(0, flags)
        if count:
            os.write(fd, struct.pack("=Q", count))
        self.addCleanup(os.close, fd)
        return fd

    def memfd(self, size: int) -> int:
        """A memfd for the length of the test."""
        fd = os.memfd_create("test")
        os.ftruncate(fd, size)
        self.addCleanup(os.close, fd)
        return fd

    def in_thread(self, work: Callable[[], object]) -> threading.Thread:
        """Run `work` in a thread; the test waits for its end, and fails when it failed."""
        failures: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        def join() -> None:
            thread.join(PATIENCE)
            self.assertFalse(thread.is_alive(), "a thread of the test hangs")
            self.assertEqual(failures, [])

        thread = threading.Thread(target=run, name="test", daemon=True)
        thread.start()
        self.addCleanup(join)
        return thread

    @contextlib.contextmanager
    def seeded(self, **about: object) -> Iterator[random.Random]:
        """Random numbers, whose seed is told when the block fails."""
        seed = int(os.environ.get("VHOST_USER_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
        with self.subTest(seed=seed, **about):
            yield random.Random(seed)


# ---------------------------------------------------------------------------------------------------------------------------
# Helpers: devices, daemons, front-ends
# ---------------------------------------------------------------------------------------------------------------------------


class Echo(VhostUserBackendMut):
    """Reads what is readable and writes it back to front. Notes what it is told."""

    num_queues = 2
    max_queue_size = 256
    config: Any

    def __init__(self) -> None:
        self.config = bytearray(b"0123456789abcdef")
        self.events: list[tuple[Any, ...]] = []
        self.processed = 0

    def process_queue(self, vring: VringT) -> None:
        self.processed += 1
        for chain in vring:
            vring.add_used(chain, chain.write(chain.read()[::-1]))

    def acked_features(self, features: int) -> None:
        self.events.append(("features", features))

    def set_event_idx(self, enabled: bool) -> None:
        self.events.append(("event_idx", enabled))

    def update_memory(self, memory: GuestMemoryAtomic) -> None:
        self.events.append(("memory", len(memory.memory().regions)))

    def reset_device(self) -> None:
        self.events.append(("reset",))

    def set_status(self, status: int) -> int:
        self.events.append(("status", status))
        return status

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        if offset >= 8:
            raise Refused("read-only from byte 8 on")
        self.events.append(("config", offset, data, flags))

    def connected(self) -> None:
        self.events.append(("connected",))

    def disconnected(self) -> None:
        super().disconnected()
        self.events.append(("disconnected",))

    def ring_started(self, index: int, vring: VringT) -> None:
        self.events.append(("started", index))

    def ring_stopped(self, index: int) -> None:
        self.events.append(("stopped", index))

    def told(self, kind: str) -> list[tuple[Any, ...]]:
        """What came with events of that kind."""
        return [event[1:] for event in self.events if event[0] == kind]


class Later(Echo):
    """The same, when the test says so: from the test's thread, in the order the test likes."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[VringT, DescriptorChain]] = []

    def process_queue(self, vring: VringT) -> None:
        for chain in vring:
            self.held.append((vring, chain))

    def complete(self, position: int = -1) -> None:
        """Complete one of those held."""
        vring, chain = self.held.pop(position)
        vring.add_used(chain, chain.write(chain.read()[::-1]))

    def holds(self, count: int) -> None:
        """Wait until that many are held."""
        wait_until(lambda: len(self.held) >= count, f"{count} chains to be taken")


class Failing(Echo):
    """Raises in ring 0 when it reads b'fail'."""

    def process_queue(self, vring: VringT) -> None:
        for chain in vring:
            data = chain.read()
            if data == b"fail":
                raise RuntimeError("as asked")
            vring.add_used(chain, chain.write(data[::-1]))


class Whole(Echo):
    """Has every hook that brings a protocol feature, and the drafts."""

    drafts = True
    protocol_features = PF.HOST_NOTIFIER | PF.INBAND_NOTIFICATIONS | PF.CROSS_ENDIAN | PF.PAGEFAULT

    def __init__(self) -> None:
        super().__init__()
        self.state = b"as new"
        self.channel: BackendChannel | None = None
        self.objects: dict[UUID, int] = {}

    def set_backend_req_fd(self, backend: BackendChannel) -> None:
        super().set_backend_req_fd(backend)
        self.channel = backend

    def send_rarp(self, mac: bytes) -> None:
        self.events.append(("rarp", mac))

    def set_mtu(self, mtu: int) -> None:
        if mtu > 9000:
            raise Refused("no giants")
        self.events.append(("mtu", mtu))

    def create_crypto_session(self, opcode: int, parameters: SymmetricSession | AsymmetricSession) -> int:
        if opcode == 0x302:
            raise Refused("no AEAD")
        self.events.append(("session", opcode, parameters))
        return 7

    def close_crypto_session(self, session_id: int) -> None:
        if session_id != 7:
            super().close_crypto_session(session_id)
        self.events.append(("closed", session_id))

    def set_gpu_socket(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(BrokenPipeError):
            sock.sendall(b"display")

    def get_shared_object(self, uuid: UUID) -> int | None:
        return os.dup(self.objects[uuid]) if uuid in self.objects else None

    def get_shmem_config(self) -> Sequence[int]:
        return (4 * PAGE, 0, PAGE)

    def save_state(self, file: BinaryIO) -> None:
        file.write(self.state)

    def load_state(self, file: BinaryIO) -> None:
        self.state = file.read()

    def suspended(self) -> None:
        self.events.append(("suspended",))

    def resumed(self) -> None:
        self.events.append(("resumed",))

    def cancel_in_flight(self, index: int) -> None:
        self.events.append(("cancelled", index))


class Served:
    """A daemon that serves a device at a socket."""

    def __init__(self, device: VhostUserBackend, path: str, vring: type[VringState] = VringMutex, poll_us: int = 0) -> None:
        self.path = path
        self.daemon = VhostUserDaemon("test", device, vring=vring, poll_us=poll_us)
        self.daemon.start(path)

    def connect(self) -> Frontend:
        """A front-end that has connected."""
        return Frontend.connect(self.path)

    def peer(self, **options: Any) -> Peer:
        """Raw bytes to it."""
        return Peer(self.path, **options)

    def wait(self) -> None:
        """Wait for the daemon's end, within reason."""
        wait_for_end(self.daemon)


def wait_for_end(daemon: VhostUserDaemon) -> None:
    """`daemon.wait()`, within reason."""
    failure: list[BaseException] = []

    def wait() -> None:
        try:
            daemon.wait()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=wait, name="waits-for-daemon", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise AssertionError("the daemon does not end")
    if failure:
        raise failure[0]


class DaemonTest(CoreTest):
    """A test with a daemon."""

    workers: Sequence[vhost_user.VringEpollHandler] = ()
    """Of the daemon that was started last, while it serves."""

    @contextlib.contextmanager
    def serving(self, device: VhostUserBackend, vring: type[VringState] = VringMutex, poll_us: int = 0) -> Iterator[Served]:
        """The device, served at a socket; in the end the daemon is shut down, and the socket gone."""
        with tempfile.TemporaryDirectory(prefix="vhost-user-") as folder:
            served = Served(device, f"{folder}/sock", vring, poll_us)
            self.workers = served.daemon.get_epoll_handlers()
            try:
                yield served
            finally:
                self.workers = ()
                served.daemon.shutdown()
                served.wait()
                del served.daemon  # what it has open goes with it, whoever still has `served`
            self.assertEqual(os.listdir(folder), [], "the socket is left over")

    @contextlib.contextmanager
    def connected(
        self, device: VhostUserBackend, queues: int = 1, vring: type[VringState] = VringMutex, poll_us: int = 0, **setup: Any
    ) -> Iterator[Frontend]:
        """A front-end that has done all that a VMM does until the device can be used."""
        with self.serving(device, vring, poll_us) as served, served.connect() as frontend:
            setup.setdefault("memory", 4 << 20)
            setup.setdefault("size", 64)
            frontend.setup(queues, **setup)
            yield frontend

    @contextlib.contextmanager
    def prepared(
        self, device: VhostUserBackend, features: int = -1, protocol_features: int = -1, vring: type[VringState] = VringMutex
    ) -> Iterator[tuple[Frontend, Rig]]:
        """A front-end that has negotiated, and memory that is not shared yet."""
        with self.serving(device, vring) as served, served.connect() as frontend:
            frontend.negotiate(features & ~(PACKED | IN_ORDER), protocol_features)
            yield frontend, Rig(frontend)

    def rests(self, worker: vhost_user.VringEpollHandler) -> None:
        """Wait until the worker has seen to all that came before, and sleeps."""
        rounds: list[float | None] = []
        look = worker._next_events

        def asleep() -> bool:
            if len(rounds) > before and rounds[-1] is None:
                return True
            worker._wake.set()  # again: it may poll a ring for long, after an earlier wake-up that took this one along
            return False

        with mock.patch.object(worker, "_next_events", lambda timeout: (rounds.append(timeout), look(timeout))[1]):
            for _ in range(3):  # one may have begun before this, and one may be of events that were come across before
                before = len(rounds)
                wait_until(asleep, "the worker to sleep")

    def stays(self, queue: FrontendQueue) -> None:
        """Nothing is used for a moment. (A late notification of what was used before may come.)"""
        deadline = time.monotonic() + MOMENT
        while time.monotonic() < deadline:
            self.assertEqual(queue.driver.used(), [])
            time.sleep(0.001)

    def echo(self, frontend: Frontend, queue: FrontendQueue, data: bytes = b"ping", kick: bool = False) -> None:
        """One request and its answer, right in every byte."""
        at, size = frontend.arena
        frontend.memory.write(at, data)
        frontend.memory.write(at + size // 2, bytes(len(data)))
        queue.submit([(at, len(data))], [(at + size // 2, len(data))], data)
        if kick:
            queue.kick()
        self.assertEqual(queue.wait(PATIENCE), [(data, len(data))])
        self.assertEqual(frontend.memory.read(at + size // 2, len(data)), data[::-1])


RAM = 1 << 30


class Rig:
    """RAM of a front-end and a driver side for each ring, for tests that take each step by themselves."""

    def __init__(self, frontend: Frontend, size: int = 16, share: bool = False) -> None:
        self.frontend = frontend
        self.size = size
        self.memory = GuestMemoryMmap.from_ranges([(RAM, 1 << 20)])
        frontend.memory = self.memory  # for user_addr
        frontend.arena = (RAM + 0x80000, 0x80000)
        if share:
            self.share()

    def share(self) -> None:
        """Make the RAM known to the back-end."""
        self.frontend.memory = GuestMemoryMmap()
        self.frontend.share_memory(self.memory)

    def driver(self, index: int = 0, **options: Any) -> SplitDriverQueue:
        """A new driver side, on a clean ring."""
        at = RAM + index * 0x10000
        length, (desc, avail, used) = SplitDriverQueue.layout(self.size)
        self.memory.write(at, bytes(length))
        return SplitDriverQueue(self.memory, self.size, (at + desc, at + avail, at + used), self.frontend.features, **options)

    def add(self, driver: DriverQueue, data: bytes = b"ping") -> None:
        """One request, published and not kicked."""
        at, size = self.frontend.arena
        self.memory.write(at, data)
        driver.add([(at, len(data))], [(at + size // 2, len(data))], data)
        driver.publish()

    def addresses(self, index: int, driver: DriverQueue) -> VringAddr:
        """The payload of SET_VRING_ADDR."""
        desc, avail, used = map(self.frontend.user_addr, driver.areas)
        return VringAddr(index, 0, desc, used, avail, 0)


class Peer:
    """A front-end that sends whatever it is told to, and says what it expects.

    OK        acknowledged with 0
    REFUSED   acknowledged with something else, and the connection stays
    CLOSED    the connection ends, without an answer
    SILENT    no answer: the next one is that to GET_FEATURES
    bytes     the payload of an explicit reply
    """

    OK, REFUSED, CLOSED, SILENT = "acknowledged", "refused", "closed", "silent"
    WITH_USER_ADDRESSES = ~int(VhostUserProtocolFeatures.GPA_ADDRESSES)

    def __init__(self, path: str, protocol_features: int = WITH_USER_ADDRESSES, features: int | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.socket.settimeout(PATIENCE)
        if protocol_features:
            self.send(15)
            [offered] = struct.unpack("=Q", self.answer()[2])
            self.msg("SET_PROTOCOL_FEATURES", struct.pack("=Q", offered & protocol_features), flags=1, expect=None)
        if features is not None:
            self.msg("SET_FEATURES", struct.pack("=Q", features))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, request: int, payload: bytes = b"", flags: int = 1, fds: Sequence[int] = (), size: int | None = None) -> None:
        """A message; `size` to lie about the payload's."""
        self.raw(struct.pack("=III", request, flags, len(payload) if size is None else size) + payload, fds)

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes, with descriptors at the first."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)

    def answer(self) -> tuple[int, int, bytes]:
        """Request, flags and payload of the next message from the back-end. Raises EOFError at the end of the connection."""
        request, flags, size = struct.unpack("=III", self._exactly(12))
        return request, flags, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.socket.recv(size - len(data))
            except ConnectionError:
                piece = b""
            if not piece:
                raise EOFError(f"the connection ends after {data!r}")
            data += piece
        return data

    def is_closed(self) -> None:
        """Wait for the connection's end; nothing else may come."""
        try:
            answer = self.answer()
        except EOFError as error:
            if "after b''" not in str(error):
                raise
            return
        raise AssertionError(f"the connection lives, and says {answer}")

    def lives(self) -> None:
        """The next message is the answer to our next question."""
        self.send(1)
        answer = self.answer()
        if answer[:2] != (1, 5):
            raise AssertionError(f"GET_FEATURES is answered by {answer}")

    def msg(self, name: str | int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1 | 8, expect: str | bytes | None = OK) -> None:
        """Send a request; see that the answer is the expected one, and the only one."""
        number = name if isinstance(name, int) else REQUESTS[name].number
        try:
            self.send(number, payload, flags, fds)
        except ConnectionError:
            if expect != self.CLOSED:
                raise
        if expect is None:
            return
        if expect == self.CLOSED:
            self.is_closed()
            return
        if expect != self.SILENT:
            request, answer_flags, data = self.answer()
            if (request, answer_flags) != (number, 5):  # flags: version 1 and REPLY, and never NEED_REPLY
                raise AssertionError(f"{name} is answered by message {request} with flags {answer_flags:#x}")
            if isinstance(expect, bytes):
                if data != expect:
                    raise AssertionError(f"{name}: expected {expect.hex()}, not {data.hex()}")
            elif len(data) != 8 or (data == bytes(8)) != (expect == self.OK):
                raise AssertionError(f"{name}: expected to be {expect}, not {data.hex()}")
        self.lives()


OK, REFUSED, CLOSED, SILENT = Peer.OK, Peer.REFUSED, Peer.CLOSED, Peer.SILENT


def u64(value: int) -> bytes:
    """A U64 payload."""
    return struct.pack("=Q", value)


def pair(index: int, num: int) -> bytes:
    """A vring state payload."""
    return struct.pack("=II", index, num)


# ---------------------------------------------------------------------------------------------------------------------------
# Guest memory
# ---------------------------------------------------------------------------------------------------------------------------


class RegionTests(CoreTest):
    """GuestRegionMmap."""

    def test_size_and_offset_that_leave_the_address_space(self) -> None:
        """Whatever the file: nothing is left mapped."""
        endless = os.open("/dev/zero", os.O_RDWR)
        self.addCleanup(os.close, endless)
        for offset, size in (0xFFF, 2**64 - 1), (2**64 - 1, 2**64 - 1), (1, 2**63 - 1), (0, 2**64 - 1):
            with self.subTest(offset=offset, size=size), self.assertRaises(GuestMemoryError):
                map_shared(endless, offset, size)

    def test_region_shows_the_files_bytes_and_writes_through(self) -> None:
        fd = self.memfd(4 * PAGE)
        os.pwrite(fd, b"hello", PAGE)
        region = GuestRegionMmap(fd, 0x1000, PAGE, 0x7000, PAGE)
        self.assertEqual(bytes(region.view[:5]), b"hello")
        region.view[:5] = b"olleh"
        self.assertEqual(os.pread(fd, 5, PAGE), b"olleh")

    def test_offset_and_size_may_be_odd(self) -> None:
        """rule 10: the mapping is of whole pages, the region begins inside."""
        fd = self.memfd(4 * PAGE)
        os.pwrite(fd, b"odd", PAGE + 123)
        region = GuestRegionMmap(fd, 0x1000, PAGE + 77, 0, PAGE + 123)
        self.assertEqual((bytes(region.view[:3]), len(region.view)), (b"odd", PAGE + 77))

    def test_fd_stays_the_callers(self) -> None:
        fd = os.memfd_create("test")
        os.ftruncate(fd, PAGE)
        region = GuestRegionMmap(fd, 0, PAGE, 0)
        os.close(fd)
        region.view[0] = 1

    def test_short_file_is_refused_with_the_likely_cause(self) -> None:
        fd = self.memfd(PAGE)
        with self.raises(GuestMemoryError, r"0x1000 bytes, the region ends at 0x1001: .*truncated"):
            GuestRegionMmap(fd, 0, PAGE, 0, 1)

    def test_what_is_no_memory_is_refused_with_the_likely_cause(self) -> None:
        for fd in (*os.pipe(), os.open("/tmp", os.O_RDONLY)):
            self.addCleanup(os.close, fd)
            with self.raises(GuestMemoryError, "share=on"):
                GuestRegionMmap(fd, 0, PAGE, 0)

    def test_read_only_file_is_refused_with_the_likely_cause(self) -> None:
        fd = os.open(f"/proc/self/fd/{self.memfd(PAGE)}", os.O_RDONLY)
        self.addCleanup(os.close, fd)
        with self.raises(GuestMemoryError, "readonly=on"):
            GuestRegionMmap(fd, 0, PAGE, 0)

    def test_eventfd_is_refused(self) -> None:
        with self.raises(GuestMemoryError, "cannot be mapped|no memory"):
            GuestRegionMmap(self.eventfd(), 0, PAGE, 0)

    def test_ranges_that_are_none_are_refused(self) -> None:
        fd = self.memfd(PAGE)
        for guest_addr, size, user_addr, offset in (0, 0, 0, 0), (2**64 - PAGE, PAGE + 1, 0, 0), (0, PAGE, 2**64 - 1, 0), (0, PAGE, 0, 2**64 - 1):
            with self.raises(GuestMemoryError, "is empty or leaves the address space"):
                GuestRegionMmap(fd, guest_addr, size, user_addr, offset)

    def test_mapping_goes_with_the_last_view(self) -> None:
        before = mapping_count()
        region = GuestRegionMmap.allocate(0, PAGE)
        view = region.view[10:20]
        del region
        self.assertEqual(mapping_count(), before + 1)
        view[0] = 1
        del view
        self.assertEqual(mapping_count(), before)

    def test_allocated_region_gives_its_fd_and_others_have_none(self) -> None:
        region = GuestRegionMmap.allocate(0, PAGE)
        other = GuestRegionMmap(region.fileno(), 0, PAGE, 0)
        region.view[5] = 7
        self.assertEqual(other.view[5], 7)
        self.assertEqual(region.user_addr, region.host_addr)
        with self.raises(ValueError, "shared by somebody else"):
            other.fileno()

    def test_hugetlb_region(self) -> None:
        """A file of huge pages: any size and offset, munmap of whole huge pages."""
        with _huge_pages(self, 3) as huge:
            fd = os.memfd_create("huge", os.MFD_HUGETLB)
            self.addCleanup(os.close, fd)
            os.ftruncate(fd, 3 * huge)
            before = mapping_count()
            region = GuestRegionMmap(fd, RAM, huge + 5 * PAGE, 0, huge - 3 * PAGE)
            region.view[3 * PAGE] = 42
            region.view[-1] = 43
            whole = GuestRegionMmap(fd, 0, 3 * huge, 0)
            self.assertEqual((whole.view[huge], whole.view[2 * huge + 2 * PAGE - 1]), (42, 43))
            self.assertTrue(region.only_here)
            del region, whole
            self.assertEqual(mapping_count(), before)


@contextlib.contextmanager
def _huge_pages(test: unittest.TestCase, count: int) -> Iterator[int]:
    """The size of a huge page, with that many free ones; skips the test where there are none."""
    knob = "/proc/sys/vm/nr_hugepages"
    with open("/proc/meminfo") as info:
        values = {line.split(":")[0]: int(line.split()[1]) for line in info}
    size = values.get("Hugepagesize", 0) << 10
    if values.get("HugePages_Free", 0) >= count:
        yield size
        return
    with open(knob) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one run of these tests at a time
        before = int(file.read())
        try:
            _set_huge_pages(knob, before + count)
        except OSError as error:
            test.skipTest(f"no huge pages, and {knob} cannot be written: {error.strerror}")
        try:
            with open(knob) as now:
                if int(now.read()) < before + count:
                    test.skipTest("the kernel has no huge pages to give")
            yield size
        finally:
            _set_huge_pages(knob, before)


def _set_huge_pages(knob: str, count: int) -> None:
    with open(knob, "w") as file:
        file.write(str(count))


class MemoryTests(CoreTest):
    """GuestMemoryMmap and GuestMemoryAtomic."""

    def test_no_regions_at_all(self) -> None:
        memory = GuestMemoryMmap()
        self.assertEqual((memory.regions, memory.find_region(0), memory.read(0, 0)), ((), None, b""))
        with self.raises(GuestMemoryError, "leave RAM"):
            memory.read(0, 1)
        with self.raises(GuestMemoryError, "in no region"):
            memory.user_to_guest(0)

    def test_509_regions_and_not_one_more(self) -> None:
        fd = self.memfd(PAGE)
        regions = [GuestRegionMmap(fd, n * PAGE, PAGE, n * PAGE) for n in range(MAX_REGIONS)]
        memory = GuestMemoryMmap(regions)
        for n in 0, 1, MAX_REGIONS // 2, MAX_REGIONS - 1:
            self.assertIs(memory.find_region(n * PAGE + 5), regions[n])
        self.assertIsNone(memory.find_region(MAX_REGIONS * PAGE))
        with self.raises(GuestMemoryError, "510 memory regions, more than 509"):
            memory.insert_region(GuestRegionMmap(fd, MAX_REGIONS * PAGE, PAGE, MAX_REGIONS * PAGE))

    def test_overlap_is_refused_in_guest_and_in_user_addresses(self) -> None:
        """rule 13"""
        fd = self.memfd(4 * PAGE)
        one = GuestRegionMmap(fd, 0x10000, 2 * PAGE, 0x50000)
        with self.raises(GuestMemoryError, "overlap in guest addresses"):
            GuestMemoryMmap([one, GuestRegionMmap(fd, 0x10000 + 2 * PAGE - 1, PAGE, 0)])
        with self.raises(GuestMemoryError, "overlap in user addresses"):
            GuestMemoryMmap([one, GuestRegionMmap(fd, 0, PAGE, 0x50000 - 1)])
        GuestMemoryMmap([one, GuestRegionMmap(fd, 0x10000 + 2 * PAGE, PAGE, 0x50000 - PAGE)])

    def test_reads_and_writes_span_adjacent_regions(self) -> None:
        memory = GuestMemoryMmap.from_ranges([(0x10000, PAGE), (0x10000 + PAGE, PAGE), (0x10000 + 2 * PAGE, PAGE)])
        data = bytes(range(256)) * 20
        memory.write(0x10000 + PAGE - 100, data)
        self.assertEqual(memory.read(0x10000 + PAGE - 100, len(data)), data)
        self.assertEqual([len(v) for v in memory.views(0x10000 + PAGE - 100, PAGE + 200)], [100, PAGE, 100])
        with self.raises(GuestMemoryError, "not in one region"):
            memory.view(0x10000 + PAGE - 1, 2)

    def test_ranges_across_a_hole_are_refused_and_nothing_is_written(self) -> None:
        memory = GuestMemoryMmap.from_ranges([(0x10000, PAGE), (0x10000 + 2 * PAGE, PAGE)])
        with self.raises(GuestMemoryError, rf"leave RAM at {0x10000 + PAGE:#x}"):
            memory.write(0x10000 + PAGE - 4, b"12345678")
        self.assertEqual(memory.read(0x10000 + PAGE - 4, 4), bytes(4))
        for address, length in (0xFFFF, 2), (0x10000 + 3 * PAGE - 1, 2), (2**64 - 1, 1), (0x10000, 2**63):
            with self.raises(GuestMemoryError, ""):
                memory.views(address, length)
            with self.raises(GuestMemoryError, ""):
                memory.view(address, length)

    def test_user_addresses_are_translated_within_one_region(self) -> None:
        fd = self.memfd(2 * PAGE)
        memory = GuestMemoryMmap([GuestRegionMmap(fd, 0x10000, PAGE, 0x7F0000), GuestRegionMmap(fd, 0x50000, PAGE, 0x100000, PAGE)])
        self.assertEqual(memory.user_to_guest(0x7F0010), 0x10010)
        self.assertEqual(memory.user_to_guest(0x100000, PAGE), 0x50000)
        for address, length in (0x7F0000 + PAGE, 1), (0x7EFFFF, 1), (0x7F0000, PAGE + 1), (0, 1):
            with self.raises(GuestMemoryError, "in no region"):
                memory.user_to_guest(address, length)

    def test_region_is_removed_by_guest_address_user_address_and_size(self) -> None:
        """rule 11: by three fields, whatever the offset."""
        fd = self.memfd(4 * PAGE)
        memory = GuestMemoryMmap([GuestRegionMmap(fd, 0x10000, PAGE, 0x50000, PAGE)])
        for wrong in (0x10001, 0x50000, PAGE), (0x10000, 0x50001, PAGE), (0x10000, 0x50000, PAGE + 1):
            with self.raises(GuestMemoryError, r"no region of .* \(have region"):
                memory.remove_region(*wrong)
        self.assertEqual(memory.remove_region(0x10000, 0x50000, PAGE).regions, ())

    def test_snapshot_outlives_a_swap(self) -> None:
        atomic = GuestMemoryAtomic()
        self.assertEqual(atomic.memory().regions, ())
        atomic.replace(GuestMemoryMmap.from_ranges([(0, PAGE)]))
        snapshot = atomic.memory()
        view = snapshot.view(0, 4)
        before = mapping_count()
        atomic.replace(GuestMemoryMmap())
        del snapshot
        view[:] = b"safe"
        self.assertEqual(mapping_count(), before)
        del view
        self.assertEqual(mapping_count(), before - 1)


class FlatTests(CoreTest):
    """FlatMemory: most of guest RAM as one view, by guest address."""

    def holds(self, memory: GuestMemoryMmap, flat: list[tuple[int, int]]) -> None:
        """These ranges are in the view, and the same memory as the regions."""
        view, first, second = memory.flat
        self.assertEqual([one for one in (first, second) if one != (0, 0)], flat)
        for start, end in flat:
            for address in start, (start + end) // 2, end - 4:
                memory.write(address, address.to_bytes(8, "little")[:4])
                self.assertEqual(bytes(view[address : address + 4]), memory.read(address, 4))
                view[address : address + 4] = b"flat"
                self.assertEqual(memory.read(address, 4), b"flat")
                self.assertEqual(memory.guest_ranges(view[address : address + 4]), [(address, 4)])
                self.assertEqual(memory.guest_ranges(memory.views(address, 4)[0]), [(address, 4)])

    def test_no_memory(self) -> None:
        self.holds(GuestMemoryMmap(), [])

    def test_one_region(self) -> None:
        """Is used as it is mapped; anywhere below 2⁶³."""
        before = mapping_count()
        for address in 0, 0x10000, 0x10010, 1 << 40, 0x7FFF_FFFF_0000:
            memory = GuestMemoryMmap.from_ranges([(address, 4 * PAGE)])
            self.holds(memory, [(address, address + 4 * PAGE)])
            self.assertEqual(mapping_count(), before + 1)
            del memory
        self.holds(GuestMemoryMmap.from_ranges([((1 << 64) - PAGE, PAGE)]), [])

    def test_regions_side_by_side(self) -> None:
        """Those that touch are one range; the two largest ranges count, the larger one first."""
        memory = GuestMemoryMmap.from_ranges([(0, 2 * PAGE), (2 * PAGE, PAGE), (1 << 32, PAGE), ((1 << 32) + PAGE, 8 * PAGE), (1 << 33, PAGE)])
        self.holds(memory, [(1 << 32, (1 << 32) + 9 * PAGE), (0, 3 * PAGE)])
        before = mapping_count()
        view = memory.flat.view[:4]
        del memory
        self.assertEqual(mapping_count(), before - 5, "what is left is held by the view")
        view[:] = b"safe"
        del view
        self.assertLess(mapping_count(), before - 5)

    def test_509_regions(self) -> None:
        self.holds(GuestMemoryMmap.from_ranges([(n * 2 * PAGE, PAGE) for n in range(MAX_REGIONS)]), [(0, PAGE), (2 * PAGE, 3 * PAGE)])

    def test_what_cannot_be_side_by_side(self) -> None:
        """Then the largest region is it: too far apart, within a page of another, at an offset in its page, watched for page faults, huge pages."""
        self.holds(GuestMemoryMmap.from_ranges([(0, PAGE), (1 << 50, 2 * PAGE)]), [(1 << 50, (1 << 50) + 2 * PAGE)])
        self.holds(GuestMemoryMmap.from_ranges([(0, PAGE - 64), (PAGE - 64, 2 * PAGE)]), [(PAGE - 64, 3 * PAGE - 64)])
        fd = self.memfd(4 * PAGE)
        odd = GuestRegionMmap(fd, 0x10000, 2 * PAGE, 0x10000, 64)
        self.holds(GuestMemoryMmap([odd, GuestRegionMmap(fd, 0x20000, PAGE, 0, 2 * PAGE)]), [(0x10000, 0x10000 + 2 * PAGE)])
        same = GuestRegionMmap(fd, 0x10040, 2 * PAGE, 0x10000, 64)  # the offset is that of its place
        self.holds(
            GuestMemoryMmap([same, GuestRegionMmap(fd, 0x20000, PAGE, 0, 3 * PAGE)]), [(0x10040, 0x10040 + 2 * PAGE), (0x20000, 0x20000 + PAGE)]
        )
        small, large = (GuestRegionMmap.allocate(address, size) for address, size in ((0, PAGE), (0x10000, 2 * PAGE)))
        large.only_here = True
        self.holds(GuestMemoryMmap([small, large]), [(0x10000, 0x10000 + 2 * PAGE)])
        large.only_here, small.only_here = False, True
        self.holds(GuestMemoryMmap([small, large]), [(0x10000, 0x10000 + 2 * PAGE)])

    def test_no_room(self) -> None:
        """Address space that is limited: it goes without."""
        memory = GuestMemoryMmap.from_ranges([(0, PAGE), (1 << 40, 2 * PAGE)])
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 40, limits[1]))
        try:
            self.holds(memory, [(1 << 40, (1 << 40) + 2 * PAGE)])
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


class OrderTests(CoreTest):
    """The fence and the atomic OR."""

    def test_fence_is_callable_again_and_again_and_cheap(self) -> None:
        fence = Fence()

        def cost() -> float:
            start = time.perf_counter()
            for _ in range(2000):
                fence()
            return (time.perf_counter() - start) / 2000

        wait_until(lambda: cost() < 5e-6, "a fence to take less than 5 µs, when nothing else takes the CPU")

    def test_fence_is_a_release_and_then_an_acquire(self) -> None:
        """Its argument stands on these two, in this order; on x86-64 nothing else would show that they are gone."""
        fence: Any = Fence()
        seen: list[str] = []
        release, acquire = fence._release, fence._acquire
        fence._release = lambda: (seen.append("release"), release())[1]
        fence._acquire = lambda: (seen.append("acquire"), acquire())[1]
        fence()
        self.assertEqual(seen, ["release", "acquire"])

    def test_atomic_or_of_every_shape_of_mask(self) -> None:
        word = GuestRegionMmap.allocate(0, PAGE).view[8:12]
        number = word.cast("I")
        masks = [0, 1, 0x7FF, 0x800, 0xFFF, 0x1000, 0x80000000, 0xFFFFFFFF, 0xFFFFF800, 0xFFFFF7FF, 0xFFFFF000, 0x12345678, 0xAAAAAAAA]
        for mask in masks + [1 << bit for bit in range(32)] + [(1 << bit) - 1 for bit in range(33)]:
            for before in 0, 0x40010200:
                number[0] = before
                atomic_or(word, mask)
                self.assertEqual(number[0], before | mask, hex(mask))

    def test_atomic_or_touches_its_word_alone(self) -> None:
        view = GuestRegionMmap.allocate(0, PAGE).view
        atomic_or(view[4:8], 0xFFFFFFFF)
        self.assertEqual(bytes(view[:12]), bytes(4) + b"\xff" * 4 + bytes(4))

    def test_atomic_or_wants_four_aligned_bytes(self) -> None:
        view = GuestRegionMmap.allocate(0, PAGE).view
        for wrong in view[0:3], view[0:8], view[1:5], view[2:6], view[0:0]:
            with self.raises(ValueError, "4 bytes aligned to 4"):
                atomic_or(wrong, 1)

    def test_atomic_or_loses_no_bit_to_another_process(self) -> None:
        """The other one sets a bit that is set, again and again: a read-modify-write would write back what it read, without our new bits."""
        region = GuestRegionMmap.allocate(0, PAGE)
        source = (
            "region = guest_memory.GuestRegionMmap(int(sys.argv[1]), 0, 4096, 0)\n"
            "word, stop = region.view[64:68], region.view[128:132]\n"
            "print('ready', flush=True)\n"
            "while not stop[0]:\n"
            "    for _ in range(100):\n"
            "        guest_memory.atomic_or(word, 1 << 31)\n"
        )
        child = program(self, source, str(region.fileno()), pass_fds=[region.fileno()])
        assert child.stdout
        self.assertEqual(child.stdout.readline(), "ready\n")
        word = region.view[64:68]
        number = word.cast("I")
        lost = 0
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            number[0] = 1 << 31
            for bit in range(31):
                atomic_or(word, 1 << bit)
            lost += number[0] != 0xFFFFFFFF
        region.view[128] = 1
        self.assertEqual((child.wait(PATIENCE), lost), (0, 0))


def program(test: CoreTest, source: str, *arguments: str, pass_fds: Sequence[int] = (), **options: Any) -> subprocess.Popen[str]:
    """Run Python source in which vhost_user, vring and guest_memory are these modules. It is killed with the test."""
    if BUNDLE:
        load = f"import sys, importlib.util\nspec = importlib.util.spec_from_file_location('vhost_user', {os.path.abspath(BUNDLE)!r})\n"
        load += "vhost_user = vring = guest_memory = importlib.util.module_from_spec(spec)\n"
        load += "sys.modules['vhost_user'] = vhost_user\nspec.loader.exec_module(vhost_user)\n"
    else:
        prefix = f"from {__package__} import" if __package__ else "import"
        load = f"import sys\n{prefix} vhost_user, vring, guest_memory\n"
    path = os.path.join(test.folder(), "program.py")
    with open(path, "w") as file:
        file.write("from __future__ import annotations\n" + load + source)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(os.path.abspath(entry) for entry in sys.path))
    environment.update(options.pop("environment", {}))
    launcher = options.pop("launcher", [])
    child = subprocess.Popen(
        [sys.executable, *launcher, path, *arguments],
        pass_fds=pass_fds,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )

    def end() -> None:
        child.kill()
        child.communicate()

    test.addCleanup(end)
    return child


# ---------------------------------------------------------------------------------------------------------------------------
# Rings alone: one that a hostile driver writes by hand
# ---------------------------------------------------------------------------------------------------------------------------

RINGS = 0x10000  # guest addresses of the rings, of the indirect tables, and of the buffers of a RawRing
TABLES = 0x20000
DATA = 0x30000
END = 0x50000  # of RAM. A second region lies behind the first, and a third behind a hole
FAR = 0x60000


def areas_at(base: int, kind: type[DriverQueue], size: int) -> tuple[int, int, int]:
    """Where descriptors, driver area and device area of a queue lie, from `base` on."""
    _, (desc, driver, device) = kind.layout(size)
    return base + desc, base + driver, base + device


Descriptor = tuple[int, int, int, int]
"""Guest address, length, flags, and next (split) or id (packed)."""


class RawRing:
    """A running ring, and a driver that writes each descriptor by hand, so that it can lie.

    `offer` makes chains available as a driver does, `run` lets the device serve them, `returned` tells what came back.
    """

    def __init__(
        self, packed: bool = False, size: int = 8, features: int = INDIRECT | EVENT_IDX, kind: type[VringState] = VringState, base: int | None = None
    ) -> None:
        self.packed = packed
        self.size = size
        self.atomic = GuestMemoryAtomic(GuestMemoryMmap.from_ranges([(RINGS, 0x30000), (RINGS + 0x30000, 0x10000), (FAR, 0x1000)]))
        self.memory = self.atomic.memory()
        layout = PackedDriverQueue if packed else SplitDriverQueue
        _, areas = layout.layout(size)
        desc, driver, device = (RINGS + offset for offset in areas)
        self.desc = self.memory.view(desc, 16 * size)
        self.driver_area = self.memory.view(driver, 4 if packed else 6 + 2 * size).cast("H")
        self.device_area = self.memory.view(device, 4 if packed else 6 + 8 * size)
        self.err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.index = self.seen = 0  # split: available index, used index; packed: positions
        self.wrap = self.used_wrap = 1
        self.extent: dict[int, int] = {}  # packed: descriptors of the chain with that id
        self.vring = kind(self.atomic, max(size, 256))
        self.vring.set_err(os.dup(self.err))
        self.vring.set_call(os.dup(self.call))
        self.vring.set_queue_size(size)
        self.vring.set_queue_features(features | VERSION_1 | (PACKED if packed else 0))
        self.vring.set_queue_info(desc, driver, device)
        if base is not None:
            self.index = self.seen = base
            struct.pack_into("<H", self.device_area, 2, base)
            self.driver_area[1] = base
            self.vring.set_queue_next_avail(base)
        self.vring.set_queue_ready(True)
        self.vring.set_enabled(True)
        self.vring.start()
        self.seen_chains: list[tuple[bytes, int]] = []

    def __enter__(self) -> RawRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.vring.reset()
        self.vring.set_err(None)
        os.close(self.err)
        os.close(self.call)

    # The driver

    def put(self, slot: int, descriptor: Descriptor) -> None:
        """Write one descriptor."""
        struct.pack_into("<QIHH", self.desc, 16 * slot, *(descriptor if not self.packed else (*descriptor[:2], descriptor[3], descriptor[2])))

    def show(self, *heads: int) -> None:
        """Split: make descriptors available as heads of chains."""
        for head in heads:
            self.driver_area[2 + self.index % self.size] = head
            self.index = (self.index + 1) & 0xFFFF
        self.driver_area[1] = self.index

    def offer(self, *parts: tuple[int, int, int], slot: int = 0) -> int:
        """Make a chain of (address, length, flags) available; NEXT is added to all but the last. Returns its id.

        Split: the descriptors from `slot` on. Packed: where the ring is, and `slot` is the id."""
        if self.packed:
            self.extent[slot] = len(parts)
            for number, (address, length, flags) in enumerate(parts, 1):
                flags |= (F_NEXT if number < len(parts) else 0) | (0x80 if self.wrap else 0x8000)
                self.put(self.index, (address, length, flags, slot))
                self.index += 1
                if self.index == self.size:
                    self.index, self.wrap = 0, self.wrap ^ 1
        else:
            for number, (address, length, flags) in enumerate(parts, 1):
                more = number < len(parts)
                self.put(slot + number - 1, (address, length, flags | (F_NEXT if more else 0), slot + number if more else 0))
            self.show(slot)
        return slot

    def table(self, *descriptors: Descriptor, at: int = TABLES) -> tuple[int, int]:
        """Write an indirect table as it is told. Returns where it is, and its length."""
        fields = [(a, n, f, x) if not self.packed else (a, n, x, f) for a, n, f, x in descriptors]
        content = b"".join(struct.pack("<QIHH", *each) for each in fields)
        self.memory.write(at, content)
        return at, len(content)

    def request(self, data: bytes = b"ping", slot: int = 0) -> int:
        """An honest request: 4 bytes to read, 8 to write."""
        self.memory.write(DATA, data)
        return self.offer((DATA, len(data), 0), (DATA + 0x100, 8, F_WRITE), slot=slot)

    def returned(self) -> list[tuple[int, int]]:
        """(id, length) of what came back since the last time."""
        found: list[tuple[int, int]] = []
        while True:
            if self.packed:
                _, length, identity, flags = struct.unpack_from("<QIHH", self.desc, 16 * self.seen)
                if flags & 0x8080 != (0x8080 if self.used_wrap else 0):
                    return found
                self.seen += self.extent[identity]
                if self.seen >= self.size:
                    self.seen, self.used_wrap = self.seen - self.size, self.used_wrap ^ 1
            else:
                if struct.unpack_from("<H", self.device_area, 2)[0] == self.seen:
                    return found
                identity, length = struct.unpack_from("<II", self.device_area, 4 + 8 * (self.seen % self.size))
                self.seen = (self.seen + 1) & 0xFFFF
            found.append((identity, length))

    # The device

    def process(self, vring: VringT) -> None:
        """Echo, and note what was seen."""
        for chain in vring:
            data = chain.read()
            self.seen_chains.append((data, chain.writable_len))
            vring.add_used(chain, chain.write(data[::-1]))

    def run(self) -> list[tuple[int, int]]:
        """Let the device serve the ring. Returns what came back."""
        self.serve(self.process)
        return self.returned()

    def serve(self, process: Callable[[VringT], object]) -> None:
        """As a worker does, until nothing is left."""
        for _ in range(1000):
            if not self.vring.drain(process):
                return
        raise AssertionError("the device is never done")

    def calls(self) -> int:
        """How often the driver was notified since the last time."""
        try:
            return os.eventfd_read(self.call)
        except BlockingIOError:
            return 0

    def is_broken(self) -> bool:
        """Whether the ring says so, in each of three ways."""
        told = is_readable(self.err)
        if (self.vring.broken is not None) != told or (told and self.vring.active):
            raise AssertionError(f"broken {self.vring.broken}, err eventfd {told}, active {self.vring.active}")
        return told


class RingTest(CoreTest):
    """A test of a ring alone, in both formats."""

    def rings(self, size: int = 8, features: int = INDIRECT | EVENT_IDX, kind: type[VringState] = VringState) -> Iterator[RawRing]:
        """A split one, then a packed one."""
        for packed in False, True:
            with RawRing(packed, size, features, kind) as ring:
                try:
                    yield ring
                except GeneratorExit:  # the loop's body failed
                    print(f"\n{self.id()} fails on the {'packed' if packed else 'split'} ring", file=sys.stderr)
                    raise

    def lives(self, ring: RawRing) -> None:
        """The ring works after all that."""
        self.assertFalse(ring.is_broken(), ring.vring.broken)
        ring.returned()
        slot = ring.request(b"live", slot=1)
        self.assertEqual(ring.run(), [(slot, 4)])
        self.assertEqual(ring.memory.read(DATA + 0x100, 4), b"evil")
        self.assertEqual(ring.vring.in_flight, 0)


class HonestRingTests(RingTest):
    """What an honest driver may do."""

    def test_chain_is_read_and_written(self) -> None:
        for ring in self.rings():
            slot = ring.request()
            self.assertEqual(ring.run(), [(slot, 4)])
            self.assertEqual(ring.memory.read(DATA + 0x100, 8), b"gnip\0\0\0\0")

    def test_views_are_of_guest_ram_itself(self) -> None:
        for ring in self.rings():
            ring.offer((DATA, 3, 0), (DATA + 8, 2, 0), (DATA + 16, 5, F_WRITE), (DATA + 32, 1, F_WRITE))
            for chain in ring.vring:
                self.assertEqual([len(part) for part in chain.readable], [3, 2])
                self.assertEqual([len(part) for part in chain.writable], [5, 1])
                self.assertEqual((chain.readable_len, chain.writable_len), (5, 6))
                ring.memory.write(DATA, b"abc")
                self.assertEqual(bytes(chain.readable[0]), b"abc")
                chain.writable[0][:] = b"12345"
                ring.vring.add_used(chain, 5)
            self.assertEqual(ring.memory.read(DATA + 16, 5), b"12345")

    def test_cursors_cross_the_parts_and_stop_at_the_end(self) -> None:
        for ring in self.rings():
            ring.memory.write(DATA, b"abcdefgh")
            ring.offer((DATA, 3, 0), (DATA + 3, 1, 0), (DATA + 4, 4, 0), (DATA + 100, 2, F_WRITE), (DATA + 102, 4, F_WRITE))
            for chain in ring.vring:
                self.assertEqual([chain.read(n) for n in (0, 1, 4, 99, 1)], [b"", b"a", b"bcde", b"fgh", b""])
                self.assertEqual([chain.write(d) for d in (b"1", b"", b"2345", b"6789", b"x")], [1, 0, 4, 1, 0])
                ring.vring.add_used(chain, 6)
            self.assertEqual(ring.memory.read(DATA + 100, 8), b"123456\0\0")

    def test_indirect_chain(self) -> None:
        for ring in self.rings():
            ring.memory.write(DATA, b"ping")
            where = ring.table((DATA, 4, F_NEXT, 1), (DATA + 64, 4, F_WRITE, 0))
            slot = ring.offer((*where, F_INDIRECT))
            self.assertEqual(ring.run(), [(slot, 4)])
            self.assertEqual(ring.memory.read(DATA + 64, 4), b"gnip")

    def test_split_indirect_table_follows_next_in_any_order(self) -> None:
        with RawRing() as ring:
            ring.memory.write(DATA, b"abcd")
            where = ring.table((DATA, 2, F_NEXT, 2), (DATA + 64, 4, F_WRITE, 0), (DATA + 2, 2, F_NEXT, 1))
            self.assertEqual((ring.offer((*where, F_INDIRECT)), ring.run()), (0, [(0, 4)]))
            self.assertEqual(ring.memory.read(DATA + 64, 4), b"dcba")

    def test_packed_indirect_table_ignores_next(self) -> None:
        """virtio 1.3 §2.8.7: of the flags in an indirect table, WRITE alone is valid."""
        with RawRing(packed=True) as ring:
            ring.memory.write(DATA, b"ping")
            where = ring.table((DATA, 4, 0, 77), (DATA + 64, 4, F_WRITE | F_NEXT, 0))
            self.assertEqual((ring.offer((*where, F_INDIRECT)), ring.run()), (0, [(0, 4)]))

    def test_split_direct_descriptors_followed_by_one_indirect(self) -> None:
        """virtio 1.3 §2.7.5.3.1 allows that."""
        with RawRing() as ring:
            ring.memory.write(DATA, b"abcdef")
            where = ring.table((DATA + 4, 2, F_NEXT, 1), (DATA + 64, 8, F_WRITE, 0))
            for _ in range(3):
                ring.offer((DATA, 4, 0), (*where, F_INDIRECT))
                self.assertEqual(ring.run(), [(0, 6)])
                self.assertEqual(ring.memory.read(DATA + 64, 6), b"fedcba")

    def test_indirect_table_longer_than_the_queue(self) -> None:
        """Linux drivers go by seg_max, and not by the queue size."""
        for ring in self.rings():
            entries = [(DATA + n, 1, F_NEXT, n + 1) for n in range(20)] + [(DATA + 0x100, 32, F_WRITE, 0)]
            ring.memory.write(DATA, bytes(range(20)))
            ring.offer((*ring.table(*entries), F_INDIRECT))
            self.assertEqual(ring.run(), [(0, 20)])
            self.assertEqual(ring.memory.read(DATA + 0x100, 20), bytes(range(20))[::-1])

    def test_zero_length_descriptors(self) -> None:
        for ring in self.rings():
            ring.offer((DATA, 0, 0), (DATA, 4, 0), (0, 0, 0), (DATA + 64, 0, F_WRITE), (DATA + 64, 4, F_WRITE))
            ring.memory.write(DATA, b"ping")
            self.assertEqual(ring.run(), [(0, 4)])
            ring.offer((0xDEAD0000, 0, 0))  # no byte of it is touched, wherever it is
            self.assertEqual(ring.run(), [(0, 0)])
            self.assertEqual((ring.seen_chains[-1], ring.vring.malformed), ((b"", 0), 0))

    def test_buffer_across_adjacent_regions(self) -> None:
        """Two parts for the device, one buffer for the driver."""
        for ring in self.rings():
            border = RINGS + 0x30000
            ring.memory.write(border - 2, b"ping")
            ring.offer((border - 2, 4, 0), (border + 0x1000, 4, F_WRITE))
            self.assertEqual((ring.run(), ring.seen_chains), ([(0, 4)], [(b"ping", 4)]))

    def test_same_buffers_again_with_new_content(self) -> None:
        """Parsed chains are remembered; what is in the buffers is not."""
        for ring in self.rings():
            for data in b"1111", b"2222", b"3333", b"4444", b"5555":
                ring.request(data)
                ring.run()
                self.assertEqual(ring.memory.read(DATA + 0x100, 4), data)
            self.assertEqual([data for data, _ in ring.seen_chains], [b"1111", b"2222", b"3333", b"4444", b"5555"])

    def test_same_slot_with_other_shapes(self) -> None:
        """What is remembered of a slot does not outlive a change of its descriptors."""
        for ring in self.rings():
            ring.memory.write(DATA, b"abcdefgh")
            table = ring.table((DATA, 1, F_NEXT, 1), (DATA + 1, 1, 0, 0))
            other = ring.table((DATA + 4, 2, 0, 0), at=TABLES + 0x100)
            shapes: list[tuple[bytes, list[tuple[int, int, int]]]] = [
                (b"ab", [(DATA, 2, 0)]),
                (b"abcd", [(DATA, 2, 0), (DATA + 2, 2, 0)]),
                (b"ab", [(*table, F_INDIRECT)]),
                (b"abc", [(DATA, 2, 0), (DATA + 2, 1, 0)]),
                (b"ef", [(*other, F_INDIRECT)]),
                (b"a", [(DATA, 1, 0)]),
            ]
            order = random.Random(1)
            for _ in range(60):
                expected, parts = order.choice(shapes)
                ring.offer(*parts)
                ring.run()
                self.assertEqual(ring.seen_chains.pop(), (expected, 0))

    def test_indirect_table_with_a_new_content_at_the_same_place(self) -> None:
        for ring in self.rings():
            ring.memory.write(DATA, b"abcdefgh")
            for at, length in (0, 2), (2, 3), (0, 2), (5, 1):
                ring.offer((*ring.table((DATA + at, length, 0, 0)), F_INDIRECT))
                ring.run()
                self.assertEqual(ring.seen_chains.pop()[0], b"abcdefgh"[at : at + length])

    def test_memo_of_the_device_stays_with_its_parts(self) -> None:
        for ring in self.rings():
            memos = []
            where = ring.table((DATA, 4, F_NEXT, 1), (DATA + 64, 4, F_WRITE, 0))
            for _ in range(5):
                ring.offer((*where, F_INDIRECT))
                for chain in ring.vring:
                    memos.append(chain.memo)
                    chain.memo = "kept"
                    ring.vring.add_used(chain, 0)
            self.assertEqual((memos[0], memos[-1]), (None, "kept"))

    def test_queue_of_one_entry(self) -> None:
        for ring in self.rings(size=1):
            for _ in range(5):
                ring.memory.write(DATA, b"ab")
                ring.offer((DATA, 2, 0))
                self.assertEqual(ring.run(), [(0, 0)])
            self.assertEqual(len(ring.seen_chains), 5)

    def test_split_indices_wrap_at_16_bits(self) -> None:
        with RawRing(base=65533) as ring:
            for _ in range(8):
                ring.request()
                self.assertEqual(ring.run(), [(0, 4)])
            self.assertEqual((ring.index, ring.vring.queue_next_avail(), ring.vring.queue_used_idx()), (5, 5, 5))

    def test_split_used_index_is_read_from_memory_on_start(self) -> None:
        """rule 7: the base is the available index alone."""
        with RawRing() as ring:
            ring.vring.stop()
            struct.pack_into("<H", ring.device_area, 2, 7)  # the driver has not seen one more come back
            ring.seen = 7
            ring.index = ring.driver_area[1] = 9
            ring.vring.set_queue_next_avail(9)
            ring.vring.start()
            self.assertEqual(ring.vring.queue_used_idx(), 7)
            ring.request()
            self.assertEqual(ring.run(), [(0, 4)])
            self.assertEqual(ring.vring.queue_used_idx(), 8)

    def test_packed_base_has_both_positions_and_wrap_counters(self) -> None:
        """rule 7"""
        with RawRing(packed=True, size=5) as ring:
            for _ in range(3):  # three times two descriptors: one over the end
                ring.request()
                ring.run()
            self.assertEqual(ring.vring.stop(), 1 | 0 << 15 | 1 << 16 | 0 << 31)
            ring.vring.start()
            ring.request(b"more")
            self.assertEqual(ring.run(), [(0, 4)])
            self.assertEqual(ring.vring.queue_next_avail(), 3 | 3 << 16)
            ring.request(b"in flight")
            [chain] = ring.vring
            self.assertEqual(ring.vring.queue_next_avail(), 0 | 1 << 15 | 3 << 16)
            ring.vring.add_used(chain, 0)
            self.assertEqual(ring.vring.queue_next_avail(), 0 | 1 << 15 | 0 << 16 | 1 << 31)

    def test_packed_base_outside_the_ring_is_refused(self) -> None:
        with RawRing(packed=True, size=5) as ring:
            for base in 5 | 1 << 15, 0x8000 | 5 << 16:
                ring.vring.stop()
                ring.vring.set_queue_next_avail(base)
                with self.raises(VringError, "outside a queue of 5"):
                    ring.vring.start()

    def test_new_packed_ring_with_the_split_rings_base_of_0(self) -> None:
        """User-mode Linux sends that."""
        with RawRing(packed=True) as ring:
            ring.vring.stop()
            ring.vring.set_queue_next_avail(0)
            ring.vring.start()
            ring.request()
            self.assertEqual(ring.run(), [(0, 4)])

    def test_ring_resumes_where_it_stopped(self) -> None:
        for ring in self.rings():
            ring.request()
            self.assertEqual(ring.run(), [(0, 4)])
            base = ring.vring.stop()
            ring.request(slot=2)
            self.assertEqual(ring.run(), [])
            ring.vring.set_queue_next_avail(base)
            ring.vring.start()
            self.assertEqual(ring.run(), [(2, 4)])

    def test_sizes_that_a_format_does_not_have(self) -> None:
        for packed, size in (False, 3), (False, 12), (True, 32769), (False, 65536):
            vring = VringState(GuestMemoryAtomic(GuestMemoryMmap.from_ranges([(0, 1 << 22)])), 1 << 17)
            vring.set_queue_features(PACKED if packed else 0)
            vring.set_queue_size(size)
            vring.set_queue_info(0, 1 << 20, 2 << 20)
            vring.set_queue_ready(True)
            with self.raises(VringError, f"queue of {size} entries"):
                vring.start()
        with self.raises(VringError, "the device allows 1 to"):
            vring.set_queue_size(0)
        with self.raises(VringError, "the device allows 1 to"):
            vring.set_queue_size((1 << 17) + 1)

    def test_areas_must_be_aligned_and_in_ram(self) -> None:
        memory = GuestMemoryAtomic(GuestMemoryMmap.from_ranges([(0x10000, 0x10000)]))
        for features, areas in (
            (0, (0x10008, 0x11000, 0x12000)),
            (0, (0x10000, 0x11001, 0x12000)),
            (0, (0x10000, 0x11000, 0x12002)),
            (PACKED, (0x10008, 0x11000, 0x12000)),
            (PACKED, (0x10000, 0x11002, 0x12000)),
            (PACKED, (0x10000, 0x11000, 0x12002)),
            (0, (0x20000 - 16, 0x11000, 0x12000)),
            (0, (0x10000, 0x20000 - 4, 0x12000)),
            (0, (0x10000, 0x11000, 0x20000)),
        ):
            with self.subTest(areas=areas):
                vring = VringState(memory, 8)
                vring.set_queue_features(features)
                vring.set_queue_info(*areas)
                vring.set_queue_ready(True)
                with self.assertRaises((VringError, GuestMemoryError)):
                    vring.start()


class HostileChainTests(RingTest):
    """A chain that breaks the rules is counted, logged, and comes back with length 0; the ring lives."""

    def refused(self, ring: RawRing, reason: str, *parts: tuple[int, int, int]) -> None:
        """The chain is refused for that reason."""
        slot = ring.offer(*parts)
        self.assertEqual(ring.run(), [(slot, 0)], "what came back")
        self.assertEqual((ring.seen_chains, ring.vring.malformed), ([], 1))
        self.expect_log(f"chain {slot} refused: .*{reason}")
        self.lives(ring)

    def test_split_loop(self) -> None:
        """rule 9"""
        with RawRing() as ring:
            for slot in 0, 1, 2:
                ring.put(slot, (DATA, 4, F_NEXT, (slot + 1) % 3))
            ring.show(0)
            self.assertEqual((ring.run(), ring.vring.malformed), ([(0, 0)], 1))
            self.expect_log("chain 0 refused: .*loop")
            self.lives(ring)

    def test_split_descriptor_whose_next_is_itself(self) -> None:
        with RawRing() as ring:
            ring.put(3, (DATA, 4, F_NEXT, 3))
            ring.show(3)
            self.assertEqual((ring.run(), ring.vring.malformed), ([(3, 0)], 1))
            self.lives(ring)

    def test_split_next_out_of_range(self) -> None:
        for following in 8, 9, 0xFFFF:
            with RawRing() as ring:
                ring.put(0, (DATA, 4, F_NEXT, following))
                ring.show(0)
                self.assertEqual((ring.run(), ring.vring.malformed), ([(0, 0)], 1))
                self.expect_log(f"next is {following}, the table has 8")
                self.lives(ring)

    def test_split_indirect_table_with_a_loop(self) -> None:
        with RawRing() as ring:
            self.refused(ring, "form a loop", (*ring.table((DATA, 4, F_NEXT, 1), (DATA, 4, F_NEXT, 0)), F_INDIRECT))

    def test_split_indirect_table_with_next_out_of_range(self) -> None:
        with RawRing() as ring:
            self.refused(ring, "next is 2, the (indirect )?table has 2", (*ring.table((DATA, 4, F_NEXT, 1), (DATA, 4, F_NEXT, 2)), F_INDIRECT))

    def test_nested_indirect_table(self) -> None:
        """rule 9"""
        for ring in self.rings():
            inner = ring.table((DATA, 4, 0, 0), at=TABLES + 0x100)
            self.refused(ring, "an indirect descriptor", (*ring.table((*inner, F_INDIRECT, 0)), F_INDIRECT))

    def test_indirect_table_of_odd_size(self) -> None:
        """rule 9"""
        for length in 0, 1, 15, 17, 40:
            for ring in self.rings():
                self.refused(ring, f"table of {length} bytes", (ring.table((DATA, 4, 0, 0))[0], length, F_INDIRECT))

    def test_indirect_table_that_is_too_big(self) -> None:
        for ring in self.rings():
            self.refused(ring, "1025 descriptors on a queue of 8", (TABLES, 16 * 1025, F_INDIRECT))

    def test_indirect_table_outside_ram(self) -> None:
        for at in 0, END - 8, 2**64 - 8:
            for ring in self.rings():
                self.refused(ring, "indirect table: ", (at, 16, F_INDIRECT))

    def test_indirect_and_next(self) -> None:
        for ring in self.rings():
            self.refused(ring, "both INDIRECT and NEXT", (*ring.table((DATA, 4, 0, 0)), F_INDIRECT), (DATA, 4, 0))

    def test_packed_indirect_inside_a_chain(self) -> None:
        """virtio 1.3 §2.8.7: direct descriptors and an indirect table don't mix in the packed ring."""
        with RawRing(packed=True) as ring:
            self.refused(ring, "an indirect descriptor", (DATA, 4, 0), (*ring.table((DATA, 4, 0, 0)), F_INDIRECT))

    def test_indirect_that_was_not_negotiated(self) -> None:
        for ring in self.rings(features=EVENT_IDX):
            self.refused(ring, "INDIRECT_DESC was not negotiated", (*ring.table((DATA, 4, 0, 0)), F_INDIRECT))

    def test_readable_behind_writable(self) -> None:
        for ring in self.rings():
            self.refused(ring, "device-readable descriptor behind", (DATA, 4, 0), (DATA, 4, F_WRITE), (DATA, 4, 0))

    def test_readable_behind_writable_in_an_indirect_table(self) -> None:
        for ring in self.rings():
            self.refused(ring, "device-readable descriptor behind", (*ring.table((DATA, 4, F_WRITE | F_NEXT, 1), (DATA, 4, 0, 0)), F_INDIRECT))

    def test_buffer_outside_ram(self) -> None:
        for address, length in (0, 4), (RINGS - 1, 2), (2**64 - 2, 4), (2**64 - 1, 0xFFFFFFFF), (FAR + 0x1000, 1):
            for ring in self.rings():
                self.refused(ring, "leave RAM", (DATA, 4, 0), (address, length, F_WRITE))

    def test_buffer_across_a_hole(self) -> None:
        for address, length in (END - 4, 8), (END - 4, FAR - END + 8), (FAR + 0xFFF, 2):
            for ring in self.rings():
                self.refused(ring, "leave RAM", (address, length, 0))

    def test_more_than_4_gib_in_one_chain(self) -> None:
        """rule 9: Its length would not fit the used ring. 64 GiB of address space, all of one sparse file."""
        fd = self.memfd(1 << 30)
        for ring in self.rings(size=16):
            big = [GuestRegionMmap(fd, (4 + n) << 30, 1 << 30, (4 + n) << 30) for n in range(4)]
            ring.vring.stop()
            ring.atomic.replace(GuestMemoryMmap([*ring.memory.regions, *big]))
            ring.vring.start()
            gib = 1 << 30
            part = (4 << 30, gib, F_WRITE)
            for parts in [part] * 4, [(4 << 30, 0xFFFFFFFF, F_WRITE), (4 << 30, 1, F_WRITE)], [(4 << 30, gib, 0)] * 3 + [part, part]:
                before = ring.vring.malformed
                ring.offer(*parts)
                self.assertEqual((ring.run(), ring.vring.malformed), ([(0, 0)], before + 1))
            self.expect_log("bytes in one chain")
            ring.offer(*[part] * 3, (4 << 30, gib - 1, F_WRITE))
            ring.run()
            self.assertEqual(ring.seen_chains, [(b"", (1 << 32) - 1)])

    def test_bad_chains_among_good_ones(self) -> None:
        """rule 9: each is given back with length 0: Each comes back once, the bad ones with length 0."""
        for ring in self.rings(size=32):
            ring.memory.write(DATA, b"ping")
            for n in range(8):
                ring.offer((DATA, 4, 0), (DATA + 64, 4, F_WRITE), slot=2 * n) if n % 3 else ring.offer((0, 4, 0), (DATA, 1, 0), slot=2 * n)
            self.assertEqual(sorted(ring.run()), [(2 * n, 4 if n % 3 else 0) for n in range(8)])
            self.assertEqual(ring.vring.malformed, 3)
            self.lives(ring)

    def test_bad_chains_are_logged_once_in_a_while(self) -> None:
        for ring in self.rings():
            self._log.lines.clear()
            for _ in range(200):
                ring.offer((0, 4, 0))
                self.assertEqual(ring.run(), [(0, 0)])
            self.assertEqual(ring.vring.malformed, 200)
            self.assertLess(len([line for line in self._log.lines if "refused" in line]), 20)

    def test_more_bad_chains_than_one_look_takes(self) -> None:
        for ring in self.rings(size=128):
            for n in range(100):
                ring.offer((0, 4, 0), slot=n)
            self.assertEqual(ring.run(), [(n, 0) for n in range(100)])
            self.lives(ring)

    def test_indirect_table_that_changes_after_it_was_read(self) -> None:
        """The copy is checked and the copy is used; the chain in hand stays what it was."""
        for ring in self.rings():
            ring.memory.write(DATA, b"ping")
            ring.offer((*ring.table((DATA, 4, F_NEXT, 1), (DATA + 64, 4, F_WRITE, 0)), F_INDIRECT))
            for chain in ring.vring:
                ring.table((0, 0xFFFFFFFF, F_NEXT, 9), (2**64 - 1, 0xFFFFFFFF, F_WRITE | F_INDIRECT, 9))
                ring.put(0, (0, 0xFFFFFFFF, F_NEXT, 9))
                self.assertEqual(chain.read(), b"ping")
                ring.vring.add_used(chain, chain.write(b"pong"))
            self.assertEqual(ring.memory.read(DATA + 64, 4), b"pong")
            self.assertEqual(ring.returned(), [(0, 4)])

    def test_same_head_made_available_twice_while_in_flight(self) -> None:
        """Both come back, and neither is the other's object."""
        for ring in self.rings():
            ring.request()
            ring.request()
            chains = list(ring.vring)
            self.assertEqual(len(chains), 2)
            self.assertIsNot(chains[0], chains[1])
            for chain in chains:
                ring.vring.add_used(chain, chain.write(chain.read()))
            self.assertEqual(ring.returned(), [(0, 4), (0, 4)])
            self.lives(ring)

    def test_same_indirect_table_in_two_chains_in_flight(self) -> None:
        for ring in self.rings():
            where = ring.table((DATA, 4, F_NEXT, 1), (DATA + 64, 4, F_WRITE, 0))
            for _ in range(2):  # the second time, it is remembered
                ring.offer((*where, F_INDIRECT), slot=0)
                ring.offer((*where, F_INDIRECT), slot=1)
                chains = list(ring.vring)
                self.assertEqual([chain.id for chain in chains], [0, 1])
                for chain in reversed(chains):
                    ring.vring.add_used(chain, 1 + chain.id)
                self.assertEqual(ring.returned(), [(1, 2), (0, 1)])

    def test_random_bytes_in_the_ring(self) -> None:
        """Nothing escapes, nothing hangs, nothing outside RAM is touched."""
        for packed in False, True:
            with self.seeded(packed=packed) as rng:
                for _ in range(150):
                    with RawRing(packed) as ring:
                        for _ in range(4):
                            for at in range(0, 0x200, 16):
                                address = rng.choice((DATA, END - 8, FAR, TABLES, 0, 2**64 - 16, RINGS)) + rng.randrange(16)
                                record = struct.pack("<QIHH", address & (2**64 - 1), rng.choice((0, 4, 16, 32, 48, 2**32 - 1)), 0, 0)
                                extra = struct.pack("<HH", *(rng.choice((0, 1, 2, 3, 7, 8, 0x80, 0x81, 0x82, 0x84, 0xFFFF)) for _ in range(2)))
                                ring.memory.write(TABLES + at, record[:12] + extra)
                                if at < 128:
                                    ring.memory.write(RINGS + at, record[:12] + extra)
                            if not packed:
                                for slot in range(8):
                                    ring.driver_area[2 + slot] = (
                                        rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 9)) if rng.random() < 0.02 else rng.randrange(8)
                                    )
                                ring.driver_area[1] = (ring.driver_area[1] + rng.choice((0, 1, 1, 2, 8, 9))) & 0xFFFF
                            for _ in range(20):
                                if not ring.vring.drain(ring.process):
                                    break
                        ring.is_broken()
                        self.assertGreaterEqual(ring.vring.in_flight, 0)


class RememberedChainTests(RingTest):
    """What a ring keeps of the chains that it has seen."""

    @staticmethod
    def kept(ring: RawRing) -> int:
        """Parts of long chains that are remembered."""
        queue: Any = ring.vring.queue
        chains = queue._known.values() if ring.packed else queue._known
        parts = {id(part) for chain in chains if chain for part in (*chain.readable, *chain.writable)}
        return len(parts | {id(part) for content in queue._long.values() for part in (*content[0], *content[1])})

    def test_memory_for_chains_is_not_the_drivers_choice(self) -> None:
        with mock.patch.object(Queue, "_MOST_KEPT", 100):
            for ring in self.rings(size=32):
                most = 0
                for number in range(60):
                    shape = [(DATA + number + 8 * part, 8, F_WRITE) for part in range(30)]
                    if number % 2:
                        ring.offer((*self.table(ring, shape, TABLES + 0x400 * (number % 8)), F_INDIRECT))
                    else:
                        ring.offer(*shape)
                    self.assertEqual(len(ring.run()), 1)
                    most = max(most, self.kept(ring))
                self.assertGreater(most, 30)
                self.assertLessEqual(most, 100 + 3 * 32)
                self.lives(ring)

    @staticmethod
    def table(ring: RawRing, parts: Sequence[tuple[int, int, int]], at: int) -> tuple[int, int]:
        """An indirect table of one chain."""
        last = len(parts) - 1
        links = ((*part[:2], part[2] | (F_NEXT if number < last else 0), number + 1 if number < last else 0) for number, part in enumerate(parts))
        return ring.table(*links, at=at)

    def test_long_chain_is_forgotten_when_a_short_one_comes_in_its_place(self) -> None:
        """The next ones there are looked at as far as they go, and parsed no more."""
        with RawRing(size=64) as ring:
            queue: Any = ring.vring.queue
            ring.offer(*((DATA + 8 * part, 8, F_WRITE) for part in range(40)))
            ring.run()
            with mock.patch.object(queue, "_parse", wraps=queue._parse) as parse:
                for number in range(5):
                    ring.request(b"%4d" % number)
                    struct.pack_into("<Q", ring.desc, 16 * 2, number)  # behind it
                    ring.run()
                self.assertEqual(parse.call_count, 1)
            # One of no bytes is one of its descriptors as well: another third one is another chain.
            for at in DATA + 0x40, DATA + 0x80:
                ring.memory.write(at, b"%4x" % (at & 0xFF))
                ring.offer((DATA, 0, 0), (at, 4, 0), (DATA + 0x100, 4, F_WRITE))
                ring.run()
                self.assertEqual(ring.memory.read(DATA + 0x100, 4), (b"%4x" % (at & 0xFF))[::-1])


class HostileRingTests(RingTest):
    """A ring that lies is broken until it is started again, and its err eventfd says so."""

    def broken(self, ring: RawRing, reason: str) -> None:
        """The ring breaks, for that reason, and works after a restart."""
        ring.run()
        self.assertTrue(ring.is_broken())
        self.expect_log(f"ring 0 is broken until it is started again: .*{reason}")
        self.assertEqual((ring.run(), ring.vring.drain(ring.process)), ([], False))
        self.assertTrue(ring.vring.wait_idle(0), f"{ring.vring.in_flight} in flight: nobody could stop this ring")
        ring.vring.stop()
        os.eventfd_read(ring.err)
        ring.memory.write(RINGS, bytes(0x2000))
        ring.index = ring.seen = 0
        ring.wrap = ring.used_wrap = 1
        ring.vring.set_queue_next_avail(0x80008000 if ring.packed else 0)
        ring.vring.start()
        self.lives(ring)

    def test_split_head_out_of_range(self) -> None:
        for head in 8, 0xFFFF:
            with RawRing() as ring:
                ring.show(head)
                self.broken(ring, f"descriptor {head} of 8")

    def test_split_available_index_too_far_ahead(self) -> None:
        """rule 9"""
        for index in 9, 1000, 0xFFFF:
            with RawRing() as ring:
                ring.driver_area[1] = index
                self.broken(ring, "ahead of 0")

    def test_split_available_index_too_far_ahead_of_what_is_in_flight(self) -> None:
        """rule 9"""
        with RawRing() as ring:
            for slot in 0, 2, 4:
                ring.request(slot=slot)
            held = list(ring.vring)
            ring.driver_area[1] = 9
            ring.run()
            self.assertTrue(ring.is_broken())
            for chain in held:
                ring.vring.add_used(chain, 0)
            self.assertTrue(ring.vring.wait_idle(0))

    def test_split_available_index_that_goes_back(self) -> None:
        with RawRing() as ring:
            ring.request()
            ring.run()
            ring.driver_area[1] = 0
            self.broken(ring, "65535 ahead of 1")

    def test_packed_chain_longer_than_the_ring(self) -> None:
        with RawRing(packed=True) as ring:
            for slot in range(8):
                ring.put(slot, (DATA, 4, F_NEXT | 0x80, 0))
            self.broken(ring, "more than 8 descriptors")

    def test_packed_more_descriptors_than_the_ring_has(self) -> None:
        """A chain that runs into one that is in flight."""
        with RawRing(packed=True) as ring:
            for slot in range(6):
                ring.offer((DATA, 4, 0), slot=slot)
            held = list(ring.vring)
            ring.offer((DATA, 4, 0), (DATA, 4, 0), (DATA, 4, 0), slot=6)
            ring.run()
            self.assertTrue(ring.is_broken())
            self.expect_log("descriptors (are )?in flight")
            for chain in held:
                ring.vring.add_used(chain, 0)
            self.assertTrue(ring.vring.wait_idle(0))

    def test_lie_behind_a_bad_chain(self) -> None:
        """The bad chain comes back, the ring breaks, and can be stopped."""
        with RawRing() as ring:
            ring.put(0, (0, 4, 0, 0))
            ring.show(0, 99)
            self.broken(ring, "descriptor 99 of 8")
        with RawRing(packed=True) as ring:
            ring.offer((0, 4, 0))
            for slot in range(1, 8):
                ring.put(slot, (DATA, 4, F_NEXT | 0x80, 0))
            ring.put(0, (0, 4, F_NEXT | 0x80, 0))
            self.broken(ring, "more than 8 descriptors")

    def test_lie_behind_a_good_chain(self) -> None:
        with RawRing() as ring:
            ring.request(slot=0)
            ring.show(99)
            self.broken(ring, "descriptor 99 of 8")

    def test_broken_ring_takes_nothing_until_it_is_started_again(self) -> None:
        """rule 9"""
        for ring in self.rings():
            ring.vring.fail("as asked")
            ring.vring.set_enabled(False)
            ring.vring.set_enabled(True)
            ring.vring.start()
            ring.request()
            self.assertEqual(ring.run(), [])
            ring.vring.stop()
            ring.vring.start()
            self.assertEqual(ring.run(), [(0, 4)])

    def test_err_eventfd_is_signalled_once(self) -> None:
        with RawRing() as ring:
            ring.vring.fail("first")
            ring.vring.fail("second")
            self.assertEqual((os.eventfd_read(ring.err), ring.vring.broken), (1, "first"))


# ---------------------------------------------------------------------------------------------------------------------------
# Rings alone: completion, notification, random traffic
# ---------------------------------------------------------------------------------------------------------------------------


class CompletionTests(RingTest):
    """What a device may do with its chains."""

    def offer(self, ring: RawRing, count: int) -> None:
        """One-descriptor chains with ids 0, 1, 2 …"""
        for slot in range(count):
            ring.offer((DATA, 4, F_WRITE), slot=slot)

    def test_completion_out_of_order(self) -> None:
        for ring in self.rings():
            self.offer(ring, 5)
            chains = list(ring.vring)
            self.assertEqual(ring.vring.in_flight, 5)
            for position in 3, 0, 2, 1, 0:
                chain = chains.pop(position)
                ring.vring.add_used(chain, chain.id)
            self.assertEqual(ring.returned(), [(3, 3), (0, 0), (4, 4), (2, 2), (1, 1)])
            self.lives(ring)

    def test_in_order_completions_wait_for_those_before(self) -> None:
        for ring in self.rings(features=INDIRECT | IN_ORDER):
            self.offer(ring, 3)
            chains = list(ring.vring)
            ring.vring.add_used(chains[2], 2)
            self.assertEqual(ring.returned(), [])
            ring.vring.add_used(chains[0], 0)
            self.assertEqual(ring.returned(), [(0, 0)])
            ring.vring.add_used(chains[1], 1)
            self.assertEqual(ring.returned(), [(1, 1), (2, 2)])
            self.lives(ring)

    def test_in_order_bad_chains_keep_their_turn(self) -> None:
        for ring in self.rings(features=INDIRECT | IN_ORDER):
            ring.offer((DATA, 4, F_WRITE), slot=0)
            ring.offer((0, 4, F_WRITE), slot=1)
            ring.offer((DATA, 4, F_WRITE), slot=2)
            chains = list(ring.vring)
            self.assertEqual(ring.returned(), [])
            ring.vring.add_used(chains[1], 2)
            ring.vring.add_used(chains[0], 7)
            self.assertEqual(ring.returned(), [(0, 7), (1, 0), (2, 2)])

    def test_chain_given_back_twice_raises(self) -> None:
        for ring in self.rings():
            ring.request()
            for chain in ring.vring:
                ring.vring.add_used(chain, 0)
                with self.raises(VringError, "add_used twice"):
                    ring.vring.add_used(chain, 0)
            self.assertEqual(ring.returned(), [(0, 0)])

    def test_leaving_the_loop_early_puts_chains_back(self) -> None:
        for ring in self.rings():
            self.offer(ring, 7)
            ids = []
            for _ in range(7):
                for chain in ring.vring:
                    ids.append(chain.id)
                    ring.vring.add_used(chain, 0)
                    break
                self.assertEqual(ring.vring.in_flight, 0)
            self.assertEqual((ids, ring.returned()), (list(range(7)), [(n, 0) for n in range(7)]))

    def test_leaving_the_loop_early_in_order(self) -> None:
        for ring in self.rings(features=IN_ORDER):
            self.offer(ring, 4)
            held = []
            for chain in ring.vring:
                held.append(chain)
                if len(held) == 2:
                    break
            held += list(ring.vring)
            self.assertEqual([chain.id for chain in held], [0, 1, 2, 3])
            for chain in reversed(held):
                ring.vring.add_used(chain, chain.id)
            self.assertEqual(ring.returned(), [(n, n) for n in range(4)])

    def test_exception_in_the_loop_puts_the_rest_back(self) -> None:
        for ring in self.rings():
            self.offer(ring, 4)
            with self.raises(RuntimeError, "as asked"):
                for chain in ring.vring:
                    ring.vring.add_used(chain, 0)
                    raise RuntimeError("as asked")
            self.assertEqual(ring.returned(), [(0, 0)])
            self.assertEqual([chain.id for chain in ring.vring], [1, 2, 3])

    def test_chain_of_a_ring_that_was_stopped_is_dropped(self) -> None:
        for ring in self.rings():
            ring.request()
            [chain] = ring.vring
            ring.vring.stop()
            chain.write(b"late")  # the view is good
            ring.vring.add_used(chain, 4)
            self.assertEqual(ring.returned(), [])

    def test_chain_of_before_a_restart_does_not_come_back_on_the_new_ring(self) -> None:
        for ring in self.rings():
            ring.request()
            [chain] = ring.vring
            ring.vring.stop()
            ring.vring.start()
            ring.vring.add_used(chain, 4)
            self.assertEqual((ring.returned(), ring.vring.in_flight), ([], 0))

    def test_ring_that_is_stopped_while_a_chain_is_completed(self) -> None:
        """By another thread, at any point of add_used: the chain is dropped. Nothing of it comes back when the ring has started again, and nobody
        looks for it without end."""
        for restarts, many, ring in (
            (restarts, many, ring) for restarts in (False, True) for many in (False, True) for ring in self.rings(kind=VringMutex)
        ):
            ring.request()
            [chain] = ring.vring

            def stop(ring: RawRing = ring, restarts: bool = restarts) -> None:
                ring.vring.stop()
                if restarts:
                    ring.vring.start()

            class Interrupted(type(ring.vring.queue)):  # type: ignore[misc]  # mypy knows no class whose base is computed
                @property
                def log(self, stop: Callable[[], None] = stop) -> None:
                    thread = threading.Thread(target=stop)
                    thread.start()
                    thread.join(PATIENCE)

            queue: Any = ring.vring.queue
            del queue.__dict__["log"]
            queue.__class__ = Interrupted
            completing = self.in_thread(lambda: ring.vring.add_used_all([chain]) if many else ring.vring.add_used(chain, 4))  # noqa: B023
            completing.join(PATIENCE)
            self.assertFalse(completing.is_alive(), "it spins")
            self.assertEqual((ring.returned(), ring.vring.in_flight), ([], 0))
            ring.vring.start()
            self.assertEqual((ring.returned(), ring.vring.in_flight), ([], 0))

    def test_batches(self) -> None:
        """All of a batch is the device's; what it completes of one is published before it has the next."""
        for features in 0, INDIRECT, IN_ORDER:
            for ring in self.rings(features=features, size=16):
                ring.vring._chunk = 4
                self.offer(ring, 11)
                held: list[DescriptorChain] = []
                found, published = [], []
                for chains in ring.vring.batches():
                    published.append(len(ring.returned()))
                    found.append([chain.id for chain in chains])
                    held.append(chains.pop())
                    ring.vring.add_used_all(chains)
                self.assertEqual(found, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]])
                self.assertEqual(published, [0, 3, 3 if features != IN_ORDER else 0])
                ring.vring.add_used_all(held)
                returned = [identity for identity, _ in ring.returned()]
                self.assertEqual(returned[-1], 10)
                self.assertEqual(ring.vring.in_flight, 0)
                with self.raises(VringError, "twice"):
                    ring.vring.add_used_all(held[:1])
                self.lives(ring)

    def test_batches_left_early(self) -> None:
        """The batch stays with the device, the rest with the driver."""
        for ring in self.rings(size=16):
            ring.vring._chunk = 4
            self.offer(ring, 7)
            first = next(ring.vring.batches())
            self.assertEqual([[chain.id for chain in chains] for chains in ring.vring.batches()], [[4, 5, 6]])
            ring.vring.add_used_all(first)
            self.assertEqual(ring.returned(), [(identity, 4) for identity in range(4)])

    def test_completion_from_many_threads(self) -> None:
        """None is lost, none comes twice."""
        for ring in self.rings(size=64, features=INDIRECT, kind=VringMutex):
            with self.seeded() as rng:
                counts = dict.fromkeys(range(64), 0)
                for _ in range(20):
                    self.offer(ring, 64)
                    chains = list(ring.vring)
                    rng.shuffle(chains)

                    def complete(some: list[DescriptorChain], vring: VringState = ring.vring) -> None:
                        for chain in some:
                            vring.add_used(chain, chain.id)

                    threads = [threading.Thread(target=complete, args=(chains[n::4],)) for n in range(4)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    for identity, length in ring.returned():
                        self.assertEqual(identity, length)
                        counts[identity] += 1
                self.assertEqual(set(counts.values()), {20})
                self.assertEqual(ring.vring.in_flight, 0)

    def test_completion_while_another_thread_has_the_ring_does_not_wait(self) -> None:
        """Whoever has the ring publishes it when it lets go."""
        for ring in self.rings(kind=VringMutex):
            self.offer(ring, 2)
            chains = list(ring.vring)
            with ring.vring.get_mut():
                thread = threading.Thread(target=ring.vring.add_used, args=(chains[0], 1))
                thread.start()
                thread.join(PATIENCE)
                self.assertFalse(thread.is_alive())
            self.assertEqual(ring.returned(), [(0, 1)])
            with ring.vring.batch():
                thread = threading.Thread(target=ring.vring.add_used, args=(chains[1], 1))
                thread.start()
                thread.join(PATIENCE)
            self.assertEqual(ring.returned(), [(1, 1)])

    def test_wait_idle_waits_for_the_last_completion(self) -> None:
        for ring in self.rings(kind=VringMutex):
            self.offer(ring, 2)
            chains = list(ring.vring)
            self.assertFalse(ring.vring.wait_idle(0.01))
            ring.vring.add_used(chains[0], 0)
            self.assertFalse(ring.vring.wait_idle(0.01))
            vring = ring.vring
            thread = self.in_thread(functools.partial(vring.add_used, chains[1], 0))
            self.assertTrue(vring.wait_idle(PATIENCE))
            thread.join()

    def test_readers_share_and_writers_exclude(self) -> None:
        for ring in self.rings(kind=VringRwLock):
            vring = ring.vring
            assert isinstance(vring, VringRwLock)
            inside = threading.Barrier(2)

            def read(vring: VringRwLock = vring, inside: threading.Barrier = inside) -> None:
                with vring.get_ref():
                    inside.wait(PATIENCE)

            threads = [self.in_thread(read), self.in_thread(read)]
            for thread in threads:
                thread.join()
            entered = threading.Event()

            def write(vring: VringRwLock = vring, entered: threading.Event = entered) -> None:
                with vring.get_mut():
                    entered.set()

            with vring.get_ref():
                writer = self.in_thread(write)
                self.assertFalse(entered.wait(MOMENT))
            writer.join(PATIENCE)
            self.assertTrue(entered.is_set())


def _watch_packed(view: memoryview, spin: Callable[[Callable[[], bool]], None]) -> int:
    """A driver on another CPU, on a packed ring of one entry: look for the used flags, then read the id. Returns how often it was wrong.

    The second half of the view is for talking: the round (0xFFFFFFFF: the end), and the answer."""
    flags = view[:16].cast("H")
    talk = view[0x8000:0x8008].cast("I")
    wrong = n = 0
    while True:
        n += 1
        spin(lambda: talk[0] >= n)  # noqa: B023
        if talk[0] == 0xFFFFFFFF:
            return wrong
        used = 0x8080 if n % 2 else 0
        talk[1] = 2 * n - 1
        for _ in range(1 << 22):
            if flags[7] & 0x8080 == used:
                break
        wrong += flags[6] != n
        talk[1] = 2 * n


def _spin(condition: Callable[[], bool]) -> None:
    """Wait for another process, which is on another CPU if all goes well."""
    deadline = time.monotonic() + 10
    while not condition():
        os.sched_yield()
        if time.monotonic() > deadline:
            raise TimeoutError


class PublicationTests(RingTest):
    """What a driver on another CPU sees of a completion."""

    def test_packed_used_descriptor_shows_its_flags_last(self) -> None:
        """And nothing like them before: a driver that saw them early would read another id. `Struct.pack_into` zeroes before it writes."""
        with RawRing(packed=True, size=1) as ring:
            source = "import os, time\n" + inspect.getsource(_spin) + inspect.getsource(_watch_packed)
            source += "region = guest_memory.GuestRegionMmap(int(sys.argv[1]), 0, 0x10000, 0)\n"
            source += "print(_watch_packed(region.view, _spin), flush=True)\n"
            fd = ring.memory.regions[0].fileno()
            child = program(self, source, str(fd), pass_fds=[fd])
            talk = ring.memory.view(RINGS + 0x8000, 8).cast("I")
            n, end = 0, time.monotonic() + 2
            while n < 3000 and time.monotonic() < end:
                n += 1
                ring.offer((DATA, 4, F_WRITE), slot=n)
                talk[0] = n
                _spin(lambda: talk[1] == 2 * n - 1)  # noqa: B023
                ring.run()
                _spin(lambda: talk[1] == 2 * n)  # noqa: B023
            talk[0] = 0xFFFFFFFF
            self.assertEqual(child.communicate(timeout=PATIENCE), ("0\n", ""))


class NotificationTests(RingTest):
    """Suppression, in both directions."""

    def test_one_call_for_a_batch(self) -> None:
        for features in 0, EVENT_IDX:
            for ring in self.rings(features=features):
                for slot in range(8):
                    ring.offer((DATA, 4, F_WRITE), slot=slot)
                ring.run()
                self.assertEqual(ring.calls(), 1)

    def test_one_call_for_the_completions_of_a_batch_context(self) -> None:
        for ring in self.rings(features=0):
            for slot in range(4):
                ring.offer((DATA, 4, F_WRITE), slot=slot)
            chains = list(ring.vring)
            with ring.vring.batch(), ring.vring.batch():
                for chain in chains[:3]:
                    ring.vring.add_used(chain, 0)
                self.assertEqual(ring.calls(), 0)
            self.assertEqual(ring.calls(), 1)
            ring.vring.add_used(chains[3], 0)
            self.assertEqual(ring.calls(), 1)

    def test_driver_that_wants_no_calls_gets_none(self) -> None:
        for features in 0, EVENT_IDX:
            for ring in self.rings(features=features):
                ring.request()
                ring.run()
                ring.calls()
                if ring.packed:
                    ring.driver_area[1] = 1
                elif features:
                    ring.driver_area[2 + ring.size] = 1000
                else:
                    ring.driver_area[0] = 1
                for _ in range(5):
                    ring.request()
                    self.assertEqual(len(ring.run()), 1)
                self.assertEqual(ring.calls(), 0)

    def test_event_idx_calls_when_the_event_is_reached(self) -> None:
        """Every third used chain."""
        for ring in self.rings(features=EVENT_IDX, size=64):
            ring.offer((DATA, 4, F_WRITE))
            ring.run()
            ring.calls()
            total = 0
            for n in range(1, 31):
                if ring.packed and n % 3 == 1:
                    ring.driver_area[0] = (n + 2) | 0x8000
                    ring.driver_area[1] = 2
                elif n % 3 == 1:
                    ring.driver_area[2 + ring.size] = n + 2
                ring.offer((DATA, 4, F_WRITE))
                ring.run()
                calls = ring.calls()
                self.assertEqual(calls, int(n % 3 == 0), n)
                total += calls
            self.assertEqual(total, 10)

    def test_packed_event_idx_over_the_end_of_the_ring(self) -> None:
        """The event's wrap counter counts."""
        with RawRing(packed=True, size=5, features=EVENT_IDX) as ring:
            ring.offer((DATA, 4, F_WRITE))
            ring.run()
            ring.calls()
            position = 1
            for _ in range(40):
                event, wrap = (ring.seen + 1) % 5, ring.used_wrap ^ (ring.seen + 1 >= 5)
                ring.driver_area[0] = event | wrap << 15  # the one after the next
                ring.driver_area[1] = 2
                ring.offer((DATA, 4, F_WRITE))
                ring.run()
                self.assertEqual(ring.calls(), 0, position)
                ring.offer((DATA, 4, F_WRITE))
                ring.run()
                self.assertEqual(ring.calls(), 1, position)
                position += 2

    def test_split_event_idx_over_the_wrap_of_16_bits(self) -> None:
        with RawRing(base=65530, features=EVENT_IDX) as ring:
            ring.offer((DATA, 4, F_WRITE))
            ring.run()
            ring.calls()
            for _ in range(10):
                ring.driver_area[2 + ring.size] = (ring.seen + 1) & 0xFFFF
                ring.offer((DATA, 4, F_WRITE))
                ring.run()
                self.assertEqual(ring.calls(), 0)
                ring.offer((DATA, 4, F_WRITE))
                ring.run()
                self.assertEqual(ring.calls(), 1)

    def drivers(self, features: int) -> Iterator[tuple[RawRing, DriverQueue]]:
        """A ring with the driver side of `vring`."""
        for ring in self.rings(features=features, size=16):
            kind = PackedDriverQueue if ring.packed else SplitDriverQueue
            yield ring, kind(ring.memory, 16, areas_at(RINGS, kind, 16), features)

    def test_fence_stands_between_asking_for_kicks_and_the_look(self) -> None:
        """DESIGN, invariant 2: what the driver publishes at that moment is seen."""
        for features in 0, EVENT_IDX:
            for ring, driver in self.drivers(features):
                queue = ring.vring.queue
                assert queue
                driver.add([], [(DATA, 4)])
                self.at_the_fence(queue, driver.publish)
                self.assertTrue(queue.enable_notification())

    def test_fence_stands_between_publication_and_the_look_at_what_the_driver_wants(self) -> None:
        """DESIGN, invariant 2: a driver that asks for a call at that moment gets one, and sees the completion."""
        for features in 0, EVENT_IDX:
            for ring, driver in self.drivers(features):
                queue = ring.vring.queue
                assert queue
                found: list[int] = []
                for number in range(2):  # the first call is made whatever the driver wants
                    driver.disable_notification()
                    driver.add([], [(DATA, 4)])
                    driver.publish()
                    for chain in queue.take(4):
                        queue.completed += (chain._token, 0)
                    queue.publish()
                    if number:
                        self.at_the_fence(queue, lambda: found.append(driver.enable_notification()))  # noqa: B023 - called here
                        self.assertTrue(queue.needs_notification())
                    else:
                        queue.needs_notification()
                        driver.used()
                self.assertEqual(found, [True])

    @staticmethod
    def at_the_fence(queue: Any, action: Callable[[], object]) -> None:
        """Have the driver do something just where the queue's next fence is."""
        fence = queue._fence

        def once() -> None:
            queue._fence = fence
            action()

        queue._fence = once

    def test_driver_kicks_once_until_the_device_has_looked(self) -> None:
        for features in 0, EVENT_IDX:
            for ring, driver in self.drivers(features):
                ring.serve(ring.process)
                for _ in range(20):
                    driver.add([], [(DATA, 4)])
                    self.assertTrue(driver.publish())
                    self.assertFalse(driver.publish(), "nothing new")
                    driver.add([], [(DATA, 4)])
                    self.assertEqual(driver.publish(), not features, "the device was told and has not looked")
                    ring.serve(ring.process)
                    self.assertEqual(len(driver.used()), 2)

    def test_driver_is_told_not_to_kick_while_the_device_works(self) -> None:
        for features in 0, EVENT_IDX:
            for ring, driver in self.drivers(features):
                wanted: list[bool] = []

                def process(vring: VringT, driver: DriverQueue = driver, wanted: list[bool] = wanted) -> None:
                    for chain in vring:
                        vring.add_used(chain, 0)
                        if len(wanted) < 5:
                            driver.add([], [(DATA, 4)])
                            wanted.append(driver.publish())

                driver.add([], [(DATA, 4)])
                driver.publish()
                ring.serve(process)
                self.assertEqual(wanted, [False] * 5)
                self.assertEqual(len(driver.used()), 6)

    def test_chain_published_after_the_devices_last_look_is_taken(self) -> None:
        """The lost wake-up: no kick comes for it, since notifications are off."""
        for features in 0, EVENT_IDX:
            for ring, driver in self.drivers(features):
                late = [b"late"] * 2

                def process(vring: VringT, driver: DriverQueue = driver, late: list[bytes] = late) -> None:
                    for chain in vring:
                        vring.add_used(chain, 0)
                    if late:
                        driver.add([], [(DATA, 4)], late.pop())
                        self.assertFalse(driver.publish())

                driver.add([], [(DATA, 4)], b"first")
                driver.publish()
                ring.serve(process)
                self.assertEqual([token for token, _ in driver.used()], [b"first", b"late", b"late"])

    def test_chain_published_just_before_notifications_are_enabled_is_taken(self) -> None:
        """The same race in its smallest window: between the look that finds nothing and the store that asks for kicks."""
        for features in 0, EVENT_IDX:
            for ring, driver in self.drivers(features):
                queue = ring.vring.queue
                assert queue
                enable, late = queue.enable_notification, [b"late"]

                def enable_too_late(driver: DriverQueue = driver, late: list[bytes] = late, enable: Callable[[], bool] = enable) -> bool:
                    if late:
                        driver.add([], [(DATA, 4)], late.pop())
                        self.assertFalse(driver.publish())
                    return enable()

                altered: Any = queue
                altered.enable_notification = enable_too_late
                driver.add([], [(DATA, 4)], b"first")
                driver.publish()
                ring.serve(ring.process)
                self.assertEqual(len(driver.used()), 2)
                del queue.enable_notification, enable, enable_too_late, queue

    def test_device_that_declines_chains_is_asked_once_more_and_then_at_the_next_kick(self) -> None:
        """Once more, because one may have come just before notifications were on."""
        for features in 0, EVENT_IDX:
            for ring, driver in self.drivers(features):
                asked: list[VringT] = []
                driver.add([], [(DATA, 4)])
                driver.publish()
                self.assertFalse(ring.vring.drain(asked.append))
                self.assertEqual(len(asked), 2)
                driver.add([], [(DATA, 4)])
                self.assertTrue(driver.publish(), "a new chain is worth a kick")
                ring.serve(ring.process)
                self.assertEqual(len(driver.used()), 2)
                asked.clear()

    def test_drain_ends_for_a_driver_that_never_stops(self) -> None:
        """Other rings of the worker get their turn."""
        for ring, driver in self.drivers(EVENT_IDX):
            served = 0

            def process(vring: VringT, driver: DriverQueue = driver) -> None:
                nonlocal served
                for chain in vring:
                    vring.add_used(chain, 0)
                    served += 1
                    driver.used()
                    driver.add([], [(DATA, 4)])
                    driver.publish()
                driver.used()
                if driver.free == driver.size:
                    driver.add([], [(DATA, 4)])
                    driver.publish()

            driver.add([], [(DATA, 4)])
            driver.publish()
            self.assertTrue(ring.vring.drain(process), "chains are left")
            self.assertLess(served, 2 * VringState.TURN)

    def test_batches_are_half_of_what_the_driver_mostly_has_waiting(self) -> None:
        """Also of a driver that sends more while it is served, so that the ring is seldom empty. (A packed ring does not tell what waits.)"""
        for ring, driver in self.drivers(EVENT_IDX):
            sizes: list[int] = []
            for run in range(60):
                depth = 16 if run < 30 else 8
                refills = 3
                while driver.size - driver.free < depth:
                    driver.add([], [(DATA, 4)])
                driver.publish()
                sizes.clear()
                for chains in ring.vring.batches():
                    sizes.append(len(chains))
                    ring.vring.add_used_all(chains)
                    ring.vring._flush()
                    if refills:
                        refills -= 1
                        for _ in driver.used():
                            driver.add([], [(DATA, 4)])
                        driver.publish()
                driver.used()
                if run in (29, 59) and not ring.packed:
                    self.assertEqual(set(sizes[:-1]), {depth // 2}, sizes)

    def test_low_level_switches(self) -> None:
        """enable_notification, disable_notification, needs_notification, signal_used_queue: the crate's methods."""
        for ring, driver in self.drivers(0):
            ring.vring.disable_notification()
            driver.add([], [(DATA, 4)])
            self.assertFalse(driver.publish())
            self.assertTrue(ring.vring.enable_notification(), "there is something")
            driver.add([], [(DATA, 4)])
            self.assertTrue(driver.publish())
            driver.disable_notification()
            self.assertFalse(ring.vring.needs_notification())
            driver.enable_notification()
            self.assertTrue(ring.vring.needs_notification())
            ring.calls()
            ring.vring.signal_used_queue()
            self.assertEqual(ring.calls(), 1)


class _Killed(BaseException):
    """The end of a life."""


class _Mortal:
    """Memory of a life that ends before the store behind the next `left[0]` ones."""

    def __init__(self, view: memoryview, left: list[int]) -> None:
        self.view = view
        self.left = left

    def __getitem__(self, at: int) -> Any:
        return self.view[at]

    def __setitem__(self, at: int, value: int) -> None:
        if not self.left[0]:
            raise _Killed
        self.left[0] -= 1
        self.view[at] = value


class RecoveryTests(DaemonTest):
    """In-flight tracking: a back-end that dies at any instruction, under completion out of order, and its next life."""

    SIZE = 16
    KILLS = 40
    SLOT = 64

    def test_nothing_is_lost_and_nothing_completed_twice(self) -> None:
        """rules 19 and 20"""
        for kind, features in (SplitDriverQueue, INDIRECT), (PackedDriverQueue, INDIRECT | PACKED):
            for indirect in False, True:
                with self.seeded(packed=kind is PackedDriverQueue, indirect=indirect) as random_:
                    self.lives(random_, kind, features, indirect)

    def test_new_region_of_a_ring_that_is_not_new(self) -> None:
        """rule 20: as after a migration, or with a front-end that begins to track: a kill before anything was published loses nothing."""
        for kind, features in (SplitDriverQueue, 0), (PackedDriverQueue, PACKED):
            memory = GuestMemoryMmap.from_ranges([(RAM, 64 * PAGE)])
            _, offsets = kind.layout(self.SIZE)
            areas = (RAM + offsets[0], RAM + offsets[1], RAM + offsets[2])
            driver = kind(memory, self.SIZE, areas, features)
            tracker = PackedInflight if features & PACKED else SplitInflight
            vring = self.life(memory, areas, self.SIZE, features, None, 0x80008000 if features & PACKED else 0)
            for number in range(self.SIZE):
                driver.add([], [(RAM + 8 * PAGE, 4)], number)
                driver.publish()
                vring.add_used_all(list(vring))
                self.assertEqual(driver.used(), [(number, 4)])
            base, region = vring.stop(), memoryview(bytearray(tracker.bytes_for(self.SIZE)))
            vring = self.life(memory, areas, self.SIZE, features, region, base)
            for number in range(self.SIZE):  # all descriptors
                driver.add([], [(RAM + 8 * PAGE, 4)], number)
            driver.publish()
            self.assertEqual(len(list(vring)), self.SIZE)  # and it is killed
            vring = self.life(memory, areas, self.SIZE, features, region, base)
            vring.add_used_all(list(vring))
            self.assertEqual(driver.used(), [(number, 4) for number in range(self.SIZE)])
            driver.add([], [(RAM + 8 * PAGE, 4)], "and on")
            driver.publish()
            vring.add_used_all(list(vring))
            self.assertEqual(driver.used(), [("and on", 4)])

    def lives(self, random_: random.Random, kind: type[DriverQueue], features: int, indirect: bool) -> None:
        memory = GuestMemoryMmap.from_ranges([(RAM, 64 * PAGE)])
        _, offsets = kind.layout(self.SIZE)
        areas = (RAM + offsets[0], RAM + offsets[1], RAM + offsets[2])
        driver = kind(memory, self.SIZE, areas, features, RAM + 8 * PAGE if indirect else None)
        tracker = PackedInflight if features & PACKED else SplitInflight
        region = GuestMemoryMmap.from_ranges([(0, tracker.bytes_for(self.SIZE))]).view(0, tracker.bytes_for(self.SIZE))
        waiting: dict[int, int] = {}  # number -> where its answer goes
        number, serving = 0, self.eventfd()
        for life in range(self.KILLS + 1):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(serving)
            child = os.fork()
            if not child:
                self.device(memory, areas, features, region, random_.random(), serving)
            try:
                if random_.random() < 0.5:  # or else it may die before it serves anything, on a slow machine each time
                    self.assertTrue(is_readable(serving, PATIENCE), "it does not begin to serve")
                end = time.monotonic() + (random_.uniform(0, 0.005) if life < self.KILLS else PATIENCE)
                while time.monotonic() < end and (life < self.KILLS or waiting):
                    while life < self.KILLS and driver.free >= 3:
                        slot = next(at for at in range(RAM + 48 * PAGE, RAM + 64 * PAGE, self.SLOT) if at not in waiting.values())
                        memory.write(slot, struct.pack("<QQ", number, 0))
                        driver.add([(slot, 4), (slot + 4, 4)], [(slot + 8, 8)], number)
                        waiting[number] = slot
                        number += 1
                        driver.publish()
                    for token, _ in driver.used():
                        assert isinstance(token, int)
                        self.assertIn(token, waiting, "completed twice")
                        self.assertEqual(memory.read(waiting.pop(token) + 8, 8), struct.pack("<Q", token ^ 0xFFFF))
            finally:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
            self.assertTrue(os.WIFSIGNALED(status), "the device failed")
        self.assertEqual(waiting, {}, "lost")
        self.assertGreater(number, self.SIZE)

    def device(self, memory: GuestMemoryMmap, areas: tuple[int, int, int], features: int, region: memoryview, seed: float, serving: int) -> None:
        """One life, in the child: completes some at once, others later and in any order; tells when it begins to. Never returns."""
        try:
            random_ = random.Random(seed)
            vring = VringMutex(GuestMemoryAtomic(memory), self.SIZE)
            vring.set_queue_features(features)
            vring.set_queue_info(*areas)
            vring.set_queue_ready(True)
            vring.set_inflight(region)
            vring.set_enabled(True)
            vring.start()
            held: list[DescriptorChain] = []

            def process(vring: VringT) -> None:
                for chain in vring:
                    held.append(chain)
                    if random_.random() < 0.1:
                        break  # the rest of the batch is put back

            os.eventfd_write(serving, 1)
            while True:
                vring.drain(process)
                random_.shuffle(held)
                with vring.batch():
                    for chain in held[len(held) // 3 :]:
                        [number] = struct.unpack("<Q", chain.read())
                        vring.add_used(chain, chain.write(struct.pack("<Q", number ^ 0xFFFF)))
                del held[len(held) // 3 :]
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def test_the_whole_last_batch_is_settled(self) -> None:
        """rule 19: PROTOCOL trap: those who clear one entry alone lose requests. Killed between publication and settlement of three."""
        area = memoryview(bytearray(SplitInflight.bytes_for(8)))
        tracker = SplitInflight(area, 8)
        tracker.note_taken([3, 0, 5, 7])
        tracker.note_used([0, 7, 3])  # published, used index 3; and then nothing more
        again = SplitInflight(area, 8)
        self.assertFalse(again.fresh)
        self.assertEqual(again.recover(3), [5])

    def life(
        self, memory: GuestMemoryMmap, areas: tuple[int, int, int], size: int, features: int, region: memoryview | None, base: int = 0
    ) -> VringState:
        """A back-end's, begun with what the one before has left."""
        vring = VringState(GuestMemoryAtomic(memory), size)
        vring.set_queue_features(features)
        vring.set_queue_info(*areas)
        vring.set_queue_ready(True)
        vring.set_inflight(region)
        vring.set_queue_next_avail(base)
        vring.set_enabled(True)
        vring.start()
        return vring

    def test_killed_before_every_store(self) -> None:
        """rules 19 and 20: In the region and in the used ring, at every position of the ring: each chain is used once, in this life or the next."""
        for kind, features, size in (SplitDriverQueue, 0, 8), (PackedDriverQueue, PACKED, 7):
            tracker: type[Any] = PackedInflight if features else SplitInflight
            for before in range(size):
                for stores in range(200):
                    with self.subTest(kind, before=before, stores=stores):
                        memory = GuestMemoryMmap.from_ranges([(RAM, 16 * PAGE)])
                        areas = areas_at(RAM, kind, size)
                        driver = kind(memory, size, areas, features)
                        region = memoryview(bytearray(tracker.bytes_for(size)))
                        vring = self.life(memory, areas, size, features, region)
                        for number in range(before):
                            driver.add([], [(RAM + 8 * PAGE, 4)] * 2, number)
                            driver.publish()
                            vring.add_used_all(list(vring))
                            self.assertEqual(driver.used(), [(number, 8)])
                        for number, parts in enumerate((2, 3, 1)):
                            driver.add([], [(RAM + 8 * PAGE, 4)] * parts, number)
                            driver.publish()
                        left = [stores]
                        begin = tracker.__init__

                        def mortal(self: Any, *arguments: Any, begin: Callable[..., None] = begin, left: list[int] = left) -> None:
                            begin(self, *arguments)
                            self._u8, self._u16, self._u32, self._u64 = (_Mortal(view, left) for view in (self._u8, self._u16, self._u32, self._u64))

                        killed = True
                        with contextlib.suppress(_Killed), mock.patch.object(tracker, "__init__", mortal):
                            vring = self.life(memory, areas, size, features, region)
                            queue: Any = vring.queue
                            if features:
                                queue._words = _Mortal(queue._words, left)
                            else:
                                queue._used16 = _Mortal(queue._used16, left)
                            taking: Any = iter(vring)
                            chains = [next(taking), next(taking)]
                            taking.close()  # the third is put back
                            chains += list(vring)
                            with vring.batch():
                                vring.add_used(chains[2], 2)
                                vring.add_used(chains[0], 0)
                            vring.add_used(chains[1], 1)
                            killed = False
                        used = driver.used()
                        vring = self.life(memory, areas, size, features, region)
                        for chain in reversed(list(vring)):
                            vring.add_used(chain, 0)
                            used += driver.used()
                        self.assertEqual(sorted(token for token, _ in used), [0, 1, 2])
                        driver.add([], [(RAM + 8 * PAGE, 4)], "after all that")
                        driver.publish()
                        vring.add_used_all(list(vring))
                        self.assertEqual(driver.used(), [("after all that", 4)])
                        self.assertEqual(driver.free, size)
                    if not killed:
                        break

    def test_packed_batch_that_was_not_shown(self) -> None:
        """rule 20: Killed before the first of three used descriptors was written: the driver sees nothing of the others in the next life."""
        memory = GuestMemoryMmap.from_ranges([(RAM, 16 * PAGE)])
        areas = areas_at(RAM, PackedDriverQueue, 4)
        driver = PackedDriverQueue(memory, 4, areas, PACKED)
        region = memoryview(bytearray(PackedInflight.bytes_for(4)))

        for lap in range(3):  # the last one of them over the end of the ring
            for number in range(3):
                driver.add([], [(RAM + 8 * PAGE, 4)], (lap, number))
                driver.publish()
            vring = self.life(memory, areas, 4, PACKED, region)
            queue: Any = vring.queue
            queue._words = _Mortal(queue._words, [2])
            with self.assertRaises(_Killed):
                vring.add_used_all(list(vring))
            self.assertEqual(driver.used(), [])
            vring = self.life(memory, areas, 4, PACKED, region)
            for number, chain in enumerate(list(vring)):
                vring.add_used(chain, number)
                self.assertEqual(driver.used(), [((lap, number), number)])

    def test_in_the_order_in_which_they_were_taken(self) -> None:
        """rule 19"""
        area = memoryview(bytearray(SplitInflight.bytes_for(8)))
        SplitInflight(area, 8).note_taken([6, 1, 4])
        again = SplitInflight(area, 8)
        self.assertEqual(again.recover(0), [6, 1, 4])
        again.note_taken([0])
        self.assertEqual(SplitInflight(area, 8).recover(0), [6, 1, 4, 0])

    def test_hostile_region(self) -> None:
        """Links that lead anywhere: no exception but VringError, no hang."""
        recovered = 0
        with self.seeded() as random_:
            for number in range(400):
                kind: type[SplitInflight | PackedInflight]
                for kind, argument in (SplitInflight, 7), (PackedInflight, lambda position: 0):
                    area = memoryview(bytearray(random_.randbytes(kind.bytes_for(8))))
                    if number % 2:  # small numbers
                        area[:] = bytes(byte % 9 if at % 2 == 0 else 0 for at, byte in enumerate(area))
                    area[8:12] = struct.pack("=HH", 1, 8)
                    with contextlib.suppress(VringError):
                        recover: Any = kind(area, 8).recover
                        recover(argument)
                        recovered += 1
        self.assertGreater(recovered, 0)
        with self.assertRaisesRegex(VringError, "for a queue of 8, this one has 16"):
            SplitInflight(memoryview(bytearray(area[:0].tobytes() + bytes(8) + struct.pack("=HH", 1, 8) + bytes(500))), 16)

    def test_region_that_is_spoiled_while_the_ring_runs(self) -> None:
        """It concerns the next life alone: requests come back, and the ring stops."""
        for features, kind, base in (0, SplitDriverQueue, 0), (PACKED, PackedDriverQueue, 0x80008000):
            device = Later()
            with self.seeded(packed=bool(features)) as random_, self.serving(device) as served, served.connect() as frontend:
                frontend.negotiate(VERSION_1 | features)
                rig = Rig(frontend, share=True)
                region, fd = frontend.get_inflight(1, rig.size)
                self.addCleanup(os.close, fd)
                frontend.set_inflight(region, fd)
                driver = kind(rig.memory, rig.size, areas_at(RAM, kind, rig.size), frontend.features)
                queue = frontend.start_queue(0, driver, base)
                for number in range(100):
                    for part in range(3):
                        queue.submit([(RAM + 0x8000, 4)], [(RAM + 0x9000, 4)], (number, part))
                    device.holds(3)
                    os.pwrite(fd, random_.randbytes(region.mmap_size), 0)
                    while device.held:
                        device.complete(random_.randrange(len(device.held)))
                    back = 0
                    while back < 3:
                        back += len(queue.wait())
                frontend.stop_queue(queue)

    def test_entries_are_used_again(self) -> None:
        """Many times as many as there are; put back too. A later life takes up just what is in flight."""
        size = 8
        area = memoryview(bytearray(PackedInflight.bytes_for(size)))
        tracker = PackedInflight(area, size)
        tracker.begin(1 << 15)
        with self.seeded() as random_:
            held: list[tuple[int, bytes]] = []
            position, wrap = 0, 1
            for number in range(500):
                count = random_.randrange(1, 4)
                if sum(token >> 16 for token, _ in held) + count <= size:
                    identity = next(i for i in range(size) if i not in [token & 0xFFFF for token, _ in held])
                    content = b"".join(struct.pack("<QIHH", number, n, identity, 0) for n in range(count))
                    held.append((count << 16 | identity, content))
                    tracker.note_taken(held[-1:])
                    if random_.random() < 0.2:
                        tracker.note_put_back([held.pop()[0]])
                elif held:
                    token, _ = held.pop(random_.randrange(len(held)))
                    position += token >> 16
                    position, wrap = position % size, wrap ^ (position >= size)
                    tracker.note_published(tracker.note_used([token], position | wrap << 15))
                again = PackedInflight(memoryview(bytearray(area)), size)
                self.assertEqual(again.recover(lambda position: 0), (held, position | wrap << 15))


REQUEST_HEADER = struct.Struct("<IIQ")


class RequestTests(RingTest):
    """Chains of header, data and status as plain numbers, for devices that ask for them."""

    def requests(self, size: int = 16, features: int = INDIRECT | EVENT_IDX) -> Iterator[tuple[RawRing, bool]]:
        """A ring of each format, for direct chains and for indirect ones; a split one as it knows the driver's buffers, and as it does not."""
        for indirect in False, True:
            for familiar in True, False:
                for ring in self.rings(size, features):
                    if ring.packed and not familiar:
                        continue
                    self.set_familiar(ring, familiar)
                    yield ring, indirect

    def set_familiar(self, ring: RawRing, familiar: bool) -> None:
        queue = ring.vring.queue
        if isinstance(queue, SplitQueue):
            queue._familiar, queue._reckoning = familiar, 1 << 30

    def offer(self, ring: RawRing, indirect: bool, slot: int, data: tuple[int, int, int], status: int = 1, header: int = 16) -> int:
        """A header and a status which `slot` has for itself, and data of (address, length, flags) between them. Returns the id."""
        parts = [(DATA + 64 * slot, header, 0), data, (DATA + 64 * slot + 32, status, F_WRITE)]
        if indirect:
            entries = [(*part[:2], part[2] | (F_NEXT if n < 3 and not ring.packed else 0), n % 3) for n, part in enumerate(parts, 1)]
            return ring.offer((*ring.table(*entries, at=TABLES + 64 * slot), F_INDIRECT), slot=slot)
        return ring.offer(*parts, slot=slot if ring.packed else 3 * slot)

    def take(self, ring: RawRing) -> tuple[list[FlatRequest], list[DescriptorChain]]:
        """All that is there, which the device keeps."""
        requests, chains = [], []
        for batch in ring.vring.requests(REQUEST_HEADER):
            requests += batch.requests
            chains += batch.chains
        return requests, chains

    def batches(self, ring: RawRing) -> Iterator[RequestBatch]:
        """All that there are: an iteration ends where all of a batch is refused."""
        while ring.vring.queue and ring.vring.queue.available():
            yield from ring.vring.requests(REQUEST_HEADER)

    def test_numbers_are_the_chains(self) -> None:
        """In any region, both ways, of any length; and what leaves RAM is refused however well the rest of the chain is known."""
        places = [DATA + 0x1000, RINGS + 0x30000 - 64, RINGS + 0x30000, RINGS + 0x38000, FAR, FAR + 0x1000 - 64]
        outside = [END - 32, END, FAR - 1, FAR + 0x1000 - 63, FAR + 0x1000, (1 << 64) - 64, (1 << 63) - 1, 0]
        for ring, indirect in self.requests():
            with self.seeded(packed=ring.packed, indirect=indirect) as rng:
                refused = flat = 0
                for _ in range(300):
                    expected: dict[int, tuple[bytes, int, int, bytes, int]] = {}
                    for slot in rng.sample(range(5), rng.randrange(1, 6)):
                        header, content = rng.randbytes(16), rng.randbytes(64)
                        ring.memory.write(DATA + 64 * slot, header)
                        address, flags, length = rng.choice(places), rng.choice((0, F_WRITE)), rng.choice((64, 64, 64, 3))
                        if rng.random() < 0.1:
                            address, length = rng.choice(outside), 64
                            refused += 1
                        else:
                            expected[DATA + 64 * slot] = header, address, length, content, flags
                        self.offer(ring, indirect, slot, (address, length, flags))
                    for batch in self.batches(ring):
                        for token, fields, header_at, into, at, length, status_at in batch.requests:
                            header, address, size, content, flags = expected.pop(header_at)
                            self.assertEqual((fields, at, length, into), (REQUEST_HEADER.unpack(header), address, size, bool(flags)))
                            batch.ram[at : at + length] = content[:length]
                            self.assertEqual(ring.memory.read(address, length), content[:length])
                            batch.ram[status_at] = 7
                            self.assertEqual(ring.memory.read(header_at + 32, 1), b"\7")
                            batch.done += (token, length)
                            flat += 1
                        for chain in batch.chains:
                            self.assertEqual(chain.readable[0].tobytes(), expected.pop(ring.memory.guest_ranges(chain.readable[0])[0][0])[0])
                            ring.vring.add_used(chain, 0)
                    self.assertEqual(expected, {})
                    ring.returned()
                self.assertEqual((ring.vring.broken, ring.vring.malformed, ring.vring.in_flight), (None, refused, 0))
                self.assertGreater(flat, 300)

    def test_what_is_not_of_that_shape_comes_as_a_chain_or_not_at_all(self) -> None:
        """Whatever a driver writes: what is taken as numbers is what the same descriptors are as a chain; and the reverse."""
        gib = 1 << 30
        big = GuestRegionMmap(self.memfd(3 * gib), 4 * gib, 3 * gib, 0)
        values = {  # of each field, right and wrong
            "address": [DATA, DATA + 0x2000, END - 16, END, FAR - 1, 0, 4 * gib, 7 * gib - 16, (1 << 64) - 1],
            "length": [1, 16, 17, 0, 2 * gib, 2 * gib - 1],
            "flags": [0, F_NEXT, F_WRITE, F_NEXT | F_WRITE, F_INDIRECT, F_NEXT | F_INDIRECT, F_WRITE | F_INDIRECT],
            "link": [0, 1, 2, 3, 4, 5, 6, 15, 16, 0xFFFF],
        }
        for ring, indirect in self.requests():
            ring.vring.stop()
            ring.atomic.replace(GuestMemoryMmap([*ring.memory.regions, big]))
            ring.memory = ring.atomic.memory()
            ring.vring.start()
            self.set_familiar(ring, familiar=bool(indirect))
            counts = {"numbers": 0, "chains": 0, "refused": 0}
            with self.seeded(packed=ring.packed, indirect=indirect) as rng:
                for _ in range(2500):
                    first = 0 if indirect else rng.choice((0, 3))
                    start, into = rng.choice((DATA, 4 * gib)), rng.choice((0, F_WRITE))
                    entries = [
                        {"address": start, "length": 16, "flags": F_NEXT, "link": first + 1},
                        {"address": start + 0x1000, "length": 64, "flags": F_NEXT | into, "link": first + 2},
                        {"address": start + 0x40, "length": 1, "flags": F_WRITE, "link": 0},
                    ]
                    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
                        field = rng.choice(list(values))
                        rng.choice(entries)[field] = rng.choice(values[field])
                    found = []
                    for taking in self.as_chains, self.as_requests:
                        if not self.put_three(ring, indirect, first, entries):
                            break  # the ring would end within, and the driver would not be there
                        found.append(taking(ring, counts))
                    self.assertFalse(ring.is_broken(), (entries, ring.vring.broken))
                    self.assertEqual(found[:1], found[1:], entries)
            self.assertGreater(min(counts.values()), 200, counts)

    def put_three(self, ring: RawRing, indirect: bool, first: int, entries: list[dict[str, int]]) -> bool:
        """Make them available, as they are. Returns whether that can be."""
        fields = [(e["address"], e["length"], e["flags"], e["link"]) for e in entries]
        if indirect:
            drop = F_NEXT if ring.packed else 0  # which drivers don't set there
            ring.offer((*ring.table(*((a, n, f & ~drop, x) for a, n, f, x in fields)), F_INDIRECT), slot=first)
        elif not ring.packed:
            for number, each in enumerate(fields):
                ring.put(first + number, each)
            ring.show(first)
        else:
            count = next((number for number, each in enumerate(fields, 1) if not each[2] & F_NEXT), 0)
            if not count:
                return False
            ring.offer(*[each[:3] for each in fields[:count]], slot=first)
        return True

    def as_chains(self, ring: RawRing, counts: dict[str, int]) -> object:
        """Where the parts of what is available begin, and their lengths."""
        found = [self.described(ring, chain) for chain in ring.vring]
        return found, ring.returned()

    def as_requests(self, ring: RawRing, counts: dict[str, int]) -> object:
        found = []
        for batch in ring.vring.requests(REQUEST_HEADER):
            for request in batch.requests:
                _, fields, header_at, into, at, length, status_at = request
                counts["numbers"] += 1
                chain = batch.chain(request)
                self.assertEqual(fields, REQUEST_HEADER.unpack(chain.readable[0]))
                found.append(self.described(ring, chain))
                header, data, status = (header_at, 16), (at, length), (status_at, 1)
                numbers = ([header], [data, status]) if into else ([header, data], [status])
                self.assertEqual(found[-1][:2], numbers)
            for chain in batch.chains:
                counts["chains"] += 1
                found.append(self.described(ring, chain))
        counts["refused"] += not found
        return found, ring.returned()

    def described(self, ring: RawRing, chain: DescriptorChain) -> tuple[object, ...]:
        parts = [[where for view in views for where in ring.memory.guest_ranges(view)] for views in (chain.readable, chain.writable)]
        ring.vring.add_used(chain, 0)
        return *parts, chain.readable_len, chain.writable_len, chain.id

    def test_three_descriptors_are_taken_as_any_number_is(self) -> None:
        """There is a short way for them, too, where they are to be a chain: it must find the same, and refuse the same."""
        values = [[DATA, DATA + 0x2000, END - 16, END, (1 << 64) - 1], [1, 16, 0, (1 << 32) - 1], range(8), range(8)]
        for ring in self.rings(size=16):
            queue = ring.vring.queue
            assert queue
            outcomes: list[str] = []
            with self.seeded(packed=ring.packed) as rng:
                for _ in range(6000):
                    first = None if ring.packed else rng.choice((0, 3))
                    into = rng.choice((0, F_WRITE))
                    number = first or 0
                    chain = [[DATA, 16, F_NEXT, number + 1], [DATA + 0x1000, 64, F_NEXT | into, number + 2], [DATA + 0x40, 1, F_WRITE, 0]]
                    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
                        field = rng.randrange(4)
                        rng.choice(chain)[field] = rng.choice(values[field])
                    content = b"".join(struct.pack("<QIHH", a, n, *((0, f) if ring.packed else (f, x))) for a, n, f, x in chain)
                    expected = self.outcome(ring, queue._any_parts, content, first)
                    self.assertEqual(self.outcome(ring, queue._parts, content, first), expected, content.hex(" ", 16))
                    outcomes.append(expected[0])
            self.assertGreater(outcomes.count("parts"), 1000)
            self.assertGreater(outcomes.count("_MalformedChain"), 500)

    def outcome(self, ring: RawRing, parse: Callable[[bytes, int | None], Parts], content: bytes, first: int | None) -> tuple[str, object]:
        """Where the parts of a chain begin, and their lengths; or how it is refused."""
        try:
            readable, writable, readable_len, writable_len = parse(content, first)
        except Exception as error:
            return type(error).__name__, str(error)
        return "parts", ([[ring.memory.guest_ranges(view) for view in views] for views in (readable, writable)], readable_len, writable_len)

    def test_header_and_status_of_other_lengths(self) -> None:
        """Than the device said. What it says may change: what is known was checked for what it said before."""
        short = struct.Struct("<Q")
        for ring, indirect in self.requests(size=32):
            for header, status in (16, 2), (12, 1), (17, 1), (8, 12):
                self.offer(ring, indirect, 0, (DATA + 0x1000, 64, F_WRITE), status, header)
                requests, chains = self.take(ring)
                self.assertEqual((requests, [(chain.readable_len, chain.writable_len) for chain in chains]), ([], [(header, 64 + status)]))
                ring.vring.add_used(chains[0], 0)
            for turn in range(4):
                self.offer(ring, indirect, 0, (DATA + 0x1000, 64, F_WRITE), status=12, header=8)
                for batch in ring.vring.requests((short, REQUEST_HEADER)[turn % 2], 12):
                    self.assertEqual((len(batch.requests), len(batch.chains)), (1 - turn % 2, turn % 2))
                    for token, fields, _, into, at, length, status_at in batch.requests:
                        self.assertEqual(
                            (fields, into, at, length, status_at), (short.unpack(ring.memory.read(DATA, 8)), True, DATA + 0x1000, 64, DATA + 32)
                        )
                        batch.done += (token, 76)
                    for chain in batch.chains:
                        ring.vring.add_used(chain, 0)

    def test_done_is_published_batch_by_batch(self) -> None:
        """Together with the chains that were completed meanwhile."""
        for ring, indirect in self.requests():
            ring.vring._chunk = 2
            slots = range(5) if indirect or not ring.packed else range(4)
            for slot in slots:
                self.offer(ring, indirect, slot, (DATA + 0x1000 * (1 + slot), 64, F_WRITE))
            self.offer(ring, True, 7, (DATA + 0x1000, 64, F_WRITE), status=2)
            sizes = []
            for batch in ring.vring.requests(REQUEST_HEADER):
                sizes.append(len(ring.returned()))
                for request in batch.requests[1:]:
                    batch.done += (request[0], 65)
                for chain in [*map(batch.chain, batch.requests[:1]), *batch.chains]:
                    ring.vring.add_used(chain, 65)
            sizes.append(len(ring.returned()))
            self.assertEqual(sum(sizes), len(slots) + 1)
            self.assertGreater(len(sizes), 2)
            self.assertEqual((sizes[0], ring.vring.in_flight), (0, 0))

    def test_device_that_fails_within_a_batch(self) -> None:
        """What it had done by then is published."""
        for ring, indirect in self.requests():
            for slot in range(3):
                self.offer(ring, indirect, slot, (DATA + 0x1000, 64, F_WRITE))
            with self.raises(RuntimeError, "as asked"):
                for batch in ring.vring.requests(REQUEST_HEADER):
                    for token, *_ in batch.requests[:2]:
                        batch.done += (token, 65)
                    raise RuntimeError("as asked")
            self.assertEqual((len(ring.returned()), ring.vring.in_flight), (2, 1 if indirect or not ring.packed else 3))

    def test_request_that_is_done_later(self) -> None:
        """As a chain; after the ring was stopped it is dropped, and views of it stay good."""
        for ring, indirect in self.requests():
            for stopped in False, True:
                self.offer(ring, indirect, 0, (DATA + 0x1000, 64, F_WRITE))
                for batch in ring.vring.requests(REQUEST_HEADER):
                    [chain] = map(batch.chain, batch.requests)
                self.assertEqual(ring.returned(), [])
                if stopped:
                    ring.vring.stop()
                self.assertEqual(chain.write(b"x" * 65), 65)
                ring.vring.add_used(chain, 65)
                self.assertEqual(len(ring.returned()), 0 if stopped else 1)
                with self.raises(VringError, "twice"):
                    ring.vring.add_used(chain, 65)

    def test_what_needs_more_than_numbers_comes_as_chains(self) -> None:
        """In order, and with a log. (By an IOMMU nothing is flat, and rings of the other byte order have no such drivers.)"""
        log = DirtyLog(memoryview(bytearray(4096)))
        for ring in self.rings(size=16, features=INDIRECT | IN_ORDER):
            self.offer(ring, True, 0, (DATA + 0x1000, 64, F_WRITE))
            requests, [chain] = self.take(ring)
            ring.vring.add_used(chain, 65)
            self.assertEqual((requests, len(ring.returned())), ([], 1))
        for ring in self.rings(size=16):
            for on, numbers in (True, 0), (False, 1):
                ring.vring.set_log(log if on else None)
                self.offer(ring, True, 0, (DATA + 0x1000, 64, F_WRITE))
                requests, chains = self.take(ring)
                self.assertEqual((len(requests), len(chains)), (numbers, 1 - numbers))
                for chain in chains:
                    ring.vring.add_used(chain, 65)

    def test_what_is_in_flight_is_noted(self) -> None:
        """And taken again, as chains, by the next life."""
        for ring, indirect in self.requests():
            ring.vring.stop()
            area = memoryview(bytearray((PackedInflight if ring.packed else SplitInflight).bytes_for(16)))
            ring.vring.set_inflight(area)
            ring.vring.start()
            ids = [self.offer(ring, indirect, slot, (DATA + 0x1000 * slot, 64, F_WRITE)) for slot in range(4)]
            for batch in ring.vring.requests(REQUEST_HEADER):
                self.assertEqual(len(batch.requests), 4)
                batch.done += (batch.requests[1][0], 65)
            self.assertEqual(ring.returned(), [(ids.pop(1), 65)])
            ring.vring.stop()
            ring.vring.start()
            requests, chains = self.take(ring)
            self.assertEqual((requests, [chain.id for chain in chains]), ([], ids))
            self.assertEqual([chain.readable_len + chain.writable_len for chain in chains], [81] * 3)

    def test_bad_rings(self) -> None:
        """What comes before the bad entry is served; then the ring is broken."""
        for before in 0, 2:
            with RawRing(size=16) as ring:
                for slot in range(before):
                    self.offer(ring, False, slot, (DATA + 0x1000, 64, F_WRITE))
                ring.show(16)
                served = 0
                for batch in ring.vring.requests(REQUEST_HEADER):
                    for token, *_ in batch.requests:
                        batch.done += (token, 65)
                        served += 1
                self.assertEqual((served, len(ring.returned()), ring.is_broken()), (before, before, True))
                self.assertIn("names descriptor 16 of 16", str(ring.vring.broken))
            with RawRing(size=16) as ring:
                for slot in range(before):
                    self.offer(ring, False, slot, (DATA + 0x1000, 64, F_WRITE))
                ring.index += 17
                ring.show()
                self.assertEqual((self.take(ring), ring.is_broken()), (([], []), True))
        with RawRing(packed=True, size=4) as ring:
            for taken in 1, 0:  # the second time, when the first one is still in flight
                self.offer(ring, False, 1, (DATA + 0x1000, 64, F_WRITE))
                requests, chains = self.take(ring)
                self.assertEqual((len(requests) + len(chains), ring.is_broken()), (taken, not taken))

    def test_indirect_tables_that_were_not_negotiated(self) -> None:
        for ring in self.rings(size=16, features=0):
            self.offer(ring, True, 0, (DATA + 0x1000, 64, F_WRITE))
            self.assertEqual((self.take(ring), len(ring.returned()), ring.vring.malformed), (([], []), 1, 1))

    def test_memory_that_has_changed(self) -> None:
        """What is known belongs to the memory that it was found in: the ring runs on, in a copy of it."""
        for ring, indirect in self.requests():
            for turn in range(5):
                if turn == 2:
                    [size, (desc, driver, device)] = (PackedDriverQueue if ring.packed else SplitDriverQueue).layout(16)
                    self.assertLess(size, 0x1000)
                    copy = GuestMemoryMmap.from_ranges([(RINGS, 0x40000)])
                    copy.regions[0].view[:] = b"".join(region.view for region in ring.memory.regions[:2])
                    ring.atomic.replace(copy)
                    ring.vring.set_queue_info(RINGS + desc, RINGS + driver, RINGS + device)
                    ring.memory, ring.desc = copy, copy.view(RINGS + desc, 16 * 16)
                    ring.driver_area = copy.view(RINGS + driver, 4 if ring.packed else 6 + 2 * 16).cast("H")
                self.offer(ring, indirect, 0, (DATA + 0x1000 + 64 * (turn // 2), 64, F_WRITE))
                for batch in ring.vring.requests(REQUEST_HEADER):
                    [(token, _, _, _, at, _, status_at)] = batch.requests
                    batch.ram[at : at + 64] = bytes([turn]) * 64
                    batch.ram[status_at] = turn
                    batch.done += (token, 65)
                self.assertEqual(ring.memory.read(DATA + 0x1000 + 64 * (turn // 2), 64), bytes([turn]) * 64)
                self.assertEqual(ring.memory.read(DATA + 32, 1)[0], turn)

    def test_driver_that_has_new_buffers_all_the_time(self) -> None:
        """Is not remembered, but for a try now and then; and is when it no longer has."""
        with RawRing(size=8, features=INDIRECT) as ring:
            queue = ring.vring.queue
            assert isinstance(queue, SplitQueue)
            known = []
            for turn in range(8 * 320):
                self.offer(ring, True, turn % 8, (DATA + 0x1000 + (16 * turn % 0x1000 if turn < 8 * 64 else 0), 64, F_WRITE))
                for batch in ring.vring.requests(REQUEST_HEADER):
                    [(token, _, _, _, at, *_)] = batch.requests
                    self.assertEqual(at, DATA + 0x1000 + (16 * turn % 0x1000 if turn < 8 * 64 else 0))
                    batch.done += (token, 65)
                known.append(queue._familiar)
            self.assertEqual((known[0], known[8 * 32], known[-1]), (True, False, True))


class RandomRingTests(CoreTest):
    """Random chains, completed in random order by this thread or others: each comes back once, with the right bytes."""

    def traffic(self, rng: random.Random, kind: type[DriverQueue], size: int, features: int, indirect: bool, threads: bool) -> None:
        """300 chains through a ring."""
        packed = kind is PackedDriverQueue
        ram = GuestMemoryMmap.from_ranges([(0x10000, 0x30000), (0x40000, 0x40000), (0x80000, 0x80000)])
        areas = areas_at(0x10000, kind, size)
        driver = kind(ram, size, areas, features, 0x18000 if indirect else None)
        vring = VringMutex(GuestMemoryAtomic(ram), size)
        vring.set_queue_features(features | VERSION_1 | (PACKED if packed else 0))
        vring.set_queue_info(*areas)
        vring.set_queue_ready(True)
        vring.set_enabled(True)
        vring.set_queue_next_avail(0x80008000 if packed else 0)
        vring.start()
        call = self.eventfd()
        vring.set_call(os.dup(call))
        self.addCleanup(vring.reset)
        slots = list(range(size))  # of 4 KiB each; the regions' borders lie within some
        held: list[DescriptorChain] = []
        waiting: dict[int, tuple[bytes, list[tuple[int, int]]]] = {}
        sent = returned = 0

        def take(ring: VringT) -> None:
            for chain in ring:
                held.append(chain)
                if rng.random() < 0.1:
                    break

        def complete(chains: Iterable[DescriptorChain]) -> None:
            for chain in chains:
                vring.add_used(chain, chain.write(chain.read()[::-1]))

        while returned < 300:
            for _ in range(rng.randrange(1, 6)):
                if sent == 300 or not slots:
                    break
                readable, writable = ([0] * rng.randrange(most) for most in (5, 4))
                if not 0 < len(readable) + len(writable) <= (16 if indirect else driver.free) or not driver.free:
                    continue
                slot = slots.pop(rng.randrange(len(slots)))
                at = 0x30000 + slot * 0x1000 + rng.randrange(64)
                parts = []
                for _ in readable + writable:
                    parts.append((at, rng.choice((0, 1, 3, 16, 100, 300))))
                    at += parts[-1][1] + rng.randrange(16)
                data = b""
                for address, count in parts[: len(readable)]:
                    piece = rng.randbytes(count)
                    ram.write(address, piece)
                    data += piece
                driver.add(parts[: len(readable)], parts[len(readable) :], slot)
                waiting[slot] = data, parts[len(readable) :]
                sent += 1
                if rng.random() < 0.5:
                    driver.publish()
            driver.publish()
            while vring.drain(take):
                pass
            vring.drain(take)
            rng.shuffle(held)
            done = [held.pop() for _ in range(rng.randrange(len(held) + 1))]
            if threads:
                workers = [threading.Thread(target=complete, args=(done[n::2],)) for n in range(2)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
            else:
                complete(done)
            for token, told in driver.used():
                assert isinstance(token, int)
                data, parts = waiting.pop(token)
                expected = data[::-1][: sum(count for _, count in parts)]
                self.assertEqual(told, len(expected))
                self.assertEqual(b"".join(ram.read(*part) for part in parts)[:told], expected)
                slots.append(token)
                returned += 1
        self.assertEqual((held, waiting, vring.in_flight, vring.malformed, vring.broken), ([], {}, 0, 0, None))
        self.assertEqual(driver.free, size)

    def test_every_kind_of_ring(self) -> None:
        """Split and packed, direct and indirect, with and without EVENT_IDX and IN_ORDER, odd sizes of packed rings."""
        kinds: list[tuple[type[DriverQueue], int]] = [(SplitDriverQueue, 16), (SplitDriverQueue, 64)]
        kinds += [(PackedDriverQueue, size) for size in (16, 7, 33)]
        for kind, size in kinds:
            for combination in range(16):
                event_idx, in_order, indirect, threads = (bool(combination >> bit & 1) for bit in range(4))
                features = INDIRECT | event_idx * EVENT_IDX | in_order * IN_ORDER
                with self.seeded(kind=kind.__name__, size=size, event_idx=event_idx, in_order=in_order, indirect=indirect, threads=threads) as rng:
                    self.traffic(rng, kind, size, features, indirect, threads)

    def test_65536_and_more_chains(self) -> None:
        """Every index wraps; the parsed chains that are remembered stay right."""
        for packed in False, True:
            with RawRing(packed, size=256, features=EVENT_IDX) as ring:
                kind = PackedDriverQueue if packed else SplitDriverQueue
                driver = kind(ring.memory, 256, areas_at(RINGS, kind, 256), EVENT_IDX)
                total = 0
                while total < 66000:
                    for slot in range(256):
                        driver.add([], [(DATA + 4 * slot, 4)], slot)
                    driver.publish()
                    for chain in ring.vring:
                        ring.vring.add_used(chain, 4)
                    self.assertEqual(driver.used(), [(slot, 4) for slot in range(256)])
                    total += 256
                self.assertEqual((ring.vring.broken, ring.vring.malformed), (None, 0))


# ---------------------------------------------------------------------------------------------------------------------------
# The wire
# ---------------------------------------------------------------------------------------------------------------------------

AES = SymmetricSession(3, 16, 0, 0, 0, 0, 1, 1, 0, 0, bytes(range(16)), b"")
"""AES-128-CBC, encrypting."""

EXAMPLES: dict[str, bytes] = {
    "GET_FEATURES": b"",
    "SET_FEATURES": u64(PROTOCOL | VERSION_1),
    "SET_OWNER": b"",
    "RESET_OWNER": b"",
    "SET_MEM_TABLE": MemTable((MemRegion(RAM, 4 * PAGE, 0x100000, 0),)).pack(),
    "SET_VRING_NUM": pair(0, 16),
    "SET_VRING_ADDR": VringAddr(0, 0, 0x100000, 0x101000, 0x102000, 0).pack(),
    "SET_VRING_BASE": pair(0, 0),
    "GET_VRING_BASE": pair(0, 0),
    "SET_VRING_KICK": u64(0),
    "SET_VRING_CALL": u64(0),
    "SET_VRING_ERR": u64(0),
    "GET_PROTOCOL_FEATURES": b"",
    "SET_PROTOCOL_FEATURES": u64(int(PROTOCOL_FEATURES | PF.CONFIG)),
    "GET_QUEUE_NUM": b"",
    "SET_VRING_ENABLE": pair(0, 1),
    "SEND_RARP": b"\x52\x54\x00\x12\x34\x56\0\0",
    "NET_SET_MTU": u64(1500),
    "SET_BACKEND_REQ_FD": b"",
    "IOTLB_MSG": IotlbMessage(0, PAGE, 0x100000, 3, Iotlb.UPDATE).pack(),
    "POSTCOPY_ADVISE": b"",
    "POSTCOPY_LISTEN": b"",
    "POSTCOPY_END": b"",
    "SET_VRING_ENDIAN": pair(0, 1),
    "GET_CONFIG": Config(0, 0, bytes(8)).pack(),
    "SET_CONFIG": Config(0, 0, b"new").pack(),
    "SET_LOG_BASE": Log(PAGE, 0).pack(),
    "SET_LOG_FD": b"",
    "CREATE_CRYPTO_SESSION": CryptoSession.of(2, AES).pack(),
    "CLOSE_CRYPTO_SESSION": u64(7),
    "GET_INFLIGHT_FD": Inflight(0, 0, 2, 16).pack(),
    "SET_INFLIGHT_FD": Inflight(PAGE, 0, 2, 16).pack(),
    "GPU_SET_SOCKET": b"",
    "RESET_DEVICE": b"",
    "GET_MAX_MEM_SLOTS": b"",
    "ADD_MEM_REG": MemReg(RAM, 4 * PAGE, 0x100000, 0).pack(),
    "REM_MEM_REG": MemReg(RAM, 4 * PAGE, 0x100000, 0).pack(),
    "SET_STATUS": u64(1),
    "GET_STATUS": b"",
    "GET_SHARED_OBJECT": bytes(range(16)),
    "SET_DEVICE_STATE_FD": pair(0, 0),
    "CHECK_DEVICE_STATE": b"",
    "VRING_KICK": pair(0, 0),
    "GET_SHMEM_CONFIG": b"",
    "GET_VRING_BASE_SKIP_DRAIN": pair(0, 0),
}
"""A payload that is right, for each request."""

NEED_FD = {
    "SET_LOG_BASE",
    "SET_LOG_FD",
    "SET_INFLIGHT_FD",
    "SET_MEM_TABLE",
    "ADD_MEM_REG",
    "SET_VRING_KICK",
    "SET_VRING_CALL",
    "SET_VRING_ERR",
    "SET_BACKEND_REQ_FD",
    "GPU_SET_SOCKET",
    "SET_DEVICE_STATE_FD",
}


class WireTest(DaemonTest):
    """A test of bytes on the socket."""

    def setUp(self) -> None:
        super().setUp()
        self.memory_fd = self.memfd(4 * PAGE)
        self.event_fd = self.eventfd()
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        self.socket_fd = theirs.fileno()

    def fds_for(self, name: str) -> list[int]:
        """The descriptors that go with the example of a request."""
        if name not in NEED_FD:
            return []
        return [
            self.memory_fd
            if "MEM" in name or "INFLIGHT" in name or name == "SET_LOG_BASE"
            else self.socket_fd
            if "BACKEND" in name or "SOCKET" in name
            else self.event_fd
        ]

    @contextlib.contextmanager
    def served(self, device: VhostUserBackend | None = None) -> Iterator[Served]:
        """A daemon, whose open descriptors are known while nobody is connected."""
        with self.serving(device or Echo()) as served:
            gc.collect()  # those of a daemon before it go now, or who knows when
            self.idle = open_fds().keys()
            yield served

    @contextlib.contextmanager
    def rejected(self, served: Served, reason: str, **options: Any) -> Iterator[Peer]:
        """The block breaks the protocol: the connection ends with that reason, nothing stays open, and the next one is served."""
        self._log.lines.clear()
        with served.peer(**options) as peer:
            yield peer
            peer.is_closed()
        self.expect_log(f"the connection ends: .*{reason}", times=1)
        wait_until(lambda: open_fds().keys() == self.idle, "the connection's descriptors to be closed")
        with served.peer() as peer:
            peer.lives()
        wait_until(lambda: open_fds().keys() == self.idle, "the next connection's descriptors to be closed")


class StreamTests(WireTest):
    """Messages in pieces."""

    def test_message_that_comes_byte_by_byte(self) -> None:
        with self.served() as served, served.peer() as peer:
            message = struct.pack("=III", 39, 9, 8) + u64(3) + struct.pack("=III", 40, 1, 0)
            for n in range(len(message)):
                peer.raw(message[n : n + 1])
            self.assertEqual([peer.answer(), peer.answer()], [(39, 5, u64(0)), (40, 5, u64(3))])

    def test_header_in_two_pieces_with_the_descriptor_at_the_first_byte(self) -> None:
        """rule 24"""
        with self.served() as served:
            for cut in range(1, 12):
                with served.peer() as peer:
                    message = struct.pack("=III", 37, 9, 40) + EXAMPLES["ADD_MEM_REG"]
                    peer.raw(message[:cut], [self.memory_fd])
                    peer.raw(message[cut:])
                    self.assertEqual(peer.answer(), (37, 5, u64(0)))
                    peer.lives()

    def test_many_messages_in_one_piece(self) -> None:
        with self.served() as served, served.peer() as peer:
            peer.raw(struct.pack("=III", 39, 9, 8) + u64(3) + struct.pack("=III", 40, 1, 0) * 3)
            self.assertEqual([peer.answer() for _ in range(4)], [(39, 5, u64(0))] + [(40, 5, u64(3))] * 3)

    def test_descriptors_of_messages_sent_ahead_are_not_mixed_up(self) -> None:
        """rule 24: Each message keeps its own, though they wait in the socket together."""
        device = Echo()
        with self.served(device) as served, served.peer() as peer:
            for number in range(4):
                peer.send(37, MemReg(RAM + number * PAGE, PAGE, 0x100000 + number * PAGE, number * PAGE).pack(), 9, [self.memory_fd])
                peer.send(39, u64(number), 9)
            self.assertEqual([peer.answer()[::2] for _ in range(8)], [(37, u64(0)), (39, u64(0))] * 4)
            self.assertEqual(len(served.daemon.memory.memory().regions), 4)

    def test_peer_that_leaves_between_messages_is_no_error(self) -> None:
        with self.served() as served:
            with served.peer() as peer:
                peer.lives()
            self.expect_log("INFO .*the front-end has left")
            self.assertFalse([line for line in self._log.lines if line.startswith(("ERROR", "WARNING"))])

    def test_peer_that_leaves_within_a_message_at_every_byte(self) -> None:
        """rule: every descriptor is closed, whatever was read so far."""
        message = struct.pack("=III", 37, 9, 40) + EXAMPLES["ADD_MEM_REG"]
        with self.served() as served:
            for cut in range(1, len(message)):
                with served.peer() as peer:
                    peer.raw(message[:cut], [self.memory_fd])
            with served.peer() as peer:
                peer.lives()
            wait_until(lambda: open_fds().keys() == self.idle, "all descriptors to be closed")
            self.expect_log("within a header")
            self.expect_log("within a payload, after 39 of 40 bytes")

    def test_receiving_process_has_close_on_exec_set(self) -> None:
        """rule 24"""
        with self.served() as served, served.peer() as peer:
            peer.msg("SET_VRING_KICK", u64(0), [self.event_fd])
            kick = served.daemon.vrings[0].kick
            assert kick is not None
            self.assertFalse(os.get_inheritable(kick))


class MalformedMessageTests(WireTest):
    """A malformed message ends the connection with a reason; its descriptors are closed, and the daemon serves the next."""

    def test_descriptors_with_the_payload(self) -> None:
        """They belong to the first byte of the header."""
        with self.served() as served, self.rejected(served, "file descriptors with its payload") as peer:
            peer.raw(struct.pack("=III", 37, 9, 40))
            peer.raw(EXAMPLES["ADD_MEM_REG"], [self.memory_fd])

    def test_descriptors_with_header_and_payload(self) -> None:
        with self.served() as served, self.rejected(served, "file descriptors with its payload") as peer:
            peer.raw(struct.pack("=III", 37, 9, 40), [self.memory_fd])
            peer.raw(EXAMPLES["ADD_MEM_REG"], [self.memory_fd])

    def test_more_descriptors_than_a_message_may_have(self) -> None:
        """rule 24"""
        with self.served() as served, self.rejected(served, f"more than {vhost_user.MAX_FDS} file descriptors") as peer:
            peer.send(5, EXAMPLES["SET_MEM_TABLE"], 9, [self.memory_fd] * (vhost_user.MAX_FDS + 1))

    def test_descriptors_by_the_header_in_pieces(self) -> None:
        """Twelve bytes with 32 each are no way around."""
        with self.served() as served, self.rejected(served, "file descriptors") as peer, contextlib.suppress(ConnectionError):
            for byte in struct.pack("=III", 5, 9, 40):
                peer.raw(bytes([byte]), [self.memory_fd] * 32)
            peer.raw(EXAMPLES["SET_MEM_TABLE"])

    def test_payload_that_is_too_big(self) -> None:
        """Refused by its header; nobody waits for that many bytes."""
        with self.served() as served:
            for size in vhost_user.MAX_PAYLOAD + 1, 2**32 - 1:
                with self.rejected(served, f"payload of {size} bytes") as peer:
                    peer.send(2, size=size, fds=[self.memory_fd])

    def test_version_that_is_not_1(self) -> None:
        with self.served() as served:
            for flags in 0, 2, 3, 8, 10:
                with self.rejected(served, "not those of protocol version 1") as peer:
                    peer.send(1, flags=flags)

    def test_reserved_flags(self) -> None:
        with self.served() as served:
            for flags in 0x11, 0x101, 0x80000001:
                with self.rejected(served, f"flags {flags:#x}") as peer:
                    peer.send(1, flags=flags)

    def test_reply_that_nobody_asked_for(self) -> None:
        with self.served() as served:
            for flags in 5, 13:
                with self.rejected(served, "GET_FEATURES is marked as a reply") as peer:
                    peer.send(1, flags=flags)

    def test_unknown_request(self) -> None:
        with self.served() as served:
            for number in sorted({0, 4, 6, 7, 22, 45, 46, 1000, 2**32 - 1} - {row.number for row in REQUESTS.values()}):
                with self.rejected(served, f"unknown request {number}") as peer:
                    peer.send(number, bytes(8), 9, [self.event_fd])

    def test_request_whose_protocol_feature_was_not_negotiated(self) -> None:
        with self.served(Whole()) as served:
            for name, row in REQUESTS.items():
                if row.gate:
                    with self.subTest(name), self.rejected(served, f"{name} without {row.gate.name} negotiated", protocol_features=0) as peer:
                        peer.send(row.number, EXAMPLES[name], fds=self.fds_for(name))

    def test_payload_of_a_wrong_size(self) -> None:
        """Every row of the table, one byte less and one byte more."""
        with self.served(Whole()) as served:
            for name, row in REQUESTS.items():
                right = EXAMPLES[name]
                wrong = [right[:-1]] if right else []
                if name != "SET_MEM_TABLE":  # some front-ends send all of their structure
                    wrong.append(right + b"\0")
                for payload in wrong:
                    with self.subTest(name, size=len(payload)), self.rejected(served, f"{name}: .*payload of {len(payload)} bytes") as peer:
                        peer.send(row.number, payload, 9, self.fds_for(name))

    def test_wrong_number_of_descriptors(self) -> None:
        """rule 26: Every row of the table."""
        with self.served(Whole()) as served:
            for name, row in REQUESTS.items():
                right = self.fds_for(name)
                wrong = [right + [self.event_fd]] if name != "REM_MEM_REG" else [[self.event_fd] * 2]
                wrong += [[]] if right else []
                for fds in wrong:
                    with self.subTest(name, fds=len(fds)), self.rejected(served, f"{len(fds)} file descriptors|which takes") as peer:
                        peer.send(row.number, EXAMPLES[name], 9, fds)

    def test_memory_without_its_descriptor_names_the_likely_cause(self) -> None:
        """rule 10"""
        with self.served() as served:
            for name in "SET_MEM_TABLE", "ADD_MEM_REG":
                with self.rejected(served, "share=on") as peer:
                    peer.send(REQUESTS[name].number, EXAMPLES[name], 9)

    def test_values_that_can_never_be_right(self) -> None:
        with self.served() as served:
            cases: list[tuple[str, bytes, str]] = [
                ("SET_VRING_NUM", pair(2, 16), "ring 2: the device has 2"),
                ("SET_VRING_BASE", pair(0xFFFFFFFF, 0), "ring 4294967295"),
                ("GET_VRING_BASE", pair(2, 0), "ring 2"),
                ("SET_VRING_ADDR", VringAddr(2, 0, 0, 0, 0, 0).pack(), "ring 2"),
                ("SET_VRING_ENABLE", pair(2, 1), "ring 2"),
                ("SET_VRING_ENABLE", pair(0, 2), "neither 0 nor 1"),
                ("SET_VRING_KICK", u64(2 | 256), "ring 2"),
                ("SET_VRING_CALL", u64(255 | 256), "ring 255"),
                ("SET_VRING_ERR", u64(3 | 256), "ring 3"),
                ("SET_VRING_KICK", u64(1 << 9 | 256), "bits beyond"),
                ("SET_MEM_TABLE", struct.pack("=II", 33, 0), "33 regions"),
                ("SET_MEM_TABLE", struct.pack("=II", 0xFFFFFFFF, 0), "4294967295 regions"),
                ("SET_STATUS", u64(256), "8 bits"),
                ("SET_CONFIG", Config(0, 2, b"x").pack(), "unknown flags"),
                ("GET_CONFIG", struct.pack("=III", 0, 0xFFFFFFFF, 0), "payload of 12 bytes"),
                ("GET_CONFIG", Config(0xFFFFFFFF, 0, b"x").pack(), "config space access"),
                ("SET_FEATURES", u64(1 << 63), "not offered"),
                ("SET_PROTOCOL_FEATURES", u64(1 << 63), "not offered"),
            ]
            for name, payload, reason in cases:
                with self.subTest(name, payload=payload.hex()), self.rejected(served, reason) as peer:
                    peer.send(REQUESTS[name].number, payload, 9)

    def test_random_bytes(self) -> None:
        """Nothing of that harms the daemon."""
        with self.served(Whole()) as served, self.seeded() as rng:
            for _ in range(150):
                with served.peer() as peer, contextlib.suppress(ConnectionError):
                    for _ in range(rng.randrange(1, 6)):
                        name = rng.choice(list(REQUESTS))
                        payload = bytearray(EXAMPLES[name])
                        for _ in range(rng.randrange(3)):
                            if payload:
                                payload[rng.randrange(len(payload))] = rng.randrange(256)
                        fds = self.fds_for(name) if rng.random() < 0.8 else [self.memory_fd] * rng.randrange(3)
                        peer.send(REQUESTS[name].number, bytes(payload), rng.choice((1, 1, 9, 9, 9, 5)), fds)
                    if rng.random() < 0.3:
                        peer.raw(rng.randbytes(rng.randrange(30)))
            with served.peer() as peer:
                peer.lives()
            wait_until(lambda: open_fds().keys() == self.idle, "all descriptors to be closed")


class AcknowledgementTests(WireTest):
    """rule 14: a reply or an acknowledgement, never both, never neither."""

    def test_every_request_is_answered_once(self) -> None:
        """rule 14: With NEED_REPLY: by its reply or by an acknowledgement, whose flags are those of a reply and no more."""
        with self.served(Whole()) as served:
            for name, row in REQUESTS.items():
                with self.subTest(name), served.peer() as peer:
                    if name == "REM_MEM_REG":
                        peer.msg("ADD_MEM_REG", EXAMPLES["ADD_MEM_REG"], [self.memory_fd])
                    if name == "POSTCOPY_LISTEN":
                        peer.msg("POSTCOPY_ADVISE", expect=b"")
                    for flags in 9, 1:
                        peer.send(row.number, EXAMPLES[name], flags, self.fds_for(name))
                        if row.reply or flags == 9:
                            number, answer_flags, payload = peer.answer()
                            self.assertEqual((number, answer_flags), (row.number, 5))
                            if row.reply:
                                row.reply.unpack(payload)
                            else:
                                self.assertEqual(payload, u64(0))
                        peer.lives()

    def test_no_acknowledgement_where_it_was_not_negotiated(self) -> None:
        with self.served(Whole()) as served, served.peer(protocol_features=~(PF.REPLY_ACK | PF.INBAND_NOTIFICATIONS)) as peer:
            for name, row in REQUESTS.items():
                if not row.reply and name not in ("SET_PROTOCOL_FEATURES", "REM_MEM_REG", "ADD_MEM_REG", "POSTCOPY_LISTEN", "VRING_KICK"):
                    peer.msg(name, EXAMPLES[name], self.fds_for(name), expect=SILENT)

    def test_acknowledgements_begin_with_the_message_that_negotiates_them(self) -> None:
        with self.served() as served, served.peer(protocol_features=0) as peer:
            peer.msg("SET_OWNER", expect=SILENT)
            peer.send(16, u64(int(PF.REPLY_ACK)), 9)
            peer.send(1)
            answer = peer.answer()
            if answer[0] == 16:  # allowed, and not asked for
                self.assertEqual(answer, (16, 5, u64(0)))
                answer = peer.answer()
            self.assertEqual(answer[:2], (1, 5))
            peer.msg("SET_OWNER")

    def test_refused_request_is_acknowledged_with_failure_and_the_connection_stays(self) -> None:
        """rule 15"""
        with self.served() as served, served.peer() as peer:
            peer.msg("SET_MEM_TABLE", EXAMPLES["SET_MEM_TABLE"], [self.memory_fd])
            table = MemTable((MemRegion(RAM, 5 * PAGE, 0x100000, 0),)).pack()  # the file has four
            overlap = MemTable((MemRegion(RAM, PAGE, 0x100000, 0), MemRegion(RAM, PAGE, 0x200000, 0))).pack()
            for name, payload, fds in (
                ("SET_MEM_TABLE", table, [self.memory_fd]),
                ("SET_MEM_TABLE", overlap, [self.memory_fd] * 2),
                ("ADD_MEM_REG", EXAMPLES["ADD_MEM_REG"], [self.memory_fd]),
                ("ADD_MEM_REG", MemReg(0, PAGE, 0, 0).pack(), [self.socket_fd]),
                ("REM_MEM_REG", MemReg(0, PAGE, 0, 0).pack(), []),
                ("SET_VRING_NUM", pair(0, 0), []),
                ("SET_VRING_NUM", pair(0, 257), []),
                ("SET_VRING_KICK", u64(0), [self.memory_fd]),
                ("SET_CONFIG", Config(8, 0, b"x").pack(), []),
            ):
                with self.subTest(name, payload=payload.hex()):
                    peer.msg(name, payload, fds, expect=REFUSED)
                    peer.msg(name, payload, fds, flags=1, expect=SILENT)
            self.assertEqual(len(served.daemon.memory.memory().regions), 1, "what was refused has changed nothing")

    def test_exception_in_the_device_is_a_refusal(self) -> None:
        class Bad(Echo):
            def acked_features(self, features: int) -> None:
                raise RuntimeError("cannot")

            def get_config(self, offset: int, size: int) -> bytes:
                raise RuntimeError("cannot")

        with self.served(Bad()) as served, served.peer() as peer:
            peer.msg("SET_FEATURES", u64(PROTOCOL), expect=REFUSED)
            peer.msg("GET_CONFIG", EXAMPLES["GET_CONFIG"], expect=b"")
            self.expect_log("acked_features of the device failed")
            self.expect_log("get_config of the device failed")

    def test_device_that_returns_nothing_is_a_refusal(self) -> None:
        class Forgets(Whole):
            def set_status(self, status: int) -> Any:
                return None

            def create_crypto_session(self, opcode: int, parameters: SymmetricSession | AsymmetricSession) -> Any:
                return None

            def get_config(self, offset: int, size: int) -> Any:
                return None

        with self.served(Forgets()) as served, served.peer() as peer:
            peer.msg("SET_STATUS", u64(1), expect=REFUSED)
            peer.msg("GET_STATUS", expect=u64(0))
            peer.msg("CREATE_CRYPTO_SESSION", EXAMPLES["CREATE_CRYPTO_SESSION"], expect=CryptoSession(0, b"", -1).pack())
            peer.msg("GET_CONFIG", EXAMPLES["GET_CONFIG"], expect=b"")
            for name in "set_status", "create_crypto_session", "get_config":
                self.expect_log(f"{name} of the device failed .*TypeError")


RULES = {
    1: "Started and enabled are two switches: both off at first, and each is kept while the other changes.",
    2: "SET_VRING_KICK itself starts a ring: no kick has to follow.",
    3: "SET_VRING_KICK without a file descriptor starts a ring that is polled.",
    4: "SET_FEATURES without bit 30 enables all rings at once; with it, it leaves them as they are.",
    5: "A ring that is started and disabled has no side effects, and loses no kick.",
    6: "GET_VRING_BASE waits for what is in flight, stops the ring and resets nothing; with all rings stopped the device is silent.",
    7: "The base of a split ring is its available index alone, that of a packed ring has both positions and wrap counters.",
    8: "Addresses may come before the memory, and are translated with the memory that there is.",
    9: "A driver's lies end in an error and no loop; a chain that is malformed is given back once, with length 0.",
    10: "As many file descriptors as regions, each mapped from wherever it begins, and closed.",
    11: "ADD_MEM_REG has one file descriptor; REM_MEM_REG goes by guest address, user address and size.",
    12: "Postcopy and CONFIGURE_MEM_SLOTS exclude each other.",
    13: "Regions overlap neither in guest addresses nor in user addresses.",
    14: "A message is answered by its reply or by an acknowledgement, never both; SET_LOG_BASE always by a reply.",
    15: "A refused request is acknowledged with an error, and the connection lives on.",
    16: "A driver may kick before the eventfd is there.",
    17: "All writable buffers of a completed chain are logged, the used ring as VHOST_VRING_F_LOG says, atomically; LOG_ALL may change any time.",
    18: "The eventfd of SET_LOG_FD is told of what was logged.",
    19: "In-flight record of a split ring: after a crash the whole last batch is settled, and the rest comes again in the order it was taken.",
    20: "In-flight record of a packed ring: what was being committed is committed or rolled back.",
    21: "In-band notifications need REPLY_ACK and BACKEND_REQ, else the connection ends.",
    22: "The reply to GET_CONFIG is as long as the request; SET_CONFIG has flags, and read-only fields.",
    23: "SHMEM_MAP over nothing that is mapped, SHMEM_UNMAP of just what was; a reset unmaps all.",
    24: "File descriptors come with the header's first byte; messages sent ahead keep theirs; a descriptor lost on the way is an error.",
    25: "SET_DEVICE_STATE_FD does not block; its reply has a descriptor or bit 8, never an error with a descriptor.",
    26: "Descriptors are closed: those replaced, those of a stopped ring, those of files that are mapped, and those of messages that were wrong.",
    27: "Programs know --socket-path, --fd and --print-capabilities, fail early with a status, and end at once on SIGTERM.",
}


class RuleTests(unittest.TestCase):
    def test_every_rule_has_its_test(self) -> None:
        named: set[int] = set()
        for cases in globals().values():
            for name, test in vars(cases).items() if isinstance(cases, type) and issubclass(cases, unittest.TestCase) else ():
                if name.startswith("test_"):
                    for numbers in re.findall(r"\brules? ((?:\d+(?:, | and | to )?)+)", test.__doc__ or ""):
                        named.update(map(int, re.findall(r"\d+", numbers)))
        self.assertEqual(named, set(RULES))


class EachRequestTests(WireTest):
    """What each request of the table does: one test for each row, named after it."""

    def test_every_row_has_its_test(self) -> None:
        rows = {f"test_{name.lower()}" for name in REQUESTS}
        self.assertEqual(rows - set(dir(self)), set(), "requests without a test")
        self.assertEqual(REQUESTS.keys() - EXAMPLES.keys(), set(), "requests without an example")

    def test_get_features(self) -> None:
        """The framework adds what it implements itself."""

        class Bits(Echo):
            features = 1 << 5

        class Fewer(Bits):
            withheld_features = PACKED | IN_ORDER

        with self.served(Bits()) as served, served.peer() as peer:
            peer.msg("GET_FEATURES", expect=u64(FEATURES | 1 << 5))
        with self.served(Fewer()) as served, served.peer() as peer:
            peer.msg("GET_FEATURES", expect=u64((FEATURES | 1 << 5) & ~PACKED & ~IN_ORDER))
        self.assertEqual(FEATURES, 1 << 26 | INDIRECT | EVENT_IDX | PROTOCOL | VERSION_1 | PACKED | IN_ORDER | RING_RESET)

    def test_set_features(self) -> None:
        device = Echo()
        with self.served(device) as served, served.peer() as peer:
            peer.msg("SET_FEATURES", u64(PROTOCOL | EVENT_IDX))
            peer.msg("SET_FEATURES", u64(PROTOCOL | VERSION_1))
            self.assertEqual(device.told("features"), [(PROTOCOL | EVENT_IDX,), (PROTOCOL | VERSION_1,)])
            self.assertEqual(device.told("event_idx"), [(True,), (False,)])

    def test_set_owner(self) -> None:
        with self.served() as served, served.peer() as peer:
            peer.msg("SET_OWNER")
            peer.msg("SET_OWNER")

    def test_set_mem_table(self) -> None:
        device = Echo()
        with self.served(device) as served, served.peer() as peer:
            regions = tuple(MemRegion(RAM + n * 0x10000, PAGE, 0x100000 + n * 0x10000, (n % 4) * PAGE) for n in range(vhost_user.MAX_FDS))
            for count in vhost_user.MAX_FDS, 8, 1, 0:
                peer.msg("SET_MEM_TABLE", MemTable(regions[:count]).pack(), [self.memory_fd] * count)
            self.assertEqual(device.told("memory"), [(vhost_user.MAX_FDS,), (8,), (1,), (0,)])

    def test_set_vring_num(self) -> None:
        with self.served() as served, served.peer() as peer:
            for num, expect in (1, OK), (256, OK), (0, REFUSED), (257, REFUSED), (0xFFFFFFFF, REFUSED):
                peer.msg("SET_VRING_NUM", pair(1, num), expect=expect)

    def test_set_vring_addr(self) -> None:
        """rule 8: it may come before the memory that it is in."""
        with self.served() as served, served.peer() as peer:
            peer.msg("SET_VRING_ADDR", EXAMPLES["SET_VRING_ADDR"])
            peer.msg("SET_MEM_TABLE", EXAMPLES["SET_MEM_TABLE"], [self.memory_fd])
            peer.msg("SET_VRING_NUM", pair(0, 8))
            peer.msg("SET_VRING_KICK", u64(0), [self.event_fd])
            peer.msg("SET_VRING_ENABLE", pair(0, 1))
            wait_until(lambda: served.daemon.vrings[0].active, "the ring to be served")

    def test_set_vring_base(self) -> None:
        with self.served() as served, served.peer() as peer:
            peer.msg("SET_VRING_BASE", pair(0, 77))
            peer.msg("GET_VRING_BASE", pair(0, 0), expect=pair(0, 77))
            peer.msg("SET_VRING_BASE", pair(1, 0xFFFF))
            peer.msg("GET_VRING_BASE", pair(1, 0), expect=pair(1, 0xFFFF))
            peer.msg("SET_VRING_KICK", u64(0), [self.event_fd])
            peer.msg("SET_VRING_BASE", pair(0, 1), expect=REFUSED)

    def test_reset_owner(self) -> None:
        """Deprecated: it disables all rings and no more."""
        with self.served() as served, served.peer() as peer:
            peer.msg("SET_VRING_KICK", u64(0), [self.event_fd])
            peer.msg("SET_VRING_ENABLE", pair(0, 1))
            peer.msg("RESET_OWNER")
            vring = served.daemon.vrings[0]
            self.assertEqual((vring.started, vring.enabled), (True, False))

    def test_set_log_base(self) -> None:
        """rule 14: Answered always, by a message of its own; a file that is too short ends the connection, since that message cannot say so."""
        with self.served() as served:
            with served.peer() as peer:
                peer.msg("SET_LOG_BASE", Log(PAGE, PAGE).pack(), [self.memory_fd], expect=u64(0))
            with self.rejected(served, "SET_LOG_BASE: .*its reply cannot say so") as peer:
                peer.send(6, Log(PAGE, 64 * PAGE).pack(), fds=[self.memory_fd])

    def test_set_log_fd(self) -> None:
        """rules 18 and 26: Kept until the next one, or the end."""
        with self.served() as served, served.peer() as peer:
            before = len(open_fds())
            for _ in range(3):
                peer.msg("SET_LOG_FD", b"", [self.event_fd])
                self.assertEqual(len(open_fds()), before + 1)

    def test_get_inflight_fd(self) -> None:
        """rules 19 and 20: A region of zeroes that nobody can cut short, large enough for the queues."""
        with self.served() as served, served.connect() as frontend:
            frontend.negotiate(-1)
            region, fd = frontend.get_inflight(2, 16)
            self.addCleanup(os.close, fd)
            self.assertEqual((region.num_queues, region.queue_size, region.mmap_offset), (2, 16, 0))
            self.assertGreaterEqual(region.mmap_size, 2 * (16 + 16 * 16))
            self.assertEqual(os.pread(fd, 1 << 20, 0), bytes(region.mmap_size))
            with self.assertRaises(PermissionError):
                os.ftruncate(fd, 0)
        with self.served() as served:
            for wrong in Inflight(0, 0, 0, 16), Inflight(0, 0, 3, 16), Inflight(0, 0, 1, 0), Inflight(0, 0, 1, 65535):
                with self.rejected(served, "GET_INFLIGHT_FD for") as peer:
                    peer.send(31, wrong.pack())

    def test_set_inflight_fd(self) -> None:
        """Mapped for the rings, and let go with them; too small a region or file is not taken."""
        with self.served() as served:
            with served.peer() as peer:
                peer.msg("SET_INFLIGHT_FD", Inflight(PAGE, 0, 2, 16).pack(), [self.memory_fd])
                peer.msg("SET_INFLIGHT_FD", Inflight(PAGE, 64 * PAGE, 2, 16).pack(), [self.memory_fd], expect=REFUSED)
            for wrong in Inflight(PAGE, 0, 3, 16), Inflight(64, 0, 1, 16):
                with self.rejected(served, "SET_INFLIGHT_FD: ") as peer:
                    peer.send(32, wrong.pack(), fds=[self.memory_fd])

    def test_inflight_region_of_smaller_queues(self) -> None:
        """A ring that is larger than SET_INFLIGHT_FD said does not start; new or not, the region is not touched behind its part."""
        with self.served() as served:
            for features, base, size_then in (VERSION_1, 0, 0), (VERSION_1, 0, 256), (VERSION_1 | PACKED, 0x80008000, 0):
                with self.subTest(features=features, size_then=size_then), served.peer(features=PROTOCOL | features) as peer:
                    region = self.memfd(PAGE)
                    if size_then:
                        os.pwrite(region, struct.pack("=QHHHH", 0, 1, size_then, 0, 0), 0)
                    before = os.pread(region, PAGE, 0)
                    peer.msg("SET_MEM_TABLE", EXAMPLES["SET_MEM_TABLE"], [self.memory_fd])
                    peer.msg("SET_INFLIGHT_FD", Inflight(PAGE, 0, 1, 1).pack(), [region])
                    peer.msg("SET_VRING_NUM", pair(0, 256))
                    peer.msg("SET_VRING_BASE", pair(0, base))
                    peer.msg("SET_VRING_ADDR", VringAddr(0, 0, 0x100000, 0x102000, 0x101800, 0).pack())
                    peer.msg("SET_VRING_KICK", u64(0), [self.event_fd], expect=REFUSED)
                    self.assertEqual(os.pread(region, PAGE, 0), before)
            self.expect_log("the in-flight region has .* bytes for a queue of 256")

    def test_get_vring_base(self) -> None:
        """rules 6 and 26: it stops the ring and lets go of kick and call, and resets nothing."""
        device = Echo()
        with self.served(device) as served, served.peer() as peer:
            peer.msg("GET_VRING_BASE", pair(1, 0), expect=pair(1, 0))
            self.assertEqual(device.told("stopped"), [])
            before = open_fds().keys()
            peer.msg("SET_VRING_CALL", u64(1), [self.event_fd])
            peer.msg("SET_VRING_KICK", u64(1), [self.event_fd])
            self.assertEqual(device.told("started"), [(1,)])
            peer.msg("GET_VRING_BASE", pair(1, 0), expect=pair(1, 0))
            self.assertEqual((device.told("stopped"), open_fds().keys()), ([(1,)], before))

    def test_set_vring_kick(self) -> None:
        """It starts the ring, with or without a descriptor; a new one replaces the old one, which is closed."""
        device = Echo()
        with self.served(device) as served, served.peer() as peer:
            peer.msg("SET_VRING_KICK", u64(0), [self.event_fd])
            before = open_fds().keys()
            for _ in range(5):
                peer.msg("SET_VRING_KICK", u64(0), [self.event_fd])
            self.assertEqual(len(open_fds()), len(before))
            peer.msg("SET_VRING_KICK", u64(256))
            self.assertEqual(len(open_fds()), len(before) - 1)
            peer.msg("SET_VRING_KICK", u64(1 | 256))
            self.assertEqual(device.told("started"), [(0,), (1,)])
            self.assertTrue(all(vring.started for vring in served.daemon.vrings))

    def test_set_vring_call(self) -> None:
        """rule 26"""
        self.replaced("SET_VRING_CALL")

    def test_set_vring_err(self) -> None:
        """rule 26"""
        self.replaced("SET_VRING_ERR")

    def replaced(self, name: str) -> None:
        """A new descriptor replaces the old one, which is closed; bit 8 leaves none."""
        with self.served() as served, served.peer() as peer:
            before = len(open_fds())
            for _ in range(5):
                peer.msg(name, u64(1), [self.event_fd])
                self.assertEqual(len(open_fds()), before + 1)
            peer.msg(name, u64(1 | 256))
            self.assertEqual(len(open_fds()), before)
            peer.msg(name, u64(1), [self.event_fd])

    def test_get_protocol_features(self) -> None:
        plain = Echo()
        plain.config = None
        plain.withheld_protocol_features = PF.STATUS
        plain.protocol_features = PF.MTU
        hooked = PROTOCOL_FEATURES | PF.CONFIG | PF.RARP | PF.MTU | PF.CRYPTO_SESSION | PF.SHARED_OBJECT | PF.DEVICE_STATE | PF.SHMEM

        with self.served() as served, served.peer() as peer:
            peer.msg("GET_PROTOCOL_FEATURES", expect=u64(int(PROTOCOL_FEATURES | PF.CONFIG)))
        with self.served(plain) as served, served.peer() as peer:
            peer.msg("GET_PROTOCOL_FEATURES", expect=u64(int(PROTOCOL_FEATURES & ~PF.STATUS | PF.MTU)))
        with self.served(Whole()) as served, served.peer() as peer:
            peer.msg("GET_PROTOCOL_FEATURES", expect=u64(int(hooked | Whole.protocol_features | PF.GET_VRING_BASE_SKIP_DRAIN)))
        for bit in PF.MQ, PF.REPLY_ACK, PF.BACKEND_REQ, PF.RESET_DEVICE, PF.CONFIGURE_MEM_SLOTS, PF.STATUS:
            self.assertTrue(PROTOCOL_FEATURES & bit)

    def test_set_protocol_features(self) -> None:
        """Before SET_FEATURES, or after it; a feature that is not chosen is not there."""
        with self.served() as served:
            with served.peer(protocol_features=0) as peer:
                peer.msg("SET_PROTOCOL_FEATURES", u64(int(PF.MQ)), flags=1, expect=SILENT)
                peer.msg("GET_QUEUE_NUM", expect=u64(2))
                peer.msg("GET_STATUS", expect=CLOSED)
            self.expect_log("GET_STATUS without STATUS")
            with served.peer(protocol_features=0) as peer:
                peer.msg("SET_FEATURES", u64(PROTOCOL), flags=1, expect=SILENT)
                peer.msg("SET_PROTOCOL_FEATURES", u64(int(PF.MQ | PF.REPLY_ACK)), flags=1, expect=SILENT)
                peer.msg("SET_OWNER")

    def test_get_queue_num(self) -> None:
        with self.served() as served, served.peer() as peer:
            peer.msg("GET_QUEUE_NUM", expect=u64(2))

    def test_set_vring_enable(self) -> None:
        """rule 1: kept while the ring is stopped."""
        with self.served() as served, served.peer(features=PROTOCOL) as peer:
            ring = served.daemon.vrings[1]
            self.assertFalse(ring.enabled)
            peer.msg("SET_VRING_ENABLE", pair(1, 1))
            self.assertTrue(ring.enabled)
            peer.msg("SET_VRING_KICK", u64(1), [self.event_fd])
            peer.msg("GET_VRING_BASE", pair(1, 0), expect=pair(1, 0))
            self.assertTrue(ring.enabled)
            peer.msg("SET_VRING_ENABLE", pair(1, 0))
            self.assertFalse(ring.enabled)

    def test_set_backend_req_fd(self) -> None:
        """rule 26: The one before is closed; what is no socket ends the connection."""
        with self.served() as served:
            with served.peer() as peer:
                ours, theirs = socket.socketpair()
                with ours, theirs:
                    peer.msg("SET_BACKEND_REQ_FD", fds=[theirs.fileno()])
                    theirs.close()
                    self.assertFalse(is_readable(ours), "is held open")
                    peer.msg("SET_BACKEND_REQ_FD", fds=[self.socket_fd])
                    self.assertTrue(is_readable(ours, PATIENCE), "the one before is not closed")
                    self.assertEqual(ours.recv(1), b"")
            wait_until(lambda: open_fds().keys() == self.idle, "the channel to be closed")
            with self.rejected(served, "SET_BACKEND_REQ_FD: the file descriptor is no socket") as peer:
                peer.send(21, fds=[self.memory_fd])

    def test_get_config(self) -> None:
        """rule 22: The reply's payload is just as long as the request's; a payload of nothing says that it failed."""

        class Short(Echo):
            def get_config(self, offset: int, size: int) -> bytes:
                if offset == 8:
                    raise Refused("not there")
                return b"x" * (size - 1)

        class Fields(ctypes.LittleEndianStructure):
            _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint16))

        declared, without = Echo(), Echo()
        declared.config = Fields(0x01020304, 0x0506)
        without.config = None
        without.protocol_features = PF.CONFIG

        with self.served() as served, served.peer() as peer:
            for offset, size in (0, 16), (3, 5), (0, 0), (0, 256):
                data = b"0123456789abcdef"[offset : offset + size].ljust(size, b"\0")
                peer.msg("GET_CONFIG", Config(offset, 0, bytes(size)).pack(), expect=Config(offset, 0, data).pack())
        for device, offset in (Short(), 8), (Short(), 0), (without, 0):
            with self.served(device) as served, served.peer() as peer:
                peer.msg("GET_CONFIG", Config(offset, 0, bytes(8)).pack(), expect=b"")
                peer.msg("GET_CONFIG", Config(offset, 0, bytes(8)).pack(), flags=1, expect=b"")
        with self.served(declared) as served, served.peer() as peer:
            peer.msg("GET_CONFIG", Config(0, 0, bytes(6)).pack(), expect=Config(0, 0, b"\4\3\2\1\6\5").pack())

    def test_set_config(self) -> None:
        """rule 22: the device sees the flags, and refuses what is read-only"""
        device = Echo()
        with self.served(device) as served, served.peer() as peer:
            peer.msg("SET_CONFIG", Config(3, 0, b"new").pack())
            peer.msg("SET_CONFIG", Config(3, 1, b"mig").pack())
            peer.msg("SET_CONFIG", Config(9, 0, b"new").pack(), expect=REFUSED)
            self.assertEqual(device.told("config"), [(3, b"new", 0), (3, b"mig", 1)])

    def test_reset_device(self) -> None:
        """All rings are as new; what was negotiated stays."""
        device = Echo()
        with self.served(device) as served, served.peer(features=PROTOCOL | VERSION_1) as peer:
            before = open_fds().keys()
            peer.msg("SET_VRING_KICK", u64(0), [self.event_fd])
            peer.msg("SET_VRING_ENABLE", pair(0, 1))
            peer.msg("SET_VRING_BASE", pair(1, 9))
            peer.msg("SET_STATUS", u64(15))
            peer.msg("RESET_DEVICE")
            self.assertEqual((device.told("reset"), device.told("stopped")), ([()], [(0,)]))
            self.assertEqual(open_fds().keys(), before)
            self.assertFalse(served.daemon.vrings[0].started or served.daemon.vrings[0].enabled)
            peer.msg("GET_VRING_BASE", pair(1, 0), expect=pair(1, 0))
            peer.msg("GET_STATUS", expect=u64(0))

    def test_get_max_mem_slots(self) -> None:
        with self.served() as served, served.peer() as peer:
            peer.msg("GET_MAX_MEM_SLOTS", expect=u64(509))

    def test_add_mem_reg(self) -> None:
        """rule 11: As many as were told, and not one more; each descriptor is closed at once."""
        with self.served() as served, served.peer() as peer:
            before = open_fds().keys()
            for n in range(MAX_REGIONS + 1):
                peer.send(37, MemReg(RAM + n * PAGE, PAGE, 0x100000 + n * PAGE, 0).pack(), 9, [self.memory_fd])
                self.assertEqual(peer.answer()[2] == u64(0), n < MAX_REGIONS)
            self.assertEqual(open_fds().keys(), before)
            self.assertEqual(len(served.daemon.memory.memory().regions), MAX_REGIONS)
            self.expect_log("ADD_MEM_REG .* refused: 510 memory regions")

    def test_rem_mem_reg(self) -> None:
        """rule 11: by guest address, user address and size; a descriptor that comes along is closed."""
        mappings = mapping_count()
        with self.served() as served, served.peer() as peer:
            before = open_fds().keys()
            for fds in [], [self.memory_fd]:
                peer.msg("ADD_MEM_REG", MemReg(RAM, PAGE, 0x100000, PAGE).pack(), [self.memory_fd])
                for wrong in MemReg(RAM + 1, PAGE, 0x100000, PAGE), MemReg(RAM, PAGE + 1, 0x100000, PAGE), MemReg(RAM, PAGE, 0x100001, PAGE):
                    peer.msg("REM_MEM_REG", wrong.pack(), fds, expect=REFUSED)
                peer.msg("REM_MEM_REG", MemReg(RAM, PAGE, 0x100000, 12345).pack(), fds)
                peer.msg("REM_MEM_REG", MemReg(RAM, PAGE, 0x100000, PAGE).pack(), fds, expect=REFUSED)
            self.assertEqual((open_fds().keys(), mapping_count()), (before, mappings))

    def test_set_status(self) -> None:
        """0 resets the device; the device may answer with another status than the driver set."""

        class NeedsReset(Echo):
            def set_status(self, status: int) -> int:
                return status | 64

        device = Echo()
        with self.served(device) as served, served.peer() as peer:
            for status in 1, 3, 11, 15, 0:
                peer.msg("SET_STATUS", u64(status))
            self.assertEqual(device.told("status")[:4], [(1,), (3,), (11,), (15,)])
            self.assertEqual(device.told("reset"), [()])
        with self.served(NeedsReset()) as served, served.peer() as peer:
            peer.msg("SET_STATUS", u64(15))
            peer.msg("GET_STATUS", expect=u64(79))

    def test_get_status(self) -> None:
        with self.served() as served, served.peer() as peer:
            peer.msg("GET_STATUS", expect=u64(0))
            peer.msg("SET_STATUS", u64(11))
            peer.msg("GET_STATUS", expect=u64(11))

    def test_vring_kick(self) -> None:
        """It starts the ring, without any eventfd; its number is reserved."""
        device = Whole()
        with self.served(device) as served:
            with served.peer() as peer:
                peer.msg("VRING_KICK", pair(1, 0))
                self.assertEqual((device.told("started"), served.daemon.vrings[1].started), ([(1,)], True))
                peer.msg("VRING_KICK", pair(1, 0))
                self.assertEqual(device.told("started"), [(1,)])
            with self.rejected(served, "VRING_KICK of ring 1 with 1") as peer:
                peer.send(35, pair(1, 1))

    def test_protocol_features_that_need_others(self) -> None:
        """rule 21: The connection ends: there is no other way to say so. Nor are they offered without those."""
        for feature, needed in vhost_user.NEEDS:
            each = [one for one in PF if one & needed]
            with self.served(Whole()) as served:
                for beside in PF(0), *each[len(each) == 1 :]:
                    with self.rejected(served, f"{feature.name} without|GET_VRING_BASE_INFLIGHT without", protocol_features=0) as peer:
                        peer.send(16, u64(int(feature | beside)))
            for missing in each:

                class Fewer(Whole):
                    withheld_protocol_features = int(missing)

                with self.subTest(feature, missing=missing), self.served(Fewer()) as served, served.connect() as frontend:
                    offered = frontend.request("GET_PROTOCOL_FEATURES").value
                    self.assertFalse(offered & (feature | missing))
                    frontend.negotiate(VERSION_1)

    def postcopy_peer(self, served: Served) -> Peer:
        """One that has negotiated what the next tests are about."""
        return served.peer(protocol_features=Peer.WITH_USER_ADDRESSES)

    def test_postcopy_advise(self) -> None:
        """Its reply brings the userfaultfd; another one until LISTEN, and then none."""
        with self.serving(migrating()) as served, served.peer(protocol_features=~PF.PAGEFAULT) as peer:
            peer.msg("POSTCOPY_ADVISE", expect=CLOSED)
            self.expect_log("without PAGEFAULT negotiated")
        with self.serving(migrating()) as served, served.connect() as frontend:
            frontend.negotiate(VERSION_1)
            fd = frontend.postcopy_advise()
            self.assertEqual(os.readlink(f"/proc/self/fd/{fd}"), "anon_inode:[userfaultfd]")
            os.close(fd)
            os.close(frontend.postcopy_advise())
            frontend.request("POSTCOPY_LISTEN")
            with self.raises(Refused, "no userfaultfd"):
                frontend.postcopy_advise()
            self.expect_log("when a postcopy migration is under way")

    def test_postcopy_listen(self) -> None:
        """After ADVISE, and before there is memory."""
        with self.serving(migrating()) as served, self.postcopy_peer(served) as peer:
            peer.msg("POSTCOPY_LISTEN", expect=REFUSED)
            self.expect_log("there was no POSTCOPY_ADVISE")
            peer.msg("POSTCOPY_ADVISE", expect=b"")
            peer.msg("SET_MEM_TABLE", EXAMPLES["SET_MEM_TABLE"], fds=[self.memory_fd])
            peer.msg("POSTCOPY_LISTEN", expect=REFUSED)
            self.expect_log("is mapped already")
            peer.msg("SET_MEM_TABLE", MemTable(()).pack())
            peer.msg("POSTCOPY_LISTEN")

    def test_postcopy_end(self) -> None:
        """Answered in any case."""
        with self.serving(migrating()) as served, self.postcopy_peer(served) as peer:
            peer.msg("POSTCOPY_END", expect=u64(1))
            self.expect_log("there was no POSTCOPY_ADVISE")
            peer.msg("POSTCOPY_ADVISE", expect=b"")
            for flags in 1, 9:
                peer.msg("POSTCOPY_END", flags=flags, expect=u64(0) if flags == 1 else u64(1))

    def test_iotlb_msg(self) -> None:
        """Answered in any case, REPLY_ACK or not: QEMU waits for it."""
        device = Whole()
        device.iommu = True
        update = (0, PAGE, 0x100000, 3, Iotlb.UPDATE)
        with self.serving(device) as served, served.peer(features=PROTOCOL | VERSION_1) as peer:
            peer.msg("IOTLB_MSG", IotlbMessage(*update).pack(), expect=u64(1))
            self.expect_log("VIRTIO_F_ACCESS_PLATFORM is not negotiated")
        with self.serving(device) as served, served.peer(features=PROTOCOL | VERSION_1 | ACCESS_PLATFORM) as peer:
            peer.msg("IOTLB_MSG", IotlbMessage(*update).pack(), expect=u64(1))
            self.expect_log("lie in no region")
            peer.msg("ADD_MEM_REG", EXAMPLES["ADD_MEM_REG"], fds=[self.memory_fd])
            for flags in 1, 9:
                peer.msg("IOTLB_MSG", IotlbMessage(*update).pack(), flags=flags, expect=u64(0))
                peer.msg("IOTLB_MSG", IotlbMessage(0, 1 << 64 - 1, 0, 0, Iotlb.INVALIDATE).pack(), flags=flags, expect=u64(0))
            for wrong, why in (
                ((0, 0, 0x100000, 3, Iotlb.UPDATE), "nothing, or more"),
                (((1 << 64) - PAGE, 2 * PAGE, 0x100000, 3, Iotlb.UPDATE), "nothing, or more"),
                ((0, 8 * PAGE, 0x100000, 3, Iotlb.UPDATE), "lie in no region"),
                ((0, PAGE, 0x100000, 3, Iotlb.MISS), "neither an update"),
                ((0, PAGE, 0x100000, 3, 9), "neither an update"),
            ):
                peer.msg("IOTLB_MSG", IotlbMessage(*wrong).pack(), expect=u64(1))
                self.expect_log(why)

    def test_set_vring_endian(self) -> None:
        with self.serving(Whole()) as served, served.peer(protocol_features=PF.REPLY_ACK) as peer:
            peer.msg("SET_VRING_ENDIAN", pair(0, 1), expect=CLOSED)
            self.expect_log("without CROSS_ENDIAN negotiated")
        with self.serving(Whole()) as served:
            for num in 2, 1 << 31:
                with served.peer() as peer:
                    peer.msg("SET_VRING_ENDIAN", pair(0, num), expect=CLOSED)
                    self.expect_log("neither 0 .little. nor 1 .big.")
            with served.peer(features=PROTOCOL) as peer:
                ring = served.daemon.vrings[0]
                for num, order in (1, "big"), (0, "little"):
                    peer.msg("SET_VRING_ENDIAN", pair(0, num))
                    self.assertEqual((ring.byteorder, served.daemon.vrings[1].byteorder), (order, sys.byteorder))
                peer.msg("SET_VRING_KICK", u64(0), fds=[self.eventfd()])
                peer.msg("SET_VRING_ENDIAN", pair(0, 1), expect=REFUSED)
                self.expect_log("ring 0 is started")
                peer.msg("GET_VRING_BASE", pair(0, 0), expect=pair(0, 0))
                peer.msg("SET_VRING_ENDIAN", pair(0, 1))
                peer.msg("SET_FEATURES", u64(PROTOCOL | VERSION_1))
                self.assertEqual(ring.byteorder, "little")  # whatever was said: only legacy drivers have an order of their own
            with served.peer(features=PROTOCOL) as peer:
                self.assertEqual(ring.byteorder, sys.byteorder)  # the next front-end's own affair

    def test_send_rarp(self) -> None:
        device = Whole()
        with self.served(device) as served, served.peer() as peer:
            peer.msg("SEND_RARP", EXAMPLES["SEND_RARP"])
            self.assertEqual(device.told("rarp"), [(b"\x52\x54\x00\x12\x34\x56",)])

    def test_net_set_mtu(self) -> None:
        """What no network has is refused here, what the device does not like is refused there."""
        device = Whole()
        with self.served(device) as served, served.peer() as peer:
            for mtu, expect in (68, OK), (9000, OK), (9001, REFUSED), (67, REFUSED), (65536, REFUSED):
                peer.msg("NET_SET_MTU", u64(mtu), expect=expect)
            self.assertEqual(device.told("mtu"), [(68,), (9000,)])

    def test_create_crypto_session(self) -> None:
        """With the keys of their lengths; a session that is not made has the number -1, and a key too long ends the connection."""
        device = Whole()
        rsa = AsymmetricSession(1, 2, 3, 1, 2, b"key")
        with self.served(device) as served:
            with served.connect() as frontend:
                frontend.negotiate(-1)
                self.assertEqual(frontend.create_crypto_session(2, AES), 7)
                self.assertEqual(frontend.create_crypto_session(0x404, rsa), 7)
                self.assertEqual(device.told("session"), [(2, AES), (0x404, rsa)])
                with self.assertRaises(Refused):
                    frontend.create_crypto_session(0x302, AES)
            long = CryptoSession.of(2, AES._replace(key_len=65)).pack()
            with self.rejected(served, "CREATE_CRYPTO_SESSION: .*longer than its place") as peer:
                peer.send(26, long)
            self.assertEqual((len(long), struct.unpack_from("=8x6I4B", long)), (1072, (3, 65, 0, 0, 0, 0, 1, 1, 0, 0)))

    def test_close_crypto_session(self) -> None:
        device = Whole()
        with self.served(device) as served, served.peer() as peer:
            peer.msg("CLOSE_CRYPTO_SESSION", u64(7))
            peer.msg("CLOSE_CRYPTO_SESSION", u64(8), expect=REFUSED)
            self.assertEqual(device.told("closed"), [(7,)])

    def test_gpu_set_socket(self) -> None:
        """It is the device's; a device without display lets go of it, and what is no socket ends the connection."""
        for device, expect, received in (Whole(), OK, b"display"), (Echo(), REFUSED, b""):
            ours, theirs = socket.socketpair()
            with self.served(device) as served, served.peer() as peer, ours, theirs:
                peer.msg("GPU_SET_SOCKET", fds=[theirs.fileno()], expect=expect)
                theirs.close()
                self.assertEqual((ours.recv(20), ours.recv(20)), (received, b""))
        with self.served() as served, self.rejected(served, "GPU_SET_SOCKET: the file descriptor is no socket") as peer:
            peer.send(33, fds=[self.memory_fd])

    def test_get_shared_object(self) -> None:
        """Its descriptor goes with the reply, or none."""
        device = Whole()
        uuid = UUID("00112233-4455-6677-8899-aabbccddeeff")
        self.assertEqual(Shared(uuid).pack(), bytes.fromhex("00112233445566778899aabbccddeeff"))
        device.objects[uuid] = self.memory_fd
        with self.served(device) as served, served.connect() as frontend:
            frontend.negotiate(-1)
            before = len(open_fds())
            fd = frontend.get_shared_object(uuid)
            assert fd is not None
            self.assertTrue(os.path.sameopenfile(fd, self.memory_fd))
            os.close(fd)
            self.assertIsNone(frontend.get_shared_object(UUID(int=5)))
            self.assertEqual(len(open_fds()), before)
        with self.served(device) as served, served.peer() as peer:
            peer.msg("GET_SHARED_OBJECT", b"", expect=bytes(16))  # as QEMU 11.1 asks

    def test_set_device_state_fd(self) -> None:
        """rule 25: State goes out and in through the descriptor, which is closed at the end. An error comes without one, and bit 8 says so."""
        device = Whole()
        failed = u64(0x101)
        with self.served(device) as served:
            with served.connect() as frontend:
                frontend.negotiate(-1)
                before = len(open_fds())
                for state in b"", b"some", random.Random(1).randbytes(300_000):
                    device.state = state
                    self.assertEqual(frontend.save_state(), state)
                    device.state = b"other"
                    frontend.load_state(state)
                    self.assertEqual(device.state, state)
                self.assertEqual(len(open_fds()), before)
            with served.peer() as peer:
                peer.msg("SET_DEVICE_STATE_FD", pair(2, 0), [self.event_fd], expect=failed)
                peer.msg("SET_DEVICE_STATE_FD", pair(0, 1), [self.event_fd], expect=failed)
                peer.msg("SET_VRING_KICK", u64(0), [self.event_fd])
                peer.msg("SET_DEVICE_STATE_FD", pair(0, 0), [self.event_fd], expect=failed)
                self.expect_log("SET_DEVICE_STATE_FD .* refused: a ring is started")

    def test_check_device_state(self) -> None:
        """rule 25: It waits for the transfer, and tells what became of it."""

        class Bad(Whole):
            def save_state(self, file: BinaryIO) -> None:
                file.write(b"half")
                raise Refused("cannot")

            def load_state(self, file: BinaryIO) -> None:
                file.read(4)

        with self.served(Bad()) as served, served.connect() as frontend:
            frontend.negotiate(-1)
            before = len(open_fds())
            with self.assertRaises(Refused):
                frontend.request("CHECK_DEVICE_STATE")
            for transfer in frontend.save_state, lambda: frontend.load_state(b"12345"), lambda: frontend.load_state(bytes(1 << 20)):
                with self.assertRaises(Refused):
                    transfer()
            frontend.load_state(b"1234")
            self.assertEqual(len(open_fds()), before)
            self.expect_log("load_state of the device failed: there is more than the device has read")

    @contextlib.contextmanager
    def saving(self, device: Whole) -> Iterator[tuple[Served, Frontend, int]]:
        """A device with more state than a pipe holds, of which nothing is read yet; the descriptor is where it would be."""
        device.state = bytes(1 << 20)
        ours, theirs = os.pipe()
        with self.served(device) as served, served.connect() as frontend:
            frontend.negotiate(-1)
            self.assertEqual(frontend.request("SET_DEVICE_STATE_FD", DeviceState(0, 0), [theirs]), U64(0x100))
            os.close(theirs)
            try:
                yield served, frontend, ours
            finally:
                os.close(ours)

    def test_device_state_that_waits_for_the_front_end(self) -> None:
        """rule 25: The control socket answers meanwhile; there is one transfer at a time, and none is waited for without end."""
        with self.saving(Whole()) as (_, frontend, _):
            self.assertEqual(frontend.queue_num(), 2)
            with self.assertRaises(Refused):
                frontend.save_state()
            patience, vhost_user._Transfer.PATIENCE = vhost_user._Transfer.PATIENCE, 0.02
            try:
                with self.assertRaises(Refused):
                    frontend.request("CHECK_DEVICE_STATE")
            finally:
                vhost_user._Transfer.PATIENCE = patience
            self.expect_log("SET_DEVICE_STATE_FD .* refused: another transfer is under way")
            self.expect_log("CHECK_DEVICE_STATE .* refused: save_state of the device does not end")

    @contextlib.contextmanager
    def loading(self) -> Iterator[tuple[Served, Frontend, threading.Event]]:
        """A device that has its state, and is not done with it before the event; the front-end has asked what became of it."""

        class Slow(Whole):
            def load_state(self, file: BinaryIO) -> None:
                super().load_state(file)
                loaded.set()
                done.wait(PATIENCE)

        loaded, done = threading.Event(), threading.Event()
        ours, theirs = os.pipe()
        with self.served(Slow()) as served, served.connect() as frontend, mock.patch.object(vhost_user._Transfer, "PATIENCE", 0.25):
            frontend.negotiate(-1)
            frontend.request("SET_DEVICE_STATE_FD", DeviceState(1, 0), [ours])
            os.close(ours)
            os.close(theirs)
            self.assertTrue(loaded.wait(PATIENCE))
            frontend.connection.send(REQUESTS["CHECK_DEVICE_STATE"].number, 0)
            try:
                self.assertFalse(is_readable(frontend.connection.socket, 2 * vhost_user._Transfer.PATIENCE), "it does not wait")
                yield served, frontend, done
            finally:
                done.set()
                wait_until(lambda: "load_state" not in [thread.name for thread in threading.enumerate()], "the thread to end")

    def test_device_state_that_takes_long_to_load(self) -> None:
        """The device has all the time it needs: it waits for nobody."""
        with self.loading() as (_, frontend, done):
            done.set()
            with frontend.connection.receive(PATIENCE) as answer:
                self.assertEqual(answer.payload, u64(0))

    def test_shutdown_while_device_state_is_loaded(self) -> None:
        for name in "shutdown", "leave":
            with self.subTest(name), self.loading() as (served, frontend, _):
                began = time.monotonic()
                if name == "shutdown":
                    served.daemon.shutdown()
                    served.wait()
                else:
                    frontend.connection.socket.shutdown(socket.SHUT_RDWR)
                    self.expect_log("the front-end has left: load_state of the device is given up")
                self.assertLess(time.monotonic() - began, PATIENCE / 2)

    def test_device_state_transfer_is_given_up(self) -> None:
        """When a ring starts, the device is reset, the front-end leaves, or the daemon is shut down."""

        def start(served: Served, frontend: Frontend) -> None:
            frontend.request("SET_VRING_KICK", VringFd(0), [self.event_fd])

        def reset(served: Served, frontend: Frontend) -> None:
            frontend.request("RESET_DEVICE")

        def leave(served: Served, frontend: Frontend) -> None:
            frontend.connection.socket.shutdown(socket.SHUT_RDWR)

        def shut_down(served: Served, frontend: Frontend) -> None:
            served.daemon.shutdown()

        for end in start, reset, leave, shut_down:
            with self.subTest(end.__name__), self.saving(Whole()) as (served, frontend, fd):
                end(served, frontend)
                # Before anything is read: or all of it might be, until the daemon comes to see the end.
                wait_until(lambda: not any(thread.name == "save_state" for thread in threading.enumerate()), "the thread to end")
                state = b""
                while piece := os.read(fd, 65536):  # there is an end
                    state += piece
                self.assertLess(len(state), 1 << 20)
        self.expect_log("save_state of the device failed: the transfer was given up")

    def test_device_state_of_another_connection(self) -> None:
        """What one front-end left unfinished is not what the next one asks about."""
        with self.saving(Whole()) as (served, frontend, _):
            frontend.connection.close()
            with served.peer() as peer:
                peer.msg("CHECK_DEVICE_STATE", expect=u64(1))
            self.expect_log("CHECK_DEVICE_STATE .* refused: no device state was transferred")

    def test_device_state_over_a_channel_of_the_device(self) -> None:
        """Its descriptor goes back without bit 8."""

        class Own(Whole):
            def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
                os.close(fd)
                own = os.memfd_create("state")
                os.pwrite(own, b"from a file", 0)
                return own

            def check_device_state(self) -> None:
                pass

        with self.served(Own()) as served, served.connect() as frontend:
            frontend.negotiate(-1)
            before = len(open_fds())
            self.assertEqual(frontend.save_state(), b"from a file")
            self.assertEqual(len(open_fds()), before)

    def test_gpu_message_set(self) -> None:
        """12 messages; those with sizes that their C structures have."""
        self.assertEqual([number for number, _, _ in GPU_REQUESTS.values()], [*range(1, 13)])
        sizes = {name: (payload.size, reply.size if reply else None) for name, (_, payload, reply) in GPU_REQUESTS.items()}
        self.assertEqual(sizes["GET_DISPLAY_INFO"], (0, 408))
        self.assertEqual(sizes["CURSOR_UPDATE"], (16404, None))
        self.assertEqual(sizes["DMABUF_SCANOUT"], (40, None))
        self.assertEqual(sizes["DMABUF_SCANOUT2"], (48, None))
        self.assertEqual(sizes["GET_EDID"], (4, 1056))

    def test_get_shmem_config(self) -> None:
        """rule 23: The number of regions that there are, and 256 sizes."""
        with self.served(Whole()) as served:
            with served.peer() as peer:
                peer.msg("GET_SHMEM_CONFIG", expect=struct.pack("=II256Q", 2, 0, 4 * PAGE, 0, PAGE, *bytes(253)))
            with served.connect() as frontend:
                frontend.negotiate(-1)
                self.assertEqual(frontend.get_shmem_config(), (4 * PAGE, 0, PAGE))

    def test_get_vring_base_skip_drain(self) -> None:
        """Draft: what is in flight is not waited for. It is recorded, and comes again; the late completion is of no effect."""

        class Slow(Later, Whole):
            pass

        device = Slow()
        with self.prepared(device) as (frontend, rig):
            region, fd = frontend.get_inflight(1, rig.size)
            self.addCleanup(os.close, fd)
            frontend.set_inflight(region, fd)
            rig.share()
            driver = rig.driver()
            queue = frontend.start_queue(0, driver)
            rig.add(driver)
            queue.kick()
            device.holds(1)
            base = frontend.stop_queue(queue, drain=False)
            self.assertEqual(device.told("cancelled"), [(0,)])
            device.complete()
            self.assertEqual(driver.used(), [])
            queue = frontend.start_queue(0, driver, base)
            device.holds(1)
            device.complete()
            self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])

    def test_skip_drain_of_a_packed_ring(self) -> None:
        """rule 7: its base tells where it goes on and where used descriptors go on, which lie apart."""

        class Slow(Later, Whole):
            pass

        device = Slow()
        with self.served(device) as served, served.connect() as frontend:
            frontend.negotiate(VERSION_1 | PACKED)
            rig = Rig(frontend, share=True)
            region, fd = frontend.get_inflight(1, rig.size)
            self.addCleanup(os.close, fd)
            frontend.set_inflight(region, fd)
            driver = PackedDriverQueue(rig.memory, rig.size, areas_at(RAM, PackedDriverQueue, rig.size), frontend.features)
            queue = frontend.start_queue(0, driver, 1 << 15 | 1 << 31)
            for _ in range(3):  # of two descriptors each
                rig.add(driver)
                queue.kick()
            device.holds(3)
            device.complete(0)
            queue.wait(PATIENCE)
            base = frontend.stop_queue(queue, drain=False)
            self.assertEqual(base, 6 | 1 << 15 | 2 << 16 | 1 << 31)
            device.held.clear()
            queue = frontend.start_queue(0, driver, base)
            device.holds(2)
            for _ in range(2):
                device.complete(0)
                self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])

    def test_skip_drain_without_inflight_tracking(self) -> None:
        """Not negotiated alone; and without a region to record it in, what is in flight is waited for."""
        with self.served(Whole()) as served:
            for missing in PF.INFLIGHT_SHMFD, PF.GET_VRING_BASE_INFLIGHT:
                with self.rejected(served, "without .*INFLIGHT", protocol_features=0) as peer:
                    peer.send(16, u64(int(PROTOCOL_FEATURES & ~missing | PF.GET_VRING_BASE_SKIP_DRAIN)))

        class Slow(Later, Whole):
            pass

        device = Slow()
        with self.connected(device) as frontend:
            [queue] = frontend.queues
            queue.submit([], [(frontend.arena[0], 4)], "token")
            device.holds(1)
            timer = threading.Timer(MOMENT, device.complete)
            timer.start()
            frontend.stop_queue(queue, drain=False)
            timer.join()
            self.assertEqual(queue.driver.used(), [("token", 0)])
            self.assertEqual(device.told("cancelled"), [])


class FrontendTests(WireTest):
    """`Frontend` against a back-end that answers wrongly."""

    @contextlib.contextmanager
    def answered_by(self, *answers: tuple[int, int, bytes]) -> Iterator[Frontend]:
        """A front-end whose next questions get these answers: request, flags, payload."""
        ours, theirs = socket.socketpair()
        frontend = Frontend(ours)
        with frontend, theirs:
            for request, flags, payload in answers:
                theirs.sendall(struct.pack("=III", request, flags, len(payload)) + payload)
            yield frontend

    def test_answer_to_another_question(self) -> None:
        with self.answered_by((2, 5, u64(0))) as frontend, self.raises(ProtocolError, "answered by message 2"):
            frontend.request("GET_FEATURES")

    def test_answer_that_echoes_need_reply(self) -> None:
        with self.answered_by((1, 13, u64(0))) as frontend, self.raises(ProtocolError, "flags 0xd"):
            frontend.request("GET_FEATURES")

    def test_answer_of_a_wrong_size(self) -> None:
        with self.answered_by((1, 5, b"1234")) as frontend, self.raises(ProtocolError, "payload of 4 bytes"):
            frontend.request("GET_FEATURES")

    def test_back_end_that_leaves(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        with Frontend(ours) as frontend, self.assertRaises(Disconnected):
            frontend.request("GET_FEATURES")

    def test_back_end_that_is_silent(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, Frontend(ours) as frontend, self.assertRaises(TimeoutError):
            frontend.connection.receive(0.01)

    def test_refusals(self) -> None:
        with self.connected(Echo()) as frontend:
            with self.assertRaises(Refused):
                frontend.set_config(8, b"x")
            with self.assertRaises(Refused):
                frontend.request("REM_MEM_REG", MemReg(1, 2, 3, 4))
            frontend.set_config(0, b"x")
            self.assertEqual(frontend.get_config(4, 4), b"4567")
            self.assertEqual(frontend.queue_num(), 2)

    def test_connection_that_is_not_read_does_not_wait_for_ever(self) -> None:
        ours, theirs = socket.socketpair()
        connection = Connection(ours)
        with theirs, contextlib.closing(connection):
            connection.SEND_TIMEOUT = 0.05
            with self.assertRaises(TimeoutError):
                for _ in range(100000):
                    connection.send(1, 0, bytes(4096))


# ---------------------------------------------------------------------------------------------------------------------------
# Rings of a daemon
# ---------------------------------------------------------------------------------------------------------------------------


class TrafficTests(DaemonTest):
    """Requests and answers, whatever the ring."""

    def test_every_kind_of_ring(self) -> None:
        for packed in False, True:
            for features in VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | IN_ORDER, -1 & ~PACKED:
                for vring in VringMutex, VringRwLock:
                    with self.subTest(packed=packed, features=features, vring=vring.__name__):
                        indirect = features == -1 & ~PACKED
                        setup = {"packed": packed, "features": features | packed * PACKED, "indirect": indirect, "memory": 1 << 20, "size": 32}
                        with self.connected(Echo(), 2, vring, **setup) as frontend:
                            for _ in range(40):
                                for queue in frontend.queues:
                                    self.echo(frontend, queue, b"ping")

    def test_many_requests_at_once(self) -> None:
        for packed in False, True:
            with self.connected(Echo(), packed=packed, indirect=False) as frontend:
                [queue] = frontend.queues
                base = frontend.arena[0]
                frontend.memory.write(base, b"abcd")
                done = 0
                for sent in range(1000):
                    while queue.driver.free < 2:
                        done += len(queue.wait(PATIENCE))
                    queue.submit([(base, 4)], [(base + 64, 4)], sent)
                while done < 1000:
                    found = queue.wait(PATIENCE)
                    self.assertEqual({length for _, length in found}, {4})
                    done += len(found)

    def test_completion_out_of_order_from_another_thread(self) -> None:
        device = Later()
        with self.connected(device) as frontend:
            [queue] = frontend.queues
            base = frontend.arena[0]
            for n in range(5):
                frontend.memory.write(base + 16 * n, bytes([n]) * 4)
                queue.submit([(base + 16 * n, 4)], [(base + 0x1000 + 16 * n, 4)], n)
            device.holds(5)
            found: list[object] = []
            for position in 4, 1, 2, 0, 0:
                device.complete(position)
                [(token, length)] = queue.wait(PATIENCE)
                self.assertEqual((length, frontend.memory.read(base + 0x1000 + 16 * int(str(token)), 4)), (4, bytes([int(str(token))]) * 4))
                found.append(token)
            self.assertEqual(found, [4, 1, 3, 0, 2])

    def test_hostile_chains_over_the_daemon(self) -> None:
        """They come back with length 0, and the requests among them are served."""
        with self.connected(Echo(), indirect=False) as frontend:
            [queue] = frontend.queues
            for n in range(50):
                queue.submit([(0xDEAD0000 + n, 4)], [], "bad")
                self.assertEqual(queue.wait(PATIENCE), [("bad", 0)])
                self.echo(frontend, queue)
            self.expect_log("ring 0: chain .* refused: .*leave RAM")

    def test_lying_ring_breaks_and_the_other_lives(self) -> None:
        with self.connected(Echo(), 2) as frontend:
            one, other = frontend.queues
            avail = frontend.memory.view(one.driver.areas[1], 4).cast("H")
            avail[1] = 1000
            one.kick()
            with self.raises(VringError, "says it is broken"):
                one.wait(PATIENCE)
            self.echo(frontend, other)
            frontend.stop_queue(one)
            del avail


class CrossEndianTests(DaemonTest):
    """Legacy rings of guests whose byte order is not this host's (CROSS_ENDIAN)."""

    def test_legacy_rings_of_both_byte_orders(self) -> None:
        """Ring indices, descriptors, indirect tables, events: all in the driver's order, over many laps."""

        class Legacy(Echo):
            protocol_features = PF.CROSS_ENDIAN

            def __init__(self) -> None:
                super().__init__()
                self.orders: set[str] = set()

            def process_queue(self, vring: VringT) -> None:
                self.orders.add(vring.byteorder)
                super().process_queue(vring)

        for big, indirect, events in itertools.product((False, True), (False, True), (False, True)):
            features = PROTOCOL | indirect << 28 | events << 29
            device = Legacy()  # each with its own notes: the worker of the one before may look at its ring once more
            with self.subTest(big=big, indirect=indirect, events=events), self.prepared(device, features) as (frontend, rig):
                self.assertFalse(frontend.features & VERSION_1)
                rig.share()
                driver = rig.driver(big_endian=big, tables=RAM + 0x40000 if indirect else None)
                queue = frontend.start_queue(0, driver)
                for number in range(3 * rig.size):
                    self.echo(frontend, queue, b"%d" % number)
                [shown] = struct.unpack_from(">H" if big else "<H", rig.memory.view(driver.areas[1], 4), 2)
                self.assertEqual(shown, 3 * rig.size)
                self.assertEqual(device.orders, {"big" if big else "little"})

    def test_scattered_chains_of_a_big_endian_driver(self) -> None:
        """Chains whose descriptors do not stand together, in the table and in an indirect one."""
        with self.prepared(Whole(), PROTOCOL | 1 << 28) as (frontend, rig):
            rig.share()
            queue = frontend.start_queue(0, rig.driver(big_endian=True))
            table, memory = struct.Struct(">QIHH"), rig.memory
            at, answer = RAM + 0x40000, RAM + 0x41000
            memory.write(at, b"ping")
            desc, avail, used = queue.driver.areas
            memory.write(desc + 16 * 5, table.pack(at, 2, 1, 2))
            memory.write(desc + 16 * 2, table.pack(at + 2, 2, 1, 9))
            memory.write(desc + 16 * 9, table.pack(answer, 4, 2, 0))
            indirect = RAM + 0x42000
            memory.write(indirect, table.pack(at, 4, 1, 2) + bytes(16) + table.pack(answer + 16, 4, 2, 0))
            memory.write(desc + 16 * 7, table.pack(indirect, 48, 4, 0))
            memory.write(avail, struct.pack(">HHHH", 0, 2, 5, 7))
            queue.kick()
            wait_until(lambda: memory.read(used + 2, 2) == b"\0\2", "both to be used")
            self.assertEqual(memory.read(used + 4, 16), struct.pack(">IIII", 5, 4, 7, 4))
            self.assertEqual((memory.read(answer, 4), memory.read(answer + 16, 4)), (b"gnip", b"gnip"))


class RingStateTests(DaemonTest):
    """Two switches for each ring: started and enabled (rules 1 to 6)."""

    def test_disabled_ring_is_left_alone_and_looked_at_when_enabled(self) -> None:
        """rules 1 and 5: both switches must be on; a kick that came before is not lost (rule 16)."""
        device = Echo()
        with self.prepared(device) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            queue = frontend.start_queue(0, driver, enable=False)
            rig.add(driver)
            queue.kick()
            self.stays(queue)
            self.assertEqual(device.processed, 0)
            frontend.enable_queue(0)
            self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])

    def test_disabled_ring_is_served_without_side_effects_by_a_device_that_can(self) -> None:
        """rule 5: a network card discards what is sent and supplies nothing. What changes is that `process_queue` looks."""

        class Net(Echo):
            serves_disabled = True
            sent = 0

            def process_queue(self, vring: VringT) -> None:
                if vring.enabled or vring.index == 1:
                    for chain in vring:
                        self.sent += vring.enabled
                        vring.add_used(chain, 0)

        device = Net()
        with self.prepared(device) as (frontend, rig):
            rig.share()
            queues = []
            for index in range(2):
                queues.append(frontend.start_queue(index, rig.driver(index), enable=False))
                rig.add(queues[index].driver)
                queues[index].kick()
            self.assertEqual(queues[1].wait(PATIENCE), [(b"ping", 0)])
            self.assertEqual(device.sent, 0)
            self.stays(queues[0])
            frontend.enable_queue(0)
            self.assertEqual(queues[0].wait(PATIENCE), [(b"ping", 0)])
            self.assertEqual(device.sent, 1)
            frontend.enable_queue(0, False)
            rig.add(queues[0].driver)
            queues[0].kick()
            self.stays(queues[0])

    def test_ring_is_looked_at_on_enable_without_a_kick(self) -> None:
        """rule 2"""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            queue = frontend.start_queue(0, driver, enable=False)
            rig.add(driver)
            frontend.enable_queue(0)
            self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])

    def test_ring_is_looked_at_on_start_without_a_kick(self) -> None:
        """rules 2 and 16: a driver that kicks before the eventfd is there is not forgotten."""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            rig.add(driver)
            frontend.enable_queue(0)
            queue = frontend.start_queue(0, driver, enable=False)
            self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])

    def test_ring_is_looked_at_when_its_kick_is_replaced(self) -> None:
        """rule 16: A kick on the old eventfd may have been lost."""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            queue = frontend.start_queue(0, driver)
            self.echo(frontend, queue)
            self.rests(self.workers[0])
            rig.add(driver)
            self.stays(queue)
            frontend.request("SET_VRING_KICK", VringFd(0), [self.eventfd()])
            self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])

    def test_ring_that_stays_active_is_so_all_the_time(self) -> None:
        """A worker that takes a kick while the ring is off leaves it: nobody would look again."""
        seen: list[bool] = []

        class Watched(VringMutex):
            @property
            def active(self) -> bool:
                return self._active

            @active.setter
            def active(self, value: bool) -> None:
                self._active = value
                seen.append(value)

        with self.prepared(Echo(), vring=Watched) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            queue = frontend.start_queue(0, driver)
            self.echo(frontend, queue)
            seen.clear()
            frontend.request("SET_VRING_ENABLE", VringStatePayload(0, 1))
            frontend.request("SET_VRING_ADDR", rig.addresses(0, driver))
            frontend.request("SET_VRING_KICK", VringFd(0), [queue.kick_fd])
            frontend.add_region(GuestRegionMmap.allocate(RAM + (1 << 30), PAGE))
            self.assertEqual(set(seen), {True})
            self.echo(frontend, queue)

    def test_disable_stops_serving_and_enable_resumes(self) -> None:
        """rules 1 and 5"""
        device = Echo()
        with self.connected(device) as frontend:
            [queue] = frontend.queues
            for _ in range(3):
                self.echo(frontend, queue)
                frontend.enable_queue(0, False)
                processed = device.processed
                base = frontend.arena[0]
                queue.submit([], [(base, 4)], "later")
                queue.kick()
                self.stays(queue)
                self.assertEqual(device.processed, processed)
                frontend.enable_queue(0)
                self.assertEqual(queue.wait(PATIENCE), [("later", 0)])

    def test_enabled_before_started(self) -> None:
        """rule 1"""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            frontend.enable_queue(0)
            queue = frontend.start_queue(0, rig.driver(), enable=False)
            self.echo(frontend, queue)

    def test_ring_without_kick_eventfd_is_polled(self) -> None:
        """rule 3: bit 8 is no error."""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            queue = FrontendQueue(frontend, 0, driver)
            frontend.queues.append(queue)
            frontend.request("SET_VRING_NUM", VringStatePayload(0, rig.size))
            frontend.request("SET_VRING_ADDR", rig.addresses(0, driver))
            frontend.request("SET_VRING_CALL", VringFd(0), [queue.call_fd])
            frontend.request("SET_VRING_KICK", VringFd(0 | VringFd.NO_FD))
            frontend.enable_queue(0)
            for _ in range(20):
                rig.add(driver)
                self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])

    def test_ring_without_call_eventfd(self) -> None:
        """The driver polls; nobody is notified."""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            queue = frontend.start_queue(0, driver)
            frontend.request("SET_VRING_CALL", VringFd(0 | VringFd.NO_FD))
            for _ in range(5):
                rig.add(driver)
                queue.kick()
                wait_until(driver.used, "the request to come back")

    def test_set_features_without_bit_30_enables_all_rings(self) -> None:
        """rule 4"""
        with self.serving(Echo()) as served, served.connect() as frontend:
            frontend.request("SET_OWNER")
            frontend.features = VERSION_1
            frontend.request("SET_FEATURES", U64(VERSION_1))
            rig = Rig(frontend, share=True)
            for index in 0, 1:
                queue = frontend.start_queue(index, rig.driver(index))
                self.echo(frontend, queue)

    def test_set_features_with_bit_30_leaves_the_rings_alone(self) -> None:
        """rule 4: an enabled ring stays enabled, a disabled one disabled."""
        with self.serving(Echo()) as served, served.peer(features=PROTOCOL) as peer:
            peer.msg("SET_VRING_ENABLE", pair(1, 1))
            peer.msg("SET_FEATURES", u64(PROTOCOL | VERSION_1))
            self.assertEqual([vring.enabled for vring in served.daemon.vrings], [False, True])

    def test_get_vring_base_waits_for_what_is_in_flight(self) -> None:
        """rule 6: and nothing is taken any more."""
        device = Later()
        with self.serving(device) as served, served.connect() as frontend:
            queue, other = frontend.setup(2, memory=4 << 20, size=64)
            base = frontend.arena[0]
            for n in range(3):
                queue.submit([], [(base + 64 * n, 4)], n)
            device.holds(3)
            frontend.connection.send(11, 0, pair(0, 0))
            wait_until(lambda: served.daemon.vrings[0]._idle, "the control thread to wait for them")
            self.assertFalse(is_readable(frontend.connection.socket, MOMENT))
            queue.submit([], [(base, 4)], "too late")
            queue.kick()
            for left in 2, 1, 0:
                self.assertFalse(is_readable(frontend.connection.socket))
                device.complete(0)
                self.assertEqual(len(device.held), left)
            with frontend.connection.receive(PATIENCE) as answer:
                self.assertEqual(answer.payload, pair(0, 3))
            self.assertEqual([token for token, _ in queue.driver.used()], [0, 1, 2])
            self.assertEqual(device.told("stopped"), [(0,)])
            other.submit([], [(base, 4)], "lives")
            device.holds(1)
            device.complete()
            self.assertEqual(other.wait(PATIENCE), [("lives", 0)])

    def test_ring_whose_start_is_refused_is_stopped(self) -> None:
        """The device is told nothing of it, no memory change fails for it, and it can start when it is set up well."""
        device = Whole()
        with self.prepared(device) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            right = rig.addresses(0, driver)
            frontend.request("SET_VRING_NUM", VringStatePayload(0, rig.size))
            frontend.request("SET_VRING_ADDR", replace(right, descriptor=right.descriptor + 1))
            frontend.enable_queue(0)
            kick = self.eventfd()
            before = len(open_fds())
            for _ in range(2):
                with self.assertRaises(Refused):
                    frontend.request("SET_VRING_KICK", VringFd(0), [kick])
            self.expect_log("is not aligned to 16")
            self.assertEqual(len(open_fds()), before)
            more = GuestRegionMmap.allocate(RAM + (1 << 30), PAGE)
            frontend.add_region(more)
            frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
            self.assertEqual((device.told("started"), device.told("stopped")), ([], []))
            self.assertEqual(device.told("resumed"), device.told("suspended"))
            frontend.request("SET_VRING_ADDR", right)
            frontend.request("SET_VRING_KICK", VringFd(0), [kick])
            rig.add(driver)
            os.eventfd_write(kick, 1)
            wait_until(driver.used, "the request to come back")

    def test_ring_that_cannot_be_where_its_memory_comes_is_broken_alone(self) -> None:
        """The others have their places, and the device learns of the memory."""
        device = Echo()
        with self.prepared(device) as (frontend, rig):
            for index in 0, 1:
                right = rig.addresses(index, rig.driver(index))
                frontend.request("SET_VRING_NUM", VringStatePayload(index, rig.size))
                frontend.request("SET_VRING_ADDR", replace(right, used=right.used + 2) if index == 0 else right)
                frontend.request("SET_VRING_KICK", VringFd(index | VringFd.NO_FD))
                frontend.enable_queue(index)
            rig.share()
            self.expect_log("ring 0 is broken .*used ring .*is not aligned to 4", times=1)
            self.assertEqual(device.told("memory"), [(1,)])
            driver = rig.driver(1)
            rig.add(driver)
            wait_until(driver.used, "the request to come back")
            driver = rig.driver(0)
            frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
            self.assertEqual((device.told("started"), device.told("stopped")), ([(0,), (1,)], [(0,)]))
            frontend.request("SET_VRING_ADDR", rig.addresses(0, driver))
            frontend.request("SET_VRING_KICK", VringFd(VringFd.NO_FD))
            rig.add(driver)
            wait_until(driver.used, "the request to come back")

    def test_ring_that_the_device_refuses_to_start_is_stopped(self) -> None:
        class Refuses(Whole):
            def ring_started(self, index: int, vring: VringT) -> None:
                super().ring_started(index, vring)
                raise Refused("as asked")

        device = Refuses()
        with self.serving(device) as served, served.peer() as peer:
            peer.msg("SET_VRING_KICK", u64(1), [self.eventfd()], expect=REFUSED)
            self.assertFalse(served.daemon.vrings[1].started)
            self.assertEqual([event[0] for event in device.events[1:]], ["resumed", "started", "stopped", "suspended"])

    def test_broken_ring_waits_for_what_is_in_flight_as_well(self) -> None:
        """rule 6: what the device had taken before the driver broke the ring is still its own, and writes guest memory."""
        device = Later()
        with self.connected(device) as frontend:
            [queue] = frontend.queues
            at = frontend.arena[0]
            frontend.memory.write(at, b"ping")
            queue.submit([(at, 4)], [(at + 64, 4)], "before")
            device.holds(1)
            frontend.memory.view(queue.driver.areas[1] + 2, 2)[:] = b"\xff\xff"
            queue.kick()
            self.expect_log("is broken until it is started again")
            frontend.connection.send(REQUESTS["GET_VRING_BASE"].number, 0, pair(0, 0))
            self.assertFalse(is_readable(frontend.connection.socket, 10 * MOMENT), "it does not wait")
            device.complete()
            with frontend.connection.receive(PATIENCE) as answer:
                self.assertEqual(answer.payload, pair(0, 1))
            self.assertEqual(queue.driver.used(), [("before", 4)])

    def test_what_a_failed_device_had_is_not_waited_for_without_end(self) -> None:
        """Nobody knows what it will still complete."""

        class Fails(Later):
            def process_queue(self, vring: VringT) -> None:
                super().process_queue(vring)
                if self.held:
                    raise RuntimeError("as asked")

        for completes in True, False:
            device = Fails()
            with self.subTest(completes=completes), self.connected(device) as frontend, mock.patch.object(vhost_user._Session, "_LOST_AFTER", 1):
                [queue] = frontend.queues
                queue.submit([], [(frontend.arena[0], 4)])
                device.holds(1)
                self.expect_log("ring 0: the device failed")
                if completes:
                    device.complete()
                frontend.stop_queue(queue)
                self.assertEqual(any("ring 0: 1 in flight are lost" in line for line in self._log.lines), not completes)
                if not completes:
                    device.complete()  # of no effect any more

    def test_ring_resumes_where_it_stopped(self) -> None:
        """rules 6 and 7: GET_VRING_BASE says where, and resets nothing; the used index is read from memory."""
        for packed in False, True:
            with self.subTest(packed=packed), self.connected(Echo(), packed=packed, size=8) as frontend:
                [queue] = frontend.queues
                driver = queue.driver
                for _ in range(5):
                    for _ in range(3):
                        self.echo(frontend, queue)
                    base = frontend.stop_queue(queue)
                    queue = frontend.start_queue(0, driver, base, enable=False)

    def test_ring_starts_again_with_a_kick_alone(self) -> None:
        """Size, base, addresses and both eventfds' switches are as they were."""
        with self.connected(Echo()) as frontend:
            [queue] = frontend.queues
            for _ in range(3):
                self.echo(frontend, queue)
                frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
                frontend.request("SET_VRING_CALL", VringFd(0), [queue.call_fd])
                frontend.request("SET_VRING_KICK", VringFd(0), [queue.kick_fd])

    def test_base_of_a_new_ring_may_be_anything(self) -> None:
        """A driver that goes on after its back-end was exchanged."""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            for area in (driver._avail, driver._used16):
                area[1] = 65534
            driver._index = driver._seen = 65534
            queue = frontend.start_queue(0, driver, base=65534)
            for _ in range(5):
                self.echo(frontend, queue)
            self.assertEqual(frontend.stop_queue(queue), 3)

    def test_single_queue_is_reset_while_the_other_runs(self) -> None:
        """VIRTIO_F_RING_RESET: disable, stop, a clean ring from 0 at another place."""
        for packed in False, True:
            with (
                self.subTest(packed=packed),
                self.connected(Echo(), 2, packed=packed, indirect=False, features=-1 & ~PACKED | packed * PACKED) as frontend,
            ):
                queue, other = frontend.queues
                for _ in range(3):
                    self.echo(frontend, queue)
                    self.echo(frontend, other)
                    frontend.enable_queue(0, False)
                    driver = queue.driver
                    frontend.stop_queue(queue)
                    base, size = frontend.arena
                    length, _ = driver.layout(32)
                    frontend.memory.write(base, bytes(length))
                    frontend.arena = (base + 0x1000, size - 0x1000)
                    fresh = type(driver)(frontend.memory, 32, areas_at(base, type(driver), 32), frontend.features)
                    queue = frontend.start_queue(0, fresh, 0x80008000 if packed else 0)
                    self.echo(frontend, other)
                self.echo(frontend, queue)

    def test_driver_that_starts_over_after_a_guests_reboot(self) -> None:
        """rule 8: all of it comes again, base 0 included, and the used index is 0 in memory."""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            for _ in range(3):
                queue = frontend.start_queue(0, rig.driver())
                for _ in range(3):
                    self.echo(frontend, queue)
                self.assertEqual(frontend.stop_queue(queue), 3)

    def test_reset_while_requests_are_in_flight(self) -> None:
        device = Later()
        with self.connected(device) as frontend:
            [queue] = frontend.queues
            queue.submit([], [(frontend.arena[0], 4)], 1)
            device.holds(1)
            frontend.connection.send(34, 8)
            self.assertFalse(is_readable(frontend.connection.socket, MOMENT))
            device.complete()
            with frontend.connection.receive(PATIENCE) as answer:
                self.assertEqual(answer.payload, u64(0))


class PollingTests(DaemonTest):
    """A worker that looks at its rings for a while before it sleeps."""

    LONG = 10**7  # µs: it does not sleep in a test

    def test_no_notification_is_wanted_while_it_polls(self) -> None:
        for packed in False, True:
            with self.subTest(packed=packed), self.serving(Echo(), poll_us=self.LONG) as served, served.connect() as frontend:
                frontend.setup(memory=4 << 20, size=64, packed=packed, indirect=False)
                [queue] = frontend.queues
                [worker] = served.daemon.get_epoll_handlers()
                self.echo(frontend, queue)
                self.rests(worker)
                self.assertGreater(worker._window, 0, "it slept, and not for long: from here on it pays")
                # Its event index still asks for the next kick, and then, with a split ring, stays behind.
                self.echo(frontend, queue)
                for _ in range(100):
                    at, size = frontend.arena
                    queue.driver.add([(at, 4)], [(at + size // 2, 4)], "unkicked")
                    self.assertFalse(queue.driver.publish())
                    self.assertEqual(queue.wait(PATIENCE), [("unkicked", 4)])

    def test_kick_and_wake_up_at_once_are_one_look(self) -> None:
        """And the ring itself is none of the others that have more, for which it would not be polled."""

        class Held(Echo):
            held = False

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                looks.append(set(worker._pending))
                if self.held:
                    self.held = False
                    go.wait(PATIENCE)
                return super().handle_event(device_event, evset, vrings, thread_id)

        device, go = Held(), threading.Event()
        looks: list[set[int]] = []
        with self.serving(device) as served, served.connect() as frontend:
            [worker] = served.daemon.get_epoll_handlers()
            [queue] = frontend.setup(memory=4 << 20, size=64)
            self.rests(worker)
            device.held = True
            worker.vrings[0].wake()
            wait_until(lambda: not device.held, "the worker to look")
            looks.clear()
            queue.kick()
            worker.vrings[0].wake()
            go.set()
            self.rests(worker)
            self.assertEqual(looks, [set()])

    def test_what_happened_at_the_same_time_does_not_wait_for_a_poll(self) -> None:
        """Two kicks that the worker finds at once."""

        class Held(Echo):
            held = False

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                if self.held:
                    self.held = False
                    return go.wait(PATIENCE) and None
                return super().handle_event(device_event, evset, vrings, thread_id)

        device, go = Held(), threading.Event()
        with self.serving(device, poll_us=self.LONG) as served, served.connect() as frontend:
            [worker] = served.daemon.get_epoll_handlers()
            queues = frontend.setup(2, memory=4 << 20, size=64)
            self.rests(worker)
            device.held = True
            worker.vrings[0].wake()
            wait_until(lambda: not device.held, "the worker to be busy")
            worker._window = self.LONG / 1e6
            at, size = frontend.arena
            for queue in queues:
                queue.submit([(at, 4)], [(at + size // 2, 4)], "at once")
            go.set()
            for queue in queues:
                self.assertEqual(queue.wait(self.LONG / 2e6), [("at once", 4)])

    def test_what_a_poll_came_across_is_not_forgotten_at_the_next_one(self) -> None:
        """Which comes first when the polled ring has more at the very moment that it is left."""

        class Again(Echo):
            again = False

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                super().handle_event(device_event, evset, vrings, thread_id)
                if self.again and device_event == 0:
                    super().handle_event(device_event, evset, vrings, thread_id)
                return None

        device = Again()
        with self.serving(device, poll_us=self.LONG) as served, served.connect() as frontend:
            [worker] = served.daemon.get_epoll_handlers()
            queues = frontend.setup(2, memory=4 << 20, size=64)
            self.rests(worker)
            worker._window = self.LONG / 1e6
            device.again = True
            for queue in queues:
                self.echo(frontend, queue)

    def test_what_is_done_later_is_polled_for_as_well(self) -> None:
        """By another thread, or by a listener, as of an io_uring: while that is waited for, and once it has completed something."""

        class ByListener(Later):
            asked = False

            def worker_started(self, worker: vhost_user.VringEpollHandler) -> None:
                worker.register_listener(fd, select.EPOLLIN | select.EPOLLET, 2)

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                if device_event < len(vrings):
                    return super().handle_event(device_event, evset, vrings, thread_id)
                self.complete()
                return None

        fd = self.eventfd()
        later, by_listener = Later(), ByListener()
        ways: list[tuple[Later, Callable[[], None]]] = [(later, later.complete), (by_listener, lambda: os.eventfd_write(fd, 1))]
        for device, complete in ways:
            with self.serving(device, poll_us=self.LONG) as served, served.connect() as frontend:
                frontend.setup(1, memory=4 << 20, size=64, indirect=False)
                [queue] = frontend.queues
                [worker] = served.daemon.get_epoll_handlers()
                at, size = frontend.arena
                kicks = 0
                for number in range(20):
                    worker._window = self.LONG / 1e6
                    queue.driver.add([(at, 4)], [(at + size // 2, 4)], number)
                    if queue.driver.publish():
                        queue.kick()
                        kicks += 1
                    device.holds(1)
                    complete()
                    self.assertEqual(queue.wait(PATIENCE), [(number, 4)])
                self.assertLess(kicks, 10, type(device).__name__)

    def test_other_workers_do_not_wait_for_a_poll(self) -> None:
        """Though the device is for one of them at a time."""

        class Two(Echo):
            def queues_per_thread(self) -> Sequence[int]:
                return (1, 2)

        with self.serving(Two(), poll_us=self.LONG) as served, served.connect() as frontend:
            queues = frontend.setup(2, memory=4 << 20, size=64)
            for worker, queue, other in zip(served.daemon.get_epoll_handlers(), queues, reversed(queues)):
                self.rests(worker)
                worker._window = self.LONG / 1e6
                self.echo(frontend, queue)
                start = time.monotonic()
                self.echo(frontend, other)
                self.assertLess(time.monotonic() - start, self.LONG / 2e6)

    def test_front_end_does_not_wait_for_a_poll(self) -> None:
        """For the ring that is polled, or for a call of the device while it is."""
        with self.serving(Echo(), poll_us=self.LONG) as served, served.connect() as frontend:
            [worker] = served.daemon.get_epoll_handlers()
            queues = frontend.setup(2, memory=4 << 20, size=64)

            def poll() -> None:
                """Have the second ring polled."""
                self.rests(worker)
                worker._window = self.LONG / 1e6
                self.echo(frontend, queues[1])

            for name, payload, fds in (
                ("SET_VRING_CALL", VringFd(1), [queues[1].call_fd]),
                ("GET_CONFIG", Config(0, 0, bytes(4)), []),
                ("GET_VRING_BASE", VringStatePayload(0, 0), []),
            ):
                with self.subTest(name):
                    poll()
                    start = time.monotonic()
                    frontend.request(name, payload, fds)
                    self.assertLess(time.monotonic() - start, self.LONG / 2e6)

    def test_everything_else_goes_on_meanwhile(self) -> None:
        """Another ring, a listener, messages, completions from elsewhere, and the end."""
        device = Later()
        with self.connected(device, 2, poll_us=self.LONG, indirect=False) as frontend:
            first, second = frontend.queues
            at, size = frontend.arena
            for number in range(50):
                queue = (first, second)[number // 3 % 2]
                queue.submit([(at, 4)], [(at + size // 2, 4)], number)
                device.holds(1)
                device.complete()
                self.assertEqual(queue.wait(PATIENCE), [(number, 4)])
                frontend.request("GET_FEATURES")
            self.assertEqual([frontend.stop_queue(first), frontend.stop_queue(second)], [26, 24])

    def test_it_does_not_look_at_an_empty_ring_while_another_has_more(self) -> None:
        class Busy(Echo):
            """Ring 0 always has more."""

            turns = 0

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                if device_event == 0:
                    self.turns += 1
                    time.sleep(0.001)
                    return True
                return super().handle_event(device_event, evset, vrings, thread_id)

        device = Busy()
        with self.serving(device, poll_us=self.LONG) as served, served.connect() as frontend:
            first, second = frontend.setup(2, memory=4 << 20, size=64)
            [worker] = served.daemon.get_epoll_handlers()
            first.kick()
            wait_until(lambda: device.turns > 5, "ring 0 to be busy")
            worker._window = self.LONG / 1e6
            self.echo(frontend, second)
            turns = device.turns
            wait_until(lambda: device.turns > turns + 20, "ring 0 to go on", self.LONG / 2e6)

    def test_it_sleeps_when_polling_does_not_pay(self) -> None:
        """After a pause longer than the longest poll it does not poll at all the next time."""
        with self.serving(Echo(), poll_us=100_000) as served, served.connect() as frontend:
            frontend.setup(memory=4 << 20, size=64)
            [queue] = frontend.queues
            [worker] = served.daemon.get_epoll_handlers()

            def window(pause: float) -> float:
                time.sleep(pause)
                self.echo(frontend, queue)
                return worker._window

            def begins_to_poll() -> bool:
                self.rests(worker)
                return window(0.0) > 0

            # More than once: how long a pause was for the worker is up to the machine as well, and it counts from when the last poll began.
            wait_until(begins_to_poll, "it to poll")
            wait_until(lambda: window(0.2) == 0, "it not to poll")

    def test_worker_whose_rings_are_woken_all_the_time(self) -> None:
        """By other threads: a set that they add to cannot be iterated over, and without a GIL not even copied."""

        class Changing(set[int]):
            def __iter__(self) -> Iterator[int]:
                raise RuntimeError("Set changed size during iteration")

        with self.serving(Echo()) as served, served.connect() as frontend:
            frontend.negotiate(0)
            [worker] = served.daemon.get_epoll_handlers()
            worker._pending, worker._polled = Changing(), Changing()
            rig = Rig(frontend, share=True)
            queue = frontend.start_queue(0, rig.driver())
            self.echo(frontend, queue)
            frontend.request("SET_VRING_KICK", VringFd(VringFd.NO_FD))
            self.echo(frontend, queue)

    def test_what_cannot_be(self) -> None:
        with self.raises(ValueError, "polling for -1"):
            VhostUserDaemon("test", Echo(), poll_us=-1)


class DirtyLogTests(DaemonTest):
    """Live migration: what the device writes is marked in the front-end's log."""

    LOG_ALL = 1 << 26

    def logged(self, log: memoryview) -> set[int]:
        """The pages whose bits are set, and cleared now, as a front-end harvests them."""
        pages = {8 * at + bit for at, byte in enumerate(log) for bit in range(8) if byte >> bit & 1}
        log[:] = bytes(len(log))
        return pages

    def test_only_while_log_all_is_set(self) -> None:
        """rule 17: it is switched by SET_FEATURES while rings run. All of a chain's writable parts count, whatever length was reported."""
        for packed in False, True:
            log = GuestMemoryMmap.from_ranges([(0, 16 * PAGE)])
            view = log.view(0, 16 * PAGE)
            with self.connected(Echo(), packed=packed) as frontend:
                queue = frontend.queues[0]
                start = -(-frontend.arena[0] // 0x1000) * 0x1000
                page = start // 0x1000
                frontend.request("SET_LOG_BASE", Log(16 * PAGE, 0), [log.regions[0].fileno()])

                def run(queue: FrontendQueue = queue, start: int = start) -> None:
                    queue.submit([(start, 4)], [(start + 0x1000, 2), (start + 0x3FFF, 2), (start + 0x5000, 4)])
                    queue.wait(PATIENCE)

                run()
                self.assertEqual(self.logged(view), set())
                frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
                for _ in range(2):
                    run()
                    self.assertEqual(self.logged(view), {page + 1, page + 3, page + 4, page + 5})
                frontend.request("SET_FEATURES", U64(frontend.features))
                run()
                self.assertEqual(self.logged(view), set())

    def test_used_ring_at_its_own_log_address(self) -> None:
        """rule 17: with VHOST_VRING_F_LOG, and the address need not be in RAM."""
        log = GuestMemoryMmap.from_ranges([(0, 4 * PAGE)])
        view = log.view(0, 4 * PAGE)
        with self.connected(Echo()) as frontend:
            queue = frontend.queues[0]
            start = -(-frontend.arena[0] // 0x1000) * 0x1000
            frontend.request("SET_LOG_BASE", Log(4 * PAGE, 0), [log.regions[0].fileno()])
            frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
            desc, available, used = map(frontend.user_addr, queue.driver.areas)
            frontend.request("SET_VRING_ADDR", VringAddr(0, VringAddr.LOG_USED, desc, used, available, 0x5000))
            queue.submit([], [(start, 4)])
            queue.wait(PATIENCE)
            wait_until(lambda: 5 in self.logged(view), "the used ring to be logged")
            frontend.request("SET_VRING_ADDR", VringAddr(0, 0, desc, used, available, 0x5000))
            self.logged(view)
            queue.submit([], [(start, 4)])
            queue.wait(PATIENCE)
            self.assertNotIn(5, self.logged(view))

    def test_ring_that_is_stopped_before_a_chain_is_published(self) -> None:
        """What the device has written into it is marked."""
        for packed in False, True:
            with RawRing(packed, kind=VringMutex) as ring:
                log = memoryview(bytearray(1 << 18))
                ring.vring.set_log(DirtyLog(log))
                ring.request()
                [chain] = ring.vring
                with mock.patch.object(ring.vring, "_flush_late", ring.vring.stop):
                    ring.vring.add_used(chain, 4)
                self.assertEqual((ring.returned(), self.logged(log)), ([], {DATA // 0x1000}))

    def used_ring_log(self, ring: RawRing, page: int, offset: int) -> memoryview:
        """Have all logged, with the used ring from that page on."""
        log = memoryview(bytearray(1 << 13))
        ring.vring.set_log(DirtyLog(log))
        ring.vring.set_used_log((page << 12) + offset)
        return log

    def test_each_part_of_the_used_ring(self) -> None:
        """rule 17: index, elements over the end of the ring as well, and what tells the driver when to kick: each page and no other."""
        # 1024 elements over two pages, the index on the page before, the event index on the one behind.
        page, data = 0x1000, {DATA >> 12}
        index, first, second, event = {page}, {page + 1}, {page + 2}, {page + 3}
        both = first | second
        for base, count, pages in (5, 1, first), (511, 1, first), (512, 1, second), (510, 4, both), (1023, 1, second), (1023, 2, both):
            with self.subTest(base=base, count=count), RawRing(size=1024, base=base) as ring:
                log = self.used_ring_log(ring, page, 0xFFC)
                for slot in range(count):
                    ring.offer((DATA, 4, F_WRITE), slot=slot)
                chains = list(ring.vring)
                self.assertEqual(self.logged(log), set())
                with ring.vring.batch():
                    for chain in chains:
                        ring.vring.add_used(chain, 4)
                self.assertEqual(self.logged(log), data | index | pages)
        for features, pages in (EVENT_IDX, event), (0, index):
            with RawRing(size=1024, features=features) as ring:
                log = self.used_ring_log(ring, page, 0xFFC)
                self.assertFalse(ring.vring.enable_notification())
                self.assertLessEqual(pages, self.logged(log))
                ring.vring.set_used_log(None)
                self.assertFalse(ring.vring.enable_notification())
                self.assertEqual(self.logged(log), set())

    def test_packed_ring(self) -> None:
        """rule 17: The ring itself, where it lies, and the device event suppression area where the log has it."""
        with RawRing(packed=True, size=1024) as ring:
            log = self.used_ring_log(ring, 0x1000, 0)
            ring.request()
            self.assertEqual(ring.run(), [(0, 4)])
            written = {DATA >> 12, 0x1000, *range(RINGS >> 12, (RINGS >> 12) + 4)}
            self.assertEqual(self.logged(log), written)
            ring.vring.set_used_log(None)
            ring.request()
            self.assertEqual(ring.run(), [(0, 4)])
            self.assertEqual(self.logged(log), {DATA >> 12})

    def test_eventfd_of_the_log(self) -> None:
        """rule 18: It is signalled when something was logged; a new one, also while the ring is logged, in place of the old one."""
        log = GuestMemoryMmap.from_ranges([(0, 16 * PAGE)])
        view = log.view(0, 16 * PAGE)
        fds = [self.eventfd() for _ in range(3)]
        with self.connected(Echo()) as frontend:
            frontend.request("SET_LOG_BASE", Log(16 * PAGE, 0), [log.regions[0].fileno()])
            for number, fd in enumerate(fds):
                frontend.request("SET_LOG_FD", fds=[fd])
                if not number:
                    frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
                self.logged(view)
                self.echo(frontend, frontend.queues[0])
                self.assertTrue(is_readable(fd, PATIENCE))
                self.assertEqual([is_readable(other) for other in fds if other != fd], [False, False])
                os.eventfd_read(fd)

    def test_log_whose_words_are_not_aligned(self) -> None:
        """It cannot be written atomically: it is refused, at once."""
        for log_all in False, True:
            log = GuestMemoryMmap.from_ranges([(0, PAGE)])
            with self.connected(Echo()) as frontend:
                if log_all:
                    frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
                with self.assertRaises(Disconnected):
                    frontend.request("SET_LOG_BASE", Log(64, 6), [log.regions[0].fileno()])
                self.expect_log("must be aligned")

    def test_log_that_cannot_be_written(self) -> None:
        """The front-end's loss: the ring goes on, and what has failed is said once."""
        log = GuestMemoryMmap.from_ranges([(0, 16 * PAGE)])
        with self.connected(Echo()) as frontend, mock.patch(f"{DirtyLog.__module__}.atomic_or", side_effect=OSError(errno.EFAULT, "Bad address")):
            frontend.request("SET_LOG_BASE", Log(16 * PAGE, 0), [log.regions[0].fileno()])
            frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
            for _ in range(3):
                self.echo(frontend, frontend.queues[0])
            frontend.request("SET_FEATURES", U64(frontend.features))
        self.expect_log("the dirty log cannot be written: .*Bad address")

    def test_log_that_is_too_small(self) -> None:
        """Pages beyond it are not marked, and nothing beyond it is written."""
        log = GuestMemoryMmap.from_ranges([(0, PAGE)])
        with self.connected(Echo()) as frontend:
            frontend.request("SET_LOG_BASE", Log(8, 16), [log.regions[0].fileno()])
            frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
            self.echo(frontend, frontend.queues[0])
            self.assertEqual(log.read(0, PAGE), bytes(PAGE))

    def test_bits_are_set_atomically_and_announced(self) -> None:
        """rules 17 and 18: Bits of others in the same word stay; SET_LOG_FD's eventfd tells of a change, once for each."""
        log = memoryview(bytearray(64))
        log[5] = 0x81
        announced = self.eventfd()
        dirty = DirtyLog(log, announced)
        dirty.mark(43 * 0x1000, 1)
        dirty.mark(200 * 0x1000 - 1, 2)
        self.assertEqual(self.logged(memoryview(bytearray(log))), {40, 47})
        dirty.commit()
        self.assertEqual(self.logged(memoryview(bytearray(log))), {40, 43, 47, 199, 200})
        self.assertTrue(is_readable(announced))
        os.eventfd_read(announced)
        dirty.mark(43 * 0x1000, 1)
        dirty.commit()
        self.assertFalse(is_readable(announced), "nothing has changed")

    def test_bits_of_another_process_stay(self) -> None:
        """rule 17: It sets others of the same word at the same time: a read-modify-write of ours would write back what it read, without those."""
        region = GuestRegionMmap.allocate(0, PAGE)
        source = (
            "region = guest_memory.GuestRegionMmap(int(sys.argv[1]), 0, 4096, 0)\n"
            "numbers, word = region.view.cast('I'), region.view[64:68]\n"
            "print('ready', flush=True)\n"
            "while numbers[1] != 0xFFFFFFFF:\n"
            "    if numbers[1] != numbers[2]:\n"
            "        for bit in range(8):\n"
            "            guest_memory.atomic_or(word, 1 << bit)\n"
            "        numbers[2] = numbers[1]\n"
        )
        child = program(self, source, str(region.fileno()), pass_fds=[region.fileno()])
        assert child.stdout
        self.assertEqual(child.stdout.readline(), "ready\n")
        numbers = region.view.cast("I")
        pages = [page for page in range(32) if (page if sys.byteorder == "little" else page ^ 24) >= 8]
        dirty = DirtyLog(region.view[64:68])
        lost = turn = 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            numbers[16] = 0
            numbers[1] = turn = turn + 1
            for page in pages:
                dirty.mark(page * 0x1000, 1)
                dirty.commit()
            wait_until(lambda: numbers[2] == turn, "the other process")  # noqa: B023
            lost += numbers[16] != 0xFFFFFFFF
        numbers[1] = 0xFFFFFFFF
        self.assertEqual((child.wait(PATIENCE), lost), (0, 0))

    def test_memory_that_changes_while_a_request_is_in_flight(self) -> None:
        """What is written into its buffers is in the log by their guest addresses, as ever."""
        device = Later()
        with self.connected(device, indirect=False) as frontend:
            [queue] = frontend.queues
            log = GuestMemoryMmap.from_ranges([(0, 16 * PAGE)])
            start = -(-frontend.arena[0] // 0x1000) * 0x1000
            frontend.add_region(GuestRegionMmap.allocate(1 << 32, 1 << 20))  # more than one
            queue.submit([], [(start, 4)])
            device.holds(1)
            frontend.add_region(GuestRegionMmap.allocate(1 << 33, 1 << 20))
            frontend.request("SET_LOG_BASE", Log(16 * PAGE, 0), [log.regions[0].fileno()])
            frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
            device.complete()
            self.assertEqual(len(queue.wait(PATIENCE)), 1)
            self.assertIn(start // 0x1000, self.logged(log.view(0, 16 * PAGE)))

    def test_memory_that_is_shared_anew_while_a_request_is_in_flight(self) -> None:
        """Also where most of memory does not lie."""
        device = Later()
        with self.connected(device, indirect=False, protocol_features=~PF.CONFIGURE_MEM_SLOTS) as frontend:
            [queue] = frontend.queues
            small = GuestRegionMmap.allocate((1 << 29) + 8, 0x800)  # begins within a page: it cannot be mapped beside the other one
            whole = GuestMemoryMmap([*frontend.memory.regions, small])
            log = GuestMemoryMmap.from_ranges([(0, 16 * PAGE)])
            frontend.share_memory(whole)
            at = small.guest_addr + 0x100
            queue.submit([], [(at, 4)])
            device.holds(1)
            frontend.share_memory(whole)
            frontend.request("SET_LOG_BASE", Log(16 * PAGE, 0), [log.regions[0].fileno()])
            frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
            device.complete()
            self.assertEqual(len(queue.wait(PATIENCE)), 1)
            self.assertIn(at // 0x1000, self.logged(log.view(0, 16 * PAGE)))

    def test_log_that_is_replaced(self) -> None:
        """What was marked and waits for its turn in the ring is in the old one; the eventfd of the old one is open as long as it is used."""
        still_open: list[bool] = []

        class Watched(VringMutex):
            def set_log(self, log: DirtyLog | None) -> None:
                if self._log and self._log._notify is not None:
                    still_open.append(self._log._notify in open_fds())
                super().set_log(log)

        device = Later()
        logs = [GuestMemoryMmap.from_ranges([(0, 16 * PAGE)]) for _ in range(2)]
        with self.connected(device, vring=Watched, features=-1 & ~PACKED, indirect=False) as frontend:
            self.assertTrue(frontend.features & IN_ORDER)
            queue = frontend.queues[0]
            start = -(-frontend.arena[0] // 0x1000) * 0x1000
            frontend.request("SET_LOG_BASE", Log(16 * PAGE, 0), [logs[0].regions[0].fileno()])
            frontend.request("SET_FEATURES", U64(frontend.features | self.LOG_ALL))
            for number in range(2):
                queue.submit([], [(start + 0x1000 * number, 4)])
            device.holds(2)
            device.complete(1)
            frontend.request("SET_LOG_BASE", Log(16 * PAGE, 0), [logs[1].regions[0].fileno()])
            self.assertIn(start // 0x1000 + 1, self.logged(logs[0].view(0, 16 * PAGE)))
            device.complete(0)
            self.assertEqual(len(queue.wait(PATIENCE)), 2)
            self.assertIn(start // 0x1000, self.logged(logs[1].view(0, 16 * PAGE)))
            for _ in range(2):
                frontend.request("SET_LOG_FD", fds=[self.eventfd()])
            self.assertEqual(still_open, [True] * 2)  # rings

    def test_mark_while_another_thread_commits(self) -> None:
        """It is in that commit or in the next one."""

        class Lock:
            """Just before it is taken, another thread was faster."""

            def __enter__(self) -> None:
                dirty._lock = real
                dirty.commit()
                real.acquire()

            def __exit__(self, *_: object) -> None:
                real.release()

        log = memoryview(bytearray(64))
        dirty: Any = DirtyLog(log)
        real = dirty._lock
        dirty.mark(3 * 0x1000, 1)
        dirty._lock = Lock()
        dirty.mark(5 * 0x1000, 1)
        dirty.commit()
        self.assertEqual(self.logged(log), {3, 5})


class MemoryChangeTests(DaemonTest):
    """Guest memory that comes late, changes and goes."""

    def test_addresses_may_come_before_the_memory(self) -> None:
        """rule 8"""
        for protocol_features in -1, ~PF.CONFIGURE_MEM_SLOTS:
            with self.subTest(protocol_features), self.prepared(Echo(), protocol_features=protocol_features) as (frontend, rig):
                driver = rig.driver()
                queue = frontend.start_queue(0, driver)
                rig.add(driver)
                queue.kick()
                self.stays(queue)
                rig.share()
                self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])
                self.echo(frontend, queue)

    def test_memory_table_comes_again_while_the_ring_runs(self) -> None:
        """As QEMU does when a DIMM is plugged."""
        with self.prepared(Echo(), protocol_features=~PF.CONFIGURE_MEM_SLOTS) as (frontend, rig):
            rig.share()
            queue = frontend.start_queue(0, rig.driver())
            more = GuestMemoryMmap.from_ranges([(RAM + (1 << 20), 1 << 16)])
            mappings = mapping_count()
            for _ in range(10):
                self.echo(frontend, queue)
                frontend.share_memory(GuestMemoryMmap(rig.memory.regions + more.regions))
                self.echo(frontend, queue)
                rig.share()
            self.assertEqual(mapping_count(), mappings)

    def test_memory_that_moves_in_the_front_end(self) -> None:
        """rule 8: user addresses are those of the current table, whatever they were."""
        with self.prepared(Echo(), protocol_features=Peer.WITH_USER_ADDRESSES) as (frontend, rig):
            rig.share()
            queue = frontend.start_queue(0, rig.driver())
            self.echo(frontend, queue)
            [region] = rig.memory.regions
            frontend.request("REM_MEM_REG", MemReg(region.guest_addr, region.size, region.user_addr, 0))
            frontend.request("ADD_MEM_REG", MemReg(region.guest_addr, region.size, 0x12340000, 0), [region.fileno()])
            desc, avail, used = (0x12340000 + area - RAM for area in queue.driver.areas)
            frontend.request("SET_VRING_ADDR", VringAddr(0, 0, desc, used, avail, 0))
            self.echo(frontend, queue, kick=True)

    def test_gpa_addresses_leave_user_addresses_out(self) -> None:
        """Rings are at guest addresses, and user addresses mean nothing: those of the specification (the guest addresses again) and QEMU's zeroes."""
        for table in False, True:
            with self.subTest(table=table), self.prepared(Echo(), protocol_features=~PF.CONFIGURE_MEM_SLOTS if table else -1) as (frontend, rig):
                self.assertTrue(frontend.protocol_features & PF.GPA_ADDRESSES)
                [region] = rig.memory.regions
                other = GuestRegionMmap.allocate(0, 1 << 16)
                if table:
                    rows = tuple(MemRegion(r.guest_addr, r.size, 0, 0) for r in (region, other))
                    frontend.request("SET_MEM_TABLE", MemTable(rows), [region.fileno(), other.fileno()])
                else:
                    for r in region, other:
                        frontend.request("ADD_MEM_REG", MemReg(r.guest_addr, r.size, 0, 0), [r.fileno()])
                queue = frontend.start_queue(0, rig.driver())
                self.assertEqual(rig.addresses(0, queue.driver).descriptor, RAM)
                self.echo(frontend, queue)
                if not table:
                    frontend.request("REM_MEM_REG", MemReg(other.guest_addr, other.size, 0, 0))
                    with self.raises(Refused, "REM_MEM_REG"):
                        frontend.request("REM_MEM_REG", MemReg(other.guest_addr, other.size, 0, 0))
                    self.expect_log("no region of")
                    self.echo(frontend, queue)

    def test_xen_fields_are_parsed_and_xen_mappings_refused(self) -> None:
        """A region with them is taken if it is an ordinary file; foreign and grant mappings are refused, and what they mean is said."""
        foreign, grant = vhost_user.XEN_FOREIGN, vhost_user.XEN_GRANT | vhost_user.XEN_NO_ADVANCE_MAP
        device = Echo()
        device.protocol_features = PF.XEN_MMAP
        with self.prepared(device, protocol_features=PF.REPLY_ACK | PF.CONFIGURE_MEM_SLOTS) as (frontend, rig):
            [region] = rig.memory.regions
            known = (region.guest_addr, region.size, region.user_addr, 0)
            with self.assertRaises(Disconnected):
                frontend.request("ADD_MEM_REG", MemReg(*known, 0, 7), [region.fileno()])
            self.expect_log("Xen's fields without XEN_MMAP negotiated")
        with self.serving(device) as served, served.peer(protocol_features=Peer.WITH_USER_ADDRESSES) as peer:
            self.assertEqual([len(MemRegion(*known, 0, 7).pack()), len(MemReg(*known, 0, 7).pack())], [40, 48])
            for flags in foreign, grant:
                peer.msg("ADD_MEM_REG", MemReg(*known, flags, 7).pack(), fds=[region.fileno()], expect=Peer.REFUSED)
                peer.msg("SET_MEM_TABLE", MemTable((MemRegion(*known, flags, 7),)).pack(), fds=[region.fileno()], expect=Peer.REFUSED)
                self.expect_log(f"Xen flags {flags:#x} of domain 7: foreign and grant mappings of Xen are not supported")
            peer.msg("ADD_MEM_REG", MemReg(*known, 0, 7).pack(), fds=[region.fileno()])
            peer.msg("REM_MEM_REG", MemReg(*known, 0, 7).pack())
            peer.msg("SET_MEM_TABLE", MemTable((MemRegion(*known, 0, 7), MemRegion(0, PAGE, 0, 0, 0, 7))).pack(), fds=[region.fileno()] * 2)
            self.assertEqual([r.guest_addr for r in served.daemon.memory.memory().regions], [0, RAM])

    def test_regions_are_added_and_removed_under_load(self) -> None:
        with self.connected(Echo(), indirect=False) as frontend:
            [queue] = frontend.queues
            extra = GuestRegionMmap.allocate(RAM + (1 << 30), 1 << 16)
            payload = MemReg(extra.guest_addr, extra.size, extra.user_addr, 0)
            for _ in range(50):
                base = frontend.arena[0]
                for n in range(10):
                    queue.submit([(base, 64)], [(base + 0x1000, 64)], n)
                frontend.add_region(extra)
                queue.submit([(extra.guest_addr, 64)], [], "there")
                frontend.request("REM_MEM_REG", payload)
                done: list[object] = []
                while len(done) < 11:
                    done += [token for token, _ in queue.wait(PATIENCE)]

    def test_region_that_goes_while_a_request_uses_it(self) -> None:
        """The views in the device's hand stay good; the mapping goes with them."""
        device = Later()
        with self.connected(device, indirect=False) as frontend:
            [queue] = frontend.queues
            extra = GuestRegionMmap.allocate(RAM + (1 << 30), 1 << 16)
            mappings = mapping_count()
            frontend.add_region(extra)
            extra.view[:4] = b"ping"
            queue.submit([(extra.guest_addr, 4)], [(extra.guest_addr + 64, 4)], "there")
            device.holds(1)
            frontend.request("REM_MEM_REG", MemReg(extra.guest_addr, extra.size, extra.user_addr, 0))
            self.assertGreater(mapping_count(), mappings)
            device.complete()
            self.assertEqual((queue.wait(PATIENCE), bytes(extra.view[64:68])), ([("there", 4)], b"gnip"))
            self.assertEqual(mapping_count(), mappings)
            queue.submit([(extra.guest_addr, 4)], [], "gone")
            self.assertEqual(queue.wait(PATIENCE), [("gone", 0)])
            self.expect_log("refused: .*leave RAM")

    def test_rings_memory_goes_and_comes_back(self) -> None:
        """No crash, no traffic meanwhile; then the ring goes on where it was, kick or no kick."""
        with self.prepared(Echo()) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            queue = frontend.start_queue(0, driver)
            [region] = rig.memory.regions
            for _ in range(3):
                self.echo(frontend, queue)
                frontend.request("REM_MEM_REG", MemReg(region.guest_addr, region.size, region.user_addr, 0))
                rig.add(driver)
                queue.kick()
                self.stays(queue)
                frontend.add_region(region)
                self.assertEqual(queue.wait(PATIENCE), [(b"ping", 4)])

    def test_no_memory_while_a_request_is_in_flight(self) -> None:
        """Its completion writes nothing, or where the ring was; the ring can be stopped."""
        device = Later()
        with self.prepared(device) as (frontend, rig):
            rig.share()
            driver = rig.driver()
            queue = frontend.start_queue(0, driver)
            rig.add(driver)
            queue.kick()
            device.holds(1)
            frontend.share_memory(GuestMemoryMmap())
            device.complete()
            frontend.stop_queue(queue)

    def test_buffers_across_regions_and_at_odd_offsets(self) -> None:
        """rule 10: an offset that is no multiple of a page."""
        fd = self.memfd(64 * PAGE)
        with self.connected(Echo(), indirect=False) as frontend:
            [queue] = frontend.queues
            base, offset = RAM + (1 << 30), 3 * PAGE + 100
            for n in 0, 1:
                frontend.request("ADD_MEM_REG", MemReg(base + n * PAGE, PAGE, 0x100000 + n * PAGE, offset + n * 8 * PAGE), [fd])
            os.pwrite(fd, b"pi", offset + PAGE - 2)
            os.pwrite(fd, b"ng", offset + 8 * PAGE)
            queue.submit([(base + PAGE - 2, 4)], [(base, 4)])
            self.assertEqual(queue.wait(PATIENCE), [(None, 4)])
            self.assertEqual(os.pread(fd, 4, offset), b"gnip")

    def test_hugetlb_memory(self) -> None:
        with _huge_pages(self, 2) as huge:
            fd = os.memfd_create("huge", os.MFD_HUGETLB)
            self.addCleanup(os.close, fd)
            os.ftruncate(fd, 2 * huge)
            mapped = GuestRegionMmap(fd, RAM, 2 * huge, 0x10000000)
            with self.serving(Echo()) as served, served.connect() as frontend:
                frontend.negotiate(-1 & ~PACKED & ~IN_ORDER)
                frontend.request("ADD_MEM_REG", MemReg(RAM, 2 * huge, 0x10000000, 0), [fd])
                frontend.memory = GuestMemoryMmap([mapped])
                _, (desc, avail, used) = SplitDriverQueue.layout(16)
                queue = frontend.start_queue(0, SplitDriverQueue(frontend.memory, 16, (RAM + desc, RAM + avail, RAM + used), frontend.features))
                frontend.arena = (RAM + huge - 64, 128)
                self.echo(frontend, queue)
            del mapped, queue, frontend

    def test_509_regions_serve_requests(self) -> None:
        with self.serving(Echo()) as served, served.connect() as frontend:
            frontend.setup(memory=1 << 20, size=16)
            fd = self.memfd(PAGE)
            for n in range(MAX_REGIONS - 1):
                frontend.request("ADD_MEM_REG", MemReg(RAM + (1 << 32) + n * PAGE, PAGE, 0x100000 + n * PAGE, 0), [fd])
            with self.assertRaises(Refused):
                frontend.request("ADD_MEM_REG", MemReg(0, PAGE, 0, 0), [fd])
            [queue] = frontend.queues
            self.echo(frontend, queue)
            os.pwrite(fd, b"ping", 0)
            for n in 0, 17, MAX_REGIONS - 2:
                queue.submit([(RAM + (1 << 32) + n * PAGE, 4)], [(frontend.arena[0], 4)])
                self.assertEqual(queue.wait(PATIENCE), [(None, 4)])


class IotlbTests(CoreTest):
    """The cache of translations by itself."""

    def test_like_a_dictionary_of_bytes(self) -> None:
        """Random updates, invalidations and look-ups give what a translation of each single page would."""
        with self.seeded() as choice:
            asked: list[int] = []
            iotlb = Iotlb(lambda kind, iova, access: asked.append(iova >> 12) or True)
            iotlb.ASK_AGAIN = 0.0
            iotlb.update(1 << 40, PAGE, 0, 3)  # pages are small
            model: dict[int, tuple[int, int]] = {}  # page -> user page, access
            whole: dict[int, tuple[int, int]] = {}  # page -> the update it came with: first page, pages
            for _ in range(3000):
                first, count = choice.randrange(64), choice.choice((1, 1, 2, 8))
                pages = range(first, first + count)
                if choice.random() < 0.5:
                    for page in {p for p in model if {*range(whole[p][0], sum(whole[p]))} & {*pages}}:
                        del model[page], whole[page]
                    if choice.random() < 0.5:
                        user, access = choice.randrange(1 << 20), choice.choice((1, 2, 3))
                        iotlb.update(first << 12, count << 12, user << 12, access)
                        iotlb.update(1 << 40, PAGE, 0, 3)
                        model.update({page: (user + page - first, access) for page in pages})
                        whole.update(dict.fromkeys(pages, (first, count)))
                    else:
                        iotlb.invalidate(first << 12, count << 12)
                    continue
                start, end = (first << 12) + choice.randrange(PAGE), ((first + count) << 12) - choice.randrange(PAGE)
                access = choice.choice((1, 2, 3))
                asked.clear()
                try:
                    found = iotlb.translate(start, max(0, end - start), access)
                except IotlbMiss:
                    self.assertEqual(asked, [page for page in range(start >> 12, -(-end >> 12)) if page not in model])
                except GuestMemoryError:
                    self.assertTrue(any(access & ~model[page][1] for page in pages if page in model))
                else:
                    bytes_found = [user + n for user, length in found for n in range(0, length, 512)]
                    self.assertEqual([user >> 12 for user in bytes_found][:1], [model[first][0]] if end > start else [])
                    self.assertEqual(sum(length for _, length in found), max(0, end - start))
                    for page in range(first, (end - 1 >> 12) + 1) if end > start else ():
                        at = max(start, page << 12) - start
                        for user, length in found:
                            if at < length:
                                self.assertEqual((user + at) >> 12, model[page][0])
                                break
                            at -= length
            self.assertEqual(len(iotlb), len(set(whole.values())) + 1)

    def test_bounded(self) -> None:
        """The oldest translation goes first."""
        iotlb = Iotlb(lambda kind, iova, access: True)
        iotlb.LIMIT = 8
        for page in range(20):
            iotlb.update(page * PAGE, PAGE, 0, 3)
        self.assertEqual([page for page in range(20) if iotlb.find(page * PAGE)], [*range(12, 20)])

    def test_asked_once_until_answered(self) -> None:
        asked: list[int] = []
        iotlb = Iotlb(lambda kind, iova, access: asked.append(iova) or len(asked) != 2)
        for _ in range(3):
            with self.assertRaises(IotlbMiss):
                iotlb.translate(PAGE, 1, 1)
        self.assertEqual(asked, [PAGE])
        for _ in range(2):  # the second could not be told, and is tried again
            with self.assertRaises(IotlbMiss):
                iotlb.translate(5 * PAGE, 1, 1)
        self.assertEqual(asked, [PAGE, 5 * PAGE, 5 * PAGE])
        iotlb.update(0, 4 * PAGE, 0, 3)
        iotlb.invalidate(0, 1 << 64)
        with self.assertRaises(IotlbMiss):
            iotlb.translate(16 * PAGE, 6 * PAGE, 1)  # pages may be four times as large: two of those
        self.assertEqual(asked[3:], [16 * PAGE, 20 * PAGE])
        del asked[3:]
        with self.assertRaises(IotlbMiss):
            iotlb.translate(PAGE, 1, 1)
        self.assertEqual(asked[3:], [PAGE])

    def test_hostile_length(self) -> None:
        """4 GiB of nothing are not asked for page by page, and what leaves the address space is refused."""
        asked: list[int] = []
        iotlb = Iotlb(lambda kind, iova, access: asked.append(iova) or True)
        with self.assertRaises(IotlbMiss):
            iotlb.translate(0, (1 << 32) - 1, 1)
        self.assertEqual(len(asked), iotlb.MOST_ASKED)
        with self.raises(GuestMemoryError, "leave the address space"):
            iotlb.translate((1 << 64) - 1, 2, 1)

    def test_pages_that_lie_apart_are_one_view(self) -> None:
        ram = GuestMemoryMmap.from_ranges([(RAM, 8 * PAGE)])
        user = ram.regions[0].user_addr
        iotlb = Iotlb(lambda kind, iova, access: True)
        space = IovaMemory(ram, iotlb)
        for page, at in enumerate((6, 2, 3, 0)):
            iotlb.update(page * PAGE, PAGE, user + at * PAGE, 3)
        mappings = mapping_count()
        view = space.view(100, 4 * PAGE - 200)
        self.assertEqual(len(space.views(100, 4 * PAGE - 200)), 3)  # pages 2 and 3 stand together
        view[PAGE - 100] = 7
        view[0] = 9
        self.assertEqual((ram.read(RAM + 2 * PAGE, 1), ram.read(RAM + 6 * PAGE + 100, 1)), (b"\7", b"\11"))
        ram.write(RAM, b"back")
        self.assertEqual(bytes(view[3 * PAGE - 100 : 3 * PAGE - 96]), b"back")
        self.assertGreater(mapping_count(), mappings)
        view.release()
        self.assertEqual(mapping_count(), mappings)
        iotlb.update(9 * PAGE, PAGE // 2, user, 3)
        iotlb.update(9 * PAGE + PAGE // 2, PAGE // 2, user + 3 * PAGE, 3)
        with self.raises(GuestMemoryError, "do not meet at pages"):
            space.view(9 * PAGE, PAGE)
        self.assertEqual(mapping_count(), mappings)


class IommuTests(DaemonTest):
    """Devices behind the guest's IOMMU (VIRTIO_F_ACCESS_PLATFORM): rings and buffers by IOVA."""

    IOVAS = 0x7000_0000_0000

    @contextlib.contextmanager
    def behind(self, device: Echo, packed: bool = False, tables: bool = False, rings: int = 1) -> Iterator[tuple[Frontend, list[FrontendQueue]]]:
        """Rings that start and have nothing translated yet. IOVAs of RAM are in the opposite order of its pages, each a translation."""
        device.iommu = True
        with self.serving(device) as served, served.connect() as frontend:
            frontend.negotiate(VERSION_1 | ACCESS_PLATFORM | packed << 34 | tables << 28)
            ram = GuestMemoryMmap.from_ranges([(RAM, 64 * PAGE)])
            frontend.share_memory(ram)
            for page in range(64):
                frontend.map_iova(self.IOVAS + page * PAGE, PAGE, RAM + (63 - page) * PAGE)
            space = IovaMemory(ram, frontend.iommu)
            kind: type[DriverQueue] = PackedDriverQueue if packed else SplitDriverQueue
            queues = []
            for index in range(rings):
                at = self.IOVAS + (4 + 20 * index) * PAGE
                _, (desc, driver, device_area) = kind.layout(256)
                areas = (at + desc, at + driver, at + device_area)
                if not packed:
                    self.assertGreater(len(space.views(areas[0], 16 * 256 + 600)), 1)
                queues.append(frontend.start_queue(index, kind(space, 256, areas, frontend.features, at + 4 * PAGE if tables else None)))
            frontend.arena = (self.IOVAS + 50 * PAGE, 14 * PAGE)
            self.space = space
            try:
                yield frontend, queues
            finally:
                del self.space

    def ping(self, frontend: Frontend, queue: FrontendQueue, data: bytes, at: int) -> None:
        """Data at an IOVA, its answer two pages on."""
        self.space.write(at, data)
        queue.submit([(at, len(data))], [(at + 2 * PAGE, len(data))], data)
        self.assertEqual(queue.wait(PATIENCE), [(data, len(data))])
        self.assertEqual(self.space.read(at + 2 * PAGE, len(data)), data[::-1])

    def test_rings_and_buffers_by_iova(self) -> None:
        """Translations that are missing are asked for; areas and buffers may consist of pages that lie anywhere."""
        for packed, tables in itertools.product((False, True), (False, True)):
            with self.subTest(packed=packed, tables=tables), self.behind(Echo(), packed, tables) as (frontend, [queue]):
                for number in range(600):
                    self.ping(frontend, queue, b"%d across pages" % number, frontend.arena[0] + PAGE - 1 - number % 16)

    def test_translation_that_ends(self) -> None:
        """From the answer to INVALIDATE on nothing is done by the old translation, which a parsed chain had been remembered with."""
        for packed, tables in itertools.product((False, True), (False, True)):
            with self.subTest(packed=packed, tables=tables), self.behind(Echo(), packed, tables) as (frontend, [queue]):
                at = frontend.arena[0]
                for number in range(40):
                    self.ping(frontend, queue, b"number %02d" % number, at)
                    frontend.unmap_iova(at, 3 * PAGE)
                    old = RAM + PAGE * (number % 2)
                    frontend.memory.write(old + 2 * PAGE, bytes(16))
                    for page in range(3):
                        frontend.map_iova(at + page * PAGE, PAGE, RAM + PAGE * (2 * page + number % 2))
                self.assertGreater(len(frontend.iommu), 60)

    def test_what_is_translated_otherwise_while_no_ring_runs(self) -> None:
        """Front-ends that have stopped the device do not tell: what was known then is asked for again."""
        for packed in False, True:
            with self.subTest(packed=packed), self.behind(Echo(), packed) as (frontend, [queue]):
                at = frontend.arena[0]
                self.ping(frontend, queue, b"before", at)
                base = frontend.stop_queue(queue)
                old, new = RAM + PAGE * 11, RAM + PAGE * 13  # where nothing else is
                for page, ram in (0, RAM + PAGE * 9), (2, new):
                    frontend.iommu.invalidate(at + page * PAGE, PAGE)
                    frontend.map_iova(at + page * PAGE, PAGE, ram)
                frontend.memory.write(old, bytes(PAGE))
                queue = frontend.start_queue(0, queue.driver, base)
                self.ping(frontend, queue, b"after", at)
                self.assertEqual(frontend.memory.read(new, 5), b"retfa")

    def test_ring_whose_own_translation_ends(self) -> None:
        """It pauses, asks, and goes on elsewhere."""
        for packed in False, True:
            with self.subTest(packed=packed), self.behind(Echo(), packed) as (frontend, [queue]):
                at = frontend.arena[0]
                for size in PAGE, 1 << 63, PAGE:
                    self.ping(frontend, queue, b"before", at)
                    frontend.request("IOTLB_MSG", IotlbMessage(queue.driver.areas[0] & -PAGE if size == PAGE else 0, size, 0, 0, Iotlb.INVALIDATE))
                    self.ping(frontend, queue, b"after", at)

    def test_a_miss_blocks_only_its_ring(self) -> None:
        device = Echo()
        with self.behind(device, rings=2) as (frontend, [first, second]):
            at = frontend.arena[0]
            self.ping(frontend, first, b"first", at)
            self.ping(frontend, second, b"second", at + 4 * PAGE)
            nowhere = 0x6000_0000_0000
            first.submit([(nowhere, 4)], [], "stuck")
            for number in range(100):
                self.ping(frontend, second, b"%d" % number, at + 4 * PAGE)
                first.kick()
            self.rests(self.workers[0])
            processed = device.processed
            self.stays(first)
            self.assertEqual(device.processed, processed, "it spins")
            frontend.map_iova(nowhere & -PAGE, PAGE, RAM)
            frontend.request("IOTLB_MSG", IotlbMessage(nowhere, PAGE, frontend.user_addr(RAM), 3, Iotlb.UPDATE))
            self.assertEqual(first.wait(PATIENCE), [("stuck", 0)])
            stopped = frontend.stop_queue(second)
            self.assertEqual(stopped, 101)

    def test_access_that_is_not_allowed(self) -> None:
        """The chain comes back, nothing is written, and the front-end is told."""
        with self.behind(Echo()) as (frontend, [queue]):
            at = frontend.arena[0]
            self.ping(frontend, queue, b"ping", at)
            frontend.unmap_iova(at + 2 * PAGE, PAGE)
            frontend.map_iova(at + 2 * PAGE, PAGE, RAM + PAGE, ACCESS_READ)
            queue.submit([(at, 4)], [(at + 2 * PAGE, 4)], "to read-only memory")
            self.assertEqual(queue.wait(PATIENCE), [("to read-only memory", 0)])
            self.assertEqual(frontend.memory.read(RAM + PAGE, 4), bytes(4))
            self.expect_log("is mapped with access 1, and 2 is wanted")
            request = frontend.next_backend_request()
            self.assertEqual((request.name, request.payload), ("IOTLB_MSG", IotlbMessage(at + 2 * PAGE, 0, 0, 2, Iotlb.ACCESS_FAIL)))

    def test_front_end_that_does_not_read_misses(self) -> None:
        """Nothing waits for it: it may be waiting for an answer of ours. What could not be told is told later."""
        with self.behind(Echo()) as (frontend, [queue]):
            self.ping(frontend, queue, b"ping", frontend.arena[0])
            channel, nowhere = frontend.channel, 0x6000_0000_0000
            assert channel
            for number in range(2):
                pages = [nowhere + (1000 * number + page) * PAGE for page in range(12 * 64)]
                queue.submit([(iova, 64 * PAGE) for iova in pages[::64]], [], number)
                for iova in pages:
                    frontend.map_iova(iova, PAGE, RAM)
                wait_until(lambda: is_readable(channel.socket), "a miss")
                frontend.request("IOTLB_MSG", IotlbMessage(nowhere, PAGE, 0, 0, Iotlb.INVALIDATE))
            done: list[object] = []
            while len(done) < 2:
                done += [token for token, _ in queue.wait(PATIENCE)]
            self.assertEqual(done, [0, 1])

    def test_stops_while_a_translation_is_missing(self) -> None:
        """A ring that cannot even be placed, and one whose chain waits: both stop, and start again where they were."""
        with self.behind(Echo(), rings=2) as (frontend, [first, second]):
            self.assertEqual(frontend.stop_queue(second), 0)
            self.ping(frontend, first, b"ping", frontend.arena[0])
            first.submit([(0x6000_0000_0000, 4)], [], "stuck")
            driver = first.driver
            self.assertEqual(frontend.stop_queue(first), 1)
            frontend.map_iova(0x6000_0000_0000, PAGE, RAM)
            again = frontend.start_queue(0, driver, base=1)
            self.assertEqual(again.wait(PATIENCE), [("stuck", 0)])

    def test_no_channel_to_ask(self) -> None:
        """Without BACKEND_REQ nothing works that is not told beforehand, and the log says why."""
        device = Echo()
        device.iommu = True
        with self.serving(device) as served, served.connect() as frontend:
            frontend.negotiate(VERSION_1 | ACCESS_PLATFORM, ~PF.BACKEND_REQ)
            rig = Rig(frontend, share=True)
            queue = frontend.start_queue(0, rig.driver())
            self.expect_log("gave no channel to ask for it")
            frontend.request("IOTLB_MSG", IotlbMessage(RAM, 1 << 20, frontend.user_addr(RAM), 3, Iotlb.UPDATE))
            self.echo(frontend, queue)

    def test_log_has_the_pages_where_they_are(self) -> None:
        """Dirty logging is by guest address: of buffers, and of the used ring, whatever address the front-end gave for its log."""
        for packed in False, True:
            with self.subTest(packed=packed), self.behind(Echo(), packed) as (frontend, [queue]):
                log = GuestMemoryMmap.from_ranges([(0, 64 << 10)])
                frontend.request("SET_LOG_BASE", Log(64 << 10, 0), [log.regions[0].fileno()])
                at = frontend.arena[0]
                self.ping(frontend, queue, b"ping", at)
                areas = queue.driver.areas
                frontend.request("SET_VRING_ADDR", VringAddr(0, VringAddr.LOG_USED, areas[0], areas[2], areas[1], 0))
                frontend.request("SET_FEATURES", U64(frontend.features | 1 << 26))
                self.ping(frontend, queue, b"ping", at)
                view = log.view(0, 64 << 10)
                frontend.stop_queue(queue)
                marked = {8 * n + bit for n, byte in enumerate(view) for bit in range(8) if byte >> bit & 1}
                used = areas[0] if packed else areas[2]
                written = {self.IOVAS + 52 * PAGE, used & -PAGE, used + (0 if packed else 2000) & -PAGE}
                if packed:
                    written.add(areas[2] & -PAGE)
                self.assertEqual(marked, {(RAM >> 12) + 63 - (iova - self.IOVAS) // PAGE for iova in written})


def migrating() -> Echo:
    """A device to which a guest may migrate, and run before its memory has come."""
    device = Echo()
    device.postcopy = True
    return device


POSTCOPY_PROGRAM = """
class Echo(vhost_user.VhostUserBackendMut):
    def process_queue(self, vring):
        for chain in vring:
            vring.add_used(chain, chain.write(chain.read()[::-1]))

sys.exit(vhost_user.run_device("echo", lambda options: Echo()))
"""


class PostcopyTests(DaemonTest):
    """Guest memory that comes when it is touched (PAGEFAULT). The back-end is a process of its own: a thread that waits for a page may have the
    interpreter's lock."""

    SIZE = 64 * PAGE

    @contextlib.contextmanager
    def arriving(self) -> Iterator[tuple[Frontend, int, GuestMemoryMmap, GuestMemoryMmap, list[int]]]:
        """The front-end of a guest that has arrived and none of whose memory has: it, the userfaultfd, memory there and here, and where the
        back-end has it."""
        path = f"{self.folder()}/sock"
        self.path, self.child = path, program(self, POSTCOPY_PROGRAM, "--socket-path", path, "--postcopy")
        there, here = (GuestMemoryMmap.from_ranges([(RAM, self.SIZE), (RAM + 2 * self.SIZE, self.SIZE)]) for _ in range(2))
        with Frontend.connect(path) as frontend:
            frontend.negotiate(VERSION_1)
            fd = frontend.postcopy_advise()
            try:
                frontend.request("POSTCOPY_LISTEN")
                bases = frontend.share_for_postcopy(here)
                frontend.ready_for_faults()
                yield frontend, fd, there, here, bases
            finally:
                os.close(fd)

    def serve_fault(self, fd: int, there: GuestMemoryMmap, here: GuestMemoryMmap, bases: list[int]) -> tuple[int, int]:
        """Bring the page that somebody waits for: which region's, and its offset."""
        event = os.read(fd, 32)
        self.assertEqual(event[0], 0x12)  # UFFD_EVENT_PAGEFAULT
        [address] = struct.unpack_from("=Q", event, 16)
        for number, base in enumerate(bases):
            if base <= address < base + self.SIZE:
                offset = (address - base) & -PAGE
                os.pwrite(here.regions[number].fileno(), there.regions[number].view[offset : offset + PAGE], offset)
                fcntl.ioctl(fd, 0x8010AA02, struct.pack("=QQ", base + offset, PAGE))  # UFFDIO_WAKE
                return number, offset
        raise AssertionError(f"a fault at {address:#x}, not in {bases}")

    def test_pages_come_when_they_are_touched(self) -> None:
        """Ring, request and place for the answer, each in pages of its own; the ring's start as well as the worker waits for them."""
        with self.arriving() as (frontend, fd, there, here, bases):
            self.assertTrue(frontend.protocol_features & PF.PAGEFAULT)
            self.assertFalse(frontend.protocol_features & PF.CONFIGURE_MEM_SLOTS)
            driver = SplitDriverQueue(there, 16, (RAM + PAGE, RAM + 2 * PAGE, RAM + 3 * PAGE))
            request, answer = RAM + 5 * PAGE, RAM + 2 * self.SIZE + 7 * PAGE
            there.write(request, b"from there")
            driver.add([(request, 10)], [(answer, 10)])
            driver.publish()
            faults: list[tuple[int, int]] = []
            done = self.eventfd()

            def serve() -> None:
                while not is_readable(done):
                    if is_readable(fd, 0.02):
                        faults.append(self.serve_fault(fd, there, here, bases))

            server = self.in_thread(serve)
            queue = frontend.start_queue(0, driver)
            wait_until(lambda: is_readable(queue.call_fd), "the answer")
            os.eventfd_write(done, 1)
            server.join(PATIENCE)
            self.assertEqual(sorted(faults), [(0, PAGE), (0, 2 * PAGE), (0, 3 * PAGE), (0, 5 * PAGE), (1, 7 * PAGE)])
            self.assertEqual(here.read(answer, 10), b"ereht morf")
            self.assertEqual(here.read(RAM + 3 * PAGE + 2, 2), b"\1\0")
            # The same table again, as after a reboot of the guest: the mappings stay, and so does what is watched.
            frontend.stop_queue(queue)
            self.assertEqual(frontend.share_for_postcopy(here), bases)
            frontend.ready_for_faults()
            frontend.request("POSTCOPY_END")
            frontend.share_memory(here)
            self.assertEqual(frontend.request("GET_FEATURES").value >> 32 & 1, 1)

    def test_other_memory_in_between_is_refused(self) -> None:
        """The userfaultfd is the front-end's alone by then: what it does not watch would be zeroes."""
        with self.arriving() as (frontend, _, _, _, _):
            other = GuestMemoryMmap.from_ranges([(RAM, self.SIZE)])
            with self.raises(ProtocolError, "postcopy is answered by"):
                frontend.protocol_features &= ~PF.REPLY_ACK
                table = MemTable((MemRegion(RAM, self.SIZE, RAM, 0),)).pack()
                frontend.connection.send(5, 8, table, [other.regions[0].fileno()])  # NEED_REPLY, to see the refusal
                with frontend.connection.receive(PATIENCE) as answer:
                    self.assertEqual(answer.payload, u64(1))
                frontend.connection.send(1, 0)
                frontend.share_for_postcopy(other)

    def test_table_that_cannot_be_mapped_ends_the_connection(self) -> None:
        """A front-end that waits for a table is told nothing else."""
        with self.arriving() as (frontend, _, _, _, _):
            other = GuestMemoryMmap.from_ranges([(RAM, self.SIZE)])
            frontend.connection.send(5, 0, MemTable((MemRegion(RAM, self.SIZE, RAM, 0),)).pack(), [other.regions[0].fileno()])
            with self.assertRaises(Disconnected), frontend.connection.receive(PATIENCE):
                pass

    def test_front_end_that_dies_leaves_nobody_waiting(self) -> None:
        """Not even a thread that waits for a page with the interpreter's lock in its hand."""
        with self.arriving() as (frontend, fd, _, _, _):
            desc, avail, used = (frontend.user_addr(RAM + number * PAGE) for number in (1, 2, 3))
            for name, payload in (
                ("SET_VRING_NUM", VringStatePayload(0, 16)),
                ("SET_VRING_ADDR", VringAddr(0, 0, desc, used, avail, 0)),
            ):
                frontend.request(name, payload)
            frontend.connection.send(12, 0, u64(0), [self.eventfd()])
            self.assertTrue(is_readable(fd, PATIENCE), "it waits for no page")
        with Frontend.connect(self.path) as frontend:
            self.assertTrue(frontend.request("GET_FEATURES").value)
        self.child.send_signal(signal.SIGTERM)
        self.assertEqual(self.child.wait(PATIENCE), 0)

    def test_acknowledgement_of_the_table_is_due(self) -> None:
        """Nothing else comes between, and it has no regions."""
        for name, payload in ("GET_FEATURES", b""), ("SET_MEM_TABLE", EXAMPLES["SET_MEM_TABLE"]):
            with self.serving(migrating()) as served, served.peer(protocol_features=Peer.WITH_USER_ADDRESSES) as peer:
                memory = GuestRegionMmap.allocate(RAM, 4 * PAGE)
                peer.msg("POSTCOPY_ADVISE", expect=b"")
                peer.msg("POSTCOPY_LISTEN")
                peer.send(5, EXAMPLES["SET_MEM_TABLE"], 1, [memory.fileno()])
                self.assertEqual(MemTable.unpack(peer.answer()[2]).regions[0].guest_addr, RAM)
                peer.msg(name, payload, fds=[memory.fileno()] if payload else [], expect=CLOSED)
                self.expect_log("without regions is due" if not payload else "with 1 regions as an acknowledgement")

    def test_memory_that_cannot_be_watched_ends_the_connection(self) -> None:
        """No message is left that could say so, and the guest would go on with zeroes for memory."""

        class Arriving(Echo):
            postcopy = True

        with self.serving(Arriving()) as served, served.connect() as frontend, Userfault() as other:
            frontend.negotiate(VERSION_1)
            os.close(frontend.postcopy_advise())
            frontend.request("POSTCOPY_LISTEN")
            memory = GuestMemoryMmap.from_ranges([(RAM, self.SIZE)])
            [base] = frontend.share_for_postcopy(memory)
            fcntl.ioctl(other.fd, 0xC020AA00, struct.pack("=QQQQ", base, self.SIZE, 1, 0))  # UFFDIO_REGISTER; the back-end is this process
            frontend.ready_for_faults()
            with self.raises(Disconnected, ""):
                frontend.connection.receive(PATIENCE)
            self.expect_log("the connection ends: postcopy: .* cannot be watched for page faults")

    def test_memory_is_watched_while_other_mappings_go(self) -> None:
        """All of its mapping, wherever in that it begins."""

        class Changing(dict[int, int]):
            def items(self) -> Any:
                raise RuntimeError("dictionary changed size during iteration")

        region = GuestRegionMmap(self.memfd(4 * PAGE), RAM, PAGE, 0, PAGE + 100)
        module = sys.modules[Userfault.__module__]
        with Userfault() as first, Userfault() as second, mock.patch.object(module, "_mappings", Changing(module._mappings)):
            first.register(region)
            with self.raises(GuestMemoryError, "cannot be watched"):
                second.register(region)

    def test_postcopy_and_memory_slots_exclude_each_other(self) -> None:
        """rule 12: A device that offers the one does not offer the other."""
        for device, wanted in (Echo(), PF.CONFIGURE_MEM_SLOTS), (migrating(), PF.PAGEFAULT):
            offered = vhost_user._offered_protocol_features(device)
            self.assertEqual(offered & (PF.CONFIGURE_MEM_SLOTS | PF.PAGEFAULT), wanted)


def _eventfd_id(fd: int) -> int | None:
    """The same for all descriptors of an eventfd."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{fd}") as info:
        for line in info:
            if line.startswith("eventfd-id:"):
                return int(line.split()[1])
    return None


class EventfdTests(DaemonTest):
    """The peer's descriptors: they stay as they are, and nobody hangs on them."""

    def start(self, frontend: Frontend, rig: Rig, kick: int, call: int) -> SplitDriverQueue:
        """A ring with these descriptors, which stay the test's."""
        rig.share()
        driver = rig.driver()
        frontend.request("SET_VRING_NUM", VringStatePayload(0, rig.size))
        frontend.request("SET_VRING_ADDR", rig.addresses(0, driver))
        frontend.request("SET_VRING_CALL", VringFd(0), [call])
        frontend.request("SET_VRING_KICK", VringFd(0), [kick])
        frontend.enable_queue(0)
        return driver

    def served(self, rig: Rig, driver: SplitDriverQueue, kick: int) -> None:
        """A request comes back, kicked."""
        rig.add(driver)
        os.write(kick, struct.pack("=Q", 1))
        wait_until(driver.used, "the request to come back")

    def test_modes_of_the_peers_descriptors_stay(self) -> None:
        """O_NONBLOCK belongs to the open file, which is the peer's too."""
        for flags in 0, os.EFD_NONBLOCK:
            kick, call = self.eventfd(0, flags), self.eventfd(0, flags)
            before = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (kick, call)]
            with self.prepared(Echo()) as (frontend, rig):
                driver = self.start(frontend, rig, kick, call)
                for _ in range(3):
                    self.served(rig, driver, kick)
                self.assertEqual([fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (kick, call)], before)
                frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
            self.assertEqual([fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (kick, call)], before)

    def test_blocking_kick_that_the_peer_drains_itself(self) -> None:
        """A read of it would block the worker for ever."""
        kick, call = self.eventfd(0, 0), self.eventfd()
        with self.prepared(Echo()) as (frontend, rig):
            driver = self.start(frontend, rig, kick, call)
            for _ in range(200):
                os.eventfd_write(kick, 1)
                os.eventfd_write(kick, 1)
                self.assertEqual(os.eventfd_read(kick), 2, "nobody else reads it")
            self.served(rig, driver, kick)

    def both_ends(self) -> Iterator[tuple[int, int]]:
        """Of a pipe, and of a socket pair as User-mode Linux makes one: what reads, and what writes."""
        ends = os.pipe()
        sockets = socket.socketpair()
        for fd in ends:
            self.addCleanup(os.close, fd)
        for sock in sockets:
            self.addCleanup(sock.close)
        yield ends
        yield sockets[0].fileno(), sockets[1].fileno()

    def test_pipe_or_socket_as_call_descriptor(self) -> None:
        for reader, writer in self.both_ends():
            kick = self.eventfd()
            with self.prepared(Echo()) as (frontend, rig):
                driver = self.start(frontend, rig, kick, writer)
                self.served(rig, driver, kick)
                self.assertTrue(is_readable(reader, PATIENCE))
                self.assertEqual(len(os.read(reader, 100)), 8)

    def test_pipe_as_kick_descriptor(self) -> None:
        """It is read: else it would be full one day."""
        for blocking in True, False:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)  # so that the test sees it full
            os.set_blocking(reader, blocking)
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PAGE)
            with self.subTest(blocking=blocking), self.prepared(Echo()) as (frontend, rig):
                driver = self.start(frontend, rig, reader, self.eventfd())
                os.close(reader)
                for _ in range(PAGE // 8 + 100):
                    self.served(rig, driver, writer)
                frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
            os.close(writer)

    def test_full_pipe_or_socket_as_call_descriptor_hangs_nobody(self) -> None:
        """Nor one that is filled just before it is written."""
        for _, writer in self.both_ends():
            for looks_empty in False, True:
                os.set_blocking(writer, False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(writer, bytes(4096))
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(writer, bytes(1))
                os.set_blocking(writer, True)
                kick = self.eventfd()
                with self.subTest(looks_empty=looks_empty), self.serving(Echo()) as served, served.connect() as frontend:
                    frontend.negotiate(0)
                    rig = Rig(frontend)
                    driver = self.start(frontend, rig, kick, writer)
                    if looks_empty:
                        served.daemon.vrings[0]._call_room = select.poll()
                        served.daemon.vrings[0]._call_room.register(self.eventfd(), select.POLLOUT)
                    for _ in range(5):
                        self.served(rig, driver, kick)
                    frontend.get_config(0, 8)
                    frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))

    def test_call_descriptor_whose_reader_is_gone(self) -> None:
        reader, writer = os.pipe()
        self.addCleanup(os.close, writer)
        kick = self.eventfd()
        with self.prepared(Echo()) as (frontend, rig):
            driver = self.start(frontend, rig, kick, writer)
            os.close(reader)
            for _ in range(3):
                self.served(rig, driver, kick)

    def test_call_eventfd_filled_to_the_brim_hangs_nobody(self) -> None:
        for flags in 0, os.EFD_NONBLOCK:
            with self.subTest(flags=flags):
                kick, call = self.eventfd(), self.eventfd(BRIM, flags)
                with self.prepared(Echo()) as (frontend, rig):
                    driver = self.start(frontend, rig, kick, call)
                    for _ in range(3):
                        self.served(rig, driver, kick)
                    frontend.request("SET_VRING_CALL", VringFd(0), [call])
                    frontend.enable_queue(0, False)
                    frontend.enable_queue(0)
                    rig.add(driver)
                    os.eventfd_write(kick, 1)
                # and the daemon shuts down, with a front-end connected
                self.assertTrue(is_readable(call))

    def test_call_eventfd_filled_to_the_brim_stays_so_while_the_worker_is_slow(self) -> None:
        """What the driver is to be notified of is not taken away by whoever waits for the ring."""

        class Slow(Echo):
            def process_queue(self, vring: VringT) -> None:
                super().process_queue(vring)
                with vring.batch():  # has the ring's lock
                    busy.set()
                    time.sleep(0.3)

        kick, call, busy = self.eventfd(), self.eventfd(BRIM), threading.Event()
        with self.prepared(Slow()) as (frontend, rig):
            driver = self.start(frontend, rig, kick, call)
            rig.add(driver)
            busy.clear()
            os.eventfd_write(kick, 1)
            self.assertTrue(busy.wait(PATIENCE))
            frontend.enable_queue(0, False)
            self.assertTrue(is_readable(call))

    def test_peer_that_fills_the_call_eventfd_all_the_time(self) -> None:
        """Between the look and the write, too: the ring can be stopped all the same."""
        kick, call = self.eventfd(), self.eventfd(0, 0)
        mine = os.dup(call)
        self.addCleanup(os.close, mine)
        with self.prepared(Echo()) as (frontend, rig):
            driver = self.start(frontend, rig, kick, call)
            done = threading.Event()

            def fill() -> None:
                while not done.is_set():
                    if not is_readable(mine):
                        os.eventfd_write(mine, BRIM)

            def drain() -> None:
                with contextlib.suppress(OSError):
                    os.preadv(mine, [bytearray(8)], -1, os.RWF_NOWAIT)

            filler = self.in_thread(fill)
            for _ in range(200):
                rig.add(driver)
                os.eventfd_write(kick, 1)
                wait_until(driver.used, "the request to come back")
                drain()
            frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
            done.set()
            while filler.is_alive():
                drain()

    def test_full_err_eventfd_hangs_nobody(self) -> None:
        """A ring that breaks signals it under the ring's lock."""
        for flags in 0, os.EFD_NONBLOCK:
            kick, call, err = self.eventfd(), self.eventfd(), self.eventfd(BRIM, flags)
            with self.subTest(flags=flags), self.prepared(Echo()) as (frontend, rig):
                self.start(frontend, rig, kick, call)
                frontend.request("SET_VRING_ERR", VringFd(0), [err])
                self.break_ring(rig, kick)
                frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
                # and the daemon shuts down, with a front-end connected

    def break_ring(self, rig: Rig, kick: int) -> None:
        """An available index that no driver has."""
        rig.memory.write(RAM + 16 * rig.size + 2, b"\xff\xff")
        os.eventfd_write(kick, 1)
        self.expect_log("is broken until it is started again")

    @contextlib.contextmanager
    def filling(self, fd: int) -> Iterator[None]:
        """A process that fills the eventfd whenever it can."""
        child = os.fork()
        if not child:
            while True:
                if not is_readable(fd):
                    os.eventfd_write(fd, BRIM)
        try:
            yield
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def test_peer_that_fills_an_eventfd_just_before_it_is_written(self) -> None:
        """A worker that is stuck there, with its ring's lock and the device's, is freed by whoever waits for it, though the peer goes on."""
        for name in "SET_VRING_CALL", "SET_VRING_ERR", "SET_LOG_FD":
            kick, fd = self.eventfd(), self.eventfd(0, 0)
            with self.subTest(name), self.prepared(Echo()) as (frontend, rig), self.filled_when_written(fd) as filled:
                driver = self.start(frontend, rig, kick, fd if name == "SET_VRING_CALL" else self.eventfd())
                if name == "SET_VRING_ERR":
                    frontend.request("SET_VRING_ERR", VringFd(0), [fd])
                    self.break_ring(rig, kick)
                else:
                    if name == "SET_LOG_FD":
                        frontend.request("SET_LOG_BASE", Log(0x10000, 0), [self.memfd(0x10000)])
                        frontend.request("SET_LOG_FD", fds=[fd])
                        frontend.request("SET_FEATURES", U64(frontend.features | 1 << 26))
                    rig.add(driver)
                    os.eventfd_write(kick, 1)
                self.assertTrue(filled.wait(PATIENCE), "the eventfd is not written")
                with self.filling(fd):
                    frontend.get_config(0, 8)  # which needs the device
                    frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))  # which needs the ring

    def test_control_thread_is_not_stuck_there_either(self) -> None:
        """Nobody waits for it: it sees to that itself."""
        fd = self.eventfd(0, 0)
        with self.connected(Echo(), 1, protocol_features=~PF.GPA_ADDRESSES) as frontend, self.filled_when_written(fd) as filled:
            frontend.request("SET_VRING_ERR", VringFd(0), [fd])
            [region] = frontend.memory.regions
            table = MemTable((MemRegion(region.guest_addr, region.size, region.user_addr - 8, 0),))  # the ring is misaligned there
            frontend.connection.send(5, 0, table.pack(), [region.fileno()])
            self.assertTrue(filled.wait(PATIENCE), "the eventfd is not written")
            frontend.request("GET_FEATURES")
        self.expect_log("ring 0 is broken")

    @contextlib.contextmanager
    def filled_when_written(self, fd: int) -> Iterator[threading.Event]:
        """Fill the eventfd after the look whether it is full, just once: at the first descriptor that is looked at and is the same."""
        real, filled = select.poll, threading.Event()
        identity = _eventfd_id(fd)

        class Poll:
            def __init__(self) -> None:
                self._poll = real()
                self._fds: list[int] = []

            def register(self, fd: Any, events: int) -> None:
                self._poll.register(fd, events)
                if events == select.POLLOUT:
                    self._fds.append(fd if isinstance(fd, int) else fd.fileno())

            def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
                ready = self._poll.poll(timeout)
                if not filled.is_set() and identity in map(_eventfd_id, self._fds):
                    os.eventfd_write(fd, BRIM)
                    filled.set()
                return ready

        with mock.patch("select.poll", Poll):
            yield filled

    def test_thread_that_is_stuck_is_freed_whoever_waits_before(self) -> None:
        """SIGHUP's thread waits for the device as well, ahead of the control thread."""
        kick, call = self.eventfd(), self.eventfd(0, 0)
        with self.serving(Echo()) as served, served.connect() as frontend, self.filled_when_written(call) as filled:
            frontend.negotiate(0)
            rig = Rig(frontend)
            driver = self.start(frontend, rig, kick, call)
            rig.add(driver)
            os.eventfd_write(kick, 1)
            self.assertTrue(filled.wait(PATIENCE))
            self.in_thread(served.daemon.reload)
            time.sleep(MOMENT)
            frontend.get_config(0, 8)

    def test_mode_of_a_pipe_is_the_peers(self) -> None:
        """A pipe is opened anew, and non-blocking here alone; the peer's stays as it is."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        kick = self.eventfd()
        with self.serving(Echo()) as served, served.connect() as frontend:
            frontend.negotiate(0)
            driver = self.start(frontend, Rig(frontend), kick, writer)
            call = served.daemon.vrings[0]._call
            assert call is not None and driver
            self.assertFalse(os.get_blocking(call))
            self.assertTrue(os.get_blocking(writer))

    def test_descriptors_that_are_no_event_descriptors(self) -> None:
        """Refused: they might block whoever writes to them. The daemon lives."""
        file = os.open(os.path.join(self.folder(), "file"), os.O_RDWR | os.O_CREAT)
        device = os.open("/dev/null", os.O_RDWR)
        for fd in file, device:
            self.addCleanup(os.close, fd)
        kick = self.eventfd()
        with self.prepared(Echo()) as (frontend, rig):
            for name, fd in itertools.product(("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR", "SET_LOG_FD"), (file, device)):
                with self.subTest(name), self.raises(Refused, name):
                    frontend.request(name, Empty() if name == "SET_LOG_FD" else VringFd(0), [fd])
            self.expect_log("no eventfd, pipe or socket", times=8)
            driver = self.start(frontend, rig, kick, self.eventfd())
            self.served(rig, driver, kick)

    def test_kick_that_was_refused_leaves_no_trace(self) -> None:
        """Its number, used again by a listener of the device's own, is the listener's."""
        file = self.memfd(PAGE)
        device = Listening()
        with self.serving(device) as served, served.peer() as peer:
            [worker] = served.daemon.get_epoll_handlers()
            for _ in range(3):
                peer.msg("SET_VRING_KICK", u64(1), [file], expect=REFUSED)
            fds = [self.eventfd() for _ in range(3)]  # one of them has the number that the kick had here
            for fd in fds:
                worker.register_listener(fd, select.EPOLLIN | select.EPOLLET, 100 + fd)
                os.eventfd_write(fd, 1)
            wait_until(lambda: len(device.heard) == 3, "the listeners to be called")
            for fd in fds:
                worker.unregister_listener(fd)


# ---------------------------------------------------------------------------------------------------------------------------
# Devices and workers
# ---------------------------------------------------------------------------------------------------------------------------


class Listening(Echo):
    """Has listeners of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, int, int]] = []
        self.fails = False

    def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
        if device_event < len(vrings):
            return super().handle_event(device_event, evset, vrings, thread_id)
        self.heard.append((device_event, evset, thread_id))
        if self.fails:
            raise RuntimeError("as asked")
        return None


class DeviceTests(DaemonTest):
    """What goes wrong in device code, and in which threads it runs."""

    def test_exception_breaks_the_ring_and_nothing_else(self) -> None:
        """Logged, err eventfd signalled; the other ring, the worker thread and the daemon live; the ring can be stopped and started."""
        with self.connected(Failing(), 2) as frontend:
            queue, other = frontend.queues
            self.echo(frontend, queue)
            base = frontend.arena[0]
            frontend.memory.write(base, b"fail")
            queue.submit([(base, 4)], [])
            with self.raises(VringError, "says it is broken"):
                queue.wait(PATIENCE)
            self.expect_log("ring 0: the device failed .*RuntimeError: as asked")
            self.expect_log("ring 0 is broken until it is started again", times=1)
            self.echo(frontend, other)
            frontend.stop_queue(queue)
            self.echo(frontend, other)

    def test_broken_ring_is_stopped_and_started_again(self) -> None:
        with self.prepared(Failing()) as (frontend, rig):
            rig.share()
            for _ in range(3):
                driver = rig.driver()
                queue = frontend.start_queue(0, driver)
                self.echo(frontend, queue)
                rig.add(driver, b"fail")
                queue.kick()
                with self.assertRaises(VringError):
                    queue.wait(PATIENCE)
                frontend.stop_queue(queue)
            self.expect_log("the device failed")

    def test_device_without_process_queue(self) -> None:
        with self.connected(VhostUserBackendMut(), queues=1) as frontend:
            [queue] = frontend.queues
            queue.submit([], [(frontend.arena[0], 4)])
            with self.assertRaises(VringError):
                queue.wait(PATIENCE)
            self.expect_log("VhostUserBackendMut has no process_queue")

    def test_exception_in_a_hook_of_the_connections_end(self) -> None:
        class Bad(Echo):
            def disconnected(self) -> None:
                raise RuntimeError("cannot")

            def ring_stopped(self, index: int) -> None:
                raise RuntimeError("cannot")

        with self.serving(Bad()) as served:
            for _ in range(3):
                with served.connect() as frontend:
                    frontend.setup(memory=1 << 20, size=16)
                    self.echo(frontend, frontend.queues[0])
            self.expect_log("disconnected of the device failed")
            self.expect_log("ring_stopped of the device failed")

    def test_nobody_is_served_before_the_device_has_started(self) -> None:
        path = f"{self.folder()}/sock"

        class Starts(VhostUserBackend):
            answered = True

            def started(self, reload: Callable[[], None]) -> None:
                self.peer = Peer(path, protocol_features=0)
                self.peer.send(1)
                self.answered = is_readable(self.peer.socket, MOMENT)

        device = Starts()
        with VhostUserDaemon("test", device) as daemon:
            daemon.start(path)
            self.assertFalse(device.answered)
            with device.peer:
                self.assertEqual(device.peer.answer()[:2], (1, 5))

    def test_exception_when_a_ring_has_stopped(self) -> None:
        """It has, and so have the others that are to."""

        class Bad(Echo):
            def ring_stopped(self, index: int) -> None:
                super().ring_stopped(index)
                raise RuntimeError("cannot")

            def suspended(self) -> None:
                raise RuntimeError("cannot")

        device = Bad()
        with self.serving(device) as served, served.peer(features=PROTOCOL) as peer:
            for name, payload in ("RESET_DEVICE", b""), ("SET_STATUS", u64(0)):
                for index in 0, 1:
                    peer.msg("SET_VRING_KICK", u64(index), [self.eventfd()])
                    peer.msg("SET_VRING_ENABLE", pair(index, 1))
                peer.msg(name, payload)
                self.assertEqual([(vring.started, vring.enabled) for vring in served.daemon.vrings], [(False, False)] * 2)
            peer.msg("SET_VRING_KICK", u64(0), [self.eventfd()])
            peer.msg("GET_VRING_BASE", pair(0, 0), expect=pair(0, 0))
            self.assertEqual((device.told("reset"), device.told("stopped")), ([(), ()], [(0,), (1,), (0,), (1,), (0,)]))
        self.expect_log("ring_stopped of the device failed")
        self.expect_log("suspended of the device failed")

    def test_exception_when_a_front_end_connects_ends_the_connection(self) -> None:
        class Bad(Echo):
            def connected(self) -> None:
                super().connected()
                if len(self.told("connected")) == 1:
                    raise RuntimeError("cannot")

        with self.serving(Bad()) as served:
            with served.peer(protocol_features=0) as peer:
                peer.is_closed()
            self.expect_log("connected of the device failed")
            with served.peer() as peer:
                peer.lives()

    def test_hooks_are_called_in_order(self) -> None:
        device = Echo()
        with self.connected(device) as frontend:
            self.echo(frontend, frontend.queues[0])
        wait_until(lambda: device.events[-1] == ("disconnected",), "the end")
        kinds = [event[0] for event in device.events]
        self.assertEqual(kinds[0], "connected")
        self.assertLess(kinds.index("features"), kinds.index("memory"))
        self.assertEqual(kinds[kinds.index("started") :], ["started", "stopped", "memory", "disconnected"])
        self.assertEqual(device.told("memory")[-1], (0,), "memory is gone with the front-end")

    def two_workers(self, base: type[VhostUserBackend], patience: float) -> tuple[int, int]:
        """Two rings, a worker each, both with something to do; each call waits that many seconds for another. Returns how many there were
        at a time, at most, and of how many threads."""

        class Two(base):  # type: ignore[misc,valid-type]  # mypy knows no class whose base is an argument
            num_queues = 2
            max_queue_size = 256

            def __init__(self) -> None:
                self.inside = self.most = 0
                self.lock = threading.Lock()
                self.threads: set[int] = set()
                self.both = threading.Event()

            def queues_per_thread(self) -> Sequence[int]:
                return [1, 2]

            def process_queue(self, vring: VringT) -> None:
                with self.lock:
                    self.inside += 1
                    self.most = max(self.most, self.inside)
                    self.threads.add(threading.get_ident())
                    if self.inside == 2:
                        self.both.set()
                self.both.wait(patience)
                for chain in vring:
                    vring.add_used(chain, chain.write(chain.read()[::-1]))
                with self.lock:
                    self.inside -= 1

        device = Two()
        with self.connected(device, 2) as frontend:
            for _ in range(3):
                for queue in frontend.queues:
                    queue.submit([], [(frontend.arena[0], 4)])
                for queue in frontend.queues:
                    queue.wait(PATIENCE)
        return device.most, len(device.threads)

    def test_calls_of_a_mut_back_end_are_serialised(self) -> None:
        self.assertEqual(self.two_workers(VhostUserBackendMut, MOMENT), (1, 2))

    def test_control_thread_goes_before_a_busy_worker(self) -> None:
        """A worker that always has more does not keep the front-end's requests waiting, though locks of Python are not fair."""

        class Busy(VhostUserBackendMut):
            config = b"space"
            batches = 0

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool:
                self.batches += 1
                time.sleep(0.001)
                return True

            def get_config(self, offset: int, size: int) -> bytes:
                return bytes([min(self.batches - waits[-1], 255)])

        class Gate:
            """Of the lock that serialises calls of the device. Whoever stands in it and is no worker waits for the lock."""

            def acquire(self, timeout: float = -1) -> bool:
                standing = gate.acquire(timeout=timeout)
                if threading.current_thread().name == "test-control":
                    waits.append(device.batches)
                return standing

            def release(self) -> None:
                gate.release()

            def __enter__(self) -> None:
                self.acquire()

            def __exit__(self, *_: object) -> None:
                self.release()

        device = Busy()
        waits: list[int] = []
        with self.serving(device) as served, served.connect() as frontend:
            frontend.setup(memory=1 << 20, size=16)
            wait_until(lambda: device.batches > 5, "the worker to be busy")
            calls: Any = served.daemon.calls
            gate: threading.Lock = calls._gate
            calls._gate = Gate()
            for turn in range(1, 51):
                [batches] = frontend.get_config(0, 1)
                # The one that has begun is over then; one may have passed the gate just before. (How many the control thread takes to come
                # here from the socket is up to the machine.)
                self.assertLessEqual(batches, 1)
                self.assertGreaterEqual(len(waits), turn)

    def test_calls_of_the_other_back_end_are_concurrent(self) -> None:
        self.assertEqual(self.two_workers(VhostUserBackend, PATIENCE / 2), (2, 2))

    def test_rings_go_to_the_workers_of_their_masks(self) -> None:
        class Masks(Echo):
            num_queues = 4

            def __init__(self) -> None:
                super().__init__()
                self.seen: dict[tuple[int, int, int], int] = {}

            def queues_per_thread(self) -> Sequence[int]:
                return [0b1010, 0b0101]

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                ring = vrings[device_event]
                assert isinstance(ring, VringState)
                self.seen[ring.index, thread_id, device_event] = len(vrings)
                return super().handle_event(device_event, evset, vrings, thread_id)

        device = Masks()
        with self.connected(device, 4) as frontend:
            for queue in frontend.queues:
                self.echo(frontend, queue)
        self.assertEqual(device.seen, {(0, 1, 0): 2, (1, 0, 0): 2, (2, 1, 1): 2, (3, 0, 1): 2})

    def test_devices_that_cannot_be(self) -> None:
        for masks in [], [1], [3, 1], [3, 2], [1, 3]:
            device = Echo()
            with (
                self.subTest(masks=masks),
                mock.patch.object(device, "queues_per_thread", return_value=masks),
                self.raises(ValueError, "queues_per_thread"),
            ):
                VhostUserDaemon("test", device)
        for count in 0, 257:
            device = Echo()
            device.num_queues = count
            with self.raises(ValueError, f"{count} queues"):
                VhostUserDaemon("test", device)
        with self.raises(ValueError, "has no lock"):
            VhostUserDaemon("test", Echo(), vring=VringState)

    def test_256_queues(self) -> None:
        class Many(Echo):
            num_queues = 256

        with self.connected(Many(), 256, size=4, indirect=False) as frontend:
            for index in 0, 127, 255:
                self.echo(frontend, frontend.queues[index])

    def test_declining_device_is_not_spun_on(self) -> None:
        class Declines(Echo):
            def process_queue(self, vring: VringT) -> None:
                self.processed += 1

        device = Declines()
        with self.connected(device) as frontend:
            [queue] = frontend.queues
            queue.submit([], [(frontend.arena[0], 4)])
            queue.kick()
            wait_until(lambda: device.processed, "the device to be asked")
            self.stays(queue)
            self.assertLess(device.processed, 10)

    def test_device_asks_to_be_called_again(self) -> None:
        """A true answer of handle_event."""

        class Steps(Echo):
            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                for chain in vrings[device_event]:
                    vrings[device_event].add_used(chain, 0)
                    return True
                return False

        device = Steps()
        with self.connected(device, indirect=False) as frontend:
            [queue] = frontend.queues
            for n in range(5):
                queue.driver.add([], [(frontend.arena[0], 4)], n)
            queue.publish()
            queue.kick()
            found: list[object] = []
            while len(found) < 5:
                found += queue.wait(PATIENCE)

    def test_device_that_takes_one_chain_at_a_time(self) -> None:
        """What it leaves is offered again, without another kick."""

        class One(Echo):
            def process_queue(self, vring: VringT) -> None:
                for chain in vring:
                    vring.add_used(chain, 0)
                    break

        for packed in False, True:
            with self.connected(One(), packed=packed, indirect=False) as frontend:
                [queue] = frontend.queues
                for n in range(30):
                    queue.driver.add([], [(frontend.arena[0], 4)], n)
                queue.publish()
                found: list[object] = []
                while len(found) < 30:
                    found += [token for token, _ in queue.wait(PATIENCE)]
                self.assertEqual(found, list(range(30)))

    def test_listener_of_the_devices_own(self) -> None:
        device = Listening()
        fd = self.eventfd()
        with self.serving(device) as served:
            [worker] = served.daemon.get_epoll_handlers()
            with self.raises(ValueError, "the number of a ring"):
                worker.register_listener(fd, select.EPOLLIN, 1)
            worker.register_listener(fd, select.EPOLLIN | select.EPOLLET, 2)
            with self.assertRaises(OSError):
                worker.register_listener(fd, select.EPOLLIN, 3)
            os.eventfd_write(fd, 1)
            wait_until(lambda: device.heard == [(2, select.EPOLLIN, 0)], "the listener to be called")
            worker.unregister_listener(fd)
            with self.raises(ValueError, "no registered listener"):
                worker.unregister_listener(fd)
            os.eventfd_write(fd, 1)
            with served.connect() as frontend:
                frontend.setup(memory=1 << 20, size=16)
                self.echo(frontend, frontend.queues[0])
            self.assertEqual(len(device.heard), 1)

    def test_listener_of_what_has_happened_already(self) -> None:
        """Its edge comes while it is being registered, from another thread than the worker's: it is not lost."""

        class Slow:
            """The worker is faster than whoever registers."""

            def register(self, *arguments: int) -> None:
                epoll.register(*arguments)
                wait_until(lambda: device.heard, "the listener to be called")

            def __getattr__(self, name: str) -> object:
                return getattr(epoll, name)

        device = Listening()
        fd = self.eventfd(1)
        with self.serving(device) as served:
            [worker] = served.daemon.get_epoll_handlers()
            epoll, worker._epoll = worker._epoll, cast(select.epoll, Slow())
            try:
                worker.register_listener(fd, select.EPOLLIN | select.EPOLLET, 2)
            finally:
                worker._epoll = epoll
            worker.unregister_listener(fd)
            with self.assertRaises(OSError):
                worker.register_listener(self.memfd(PAGE), select.EPOLLIN, 3)  # not to be polled
            self.assertEqual(worker._listeners, {})

    def test_worker_hooks(self) -> None:
        """Each worker's thread says when it begins and ends; listeners are registered there."""

        class Listening(Echo):
            def __init__(self) -> None:
                super().__init__()
                self.bell = os.eventfd(0)
                self.rung = threading.Event()

            def queues_per_thread(self) -> Sequence[int]:
                return [1, 2]

            def worker_started(self, worker: vhost_user.VringEpollHandler) -> None:
                self.events.append(("begins", [vring.index for vring in worker.vrings], threading.current_thread().name))
                if worker.thread_id:
                    raise RuntimeError("as asked")
                worker.register_listener(self.bell, select.EPOLLIN, 1)

            def worker_ended(self, worker: vhost_user.VringEpollHandler) -> None:
                self.events.append(("ends", worker.thread_id))

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                if device_event < len(vrings):
                    return super().handle_event(device_event, evset, vrings, thread_id)
                os.eventfd_read(self.bell)
                self.rung.set()
                return None

        device = Listening()
        self.addCleanup(os.close, device.bell)
        with self.connected(device) as frontend:
            os.eventfd_write(device.bell, 1)
            self.assertTrue(device.rung.wait(PATIENCE))
            self.echo(frontend, frontend.queues[0])
        self.assertEqual(sorted(device.told("begins")), [([0], "test-worker-0"), ([1], "test-worker-1")])
        self.assertEqual(sorted(device.told("ends")), [(0,), (1,)])
        self.expect_log("worker_started of the device failed")

    def test_listener_that_goes_while_its_event_comes(self) -> None:
        """Another thread unregisters it between the worker's two looks; the worker lives."""

        class Vanishing(dict[int, int]):
            def __contains__(self, fd: object) -> bool:
                return self.pop(cast(int, fd), None) is not None

        device, fd = Listening(), self.eventfd()
        with self.serving(device) as served, served.connect() as frontend:
            [worker] = served.daemon.get_epoll_handlers()
            worker._listeners = Vanishing()
            worker.register_listener(fd, select.EPOLLIN | select.EPOLLET, 7)
            os.eventfd_write(fd, 1)
            wait_until(lambda: not worker._listeners, "the listener to go")
            frontend.setup(memory=1 << 20, size=16)
            self.echo(frontend, frontend.queues[0])
            self.assertEqual(device.heard, [])

    def test_listener_that_raises_is_removed(self) -> None:
        """It would be called for ever; the worker lives. When the log says so, it is removed."""
        device = Listening()
        device.fails = True
        fd = self.eventfd(1)
        with self.serving(device) as served:
            [worker] = served.daemon.get_epoll_handlers()
            emit = self._log.emit
            registered: list[bool] = []
            with mock.patch.object(self._log, "emit", lambda record: (registered.append(fd in worker._listeners), emit(record))):
                worker.register_listener(fd, select.EPOLLIN, 7)
                self.expect_log("listener 7 .* removed")
            self.assertEqual(registered, [False])
            with self.raises(ValueError, "no registered listener"):
                worker.unregister_listener(fd)
            with served.connect() as frontend:
                frontend.setup(memory=1 << 20, size=16)
                self.echo(frontend, frontend.queues[0])
            self.assertEqual(len(device.heard), 1)

    def test_device_that_uses_a_ring_from_its_listener(self) -> None:
        """As a network device does when a packet arrives."""

        class Receives(Listening):
            def process_queue(self, vring: VringT) -> None:
                pass  # buffers wait for packets

            def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
                if device_event == 5:
                    for chain in vrings[0]:
                        vrings[0].add_used(chain, chain.write(b"packet"))
                        break
                    return None
                return super().handle_event(device_event, evset, vrings, thread_id)

        device, fd = Receives(), self.eventfd()
        with self.serving(device) as served, served.connect() as frontend:
            frontend.setup(2, memory=1 << 20, size=16)
            served.daemon.get_epoll_handlers()[0].register_listener(fd, select.EPOLLIN | select.EPOLLET, 5)
            queue = frontend.queues[0]
            base = frontend.arena[0]
            for n in range(8):
                queue.submit([], [(base + 64 * n, 64)], n)
            for n in range(8):
                os.eventfd_write(fd, 1)
                self.assertEqual(queue.wait(PATIENCE), [(n, 6)])

    def test_send_exit_event_ends_the_worker(self) -> None:
        with self.serving(Echo()) as served:
            [worker] = served.daemon.get_epoll_handlers()
            worker.send_exit_event()
            wait_until(lambda: not self.worker_lives(), "the worker to end")
            with served.peer() as peer:
                peer.lives()

    def test_exit_event_of_the_device_ends_the_worker(self) -> None:
        class Exits(Echo):
            fd = self.eventfd()

            def exit_event(self, thread_id: int) -> int | None:
                return self.fd

        with self.serving(Exits()):
            self.assertTrue(self.worker_lives())
            os.eventfd_write(Exits.fd, 1)
            wait_until(lambda: not self.worker_lives(), "the worker to end")

    def worker_lives(self) -> bool:
        """Whether there is a worker thread."""
        return any(thread.name == "test-worker-0" for thread in threading.enumerate())


class ChannelTests(DaemonTest):
    """The back-end's own requests."""

    def test_config_change_reaches_the_front_end(self) -> None:
        device = Echo()
        with self.connected(device) as frontend:
            device.config[:4] = b"grow"
            self.assertTrue(device.config_changed())
            self.assertEqual(frontend.next_backend_request(PATIENCE).name, "CONFIG_CHANGE_MSG")
            self.assertEqual(frontend.get_config(0, 4), b"grow")
        wait_until(lambda: device.told("disconnected"), "the front-end to be gone")
        self.assertFalse(device.config_changed(), "nobody is there to be told")

    def test_config_change_is_not_sent_where_it_was_not_negotiated(self) -> None:
        for without in PF.CONFIG, PF.BACKEND_REQ:
            device = Echo()
            with self.connected(device, protocol_features=~without) as frontend:
                self.assertFalse(device.config_changed())
                if frontend.channel:
                    self.assertFalse(is_readable(frontend.channel.socket))

    def test_channel_goes_to_the_device(self) -> None:
        class Wants(Echo):
            def __init__(self) -> None:
                super().__init__()
                self.given: list[BackendChannel] = []

            def set_backend_req_fd(self, backend: BackendChannel) -> None:
                self.given.append(backend)

        device = Wants()
        with self.connected(device) as frontend:
            [channel] = device.given
            self.assertTrue(channel.config_change())
            self.assertEqual(frontend.next_backend_request(PATIENCE).number, 2)
            self.assertFalse(device.config_changed(), "the device keeps its channel itself")

    def test_every_row_has_its_test(self) -> None:
        names = {name.removesuffix("_MSG").lower() for name in BACKEND_REQUESTS}
        self.assertEqual({name for name in names if not hasattr(self, f"test_{name}")}, set(), "requests of the back-end without a test here")

    def test_iotlb(self) -> None:
        """Misses and failures, with what is wanted; they are not waited for."""
        device = Whole()
        device.iommu = True
        with self.connected(device, features=Frontend.RING_FEATURES | ACCESS_PLATFORM) as frontend:
            assert device.channel
            frontend.answer_misses()
            self.assertTrue(device.channel.iotlb(Iotlb.MISS, 0x12345000, 1))
            self.assertEqual(frontend.next_backend_request().payload, IotlbMessage(0x12345000, 0, 0, 1, Iotlb.MISS))
            wait_until(lambda: not device.channel or not device.channel.iotlb(Iotlb.ACCESS_FAIL, 0, 2), "the front-end's socket to be full")
            self.assertEqual(frontend.next_backend_request().payload, IotlbMessage(0, 0, 0, 2, Iotlb.ACCESS_FAIL))
            self.assertTrue(device.channel.iotlb(Iotlb.ACCESS_FAIL, 0, 2))

    @contextlib.contextmanager
    def whole(self, **setup: Any) -> Iterator[tuple[Whole, BackendChannel, Frontend]]:
        """A device with everything, its channel, and a front-end; one ring is started."""
        device = Whole()
        with self.connected(device, **setup) as frontend:
            assert device.channel
            yield device, device.channel, frontend

    def answering(self, frontend: Frontend, count: int) -> list[BackendMessage]:
        """Answer that many requests of the back-end, from another thread. Returns the list that they come into."""
        got: list[BackendMessage] = []

        def answer() -> None:
            got.extend(frontend.next_backend_request(PATIENCE) for _ in range(count))

        self.in_thread(answer)
        return got

    def test_config_change(self) -> None:
        with self.whole() as (device, _, frontend):
            self.assertTrue(device.config_changed())
            self.assertEqual(frontend.next_backend_request(PATIENCE), BackendMessage(BACKEND_REQUESTS["CONFIG_CHANGE_MSG"], Empty(), []))

    def test_vring_call(self) -> None:
        """In place of an eventfd; not for a front-end that polls."""
        with self.whole() as (_, _, frontend):
            queue = frontend.queues[0]
            frontend.stop_queue(queue)
            queue = frontend.start_queue(0, self.fresh_driver(queue.driver, frontend))
            frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
            frontend.request("VRING_KICK", VringStatePayload(0, 0))
            got = self.answering(frontend, 1)
            queue.driver.add([], [(frontend.arena[0], 4)], "in band")
            queue.driver.publish()
            frontend.request("VRING_KICK", VringStatePayload(0, 0))
            wait_until(lambda: got, "the call")
            self.assertEqual((got[0].name, got[0].payload), ("VRING_CALL", VringStatePayload(0, 0)))
            self.assertEqual([token for token, _ in queue.driver.used()], ["in band"])
            frontend.request("SET_VRING_CALL", VringFd(VringFd.NO_FD))
            queue.driver.enable_notification()
            queue.driver.add([], [(frontend.arena[0], 4)], "polled")
            queue.driver.publish()
            frontend.request("VRING_KICK", VringStatePayload(0, 0))
            wait_until(queue.driver.used, "the answer")
            assert frontend.channel
            self.assertFalse(is_readable(frontend.channel.socket, MOMENT))
            frontend.request("GET_VRING_BASE", VringStatePayload(0, 0))
            got = self.answering(frontend, 1)
            frontend.request("VRING_KICK", VringStatePayload(0, 0))
            queue.driver.add([], [(frontend.arena[0], 4)], "in band, when it has started again")
            queue.driver.publish()
            frontend.request("VRING_KICK", VringStatePayload(0, 0))
            wait_until(lambda: got, "the call")

    def test_vring_err(self) -> None:
        """Whether or not the front-end polls for what is used."""
        for polls in False, True:
            with self.subTest(polls=polls), self.whole() as (_, _, frontend):
                queue = frontend.queues[0]
                frontend.request("SET_VRING_ERR", VringFd(VringFd.NO_FD))
                if polls:
                    frontend.request("SET_VRING_CALL", VringFd(VringFd.NO_FD))
                got = self.answering(frontend, 1)
                frontend.memory.view(queue.driver.areas[1] + 2, 2)[:] = b"\xff\xff"  # an available index that cannot be
                queue.kick()
                wait_until(lambda: got, "the error")  # noqa: B023
                self.assertEqual((got[0].name, got[0].payload), ("VRING_ERR", VringStatePayload(0, 0)))
                self.expect_log("ring 0 is broken")

    @staticmethod
    def fresh_driver(driver: DriverQueue, frontend: Frontend) -> DriverQueue:
        """The driver side of a ring that begins anew, in the same place."""
        length, _ = type(driver).layout(driver.size)
        frontend.memory.write(driver.areas[0], bytes(length))
        return type(driver)(frontend.memory, driver.size, driver.areas, frontend.features)

    def test_vring_host_notifier(self) -> None:
        """With its descriptor, or without to undo it; for a device that says so."""
        with self.whole() as (_, channel, frontend):
            fd = self.memfd(2 * PAGE)
            self.assertTrue(channel.host_notifier(1, fd, PAGE))
            message = frontend.next_backend_request(PATIENCE)
            self.assertEqual(message.payload, VringArea(1, PAGE, PAGE))
            self.assertTrue(os.path.sameopenfile(message.fds[0], fd))
            os.close(message.fds[0])
            self.assertTrue(channel.host_notifier(1))
            message = frontend.next_backend_request(PATIENCE)
            self.assertEqual((message.payload, message.fds), (VringArea(1 | 256, PAGE, 0), []))
        with self.whole(protocol_features=~PF.BACKEND_SEND_FD) as (_, channel, _):
            self.assertFalse(channel.host_notifier(1, fd, PAGE))
        with self.whole(protocol_features=~PF.HOST_NOTIFIER) as (_, channel, _):
            self.assertFalse(channel.host_notifier(1))

    def test_shared_object_add(self) -> None:
        with self.whole() as (_, channel, frontend):
            self.assertTrue(channel.shared_object_add(UUID(int=5)))
            self.assertEqual(frontend.next_backend_request(PATIENCE).payload, Shared(UUID(int=5)))
            self.assertEqual(frontend.exported, {UUID(int=5)})

    def test_shared_object_remove(self) -> None:
        with self.whole() as (_, channel, frontend):
            for tell in channel.shared_object_add, channel.shared_object_remove:
                self.assertTrue(tell(UUID(int=5)))
                frontend.next_backend_request(PATIENCE)
            self.assertEqual(frontend.exported, set())

    def test_shared_object_lookup(self) -> None:
        """The descriptor comes with the answer; without one there is none, and no acknowledgement follows."""
        with self.whole() as (_, channel, frontend):
            fd = self.memfd(PAGE)
            frontend.shared_objects[UUID(int=5)] = fd
            self.answering(frontend, 3)
            for _ in range(2):
                found = channel.shared_object_lookup(UUID(int=5))
                assert found is not None
                self.assertTrue(os.path.sameopenfile(found, fd))
                os.close(found)
            self.assertIsNone(channel.shared_object_lookup(UUID(int=6)))

    def test_answers_to_lookup_that_are_wrong(self) -> None:
        """An error with a descriptor, success without one, an answer to something else."""
        with self.whole() as (_, channel, frontend):
            assert frontend.channel
            fd = self.memfd(PAGE)
            before = len(open_fds())
            for request, value, fds in (8, 1, [fd]), (8, 0, []), (9, 0, [fd]):
                frontend.channel.send(request, 4, u64(value), fds)
                self.assertIsNone(channel.shared_object_lookup(UUID(int=5)))
            self.assertEqual(len(open_fds()), before)
            self.expect_log("SHARED_OBJECT_LOOKUP is answered by message 9", times=1)

    def test_late_answer_is_not_taken_for_the_next_one(self) -> None:
        with self.whole() as (_, channel, frontend):
            fd = self.memfd(PAGE)
            frontend.shared_objects[UUID(int=5)] = fd
            channel.ANSWER_TIMEOUT = 0.02
            self.assertIsNone(channel.shared_object_lookup(UUID(int=5)))
            self.expect_log("SHARED_OBJECT_LOOKUP is not answered: the peer is silent", times=1)
            channel.ANSWER_TIMEOUT = PATIENCE
            self.answering(frontend, 2)
            self.assertIsNone(channel.shared_object_lookup(UUID(int=6)))

    def test_shmem_map(self) -> None:
        """rule 23: Whole pages, inside a region, over nothing that is mapped: anything else is not even sent."""
        with self.whole() as (_, channel, frontend):
            fd = self.memfd(4 * PAGE)
            got = self.answering(frontend, 4)
            self.assertTrue(channel.shmem_map(0, fd, PAGE, 2 * PAGE, PAGE, writable=True))
            self.assertTrue(channel.shmem_map(0, fd, 0, 0, 2 * PAGE, wait=True))
            self.assertTrue(channel.shmem_map(2, fd, 0, 0, PAGE, wait=True))
            for area in (0, 0, PAGE, PAGE), (0, 0, PAGE, 2 * PAGE), (0, 0, 0, 4 * PAGE), (2, 0, 0, PAGE):
                with self.subTest(area), self.raises(ValueError, "overlaps what is mapped"):
                    channel.shmem_map(area[0], fd, *area[1:])
            for area in (0, 0, 4 * PAGE, PAGE), (0, 0, 3 * PAGE, 2 * PAGE), (1, 0, 0, PAGE), (3, 0, 0, PAGE), (-1, 0, 0, PAGE), (0, 0, -PAGE, PAGE):
                with self.subTest(area), self.raises(ValueError, "outside the regions"):
                    channel.shmem_map(area[0], fd, *area[1:])
            for area in (0, 0, 3 * PAGE, 0), (0, 0, 3 * PAGE, 1), (0, 1, 3 * PAGE, PAGE), (0, 0, 3 * PAGE + 1, PAGE):
                with self.subTest(area), self.raises(ValueError, "not whole pages"):
                    channel.shmem_map(area[0], fd, *area[1:])
            frontend.maps.append(ShmemMap(0, 0, 3 * PAGE, PAGE, 0))  # which the front-end alone knows of
            self.assertFalse(channel.shmem_map(0, fd, 0, 3 * PAGE, PAGE, wait=True))
            wait_until(lambda: len(got) == 4, "all four to be answered")
            self.assertEqual(got[0].payload, ShmemMap(0, PAGE, 2 * PAGE, PAGE, 1))
            self.assertEqual([len(message.fds) for message in got], [1] * 4)
            for message in got:
                os.close(message.fds[0])

    def test_shmem_unmap(self) -> None:
        """rule 23: Just what was mapped, and once. A device reset unmaps all."""
        for name, payload in ("RESET_DEVICE", Empty()), ("SET_STATUS", U64(0)):
            with self.subTest(name), self.whole() as (_, channel, frontend):
                fd = self.memfd(4 * PAGE)
                got = self.answering(frontend, 3)
                self.assertTrue(channel.shmem_map(0, fd, 0, 0, 2 * PAGE))
                for area in (0, 0, PAGE), (0, PAGE, PAGE), (0, 0, 3 * PAGE), (2, 0, 2 * PAGE):
                    with self.raises(ValueError, "not a whole map"):
                        channel.shmem_unmap(*area)
                self.assertTrue(channel.shmem_unmap(0, 0, 2 * PAGE, wait=True))
                with self.raises(ValueError, "not a whole map"):
                    channel.shmem_unmap(0, 0, 2 * PAGE)
                self.assertEqual(frontend.maps, [])
                self.assertTrue(channel.shmem_map(0, fd, 0, 0, 2 * PAGE))
                wait_until(lambda: len(got) == 3, "all to be read")  # noqa: B023
                self.assertEqual(len(frontend.maps), 1)
                frontend.request(name, payload)
                self.assertEqual(frontend.maps, [])
                with self.raises(ValueError, "not a whole map"):
                    channel.shmem_unmap(0, 0, 2 * PAGE)
                for message in got:
                    for taken in message.fds:
                        os.close(taken)

    def test_maps_that_a_front_end_refuses(self) -> None:
        """rule 23: as the back-end's side does not even send them"""
        with self.whole() as (_, _, frontend):
            for area in (
                ShmemMap(0, 0, 4 * PAGE, PAGE, 0),
                ShmemMap(0, 0, 0, 5 * PAGE, 0),
                ShmemMap(1, 0, 0, PAGE, 0),
                ShmemMap(3, 0, 0, PAGE, 0),
                ShmemMap(0, 0, 0, 0, 0),
                ShmemMap(0, 1, 0, PAGE, 0),
                ShmemMap(0, 0, 1, PAGE, 0),
                ShmemMap(0, 0, 0, PAGE + 1, 0),
                ShmemMap(0, 0, 2**64 - PAGE, PAGE, 0),
            ):
                with self.subTest(area):
                    self.assertEqual((frontend._answer(area, BACKEND_REQUESTS["SHMEM_MAP"]), frontend.maps), ((1, ()), []))
            self.assertEqual(frontend._answer(ShmemMap(0, 0, 3 * PAGE, PAGE, 0), BACKEND_REQUESTS["SHMEM_MAP"]), (0, ()))

    def test_wait_in_the_control_thread(self) -> None:
        """The front-end would not answer before it has its own answer."""

        class Asks(Whole):
            def set_config(self, offset: int, data: bytes, flags: int) -> None:
                assert self.channel
                self.channel.shared_object_lookup(UUID(int=5))

        with self.connected(Asks()) as frontend:
            with self.assertRaises(Refused):
                frontend.set_config(0, b"x")
            self.expect_log("set_config of the device failed.*SHARED_OBJECT_LOOKUP would wait for the front-end")

    def test_wait_when_the_front_end_leaves(self) -> None:
        """Or when the daemon is to end."""
        for leaves in True, False:
            device = Whole()
            found: list[int | None] = []
            with self.serving(device) as served, served.connect() as frontend:
                frontend.setup(memory=1 << 20, size=16)
                channel = device.channel
                assert channel
                thread = threading.Thread(target=lambda: found.append(channel.shared_object_lookup(UUID(int=5))), name="waits")  # noqa: B023
                thread.start()
                wait_until(lambda: bool(frontend.channel and is_readable(frontend.channel.socket)), "the question")
                if leaves:
                    frontend.connection.socket.shutdown(socket.SHUT_RDWR)  # the channel stays open at its end
                else:
                    served.daemon.shutdown()
                thread.join(channel.ANSWER_TIMEOUT / 2)
                self.assertEqual(found, [None])
            self.expect_log("SHARED_OBJECT_LOOKUP is not answered")

    def test_suspended_device_is_silent(self) -> None:
        """rule 6: while all rings are stopped no message goes out; the control socket answers. A config change is told when a ring starts."""
        with self.whole() as (device, channel, frontend):
            self.assertEqual((device.told("resumed"), device.told("suspended")), ([()], []))
            [queue] = frontend.queues
            driver, base = queue.driver, frontend.stop_queue(queue)
            self.assertEqual(device.told("suspended"), [()])
            self.assertTrue(device.config_changed())
            self.assertTrue(device.config_changed())
            self.assertFalse(channel.shared_object_add(UUID(int=5)))
            self.assertIsNone(channel.shared_object_lookup(UUID(int=5)))
            assert frontend.channel
            self.assertFalse(is_readable(frontend.channel.socket, MOMENT))
            self.assertEqual(frontend.get_config(0, 4), b"0123")
            frontend.start_queue(0, driver, base)
            self.assertEqual(frontend.next_backend_request(PATIENCE).name, "CONFIG_CHANGE_MSG")
            self.assertFalse(is_readable(frontend.channel.socket, MOMENT))
            self.assertEqual(device.told("resumed"), [()] * 2)
            self.echo(frontend, frontend.queues[0])

    def test_front_end_that_has_closed_its_end(self) -> None:
        device = Echo()
        with self.connected(device) as frontend:
            assert frontend.channel
            frontend.channel.close()
            frontend.channel = None
            self.assertFalse(device.config_changed())
            self.echo(frontend, frontend.queues[0])


# ---------------------------------------------------------------------------------------------------------------------------
# The daemon's life
# ---------------------------------------------------------------------------------------------------------------------------


class LifeTests(DaemonTest):
    """Listening, connecting, serving one after another, shutting down."""

    def test_front_ends_are_served_one_after_another(self) -> None:
        device = Echo()
        with self.serving(device) as served:
            for _ in range(5):
                with served.connect() as frontend:
                    frontend.setup(2, memory=1 << 20, size=16)
                    for queue in frontend.queues:
                        self.echo(frontend, queue)
            wait_until(lambda: len(device.told("disconnected")) == 5, "the last to be gone")

    def test_nothing_of_a_session_is_left_for_the_next(self) -> None:
        with self.serving(Echo()) as served:
            with served.connect() as frontend:
                frontend.setup(2, memory=1 << 20, size=16)
                frontend.request("SET_STATUS", U64(15))
            with served.peer(protocol_features=0) as peer:
                peer.msg("GET_QUEUE_NUM", expect=CLOSED)
            self.expect_log("GET_QUEUE_NUM without MQ")
            with served.peer() as peer:
                peer.msg("GET_STATUS", expect=u64(0))
                peer.msg("GET_VRING_BASE", pair(0, 0), expect=pair(0, 0))
                self.assertEqual(served.daemon.memory.memory().regions, ())
                for vring in served.daemon.vrings:
                    self.assertFalse(vring.started or vring.enabled or vring.queue)

    def test_second_front_end_waits_for_the_first(self) -> None:
        with self.serving(Echo()) as served, served.connect() as second:
            first = served.connect()
            first, second = second, first
            with first, second:
                first.setup(memory=1 << 20, size=16)
                second.connection.send(1, 0)
                self.assertFalse(is_readable(second.connection.socket, MOMENT))
                first.close()
                with second.connection.receive(PATIENCE) as answer:
                    self.assertEqual(answer.request, 1)

    def test_front_end_that_is_killed_while_requests_are_in_flight(self) -> None:
        """It waits for nothing; what completes later is dropped."""
        device = Later()
        with self.serving(device) as served:
            with served.connect() as frontend:
                frontend.setup(memory=1 << 20, size=16)
                frontend.queues[0].submit([], [(frontend.arena[0], 4)])
                device.holds(1)
            wait_until(lambda: device.told("disconnected"), "the session to end")
            with served.connect() as frontend:
                frontend.setup(memory=1 << 20, size=16)
                device.complete()
                frontend.queues[0].submit([], [(frontend.arena[0], 4)], "new")
                device.holds(1)
                device.complete()
                self.assertEqual(frontend.queues[0].wait(PATIENCE), [("new", 0)])

    def test_1000_connections_in_a_row(self) -> None:
        """Nothing is left over: counted at the end of each test."""
        device = Echo()
        with self.serving(device) as served:
            before, mappings = open_fds().keys(), mapping_count()
            for n in range(1000):
                with served.peer(protocol_features=0) as peer:
                    peer.lives()
                    if n % 10 == 0:
                        self.whole_session(served, peer)
            wait_until(lambda: len(device.told("disconnected")) == 1000, "the last to be gone")
            wait_until(lambda: (open_fds().keys(), mapping_count()) == (before, mappings), "everything to be let go")

    def whole_session(self, served: Served, peer: Peer) -> None:
        """Some of everything that a session may own."""
        fd, event = os.memfd_create("test"), os.eventfd(0)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                os.ftruncate(fd, PAGE)
                peer.msg("SET_PROTOCOL_FEATURES", EXAMPLES["SET_PROTOCOL_FEATURES"], flags=1, expect=SILENT)
                peer.msg("ADD_MEM_REG", MemReg(RAM, PAGE, 0x100000, 0).pack(), [fd])
                peer.msg("SET_BACKEND_REQ_FD", fds=[theirs.fileno()])
                for name in "SET_VRING_ERR", "SET_VRING_CALL", "SET_VRING_KICK":
                    peer.msg(name, u64(1), [event])
            finally:
                os.close(fd)
                os.close(event)

    def test_1000_connections_that_break_off_within_a_message(self) -> None:
        event = self.eventfd()
        message = struct.pack("=III", 12, 1, 8) + u64(0)
        with self.serving(Echo()) as served:
            before = open_fds().keys()
            for n in range(1000):
                with Peer(served.path, protocol_features=0) as peer:
                    peer.raw(message[: n % 19 + 1], [event])
            with served.peer() as peer:
                peer.lives()
            wait_until(lambda: open_fds().keys() == before, "the last to be gone")

    def test_socket_is_removed_at_the_end_and_a_stale_one_replaced(self) -> None:
        path = f"{self.folder()}/sock"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        for _ in range(2):
            served = Served(Echo(), path)
            with served.peer() as peer:
                peer.lives()
            served.daemon.shutdown()
            served.wait()
            self.assertFalse(os.path.exists(path))

    def test_what_is_no_socket_is_not_removed(self) -> None:
        path = f"{self.folder()}/precious"
        with open(path, "w") as file:
            file.write("data")
        daemon = VhostUserDaemon("test", Echo())
        with self.raises(OSError, f"cannot listen at {path}"):
            daemon.start(path)
        with open(path) as file:
            self.assertEqual(file.read(), "data")

    def test_socket_of_another_daemon_at_the_same_path_is_not_removed(self) -> None:
        path = f"{self.folder()}/sock"
        first, second = Served(Echo(), path), Served(Echo(), path)
        first.daemon.shutdown()
        first.wait()
        with second.peer() as peer:
            peer.lives()
        second.daemon.shutdown()
        second.wait()

    def test_path_that_cannot_be(self) -> None:
        for path in "/nonexistent/sock", "/tmp/" + "x" * 200:
            with self.assertRaises(OSError):
                VhostUserDaemon("test", Echo()).start(path)
            with self.assertRaises(OSError):
                VhostUserDaemon("test", Echo()).start_client(path)

    def test_listener_object(self) -> None:
        path = f"{self.folder()}/sock"
        daemon = VhostUserDaemon("test", Echo())
        daemon.start(Listener(path))
        self.assertTrue(stat.S_ISSOCK(os.stat(path).st_mode))
        with Peer(path) as peer:
            peer.lives()
        daemon.shutdown()
        wait_for_end(daemon)
        self.assertFalse(os.path.exists(path))

    def test_daemon_connects_as_client(self) -> None:
        """It ends when the front-end leaves."""
        path = f"{self.folder()}/sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            daemon = VhostUserDaemon("test", Echo())
            daemon.start_client(path)
            with Frontend(listener.accept()[0]) as frontend:
                frontend.setup(memory=1 << 20, size=16)
                self.echo(frontend, frontend.queues[0])
        wait_for_end(daemon)

    @contextlib.contextmanager
    def listening(self, path: str) -> Iterator[Callable[[], Frontend]]:
        """A front-end that listens at the path: what gives the next connection."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.settimeout(PATIENCE)
            try:
                yield lambda: Frontend(listener.accept()[0])
            finally:
                os.unlink(path)

    @contextlib.contextmanager
    def reconnecting(self, device: VhostUserBackend, path: str) -> Iterator[VhostUserDaemon]:
        """A daemon that connects there, again and again."""
        daemon = VhostUserDaemon("test", device)
        daemon.start_client(path, reconnect=True)
        try:
            yield daemon
        finally:
            daemon.shutdown()
            wait_for_end(daemon)

    def test_client_whose_front_end_is_not_there_yet(self) -> None:
        """It goes on trying where it is to reconnect, and tells once; else that is an error."""
        path = f"{self.folder()}/sock"
        with self.raises(OSError, f"cannot connect to {path}"):
            VhostUserDaemon("test", Echo()).start_client(path)
        with self.reconnecting(Echo(), path):
            self.expect_log(f"cannot connect to {path}: No such file or directory; trying again")
            time.sleep(MOMENT)
            with self.listening(path) as accept, accept() as frontend:
                frontend.setup(memory=1 << 20, size=16)
                self.echo(frontend, frontend.queues[0])
            self.expect_log("cannot connect", times=1)

    def test_client_tries_less_and_less_often(self) -> None:
        """Up to a limit; after a connection it begins anew, and not without a pause. Shutdown is not kept waiting."""
        path = f"{self.folder()}/sock"
        tried: list[tuple[float, bool]] = []
        connected = vhost_user._connected

        def attempt(path: str) -> socket.socket:
            try:
                sock = connected(path)
            except OSError:
                tried.append((time.monotonic(), False))
                raise
            tried.append((time.monotonic(), True))
            return sock

        pauses = mock.patch.multiple(VhostUserDaemon, _FIRST_PAUSE=0.02, _LONGEST_PAUSE=1.0)
        with pauses, mock.patch.object(vhost_user, "_connected", attempt), self.reconnecting(Echo(), path):
            wait_until(lambda: len(tried) > 5, "some attempts")
            with self.listening(path) as accept:
                for _ in range(3):
                    accept().close()
                wait_until(lambda: sum(well for _, well in tried) == 3, "the last one to be noted")
            connected_at = len(tried) - 1
            wait_until(lambda: len(tried) > connected_at + 3, "some more")
        failures = 0
        for (before, well), (now, _) in itertools.pairwise(tried):
            failures = 0 if well else failures + 1
            self.assertGreaterEqual(now - before, min(0.02 * 2 ** max(failures - 1, 0), 1.0) * 0.99)
        self.assertLess(tried[connected_at + 3][0] - tried[connected_at][0], 1.5, "it does not begin anew")
        with mock.patch.object(VhostUserDaemon, "_FIRST_PAUSE", 2 * PATIENCE), self.reconnecting(Echo(), path):
            self.expect_log("trying again")

    def test_rings_go_on_when_the_front_end_comes_back(self) -> None:
        """To where the daemon connects: with the same memory and rings, and with what was in flight."""
        path = f"{self.folder()}/sock"
        device = Later()
        memory = GuestMemoryMmap.from_ranges([(RAM, 1 << 20)])
        areas = areas_at(RAM, SplitDriverQueue, 16)
        driver = SplitDriverQueue(memory, 16, areas)
        region: tuple[Inflight, int] | None = None
        with self.reconnecting(device, path):
            for life in range(4):
                with self.listening(path) as accept, accept() as frontend:
                    frontend.negotiate(0)
                    frontend.share_memory(memory)
                    if region is None:
                        region = frontend.get_inflight(1, 16)
                        self.addCleanup(os.close, region[1])
                    frontend.set_inflight(*region)
                    queue = frontend.start_queue(0, driver)
                    for number in range(3):
                        memory.write(RAM + 0x8000, b"ping")
                        driver.add([(RAM + 0x8000, 4)], [(RAM + 0x9000 + 64 * number, 4)], (life, number))
                    queue.publish()
                    device.holds(4 if life else 3)
                    tokens = []
                    for _ in range(3 if life else 2):
                        device.complete(0)
                        tokens += [token for token, _ in queue.wait(PATIENCE)]
                    left = [(life - 1, 2)] if life else []
                    self.assertEqual(tokens, [*left, (life, 0), (life, 1)])
                    self.assertEqual(memory.read(RAM + 0x9000 + 64, 4), b"gnip")
                wait_until(lambda: len(device.told("disconnected")) == life + 1, "the daemon to notice")  # noqa: B023
                device.held.clear()

    def test_daemon_serves_a_connected_socket(self) -> None:
        ours, theirs = socket.socketpair()
        daemon = VhostUserDaemon("test", Echo())
        daemon.start_socket(theirs)
        with Frontend(ours) as frontend:
            frontend.setup(memory=1 << 20, size=16)
            self.echo(frontend, frontend.queues[0])
        wait_for_end(daemon)

    def test_daemon_serves_a_listening_socket_and_leaves_its_path(self) -> None:
        path = f"{self.folder()}/sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        daemon = VhostUserDaemon("test", Echo())
        daemon.start_socket(listener)
        for _ in range(3):
            with Peer(path) as peer:
                peer.lives()
        daemon.shutdown()
        wait_for_end(daemon)
        self.assertTrue(os.path.exists(path))

    def test_daemon_is_started_once(self) -> None:
        with self.serving(Echo()) as served, self.raises(RuntimeError, "started already"):
            other = Listener(f"{self.folder()}/other")
            self.addCleanup(other.close)
            served.daemon.start(other)

    def test_serve_is_start_and_wait(self) -> None:
        path = f"{self.folder()}/sock"
        daemon = VhostUserDaemon("test", Echo())
        thread = self.in_thread(lambda: daemon.serve(path))
        with Frontend.connect(path) as frontend:
            frontend.setup(memory=1 << 20, size=16)
            self.echo(frontend, frontend.queues[0])
        daemon.shutdown()
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())

    def test_daemon_as_a_context_manager(self) -> None:
        path = f"{self.folder()}/sock"
        with VhostUserDaemon("test", Echo()) as daemon:
            daemon.start(path)
            with Peer(path) as peer:
                peer.lives()
        self.assertFalse(os.path.exists(path))

    def test_wait_raises_what_ended_the_daemon(self) -> None:
        class Broken(Listener):
            def accept(self, interrupt: int) -> socket.socket | None:
                raise OSError(errno.EBADF, "as asked")

        daemon = VhostUserDaemon("test", Echo())
        daemon.start(Broken(f"{self.folder()}/sock"))
        with self.raises(OSError, "as asked"):
            wait_for_end(daemon)
        self.expect_log("daemon test ends")

    def test_error_of_a_peer_does_not_end_the_daemon(self) -> None:
        with self.serving(Echo()) as served:
            for _ in range(3):
                with served.peer() as peer:
                    peer.msg(999, expect=CLOSED)
            self.expect_log("unknown request 999")

    def test_no_file_descriptors_left(self) -> None:
        """What cannot be done for that is refused, or ends the connection; the daemon lives."""
        with self.serving(Whole()) as served:
            for name, left, answer in ("GET_INFLIGHT_FD", 0, None), ("POSTCOPY_ADVISE", 0, b""), ("POSTCOPY_ADVISE", 1, b""):
                with self.subTest(name, left=left), served.peer() as peer:
                    before = resource.getrlimit(resource.RLIMIT_NOFILE)
                    resource.setrlimit(resource.RLIMIT_NOFILE, (sorted(set(range(1024)) - open_fds().keys())[left], before[1]))
                    try:
                        peer.send(REQUESTS[name].number, EXAMPLES[name])
                        if answer is None:
                            peer.is_closed()
                        else:
                            self.assertEqual(peer.answer()[2], answer)
                    finally:
                        resource.setrlimit(resource.RLIMIT_NOFILE, before)
            self.expect_log("GET_INFLIGHT_FD: .*Too many open files")
            with served.peer() as peer:
                peer.lives()

    def test_fault_of_this_program_ends_the_connection_alone(self) -> None:
        """Whatever a request comes upon that nobody has thought of."""
        with self.serving(Echo()) as served:
            with served.peer() as peer, mock.patch.object(vhost_user.MemTable, "unpack", side_effect=IndexError("as asked")):
                peer.send(5, EXAMPLES["SET_MEM_TABLE"])
                peer.is_closed()
            self.expect_log(r"the connection ends \[IndexError: as asked\]")
            with served.peer() as peer:
                peer.lives()

    def test_shutdown_while_idle_and_before_anything(self) -> None:
        with self.serving(Echo()):
            pass
        daemon = VhostUserDaemon("test", Echo())
        daemon.shutdown()
        daemon.wait()

    def test_shutdown_while_connected(self) -> None:
        with self.serving(Echo()) as served, served.connect() as frontend:
            frontend.setup(memory=1 << 20, size=16)
            self.echo(frontend, frontend.queues[0])
            served.daemon.shutdown()
            served.wait()
            with self.assertRaises(Disconnected):
                frontend.request("GET_FEATURES")

    def test_shutdown_while_a_ring_waits_to_stop(self) -> None:
        """The front-end is not told where it would go on: behind what is lost."""
        device = Later()
        for request, payload in ("GET_VRING_BASE", VringStatePayload(0, 0)), ("RESET_DEVICE", Empty()):
            with self.subTest(request), self.serving(device) as served, served.connect() as frontend:
                [queue] = frontend.setup(1, memory=1 << 20, size=16, indirect=False)
                queue.submit([], [(frontend.arena[0], 4)])
                device.holds(1)
                frontend.connection.send(REQUESTS[request].number, 0, payload.pack())
                self.assertFalse(is_readable(frontend.connection.socket, MOMENT))
                served.daemon.shutdown()
                with self.assertRaises(Disconnected), frontend.connection.receive(PATIENCE):
                    pass
                served.wait()
                device.held.clear()

    def test_shutdown_from_any_thread_and_again(self) -> None:
        with self.serving(Echo()) as served, served.peer() as peer:
            peer.lives()
            for thread in [threading.Thread(target=served.daemon.shutdown) for _ in range(5)]:
                thread.start()
                thread.join()
            served.wait()
            served.daemon.shutdown()
            served.wait()

    def test_shutdown_from_device_code(self) -> None:
        class Ends(Echo):
            daemon: VhostUserDaemon

            def process_queue(self, vring: VringT) -> None:
                super().process_queue(vring)
                self.daemon.shutdown()

        device = Ends()
        with self.serving(device) as served, served.connect() as frontend:
            device.daemon = served.daemon
            frontend.setup(memory=1 << 20, size=16)
            served.wait()
        del device.daemon

    def test_shutdown_within_a_half_sent_message(self) -> None:
        with self.serving(Echo()) as served, served.peer(protocol_features=0) as peer:
            peer.lives()
            peer.raw(struct.pack("=III", 37, 1, 40), [self.memfd(PAGE)])
            served.daemon.shutdown()
            served.wait()

    def test_shutdown_while_a_request_is_in_flight(self) -> None:
        device = Later()
        with self.serving(device) as served, served.connect() as frontend:
            frontend.setup(memory=1 << 20, size=16)
            frontend.queues[0].submit([], [(frontend.arena[0], 4)])
            device.holds(1)
            served.daemon.shutdown()
            served.wait()
            device.complete()

    def test_shutdown_while_a_ring_is_being_stopped(self) -> None:
        """GET_VRING_BASE waits for a request that never ends; the shutdown doesn't."""
        device = Later()
        with self.serving(device) as served, served.connect() as frontend:
            frontend.setup(memory=1 << 20, size=16)
            frontend.queues[0].submit([], [(frontend.arena[0], 4)])
            device.holds(1)
            frontend.connection.send(11, 0, pair(0, 0))
            self.assertFalse(is_readable(frontend.connection.socket, MOMENT))
            served.daemon.shutdown()
            served.wait()
            device.held.clear()

    def test_shutdown_while_the_peer_reads_nothing(self) -> None:
        with self.serving(Echo()) as served, served.peer() as peer:
            peer.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    peer.send(24, Config(0, 0, bytes(4000)).pack())
            served.daemon.shutdown()
            served.wait()

    def test_reload_of_a_device_that_fails(self) -> None:
        class Bad(Echo):
            def reload(self) -> None:
                raise RuntimeError("cannot")

        VhostUserDaemon("test", Bad()).reload()
        self.expect_log("reload of the device failed")


# ---------------------------------------------------------------------------------------------------------------------------
# Worker processes
# ---------------------------------------------------------------------------------------------------------------------------


class Told(Echo):
    """Answers with its process id, and the config byte that was written last; notes each reload."""

    num_queues = 4
    reloads = 0

    def process_queue(self, vring: VringT) -> None:
        for chain in vring:
            if chain.read() == b"hang":
                threading.Event().wait()
            vring.add_used(chain, chain.write(struct.pack("=IBB", os.getpid(), self.config[0], self.reloads)))

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        if offset >= 8:
            raise Refused("read-only from byte 8 on")
        self.config[offset : offset + len(data)] = data

    def set_mtu(self, mtu: int) -> None:
        if os.getpid() % 2 and mtu == 1000:
            raise Refused("some processes like no round numbers")

    def reload(self) -> None:
        self.reloads += 1
        self.config_changed()


def children(pid: int | None = None) -> list[int]:
    """The processes that one has started, those included that nobody has waited for."""
    found = []
    for task in os.listdir(f"/proc/{pid or os.getpid()}/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid or os.getpid()}/task/{task}/children") as file:
            found += [int(child) for child in file.read().split()]
    return found


def is_running(pid: int) -> bool:
    """Whether there is such a process, be it a zombie."""
    return os.path.exists(f"/proc/{pid}")


class ProcessTests(DaemonTest):
    """One device in several worker processes."""

    @contextlib.contextmanager
    def spread(self, device: VhostUserBackend | None = None, processes: int = 2) -> Iterator[Served]:
        """A device, served at a socket by worker processes; in the end no process is left."""
        before = children()
        with tempfile.TemporaryDirectory(prefix="vhost-user-") as folder:
            served = Served.__new__(Served)
            served.path = f"{folder}/sock"
            served.daemon = VhostUserDaemon("test", device or Told(), processes=processes)
            served.daemon.start(served.path)
            try:
                yield served
            finally:
                served.daemon.shutdown()
                served.wait()
                self.assertEqual(children(), before, "a process is left over")

    def ask(self, queue: FrontendQueue) -> tuple[int, int, int]:
        """Who serves the ring: process id, config byte, reloads."""
        memory = queue._frontend.memory
        at = queue._frontend.arena[0] + 64 * queue.index
        queue.submit([(at, 4)], [(at + 16, 6)])
        queue.wait()
        return struct.unpack("=IBB", memory.read(at + 16, 6))

    def test_rings_belong_to_processes(self) -> None:
        for packed in False, True:
            with self.subTest(packed=packed), self.spread() as served, served.connect() as frontend:
                queues = frontend.setup(4, memory=4 << 20, size=16, packed=packed)
                owners = [self.ask(queue)[0] for queue in queues]
                self.assertEqual(owners[:2], owners[2:])
                self.assertEqual(len({*owners, os.getpid()}), 3)
                for _ in range(50):
                    self.assertEqual([self.ask(queue)[0] for queue in queues], owners)

    def test_end_of_a_connection_is_not_the_end_of_the_daemon(self) -> None:
        """Whose main thread goes on waiting where signals are handled."""
        with self.spread() as served:
            for _ in range(2):
                with served.connect() as frontend:
                    self.ask(frontend.setup(4, memory=4 << 20, size=16)[0])
                wait_until(lambda: not served.daemon._processes, "the worker processes to end")
                self.assertFalse(is_readable(served.daemon._ended.fd, 0))

    def test_more_processes_than_queues(self) -> None:
        with self.spread(Told(), 9) as served, served.connect() as frontend:
            owners = {self.ask(queue)[0] for queue in frontend.setup(4, memory=4 << 20, size=16)}
            self.assertEqual(len(owners), 4)
        self.expect_log("9 worker processes for 4 queues")

    def test_config_is_written_in_all_and_refused_once(self) -> None:
        with self.spread() as served, served.connect() as frontend:
            queues = frontend.setup(4, memory=4 << 20, size=16)
            frontend.set_config(0, b"X")
            self.assertEqual(frontend.get_config(0, 2), b"X1")
            self.assertEqual([self.ask(queue)[1] for queue in queues], 4 * [ord("X")])
            with self.assertRaises(Refused):
                frontend.set_config(8, b"X")
            self.assertFalse(is_readable(frontend.connection.socket, MOMENT), "more than one answer")
            frontend.set_config(0, b"Y")

    def test_failure_in_one_process_is_the_answer(self) -> None:
        device = Told()
        with self.spread(device, 4) as served:
            for _ in range(4):  # until there are processes with odd and with even numbers
                with served.connect() as frontend:
                    owners = {self.ask(queue)[0] % 2 for queue in frontend.setup(4, memory=4 << 20, size=16)}
                    frontend.request("NET_SET_MTU", U64(1500))
                    if 1 in owners:
                        with self.assertRaises(Refused):
                            frontend.request("NET_SET_MTU", U64(1000))
                        frontend.request("NET_SET_MTU", U64(1500))
                if owners == {0, 1}:
                    return

    def test_rings_stop_and_go_on(self) -> None:
        with self.spread() as served, served.connect() as frontend:
            queues = frontend.setup(4, memory=4 << 20, size=16)
            for queue in queues:
                for _ in range(queue.index + 1):
                    self.ask(queue)
            drivers = [queue.driver for queue in queues]
            bases = [frontend.stop_queue(queue) for queue in tuple(queues)]
            self.assertEqual(bases, [1, 2, 3, 4])
            for index, (driver, base) in enumerate(zip(drivers, bases, strict=True)):
                self.ask(frontend.start_queue(index, driver, base))
            self.assertEqual(frontend.request("GET_STATUS"), U64(0))
            frontend.request("SET_STATUS", U64(15))
            self.assertEqual(frontend.request("GET_STATUS"), U64(15))
            frontend.request("RESET_DEVICE")
            self.assertEqual(frontend.request("GET_VRING_BASE", VringStatePayload(3, 0)), VringStatePayload(3, 0))

    def test_each_front_end_has_new_processes(self) -> None:
        seen: set[int] = set()
        with self.spread() as served:
            for _ in range(3):
                with served.connect() as frontend:
                    queues = frontend.setup(4, memory=4 << 20, size=16)
                    owners = {self.ask(queue)[0] for queue in queues}
                    self.assertEqual(len(owners - seen), 2)
                    seen |= owners
                    frontend.set_config(0, b"Z")
            wait_until(lambda: not any(map(is_running, seen)), "the processes to end, and to be waited for")
            with served.connect() as frontend:
                self.assertEqual([self.ask(queue)[1] for queue in frontend.setup(4, memory=4 << 20, size=16)], 4 * [ord("0")])

    def test_client_reconnects_with_new_processes(self) -> None:
        path = f"{self.folder()}/sock"
        before = children()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.settimeout(PATIENCE)
            daemon = VhostUserDaemon("test", Told(), processes=2)
            daemon.start_client(path, reconnect=True)
            seen: set[int] = set()
            for count in 2, 4:
                with Frontend(listener.accept()[0]) as frontend:
                    seen |= {self.ask(queue)[0] for queue in frontend.setup(4, memory=4 << 20, size=16)}
                self.assertEqual(len(seen), count)
            daemon.shutdown()
            wait_for_end(daemon)
        self.assertEqual(children(), before, "a process is left over")

    def test_killed_process_ends_the_connection_alone(self) -> None:
        with self.spread() as served:
            with served.connect() as frontend:
                queues = frontend.setup(4, memory=4 << 20, size=16)
                first, second = self.ask(queues[0])[0], self.ask(queues[1])[0]
                os.kill(second, signal.SIGKILL)
                with self.raises(Disconnected, ""):
                    frontend.connection.receive(PATIENCE)
            self.expect_log("the connection ends: worker process 1 has ended it, or is no more")
            wait_until(lambda: not is_running(first) and not is_running(second), "both to be waited for")
            with served.connect() as frontend:
                self.ask(frontend.setup(4, memory=4 << 20, size=16)[3])

    def test_device_that_hangs_is_killed(self) -> None:
        with self.spread() as served:
            with served.connect() as frontend:
                queues = frontend.setup(4, memory=4 << 20, size=16)
                owner = self.ask(queues[1])[0]
                frontend.memory.write(frontend.arena[0], b"hang")
                queues[1].submit([(frontend.arena[0], 4)], [(frontend.arena[0] + 16, 6)])
            wait_until(lambda: not is_running(owner), "it to be killed", 20)
            with served.connect() as frontend:
                self.ask(frontend.setup(4, memory=4 << 20, size=16)[1])

    def test_nursery_killed(self) -> None:
        """Without it there are no workers any more, and the daemon says so."""
        before = set(children())
        with self.raises(OSError, "worker processes cannot be started"), self.spread() as served:
            with served.connect() as frontend:
                owner = self.ask(frontend.setup(4, memory=4 << 20, size=16)[0])[0]
                [nursery] = set(children()) - before
                os.kill(nursery, signal.SIGKILL)
                wait_until(lambda: not is_running(owner), "the workers to die with it")
            with served.connect() as frontend, self.raises(Disconnected, ""):
                frontend.connection.receive(PATIENCE)
            self.expect_log("daemon test ends")

    def test_front_end_that_breaks_the_protocol(self) -> None:
        with self.spread() as served:
            for name, payload, fds in ("SET_VRING_NUM", pair(77, 1), 0), ("SET_FEATURES", u64(1 << 63), 0), ("SET_LOG_FD", b"", 2), (999, b"", 1):
                with self.subTest(name), served.peer() as peer:
                    peer.msg(name, payload, [self.eventfd() for _ in range(fds)], expect=CLOSED)
            with served.connect() as frontend:
                self.ask(frontend.setup(4, memory=4 << 20, size=16)[3])

    def test_what_there_is_one_of_is_not_offered(self) -> None:
        class Spread(Whole):
            num_queues = 2

        with self.spread(Spread()) as served, served.peer(protocol_features=0) as peer:
            peer.send(15)
            [offered] = struct.unpack("=Q", peer.answer()[2])
            self.assertFalse(offered & (PF.SHARED_OBJECT | PF.DEVICE_STATE | PF.PAGEFAULT))
            self.assertTrue(offered & PF.SHMEM)
            peer.msg("SET_PROTOCOL_FEATURES", u64(PF.DEVICE_STATE), expect=CLOSED)

    def test_reload_reaches_all_and_the_front_end_is_told_once(self) -> None:
        with self.spread() as served, served.connect() as frontend:
            queues = frontend.setup(4, memory=4 << 20, size=16)
            self.assertEqual([self.ask(queue)[2] for queue in queues], 4 * [1])
            served.daemon.reload()
            self.assertEqual([self.ask(queue)[2] for queue in queues], 4 * [2])
            self.assertEqual(frontend.next_backend_request().name, "CONFIG_CHANGE_MSG")
            with self.assertRaises(TimeoutError):
                frontend.next_backend_request(MOMENT)

    def test_requests_of_the_device_and_their_answers(self) -> None:
        """Both processes ask at once and wait; each has the answer to its own question, while the control threads go on."""

        class Asking(Whole):
            num_queues = 2
            protocol_features = PF(0)
            withheld_protocol_features = PF(0)

            def process_queue(self, vring: VringT) -> None:
                for chain in vring:
                    shmid = chain.read()[0]
                    assert self.channel and isinstance(vring, VringState)
                    with tempfile.TemporaryFile() as file:
                        mapped = self.channel.shmem_map(2 * vring.index, file.fileno(), 0, PAGE * shmid, PAGE, wait=True)
                    vring.add_used(chain, chain.write(bytes([mapped])))

        with self.spread(Asking()) as served, served.connect() as frontend:
            queues = frontend.setup(2, memory=4 << 20, size=16)
            at = frontend.arena[0]
            frontend.maps.append(ShmemMap(2, 0, 0, PAGE, 0))  # so that ring 1's is refused
            frontend.memory.write(at, bytes(2))
            for queue in queues:
                queue.submit([(at + queue.index, 1)], [(at + 16 + queue.index, 1)])
            self.assertEqual(frontend.request("GET_STATUS"), U64(0))  # nobody waits for the answers
            for _ in queues:
                [fd] = frontend.next_backend_request().fds
                os.close(fd)
            for queue in queues:
                queue.wait()
            self.assertEqual(frontend.memory.read(at + 16, 2), b"\1\0")

    def test_nothing_is_left_open_in_the_workers(self) -> None:
        """A worker has its own descriptors: not the listening socket, nor what belongs to its siblings or to the front-end."""
        with self.spread() as served, served.connect() as frontend:
            queues = frontend.setup(4, memory=4 << 20, size=16)
            kinds = []
            for queue in queues[:2]:
                pid = self.ask(queue)[0]
                links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
                kinds.append({link for link in links if link.startswith("socket:")})
            self.assertFalse(kinds[0] & kinds[1], "a socket that both have")
            ours = {link for link in open_fds().values() if link.startswith("socket:")}
            self.assertFalse((kinds[0] | kinds[1]) & ours, "a socket that the parent has")


# ---------------------------------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------------------------------

PROGRAM = """
class Echo(vhost_user.VhostUserBackendMut):
    num_queues = 2
    config = b"0123456789abcdef"
    def process_queue(self, vring):
        for chain in vring:
            vring.add_used(chain, chain.write(chain.read()[::-1]))
    def reload(self):
        print("reloaded", flush=True)

def build(options):
    if options.fail:
        raise ValueError("no such thing as " + options.fail)
    return Echo()

sys.exit(vhost_user.run_device("echo", build, lambda parser: parser.add_argument("--fail"), ["first", "second"]))
"""


class ProgramTests(DaemonTest):
    """`run_device`: the specification's conventions for back-end programs."""

    def run_program(self, *arguments: str, expect: int = 0, **options: Any) -> tuple[str, str]:
        """Run the program to its end. Returns what it wrote to stdout and stderr."""
        child = program(self, PROGRAM, *arguments, **options)
        out, err = child.communicate(timeout=PATIENCE)
        self.assertEqual(child.returncode, expect, err)
        return out, err

    def works(self, frontend: Frontend) -> None:
        """The program serves this front-end."""
        frontend.setup(memory=1 << 20, size=16)
        self.echo(frontend, frontend.queues[0])

    def ends(self, child: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
        """The signal ends the program at once, with status 0. Returns stderr."""
        child.send_signal(number)
        start = time.monotonic()
        _, err = child.communicate(timeout=PATIENCE)
        self.assertEqual(child.returncode, 0, err)
        self.assertLess(time.monotonic() - start, 3.0, "seconds to end")
        return err

    def test_capabilities_are_printed_whatever_else_there_is(self) -> None:
        """rule 27"""
        for arguments in ["--print-capabilities"], ["--print-capabilities", "--socket-path", "/x", "--fd", "3", "--nonsense"]:
            out, _ = self.run_program(*arguments)
            self.assertEqual(json.loads(out), {"type": "echo", "features": ["first", "second"]})

    def test_command_lines_that_make_no_sense(self) -> None:
        """rule 27"""
        for arguments in (
            [],
            ["--socket-path", "/x", "--fd", "3"],
            ["--fd", "x"],
            ["--nonsense"],
            ["--fd", "3", "--client"],
            ["--socket-path", "/x", "--reconnect"],
        ):
            _, err = self.run_program(*arguments, expect=2)
            self.assertIn("usage: ", err)

    def test_failure_has_a_status_and_a_reason(self) -> None:
        """rule 27"""
        path = f"{self.folder()}/missing/sock"
        for arguments, reason in (
            (["--socket-path", path], f"cannot listen at {path}"),
            (["--socket-path", path, "--client"], f"cannot connect to {path}"),
            (["--socket-path", "/x", "--fail", "this"], "no such thing as this"),
            (["--fd", "77"], ""),
        ):
            _, err = self.run_program(*arguments, expect=1)
            self.assertIn(reason, err)
            self.assertNotIn("Traceback", err)

    def test_socket_path_and_sigterm_while_connected(self) -> None:
        """rule 27"""
        for number in signal.SIGTERM, signal.SIGINT:
            path = f"{self.folder()}/sock"
            child = program(self, PROGRAM, "--socket-path", path)
            with Frontend.connect(path) as frontend:
                self.works(frontend)
                self.assertEqual(self.ends(child, number), "")
            self.assertFalse(os.path.exists(path))

    def test_sigterm_while_idle(self) -> None:
        path = f"{self.folder()}/sock"
        child = program(self, PROGRAM, "--socket-path", path)
        with Frontend.connect(path) as frontend:
            self.works(frontend)
        self.ends(child)

    def test_client(self) -> None:
        """It connects, and ends with its front-end."""
        path = f"{self.folder()}/sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.settimeout(PATIENCE)
            child = program(self, PROGRAM, "--socket-path", path, "--client")
            with Frontend(listener.accept()[0]) as frontend:
                self.works(frontend)
            self.assertEqual(child.wait(PATIENCE), 0)

    def test_fd_that_is_connected(self) -> None:
        """rule 27"""
        ours, theirs = socket.socketpair()
        with theirs:
            child = program(self, PROGRAM, "--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()])
        with Frontend(ours) as frontend:
            self.works(frontend)
        self.assertEqual(child.wait(PATIENCE), 0)

    def test_fd_that_listens(self) -> None:
        """rule 27"""
        path = f"{self.folder()}/sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            child = program(self, PROGRAM, "--fd", str(listener.fileno()), pass_fds=[listener.fileno()])
        for _ in range(2):
            with Frontend.connect(path) as frontend:
                self.works(frontend)
        self.ends(child)

    def test_socket_activation(self) -> None:
        """sd_listen_fds(3): descriptor 3, if LISTEN_PID is this process."""
        path = f"{self.folder()}/sock"
        launcher = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.executable, sys.argv[2:])"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            child = program(
                self,
                PROGRAM,
                launcher=["-c", launcher, str(listener.fileno()), sys.executable],
                pass_fds=[listener.fileno()],
                environment={"LISTEN_FDS": "1"},
            )
            named = f"{self.folder()}/named"
            other = program(
                self,
                PROGRAM,
                "--socket-path",
                named,
                launcher=["-c", launcher, str(listener.fileno()), sys.executable],
                pass_fds=[listener.fileno()],
                environment={"LISTEN_FDS": "1"},
            )
        for program_, where in (child, path), (other, named):  # a socket that is named is the one
            with Frontend.connect(where) as frontend:
                self.works(frontend)
            self.ends(program_)
        _, err = self.run_program(expect=2, environment={"LISTEN_FDS": "1", "LISTEN_PID": "1"})
        self.assertIn("--socket-path", err)

    def test_readiness_is_told(self) -> None:
        """sd_notify(3), once the socket can be connected to; the address may be abstract."""
        folder = self.folder()
        for address, bound in (f"{folder}/notify", f"{folder}/notify"), (f"@vhost-user-{os.getpid()}", f"\0vhost-user-{os.getpid()}"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.bind(bound)
                notify.settimeout(PATIENCE)
                child = program(self, PROGRAM, "--socket-path", f"{folder}/sock", environment={"NOTIFY_SOCKET": address})
                self.assertEqual(notify.recv(100).split(b"\n")[0], b"READY=1")
                with Frontend.connect(f"{folder}/sock", timeout=0) as frontend:
                    self.works(frontend)
                self.ends(child)

    def test_sighup_reloads(self) -> None:
        path = f"{self.folder()}/sock"
        child = program(self, PROGRAM, "--socket-path", path)
        with Frontend.connect(path) as frontend:
            for _ in range(2):
                child.send_signal(signal.SIGHUP)
                assert child.stdout
                self.assertEqual(child.stdout.readline(), "reloaded\n")
            self.works(frontend)
        self.ends(child)

    def idle_wakeups(self, pids: Iterable[int]) -> int:
        """How often threads of these processes have gone to sleep, so far."""
        found = 0
        for pid in pids:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/status") as file:
                    found += sum(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))
        return found

    def family(self, pid: int) -> list[int]:
        """A process, and those that it has started, and so on."""
        return [pid, *(other for child in children(pid) for other in self.family(child))]

    def test_idle_program_never_wakes_up(self) -> None:
        for processes in "1", "2":
            with self.subTest(processes=processes):
                path = f"{self.folder()}/sock"
                child = program(self, PROGRAM, "--socket-path", path, "--processes", processes)
                with Frontend.connect(path) as frontend:
                    self.works(frontend)
                    time.sleep(0.5)  # what ends the work above
                    pids = self.family(child.pid)
                    self.assertEqual(len(pids), 1 if processes == "1" else 4)
                    for patience in 2, 1, 0:  # that end may take longer; what wakes up again and again would do so each time
                        before = self.idle_wakeups(pids)
                        time.sleep(2.5)  # more than twice the period of what looks once a second
                        if self.idle_wakeups(pids) == before:
                            break
                        self.assertTrue(patience, "it wakes up")
                self.ends(child)

    def test_worker_processes_end_with_the_program(self) -> None:
        for number in signal.SIGTERM, signal.SIGKILL:
            with self.subTest(number=number):
                path = f"{self.folder()}/sock"
                child = program(self, PROGRAM, "--socket-path", path, "--processes", "2")
                with Frontend.connect(path) as frontend:
                    self.works(frontend)
                    pids = self.family(child.pid)
                    self.assertEqual(len(pids), 4)
                    if number == signal.SIGTERM:
                        self.ends(child)
                    else:
                        child.kill()
                        child.wait()
                    with self.raises(Disconnected, ""):
                        frontend.connection.receive(PATIENCE)
                wait_until(lambda: not any(map(is_running, pids)), "all to be gone")  # noqa: B023 - called here

    def test_signals_are_handled_at_any_time(self) -> None:
        """Not one SIGHUP that comes by itself is lost, and none leaves the program deaf."""
        path = f"{self.folder()}/sock"
        child = program(self, PROGRAM, "--socket-path", path)
        Frontend.connect(path).close()
        assert child.stdout
        for _ in range(100):
            child.send_signal(signal.SIGHUP)
            self.assertTrue(is_readable(child.stdout.fileno(), PATIENCE), "a signal is lost")
            self.assertEqual(child.stdout.readline(), "reloaded\n")
        self.ends(child)

    def test_debug_log_shows_messages_in_words(self) -> None:
        path = f"{self.folder()}/sock"
        child = program(self, PROGRAM, "--socket-path", path, "--log-level", "debug")
        with Frontend.connect(path) as frontend:
            self.works(frontend)
            frontend.get_config(2, 3)
            with self.assertRaises(Refused):
                frontend.set_config(0, b"x")
        err = self.ends(child)
        for words in (
            "GET_FEATURES",
            "SET_VRING_NUM ring 0: 0x10",
            "SET_VRING_KICK ring 0",
            "GET_CONFIG 3 bytes at 2",
            "ADD_MEM_REG 0x100000 bytes at guest",
            "refused",
        ):
            self.assertIn(words, err)


if __name__ == "__main__":
    unittest.main()
