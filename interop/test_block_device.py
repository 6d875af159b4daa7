"""A disk on a block device: a loop device, under QEMU's block layer and under a guest."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

from vhost_user import Frontend, FrontendQueue

from . import diskcheck, sid
from .diskcheck import MIB
from .guest import NEWEST, QemuGuest, disk_device
from .peers import Disk, Process, needs_disk, serve_disk
from .support import PATIENCE, InteropTest, missing, needs, needs_sid, wait_for

SIZE = 48 * MIB
SECTOR, BLOCK = 512, 4096

# How the disk transfers: its default, and past the page cache in each way.
WAYS = (("auto", False), ("io_uring", True), ("sync", True))

# Past the page cache or not at all.
_STRICT = """
import sys
from devices import blk
blk._past_the_cache = lambda transfer, direct_fd, fd, views, offset: transfer(direct_fd, views, offset)
sys.exit(blk.main())
"""

# As with a kernel that demands aligned memory of whoever goes past the page cache (most do; Linux 6.18 does not).
_ALIGNED_MEMORY = """
import ctypes, errno, fcntl, os, sys
from devices.io_uring import OP_READV, OP_WRITEV, IoUring, address_of

def checked(call):
    def transfer(fd, views, offset, flags=0):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT and any(address_of(view) % 512 for view in views):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(fd, views, offset, flags)
    return transfer

def prepare(ring, opcode, file, address, length, offset, flags, token, prepare=IoUring.prepare):
    vector = opcode in (OP_READV, OP_WRITEV)
    addresses = (ctypes.c_uint64 * (2 * length)).from_address(address)[::2] if vector else [address]
    prepare(ring, opcode, file, address, length, offset | any(at % 512 for at in addresses), flags, token)

os.preadv, os.pwritev, IoUring.prepare = checked(os.preadv), checked(os.pwritev), prepare
from devices import blk
sys.exit(blk.main())
"""


def loop_device(case: InteropTest, image: Path, sector: int = 512) -> Path:
    """A loop device on the image, until the test's end.

    It is told to go with the last who has it open, and that is we: so it goes too when the tests themselves are killed."""
    needs("losetup")
    done = losetup("--find", "--show", "--sector-size", str(sector), str(image))
    if done.returncode:
        missing(f"no loop device can be had: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    case.addCleanup(wait_for, lambda: not attached(image), f"{device} is let go")
    fd = os.open(device, os.O_RDONLY)
    case.addCleanup(os.close, fd)
    losetup("--detach", str(device)).check_returncode()
    case.assertEqual(attached(image), [device.name])
    return device


def attached(image: Path) -> list[str]:
    """The loop devices on an image."""
    files = {file.parts[3]: file.read_text(encoding="utf-8").strip() for file in Path("/sys/block").glob("loop*/loop/backing_file")}
    return [name for name, file in files.items() if file.removesuffix(" (deleted)") == str(image)]


def losetup(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["losetup", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE)


def used_bytes(image: Path) -> int:
    """What the image takes up on the host; written out first, since blocks may be given to it as late as then."""
    with open(image, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_blocks * 512


class LoopTest(InteropTest):
    """Disks on loop devices."""

    def setUp(self) -> None:
        needs("setpriv")
        needs_sid()
        needs_disk("aio")
        self.count = 0

    def serve(self, sector: int = 512, *, aio: str = "auto", direct: bool = False, block_size: int = 512, code: str = "") -> Path:
        """One more disk, at `self.socket`; returns the image behind its device."""
        self.count += 1
        image = self.image(f"{self.count}.img", SIZE)
        self.socket = self.dir / f"{self.count}.sock"
        self.device = loop_device(self, image, sector)
        self.backend = serve_disk(self, Disk(self.device, aio=aio, direct=direct, block_size=block_size, code=code), self.socket)
        return image


class BlockLayer(LoopTest):
    """QEMU's block layer as the front-end, which makes requests as they are asked for: nothing is merged, nothing cached."""

    def qemu_io(self, *commands: str) -> tuple[int, str]:
        log = self.dir / "qemu-io.log"
        disk = f"driver=virtio-blk-vhost-user,path={self.socket},cache.direct=on"
        words = [word for command in commands for word in ("-c", command)]
        process = Process(sid.command(["qemu-io", "--image-opts", disk, *words], binds=[self.dir]), log)
        self.addCleanup(process.kill)
        status, output = process.wait(), log.read_text(encoding="utf-8")
        log.unlink()
        return status, output

    def succeeds(self, *commands: str) -> None:
        status, output = self.qemu_io(*commands)
        self.assertEqual(status, 0, output)
        self.assertNotIn("failed", output)

    def expect(self, image: Path, *pieces: tuple[int, int, int]) -> None:
        """The pieces (value, offset, length) are what a front-end reads, and the image has them, with zeroes in between."""
        self.succeeds(*(f"read -P {value} {offset} {length}" for value, offset, length in pieces))
        wanted = bytearray(SIZE)
        for value, offset, length in pieces:
            wanted[offset : offset + length] = bytes([value]) * length
        self.assert_same_bytes(image.read_bytes(), bytes(wanted), "the image")

    def test_written_and_read_back(self) -> None:
        pieces = ((1, 0, 512), (2, 512, 512), (3, 8192, 65536), (4, MIB, MIB), (5, 3 * MIB - 512, 5 * MIB), (6, SIZE - 512, 512))
        for aio, direct in WAYS:
            with self.subTest(aio, direct=direct):
                image = self.serve(aio=aio, direct=direct)
                self.succeeds(*(f"write -P {value} {offset} {length}" for value, offset, length in pieces), "flush")
                self.expect(image, *pieces)

    def test_capacity(self) -> None:
        """It is the device's; when that has grown, a SIGHUP tells."""
        image = self.serve()
        last, next_ = f"write -P 1 {SIZE - 512} 512", f"write -P 2 {SIZE} 512"
        self.succeeds(last)
        self.assertNotEqual(self.qemu_io(next_)[0], 0)
        os.truncate(image, 2 * SIZE)
        losetup("--set-capacity", str(self.device)).check_returncode()
        self.backend.signal(signal.SIGHUP)
        wait_for(lambda: f"{2 * SIZE // 512} sectors, {SIZE // 512} before" in self.backend.log.read_text(), "another size")
        self.succeeds(next_, f"read -P 1 {SIZE - 512} 512", f"read -P 2 {SIZE} 512")

    def test_discard_and_write_zeroes(self) -> None:
        """What is discarded, or zeroed where that may save space, takes up none in the image any more; what is only zeroed stays."""
        for aio, direct in WAYS:
            with self.subTest(aio, direct=direct):
                image = self.serve(aio=aio, direct=direct)
                self.succeeds("write -P 7 0 16M", "flush")
                before = used_bytes(image)
                self.assertGreaterEqual(before, 16 * MIB)
                self.succeeds("discard 1M 4M", "flush")
                self.assertLessEqual(used_bytes(image), before - 4 * MIB)
                self.succeeds("write -z -u 8M 2M", "flush")
                self.assertLessEqual(used_bytes(image), before - 6 * MIB)
                self.succeeds("write -z 12M 1M", "flush")
                self.assertGreaterEqual(used_bytes(image), 10 * MIB)
                self.expect(image, (7, 0, MIB), (7, 5 * MIB, 3 * MIB), (7, 10 * MIB, 2 * MIB), (7, 13 * MIB, 3 * MIB))

    def test_parts_of_the_devices_blocks(self) -> None:
        """Sectors of 512 bytes on a device whose blocks are larger: none is lost when its neighbours are written at the same time."""
        for aio, direct in WAYS:
            with self.subTest(aio, direct=direct):
                image = self.serve(BLOCK, aio=aio, direct=direct)
                sectors = [(1 + n, 512 * n, 512) for n in range(64)]
                unaligned = (100, MIB + 512, MIB), (101, 4 * MIB - 1024, 65536 + 512)
                self.succeeds(*(f"aio_write -P {value} {offset} {length}" for value, offset, length in (*sectors, *unaligned)), "aio_flush")
                self.succeeds(
                    "write -P 102 8M 64k", f"discard {8 * MIB + 512} 512", f"write -z {8 * MIB + 8192} 1536", "write -z -u 8413696 4608", "flush"
                )
                rest = (102, 8 * MIB, 512), (102, 8 * MIB + 1024, 7168), (102, 8 * MIB + 9728, 15360), (102, 8 * MIB + 29696, 65536 - 29696)
                self.expect(image, *sectors, *unaligned, *rest)

    def test_the_devices_blocks(self) -> None:
        """Told that blocks are larger, front-ends ask for whole ones alone."""
        for aio, direct in WAYS:
            with self.subTest(aio, direct=direct):
                image = self.serve(BLOCK, aio=aio, direct=direct, block_size=BLOCK, code=_STRICT)
                pieces = ((1, 0, 4096), (2, 4096, 4096), (3, MIB + 4096, MIB), (4, SIZE - 4096, 4096))
                self.succeeds(
                    *(f"write -P {value} {offset} {length}" for value, offset, length in pieces), "write -P 5 4M 512", "write -z 4M 512", "flush"
                )
                self.expect(image, *pieces)


class Neighbours(LoopTest):
    """Our own front-end, whose buffers are wherever a test wants them."""

    ROUNDS, SECTORS = 60, 64
    APART = 8192  # of one sector's buffer from the next one's

    def test_memory_that_is_not_aligned(self) -> None:
        """What the storage cannot take from memory as it is must not meet, in the page cache, what goes past that to the same page."""
        for aio, direct in WAYS:
            if direct:
                with self.subTest(aio):
                    self.serve(aio=aio, direct=True, code=_ALIGNED_MEMORY)
                    with Frontend.connect(self.socket) as frontend:
                        self.write_all_sectors_at_once(frontend)

    def write_all_sectors_at_once(self, frontend: Frontend) -> None:
        [queue] = frontend.setup(memory=4 << 20, features=Frontend.RING_FEATURES | 1 << 9)  # with FLUSH: writes need not be durable
        seed = random.randrange(1 << 32)
        random_ = random.Random(seed)
        for number in range(self.ROUNDS):
            odd = [random_.choice((0, 8)) for _ in range(self.SECTORS)]
            written = [random_.randbytes(SECTOR) for _ in odd]
            order = random_.sample(range(self.SECTORS), self.SECTORS)
            self.transfer(queue, frontend, order, odd, written)
            read = self.transfer(queue, frontend, order, [0] * self.SECTORS, None)
            wrong = [sector for sector in order if read[sector] != written[sector]]
            self.assertEqual(wrong, [], f"round {number}, seed {seed}: these sectors have not what was written last")

    def transfer(self, queue: FrontendQueue, frontend: Frontend, order: list[int], odd: list[int], data: list[bytes] | None) -> list[bytes]:
        """One request for each sector, all at once, with buffers at an `odd` address each; returns what is in the buffers then."""
        memory, headers = frontend.memory, -(-frontend.arena[0] // self.APART) * self.APART
        buffers = [headers + self.APART * (1 + sector) + odd[sector] for sector in range(self.SECTORS)]
        status = headers + 16 * self.SECTORS
        memory.write(status, b"\xff" * self.SECTORS)
        for sector in order:
            header, buffer = (headers + 16 * sector, 16), (buffers[sector], SECTOR)
            memory.write(header[0], struct.pack("<IIQ", 1 if data else 0, 0, sector))
            if data:
                memory.write(buffer[0], data[sector])
            queue.driver.add([header, buffer] if data else [header], [*([] if data else [buffer]), (status + sector, 1)], sector)
        queue.publish()
        done = 0
        while done < len(order):
            done += len(queue.wait())
        self.assertEqual(memory.read(status, self.SECTORS), bytes(self.SECTORS))
        return [memory.read(buffer, SECTOR) for buffer in buffers]


class Guests(LoopTest):
    """A guest's file system on top."""

    def test_file_system(self) -> None:
        """On blocks of either size; the file system's are smaller than the larger ones."""
        disks = []
        devices = []
        for number, (sector, aio, direct) in enumerate(((512, "auto", False), (BLOCK, "io_uring", True))):
            image = self.serve(sector, aio=aio, direct=direct)
            disks.append((image, self.device, f"/dev/vd{'ab'[number]}"))
            devices.append(replace(disk_device(self.socket), name=f"disk{number}", bus=f"port{number}"))
        guest = QemuGuest(NEWEST, self.dir, devices)
        self.addCleanup(guest.kill)
        guest.wait_ready()
        for image, device, dev in disks:
            with self.subTest(dev):
                self.assertEqual(guest.run(f"blockdev --getsize64 {dev}"), str(SIZE))
                diskcheck.filesystem(guest, dev)
                diskcheck.fio_verify(guest, dev)
                guest.run(f"dd if=/dev/urandom of={dev} bs=512 seek=3 count=100 oflag=direct conv=notrunc")
                diskcheck.same_content(guest, device, dev)
                before = used_bytes(image)
                guest.run(f"blkdiscard {dev}")
                self.assertLess(used_bytes(image), before - 8 * MIB)
                diskcheck.same_content(guest, device, dev)
