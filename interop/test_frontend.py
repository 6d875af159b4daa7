"""Our `Frontend` and driver side on disks that nobody here wrote: qemu-storage-daemon, old and new, and the Rust crate's."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from vhost_user import Frontend, FrontendQueue

from . import sid
from .diskcheck import EVENT_IDX, INDIRECT_DESC, MIB, MQ
from .peers import Disk, rust_peer, start_backend, storage_daemon
from .support import InteropTest, needs, needs_sid

SIZE = 16 * MIB
BLOCK = 4096
BLOCKS = SIZE // BLOCK
DEPTH = 32
T_IN, T_OUT, T_FLUSH = 0, 1, 4
F_FLUSH = 9
HEADER = struct.Struct("<IIQ")


def content(salt: int, block: int) -> bytes:
    """What a block holds: no two are alike, and none is as another connection wrote it."""
    return random.Random(salt << 32 | block).randbytes(BLOCK)


class Driver:
    """A small disk driver: up to DEPTH requests in flight on one queue, each with its own header, data and status."""

    def __init__(self, frontend: Frontend, queue: FrontendQueue, arena: int, salt: int) -> None:
        self.queue = queue
        self.salt = salt
        self.memory = frontend.memory
        self.slots = [arena + n * 2 * BLOCK for n in range(DEPTH)]

    def run(self, kind: int, blocks: Sequence[int]) -> None:
        """All of them succeed, in whatever order; what is read is right."""
        waiting, idle = list(blocks), list(self.slots)
        while waiting or len(idle) < DEPTH:
            while waiting and idle:
                self._submit(kind, waiting.pop(), idle.pop())
            for token, length in self.queue.wait():
                assert isinstance(token, tuple)
                block, slot = token
                self._check(kind, block, slot, length)
                idle.append(slot)

    def _submit(self, kind: int, block: int, slot: int) -> None:
        data = (slot + BLOCK, BLOCK)
        self.memory.write(slot, HEADER.pack(kind, 0, block * BLOCK // 512 if kind != T_FLUSH else 0) + b"\xff")
        self.memory.write(slot + BLOCK, content(self.salt, block) if kind == T_OUT else bytes(BLOCK))
        readable = [(slot, HEADER.size), *([data] if kind == T_OUT else [])]
        writable = [*([data] if kind == T_IN else []), (slot + HEADER.size, 1)]
        self.queue.submit(readable, writable, (block, slot))

    def _check(self, kind: int, block: int, slot: int, length: int) -> None:
        status = self.memory.read(slot + HEADER.size, 1)[0]
        if status:
            raise AssertionError(f"request {kind} of block {block}: status {status}")
        if kind == T_IN and (length != BLOCK + 1 or self.memory.read(slot + BLOCK, BLOCK) != content(self.salt, block)):
            raise AssertionError(f"block {block}: other data than was written, or {length} bytes returned")


class FrontendOnForeignBackends(InteropTest):
    def exercise(self, command: Callable[[Disk, Path], list[str]]) -> None:
        """Every kind of ring that such a back-end has, each on a connection of its own to the same process."""
        disk = Disk(self.image("disk.img", SIZE), num_queues=2)
        socket = self.dir / "disk.sock"
        backend = start_backend(self, command(disk, socket), socket)
        both = 1 << EVENT_IDX | 1 << INDIRECT_DESC
        for queues, without in ((1, 0), (1, 1 << EVENT_IDX), (1, 1 << INDIRECT_DESC), (1, both), (2, 0)):
            with self.subTest(queues=queues, without=hex(without)), Frontend.connect(socket) as frontend:
                self.one_connection(frontend, disk.image, queues, without)
        self.assertTrue(backend.running())

    def one_connection(self, frontend: Frontend, image: Path, queues: int, without: int) -> None:
        wanted = (Frontend.RING_FEATURES | 1 << F_FLUSH | 1 << MQ) & ~without
        rings = frontend.setup(queues, 128, features=wanted, indirect=not without >> INDIRECT_DESC & 1)
        self.assertEqual(frontend.features & wanted, wanted)
        self.assertEqual(int.from_bytes(frontend.get_config(0, 8), "little"), SIZE // 512)
        salt = random.randrange(1 << 32)
        order = random.sample(range(BLOCKS), BLOCKS // 4)
        for number, ring in enumerate(list(rings)):
            driver = Driver(frontend, ring, frontend.arena[0] + number * DEPTH * 2 * BLOCK, salt)
            blocks = order[number::queues]
            driver.run(T_OUT, blocks)
            driver.run(T_FLUSH, [0])
            driver.run(T_IN, blocks)
            self.check_image(image, salt, blocks)
            frontend.stop_queue(ring)

    def check_image(self, image: Path, salt: int, blocks: Sequence[int]) -> None:
        data = image.read_bytes()
        for block in blocks:
            self.assertEqual(data[block * BLOCK : (block + 1) * BLOCK], content(salt, block), f"block {block} of the image")

    def test_oldest_storage_daemon(self) -> None:
        needs("qemu-storage-daemon", "setpriv")
        self.exercise(storage_daemon)

    def test_newest_storage_daemon(self) -> None:
        needs_sid()
        self.exercise(lambda disk, socket: sid.command(storage_daemon(disk, socket), binds=[self.dir]))

    def test_rust_crate(self) -> None:
        needs_sid()
        self.exercise(rust_peer)
