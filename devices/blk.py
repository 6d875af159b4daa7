"""A virtio block device (virtio 1.3 §5.2): `python3 -m devices.blk --socket-path /run/disk.sock --blk-file disk.img`.

In reading order: facts of the device type, the images that can be behind it (`FileImage`, `RamImage`), a watch on the image's size, the device
`Blk`, and the program.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import functools
import logging
import mmap
import os
import stat
import struct
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from guest_memory import GuestMemoryError, map_shared, truncation
from vhost_user import Refused, VhostUserBackend, VringT, run_device
from vring import DescriptorChain

log = logging.getLogger("vhost_user")

# ---------------------------------------------------------------------------------------------------------------------------
# Facts (virtio 1.3 §5.2.3, §5.2.4, §5.2.6)
# ---------------------------------------------------------------------------------------------------------------------------

SECTOR = 512

F_SIZE_MAX = 1 << 1
F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

REQUEST_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
SEGMENT = struct.Struct("<QII")  # sector, sectors, flags: of DISCARD and WRITE_ZEROES
SEGMENT_F_UNMAP = 1
ID_BYTES = 20

SIZE_MAX = 4 << 20  # bytes of one segment
SEG_MAX = 126  # data segments of one request: with header and status they fit a queue of 128 without indirect tables
MAX_SEGMENTS = 32  # of one DISCARD or WRITE_ZEROES
MAX_SEGMENT_SECTORS = (64 << 20) // SECTOR  # of each: bounds how long one request takes


class BlkConfig(ctypes.LittleEndianStructure):
    """struct virtio_blk_config as far as the features here go."""

    _pack_ = 1
    _fields_ = (
        ("capacity", ctypes.c_uint64),
        ("size_max", ctypes.c_uint32),
        ("seg_max", ctypes.c_uint32),
        ("geometry", ctypes.c_uint32),
        ("blk_size", ctypes.c_uint32),
        ("physical_block_exp", ctypes.c_uint8),
        ("alignment_offset", ctypes.c_uint8),
        ("min_io_size", ctypes.c_uint16),
        ("opt_io_size", ctypes.c_uint32),
        ("writeback", ctypes.c_uint8),
        ("unused0", ctypes.c_uint8),
        ("num_queues", ctypes.c_uint16),
        ("max_discard_sectors", ctypes.c_uint32),
        ("max_discard_seg", ctypes.c_uint32),
        ("discard_sector_alignment", ctypes.c_uint32),
        ("max_write_zeroes_sectors", ctypes.c_uint32),
        ("max_write_zeroes_seg", ctypes.c_uint32),
        ("write_zeroes_may_unmap", ctypes.c_uint8),
        ("unused1", ctypes.c_uint8 * 3),
    )


# ---------------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------------

Views = Sequence[memoryview]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE, _FALLOC_ZERO_RANGE = 1, 2, 16
_ZEROES = bytes(1 << 20)
_IOV_MAX = os.sysconf("SC_IOV_MAX")


class Image(ABC):
    """What is behind the disk. Methods raise OSError when the storage fails.

    name         to call it by
    can_discard  whether `discard` saves space
    read         fills the views from an offset, returns how many bytes were read; 0 only at the end of the image
    write        writes the views at an offset, returns how many bytes were written
    """

    name: str
    can_discard = True
    read: Callable[[Views, int], int]  # attributes, so that a request's path leads into the kernel by one call
    write: Callable[[Views, int], int]

    @abstractmethod
    def size(self) -> int:
        """Bytes, as of now."""

    def refresh(self) -> None:  # noqa: B027 - memory of our own stays as it is
        """Look at the storage again: it has another size."""

    @abstractmethod
    def flush(self) -> None:
        """Make all that was written durable."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """The range's content is no longer needed; it reads as zeroes here."""

    @abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes, and stays allocated where the storage can do that."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the storage."""


class FileImage(Image):
    """An image file or a block device, through the page cache.

    Reads are system calls, or copies out of a mapping of the file. A copy costs a fraction of a call, but where it meets a page that is
    not in memory it keeps the whole interpreter waiting for the storage: so a mapping is for files that are always in memory.
    """

    def __init__(self, path: str, read_only: bool = False, mapped: bool | None = None) -> None:
        """`mapped`: whether reads go through a mapping; by default they do where the file is in a file system in memory (tmpfs).

        Raises OSError when it cannot be opened or mapped, ValueError when it is neither file nor block device."""
        self.name = os.path.basename(path)
        self.path = path
        # Without waiting: for the writer of a named pipe, say.
        self.fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK | os.O_CLOEXEC)
        self.read = functools.partial(os.preadv, self.fd)
        self.write = functools.partial(os.pwritev, self.fd)
        self._mapping = memoryview(b""), 0  # and `truncation.pages` when it was made
        self._can_zero = True
        try:
            mode = os.fstat(self.fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise ValueError(f"{path} is neither a file nor a block device")
            if _in_memory(self.fd) if mapped is None else mapped:
                self.read = self._read_mapped
                self.refresh()
            self.can_discard = not read_only and self._fallocate(_FALLOC_PUNCH_HOLE, self.size(), 4096)
        except BaseException:
            os.close(self.fd)
            raise

    def size(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)  # a block device's too

    def refresh(self) -> None:
        if self.read == self._read_mapped:
            size, pages = self.size(), truncation.pages
            try:
                self._mapping = map_shared(self.fd, 0, size, writable=False) if size else memoryview(b""), pages
            except GuestMemoryError as error:  # or it was cut short just now
                raise OSError(errno.EIO, str(error)) from error

    def _read_mapped(self, views: Views, offset: int) -> int:
        (memory, pages), position = self._mapping, offset
        try:
            for view in views:
                end = position + len(view)
                view[:] = memory[position:end]
                position = end
        except ValueError:  # beyond the mapping: the file has grown, or is shorter than it was
            return os.preadv(self.fd, views, offset)
        if truncation.pages != pages:  # something was cut short, maybe this file: the mapping may keep zeroes where there is data again
            self.refresh()
            return os.preadv(self.fd, views, offset)
        return position - offset

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        if not self._fallocate(_FALLOC_PUNCH_HOLE, offset, length):
            self._write_zeroes(offset, length)

    def zero(self, offset: int, length: int) -> None:
        self._can_zero = self._can_zero and self._fallocate(_FALLOC_ZERO_RANGE, offset, length)
        if not self._can_zero:  # tmpfs, for one
            self._write_zeroes(offset, length)

    def _write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            offset += os.pwrite(self.fd, memoryview(_ZEROES)[: end - offset], offset)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Returns whether the storage can do that at all."""
        if _libc.fallocate(self.fd, mode | _FALLOC_KEEP_SIZE, offset, length) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            return False
        raise OSError(code, os.strerror(code), self.name)

    def close(self) -> None:
        self._mapping = memoryview(b""), 0
        os.close(self.fd)


_TMPFS, _RAMFS, _HUGETLBFS = 0x01021994, 0x858458F6, 0x958458F6


def _in_memory(fd: int) -> bool:
    """Whether the file is in a file system that has no other storage than memory."""
    status = (ctypes.c_long * 32)()  # struct statfs begins with f_type
    return _libc.fstatfs(fd, status) == 0 and status[0] in (_TMPFS, _RAMFS, _HUGETLBFS)


class RamImage(Image):
    """Zeroed memory of this process, gone with it."""

    def __init__(self, size: int, shared: bool = False) -> None:
        """`size` in bytes; `shared`: with processes that are forked from this one. Raises ValueError when there is none, OSError when it cannot be
        had."""
        if size <= 0:
            raise ValueError(f"a disk of {size} bytes")
        self.name = "ram"
        if size > sys.maxsize:
            raise OSError(errno.ENOMEM, f"a disk of {size} bytes does not fit memory")
        self._memory = mmap.mmap(-1, size, (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self.read = self._read
        self.write = self._write

    def size(self) -> int:
        return len(self._view)

    def _read(self, views: Views, offset: int) -> int:
        memory, position = self._view, offset
        for view in views:
            end = position + len(view)
            view[:] = memory[position:end]
            position = end
        return position - offset

    def _write(self, views: Views, offset: int) -> int:
        memory, position = self._view, offset
        for view in views:
            end = position + len(view)
            memory[position:end] = view
            position = end
        return position - offset

    def flush(self) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        first, last = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)  # gives the pages back; they read as zeroes
            self.zero(offset, first - offset)
            self.zero(last, offset + length - last)
        else:
            self.zero(offset, length)

    def zero(self, offset: int, length: int) -> None:
        for start in range(offset, offset + length, len(_ZEROES)):
            end = min(start + len(_ZEROES), offset + length)
            self._view[start:end] = _ZEROES[: end - start]

    def close(self) -> None:
        self._view.release()
        self._memory.close()


# ---------------------------------------------------------------------------------------------------------------------------
# The image's size
# ---------------------------------------------------------------------------------------------------------------------------


class SizeWatch:
    """Calls back after a file was changed by whomever, at most once a second; nothing runs while it is left alone (inotify)."""

    _IN_MODIFY, _IN_ONESHOT = 0x2, 0x80000000

    def __init__(self, path: str, changed: Callable[[], object]) -> None:
        """Raises OSError when the file cannot be watched."""
        self._path = os.fsencode(path)
        self._changed = changed
        self._inotify = _libc.inotify_init1(os.O_CLOEXEC)
        if self._inotify < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        try:
            self._arm()
        except OSError:
            os.close(self._inotify)
            raise
        threading.Thread(target=self._run, name="size-watch", daemon=True).start()

    def _arm(self) -> None:
        if _libc.inotify_add_watch(self._inotify, self._path, ctypes.c_uint32(self._IN_MODIFY | self._IN_ONESHOT)) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def _run(self) -> None:
        pause = threading.Event()
        try:
            while True:
                os.read(self._inotify, 4096)
                pause.wait(1.0)  # our own writes are changes too
                self._arm()  # first: what changes from here on is the next event
                self._changed()
        except OSError as error:
            log.warning("%s is no longer watched: %s", os.fsdecode(self._path), error)
        finally:
            os.close(self._inotify)


# ---------------------------------------------------------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------------------------------------------------------


class _Shape:
    """What a request's parts are for, which depends on the chain alone and is kept with it.

    header    the 16 bytes of the request header, or None when they lie in several parts
    out, out_sectors   data the driver sends, and how many sectors that is; -1: no whole number
    into, into_sectors, into_len   likewise data the device returns, and its bytes
    status    the last device-writable byte
    """

    __slots__ = ("header", "into", "into_len", "into_sectors", "out", "out_len", "out_sectors", "status")

    def __init__(self, chain: DescriptorChain) -> None:
        readable, writable = chain.readable, chain.writable
        first, last = readable[0], writable[-1]
        self.out: Views
        self.into: Views
        if len(first) == REQUEST_HEADER.size:  # as drivers have it
            self.header: memoryview | None = first
            self.out = readable[1:]
        else:
            self.header = first[: REQUEST_HEADER.size] if len(first) > REQUEST_HEADER.size else None
            self.out = _cut(readable, REQUEST_HEADER.size, chain.readable_len)
        if len(last) == 1:  # likewise
            self.status = last
            self.into = writable[:-1]
        else:
            self.status = last[-1:]
            self.into = _cut(writable, 0, chain.writable_len - 1)
        self.out_len = length = chain.readable_len - REQUEST_HEADER.size
        self.out_sectors = -1 if length % SECTOR else length // SECTOR
        self.into_len = length = chain.writable_len - 1
        self.into_sectors = -1 if length % SECTOR else length // SECTOR


def _cut(parts: Views, start: int, end: int) -> list[memoryview]:
    """The bytes from start to end of all the parts taken together."""
    found = []
    for part in parts:
        if start < len(part) and end > 0:
            found.append(part[max(start, 0) : end] if start > 0 or end < len(part) else part)
        start -= len(part)
        end -= len(part)
    return found


class Blk(VhostUserBackend):
    """A disk on an image. Any number of queues; each worker thread serves its own."""

    max_queue_size = 1024

    def __init__(
        self,
        image: Image,
        *,
        read_only: bool = False,
        num_queues: int = 1,
        threads: int = 1,
        block_size: int = SECTOR,
        serial: str = "",
        watch: bool = False,
    ) -> None:
        """`threads` workers share the queues. `block_size`: of logical blocks, a power of two from 512. `serial`: up to 20 bytes; the image's
        name by default. `watch`: notice by itself that a file has another size. Raises ValueError."""
        if block_size < SECTOR or block_size & (block_size - 1):
            raise ValueError(f"a block size of {block_size}: must be a power of two, {SECTOR} or more")
        if not 1 <= num_queues <= 256 or not threads >= 1:
            raise ValueError(f"{num_queues} queues on {threads} threads: must be 1 to 256 on at least one")
        self.image = image
        self.read_only = read_only
        self.num_queues = num_queues
        self._threads = min(threads, num_queues)
        self._watch = watch
        self._serial = (serial or image.name).encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._capacity = image.size() // SECTOR
        self._durable_writes = False
        self._can_flush: bool | None = None  # as negotiated
        self._resizing = threading.Lock()
        self.features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_CONFIG_WCE | F_MQ
        if read_only:
            self.features |= F_RO
        else:
            self.features |= F_WRITE_ZEROES | (F_DISCARD if image.can_discard else 0)
        self.config: BlkConfig = BlkConfig(
            capacity=self._capacity,
            size_max=SIZE_MAX,
            seg_max=SEG_MAX,
            blk_size=block_size,
            physical_block_exp=max(0, (4096 // block_size).bit_length() - 1),
            min_io_size=max(1, 4096 // block_size),
            writeback=1,
            num_queues=num_queues,
            max_discard_sectors=MAX_SEGMENT_SECTORS,
            max_discard_seg=MAX_SEGMENTS,
            discard_sector_alignment=block_size // SECTOR,
            max_write_zeroes_sectors=MAX_SEGMENT_SECTORS,
            max_write_zeroes_seg=MAX_SEGMENTS,
            write_zeroes_may_unmap=1,
        )
        self._others: dict[int, Callable[[int, _Shape], int]] = {
            T_FLUSH: self._flush,
            T_GET_ID: self._get_id,
            T_DISCARD: self._discard,
            T_WRITE_ZEROES: self._write_zeroes,
        }

    def queues_per_thread(self) -> Sequence[int]:
        return [sum(1 << queue for queue in range(thread, self.num_queues, self._threads)) for thread in range(self._threads)]

    # State

    def started(self, reload: Callable[[], None]) -> None:
        if self._watch and isinstance(self.image, FileImage):
            try:
                SizeWatch(self.image.path, reload)
            except OSError as error:  # no inotify left, say
                log.warning("%s is not watched for growth, SIGHUP still works: %s", self.image.path, error)

    def acked_features(self, features: int) -> None:
        # A driver that cannot flush expects that a write is durable when it is done (virtio 1.3 §5.2.6.2). The same features come again when
        # a migration begins, with rings running: what the driver has chosen since stays.
        can_flush = bool(features & F_FLUSH)
        if can_flush != self._can_flush:
            self._can_flush = can_flush
            self._set_writeback(int(can_flush))

    def _set_writeback(self, writeback: int) -> None:
        self.config.writeback = writeback
        self._durable_writes = not writeback

    def reset_device(self) -> None:
        self._can_flush = None
        self._set_writeback(1)

    def disconnected(self) -> None:
        super().disconnected()
        self.reset_device()

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        if offset != BlkConfig.writeback.offset or len(data) != 1 or data[0] > 1:
            raise Refused(f"only the writeback byte of config space can be written, not {len(data)} bytes at {offset}")
        self._set_writeback(data[0])
        if self._durable_writes:
            self.image.flush()

    def reload(self) -> None:
        """Tell the driver when the image has another size than before."""
        with self._resizing:
            capacity = self.image.size() // SECTOR
            if capacity != self._capacity:
                log.info("%s: %d sectors, %d before", self.image.name, capacity, self._capacity)
                self.image.refresh()
                self._capacity = self.config.capacity = capacity
                self.config_changed()

    # Requests

    def process_queue(self, vring: VringT) -> None:
        read, write, add_used, unpack = self.image.read, self._write, vring.add_used, REQUEST_HEADER.unpack_from
        for chain in vring:
            shape = chain.memo
            if shape is None:
                if chain.readable_len < REQUEST_HEADER.size or not chain.writable_len:
                    add_used(chain, self._refuse(chain))
                    continue
                shape = chain.memo = _Shape(chain)
            kind, _, sector = unpack(shape.header or b"".join(chain.readable)[: REQUEST_HEADER.size])
            try:
                if kind == T_IN:
                    status = S_IOERR
                    if 0 <= shape.into_sectors <= self._capacity - sector and not shape.out_len:
                        done = read(shape.into, sector * SECTOR)
                        if done == shape.into_len or self._finish(read, shape.into, sector * SECTOR, done, shape.into_len):
                            status = S_OK
                elif kind == T_OUT:
                    status = write(sector, shape)
                elif kind in self._others:
                    status = self._others[kind](sector, shape)
                else:
                    status = S_UNSUPP
            except OSError as error:
                log.warning("%s: request %d at sector %d failed: %s", self.image.name, kind, sector, error)
                status = S_IOERR
            shape.status[0] = status
            add_used(chain, chain.writable_len)

    @staticmethod
    def _refuse(chain: DescriptorChain) -> int:
        """A chain that is no request: without header, or without room for a status."""
        log.debug("%r is no request", chain)
        if not chain.writable_len:
            return 0
        chain.writable[-1][-1] = S_IOERR
        return chain.writable_len

    @staticmethod
    def _finish(transfer: Callable[[Views, int], int], views: Views, offset: int, done: int, length: int) -> bool:
        """Go on with a transfer that was cut short. Returns whether all of it was done: not at the end of an image that has shrunk."""
        while done < length:
            step = transfer(_cut(views, done, length)[:_IOV_MAX], offset + done)
            if not step:
                return False
            done += step
        return True

    def _in_range(self, sector: int, sectors: int) -> bool:
        return 0 <= sectors <= self._capacity - sector

    def _write(self, sector: int, shape: _Shape) -> int:
        if self.read_only or shape.into_len or not self._in_range(sector, shape.out_sectors):
            return S_IOERR
        done = self.image.write(shape.out, sector * SECTOR)
        if done != shape.out_len and not self._finish(self.image.write, shape.out, sector * SECTOR, done, shape.out_len):
            return S_IOERR
        if self._durable_writes:
            self.image.flush()
        return S_OK

    def _flush(self, sector: int, shape: _Shape) -> int:
        self.image.flush()
        return S_OK

    def _get_id(self, sector: int, shape: _Shape) -> int:
        at = 0
        for view in _cut(shape.into, 0, ID_BYTES):
            view[:] = self._serial[at : at + len(view)]
            at += len(view)
        return S_OK

    def _discard(self, sector: int, shape: _Shape) -> int:
        return self._each_segment(shape, F_DISCARD, 0, lambda offset, length, flags: self.image.discard(offset, length))

    def _write_zeroes(self, sector: int, shape: _Shape) -> int:
        def zero(offset: int, length: int, flags: int) -> None:
            (self.image.discard if flags else self.image.zero)(offset, length)

        return self._each_segment(shape, F_WRITE_ZEROES, SEGMENT_F_UNMAP, zero)

    def _each_segment(self, shape: _Shape, feature: int, allowed: int, action: Callable[[int, int, int], object]) -> int:
        """Check all segments of a DISCARD or WRITE_ZEROES, then act on each (virtio 1.3 §5.2.6.2)."""
        if not self.features & feature:
            return S_IOERR if self.read_only else S_UNSUPP
        if not shape.out_len or shape.out_len % SEGMENT.size or shape.out_len > MAX_SEGMENTS * SEGMENT.size:
            return S_IOERR
        segments = list(SEGMENT.iter_unpack(b"".join(shape.out)))  # once: the driver may change it meanwhile
        for sector, sectors, flags in segments:
            if flags & ~allowed:
                return S_UNSUPP
            if sectors > MAX_SEGMENT_SECTORS or not self._in_range(sector, sectors):
                return S_IOERR
        for sector, sectors, flags in segments:
            if sectors:
                action(sector * SECTOR, sectors * SECTOR, flags)
        if self._durable_writes:
            self.image.flush()
        return S_OK


# ---------------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of "512M", "1G" … (binary units). Raises ValueError."""
    number = text.rstrip("KMGTkmgt")
    unit = text[len(number) :].upper()
    if not number.isdigit() or unit not in _UNITS:
        raise ValueError(f"{text!r} is no size")
    return int(number) * _UNITS[unit]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blk-file", metavar="FILE", help="the disk: an image file or a block device")
    parser.add_argument(
        "--aio",
        choices=("auto", "sync", "mmap"),
        default="auto",
        help="how the file is read: by system calls, or by copies from a mapping (auto: mmap where it is in memory, as in /dev/shm)",
    )
    parser.add_argument("--ram", metavar="SIZE", type=parse_size, help="a disk in memory instead: 512M, 1G …")
    parser.add_argument("--read-only", action="store_true", help="the guest cannot write")
    parser.add_argument("--num-queues", type=int, default=1, metavar="N", help="virtqueues (default 1); the VMM must not use more")
    parser.add_argument("--threads", type=int, metavar="N", help="worker threads (default: 1; on a free-threaded Python one for each queue)")
    parser.add_argument("--block-size", type=int, default=SECTOR, metavar="BYTES", help="size of logical blocks (default 512)")
    parser.add_argument("--serial", default="", help="what the guest sees as serial number, 20 bytes (default: the file's name)")


def _build(arguments: argparse.Namespace) -> Blk:
    if (arguments.blk_file is None) == (arguments.ram is None):
        raise ValueError("one of --blk-file and --ram is needed")
    mapped = {"auto": None, "sync": False, "mmap": True}[arguments.aio]
    image = (
        RamImage(arguments.ram, shared=arguments.processes > 1)
        if arguments.ram is not None
        else FileImage(arguments.blk_file, arguments.read_only, mapped)
    )
    return Blk(
        image,
        read_only=arguments.read_only,
        num_queues=arguments.num_queues,
        threads=arguments.threads or (1 if _has_gil() else arguments.num_queues),
        block_size=arguments.block_size,
        serial=arguments.serial,
        watch=True,
    )


def _has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def main() -> int:
    """The program: `--blk-file` and `--read-only` are the conventions' (vhost-user, "vhost-user-blk"), whose name of the type is "block"."""
    return run_device("block", _build, _options, features=("read-only", "blk-file"))


if __name__ == "__main__":
    sys.exit(main())
