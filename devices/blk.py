"""A virtio block device (virtio 1.3 §5.2): `python3 -m devices.blk --socket-path /run/disk.sock --blk-file disk.img`.

In reading order: facts of the device type, the images that can be behind it (`FileImage`, `RamImage`), a watch on the image's size, what a request
consists of, the ways in which transfers get done (`SystemCalls`, `Uring`), the device `Blk`, and the program.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import functools
import logging
import mmap
import os
import select
import stat
import struct
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import chain as concatenate
from pathlib import Path

from devices.io_uring import FSYNC_DATASYNC, OP_FSYNC, OP_READ, OP_READV, OP_WRITE, OP_WRITEV, RWF_DSYNC, IoUring, address_of
from guest_memory import GuestMemoryError, map_shared, truncation
from vhost_user import Refused, VhostUserBackend, VringEpollHandler, VringT, has_gil, run_device
from vring import DescriptorChain, FlatRequest, RequestBatch

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
HEADER_BYTES = REQUEST_HEADER.size
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
    copies_reads, copies_writes   whether these can be copies within memory: of `content`, and into it
    uring_fd     the file that io_uring shall transfer from and to; None: none
    read_cached  like `read`, of what is in the page cache; raises OSError rather than wait for the storage
    cached       whether writes go into the page cache, and seldom wait
    """

    name: str
    can_discard = True
    copies_reads = copies_writes = False
    uring_fd: int | None = None
    read_cached: Callable[[Views, int], int] | None = None
    cached = True
    read: Callable[[Views, int], int]  # attributes, so that a request's path leads into the kernel by one call
    write: Callable[[Views, int], int]

    @abstractmethod
    def size(self) -> int:
        """Bytes, as of now."""

    @abstractmethod
    def content(self) -> memoryview:
        """All of it, with `copies_reads`. When `truncation.pages` has changed across a copy, that has to be done again by `read` or `write`."""

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


AIO = ("auto", "sync", "mmap", "io_uring")


class FileImage(Image):
    """An image file or a block device, through the page cache or past it.

    Transfers can be copies out of a mapping of the file, and into it (`mmap`). A copy costs a fraction of a system call, but where it meets a page
    that is not in memory it keeps the whole interpreter waiting for the storage: so a mapping is for files that are always in memory, and only
    those are written that way. When there is no memory left for a hole, SIGBUS says so: the process has to survive it (`survive_truncation`).
    """

    def __init__(self, path: str, read_only: bool = False, aio: str = "auto", direct: bool = False) -> None:
        """`aio`: one of AIO. "sync": a system call for each transfer; "io_uring": many transfers at a time; "auto": "mmap" where the file is in a
        file system in memory (tmpfs), else "io_uring". Where that is not to be had it is "sync". `direct`: past the page cache.

        Raises OSError when it cannot be opened or mapped, ValueError when it is neither file nor block device, or `direct` and mapped."""
        self.name = os.path.basename(path)
        self.path = path
        # Without waiting: for the writer of a named pipe, say.
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK | os.O_CLOEXEC
        self.fd = os.open(path, flags)
        self._direct_fd: int | None = None
        self.read = functools.partial(os.preadv, self.fd)
        self.write = functools.partial(os.pwritev, self.fd)
        self._mapping = memoryview(b""), 0  # and `truncation.pages` when it was made
        self._can_zero = True
        try:
            mode = os.fstat(self.fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise ValueError(f"{path} is neither a file nor a block device")
            if aio == "auto":
                aio = "mmap" if _in_memory(self.fd) and not direct else "io_uring"
            if direct and aio == "mmap":
                raise ValueError("a mapping is of the page cache: it cannot be past it")
            if direct:
                self._go_past_the_cache(os.open(path, flags | os.O_DIRECT))
            if aio == "mmap":
                self._use_mapping(not read_only)
            elif aio == "io_uring" and _has_io_uring(self.fd):
                self.uring_fd = self.fd if self._direct_fd is None else self._direct_fd
                if not direct:
                    self.read_cached = self._cached_reads()
            self.can_discard = not read_only and self._takes_discards()
        except BaseException:
            self.close()
            raise

    def _go_past_the_cache(self, fd: int) -> None:
        self._direct_fd = fd
        self.cached = False
        self.read = functools.partial(_past_the_cache, os.preadv, fd, self.fd)
        self.write = functools.partial(_past_the_cache, os.pwritev, fd, self.fd)

    def _use_mapping(self, writable: bool) -> None:
        self.read = self._read_mapped
        self.copies_reads = True
        if writable and truncation.survived and _in_memory(self.fd):
            self.write = self._write_mapped
            self.copies_writes = True
        self.refresh()

    def _takes_discards(self) -> bool:
        status = os.fstat(self.fd)
        if stat.S_ISBLK(status.st_mode):
            return _device_can_discard(status.st_rdev)
        return self._fallocate(_FALLOC_PUNCH_HOLE, self.size(), 4096)

    def _cached_reads(self) -> Callable[[Views, int], int] | None:
        """`read_cached` of this file, if there is a way."""
        fd, flags = self.fd, 0 if _in_memory(self.fd) else os.RWF_NOWAIT  # where nothing waits the flag is not known either
        try:
            os.preadv(fd, [bytearray(1)], 0, flags)
        except BlockingIOError:
            pass
        except OSError:
            return None
        return lambda views, offset: os.preadv(fd, views, offset, flags)

    def size(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)  # a block device's too

    def refresh(self) -> None:
        if self.copies_reads:
            size, pages = self.size(), truncation.pages
            try:
                self._mapping = map_shared(self.fd, 0, size, self.copies_writes) if size else memoryview(b""), pages
            except GuestMemoryError as error:  # or it was cut short just now
                raise OSError(errno.EIO, str(error)) from error

    def content(self) -> memoryview:
        memory, pages = self._mapping
        if truncation.pages != pages:  # something was cut short, maybe this file: the mapping may keep zeroes where there is data again
            self.refresh()
            memory, _ = self._mapping
        return memory

    def _read_mapped(self, views: Views, offset: int) -> int:
        (memory, pages), position = self._mapping, offset
        try:
            for view in views:
                end = position + len(view)
                view[:] = memory[position:end]
                position = end
        except ValueError:  # beyond the mapping: the file has grown, or is shorter than it was
            return os.preadv(self.fd, views, offset)
        if truncation.pages != pages:
            self.refresh()
            return os.preadv(self.fd, views, offset)
        return position - offset

    def _write_mapped(self, views: Views, offset: int) -> int:
        (memory, pages), position = self._mapping, offset
        try:
            for view in views:
                end = position + len(view)
                memory[position:end] = view
                position = end
        except ValueError:
            return os.pwritev(self.fd, views, offset)
        if truncation.pages != pages:  # maybe it went nowhere: the file is shorter, or its file system full
            self.refresh()
            return os.pwritev(self.fd, views, offset)
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
        if self._direct_fd is not None:
            os.close(self._direct_fd)


def _past_the_cache(transfer: Callable[[int, Views, int], int], direct_fd: int, fd: int, views: Views, offset: int) -> int:
    """By way of aligned memory where the storage cannot take the guest's as it is. Only what is at an offset or of a length that is not aligned
    goes through the page cache: a page there must not meet, at the same time, what goes past it to other sectors of the same page."""
    for way in transfer, functools.partial(_bounced, transfer):
        try:
            return way(direct_fd, views, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return transfer(fd, views, offset)


def _bounced(transfer: Callable[[int, Views, int], int], fd: int, views: Views, offset: int) -> int:
    """MAX_RUN bytes at most: whoever transfers goes on after fewer than were asked for."""
    views = _cut(views, 0, MAX_RUN)
    length = sum(map(len, views))
    with mmap.mmap(-1, max(length, 1)) as pages, memoryview(pages) as whole, whole[:length] as aligned:
        if transfer is os.pwritev:
            aligned[:] = b"".join(views)
            return transfer(fd, [aligned], offset)
        done = transfer(fd, [aligned], offset)
        position = 0
        for view in views:
            step = min(len(view), done - position)
            if step <= 0:
                break
            view[:step] = aligned[position : position + step]
            position += step
        return done


def _device_can_discard(number: int) -> bool:
    """Of a block device, or the one that it is a partition of."""
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for queue in folder / "queue", folder.parent / "queue":
        with suppress(OSError):
            return (queue / "discard_max_bytes").read_text(encoding="ascii").strip() != "0"
    return False


def _has_io_uring(fd: int) -> bool:
    try:
        IoUring(1, [fd]).close()
    except OSError as error:
        log.warning("io_uring cannot be used here: %s. Each transfer is a system call instead", error.strerror)
        return False
    return True


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
        self._give_back = mmap.MADV_REMOVE if shared else mmap.MADV_DONTNEED  # pages, which then read as zeroes
        with suppress(OSError):  # a kernel without them
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # random blocks seldom lie in pages that the processor has just looked up
        self._view = memoryview(self._memory)
        self.copies_reads = self.copies_writes = True
        self.read = self._read
        self.write = self._write

    def size(self) -> int:
        return len(self._view)

    def content(self) -> memoryview:
        return self._view

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
            self._memory.madvise(self._give_back, first, last - first)
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
# Requests
# ---------------------------------------------------------------------------------------------------------------------------


NEVER = 1 << 64  # sectors that no disk has


class _Shape:
    """What a request's parts are for, which depends on the chain alone and is kept with it.

    header    the 16 bytes of the request header, or None when they lie in several parts
    out, out_len, out_sectors   data the driver sends, its bytes and sectors: NEVER where it cannot be written, for another length or data both ways
    into, into_len, into_sectors   likewise data the device returns
    status    the last device-writable byte
    """

    __slots__ = ("header", "into", "into_len", "into_sectors", "out", "out_len", "out_sectors", "status")

    def __init__(self, chain: DescriptorChain) -> None:
        readable, writable = chain.readable, chain.writable
        self.out_len = out = chain.readable_len - HEADER_BYTES
        self.into_len = into = chain.writable_len - 1
        self.out_sectors = NEVER if into or out % SECTOR else out // SECTOR
        self.into_sectors = NEVER if out or into % SECTOR else into // SECTOR
        self.header: memoryview | None = readable[0]
        self.status = writable[-1]
        self.out: Views = readable[1:]
        self.into: Views = writable[:-1]
        if len(readable[0]) != HEADER_BYTES:  # drivers have it so
            self.header = readable[0][:HEADER_BYTES] if len(readable[0]) > HEADER_BYTES else None
            self.out = _cut(readable, HEADER_BYTES, chain.readable_len)
        if len(self.status) != 1:  # likewise
            self.status = self.status[-1:]
            self.into = _cut(writable, 0, chain.writable_len - 1)


def _cut(parts: Views, start: int, end: int) -> list[memoryview]:
    """The bytes from start to end of all the parts taken together."""
    found = []
    for part in parts:
        if start < len(part) and end > 0:
            found.append(part[max(start, 0) : end] if start > 0 or end < len(part) else part)
        start -= len(part)
        end -= len(part)
    return found


# ---------------------------------------------------------------------------------------------------------------------------
# Transfers
# ---------------------------------------------------------------------------------------------------------------------------

MAX_RUN = 1 << 20  # bytes


class Run:
    """Requests of one batch that one transfer does: reads, or writes, of `length` bytes from `offset` on, the one behind the other; or a flush."""

    __slots__ = ("kind", "length", "offset", "pairs", "requests", "views", "vring")

    def __init__(self, vring: VringT, kind: int, offset: int, chain: DescriptorChain, shape: _Shape, views: Views, length: int) -> None:
        self.vring = vring
        self.kind = kind
        self.offset = offset
        self.requests = [(chain, shape)]
        self.views = views
        self.length = length
        self.pairs: ctypes.Array[ctypes.c_uint64] | None = None  # addresses and lengths of the views

    def takes(self, kind: int, offset: int, chain: DescriptorChain, shape: _Shape, views: Views, length: int) -> bool:
        """Add a request, if it goes on where this run ends."""
        if offset != self.offset + self.length or kind != self.kind or self.length + length > MAX_RUN or len(self.views) + len(views) > _IOV_MAX:
            return False
        self.requests.append((chain, shape))
        self.views = [*self.views, *views]
        self.length += length
        return True


Transfer = Callable[[Views, int], int]


class SystemCalls:
    """Each run is done when `start` returns."""

    def __init__(self, disk: Blk) -> None:
        self._disk = disk
        self._misses = False  # what is wanted at once is not to be had: it is not tried for the rest of the batch

    def at_once(self) -> tuple[Transfer | None, Transfer | None]:
        """How to read and to write without a run, if there is a way: it transfers less than asked for, or raises OSError, where a run is needed."""
        image = self._disk.image
        return image.read, image.write if self._disk.writes_at_once else None

    def do(self, batch: RequestBatch, requests: Sequence[FlatRequest], capacity: int) -> list[FlatRequest]:
        """Do what can be done at once, neighbours by one transfer. Returns the requests for which that is no way."""
        read, write = self.at_once()
        ram = batch.ram
        rest: list[FlatRequest] = []
        run: list[FlatRequest] = []
        views: list[memoryview] = []
        transfer: Transfer | None = None
        start = end = 0
        for request in requests:
            _, (kind, _, sector), _, into, at, length, _ = request
            way = (read if kind == T_IN else None) if into else write if kind == T_OUT else None
            offset = sector * SECTOR
            if way is None or length % SECTOR or offset + length > capacity:
                rest.append(request)
                continue
            if offset != end or way is not transfer or offset + length - start > MAX_RUN or len(views) == _IOV_MAX:
                if run:
                    self._finish(batch, run, end - start, transfer, views, start, rest)
                    run, views = [], []
                    if self._misses:
                        read = write = None
                transfer, start = way, offset
            run.append(request)
            views.append(ram[at : at + length])
            end = offset + length
        if run:
            self._finish(batch, run, end - start, transfer, views, start, rest)
        return rest

    def _finish(
        self, batch: RequestBatch, run: list[FlatRequest], length: int, transfer: Transfer | None, views: Views, start: int, rest: list[FlatRequest]
    ) -> None:
        try:
            whole = transfer is not None and not self._misses and transfer(views, start) == length
        except OSError:
            whole = False
        if not whole:
            self._misses = True
            rest += run
            return
        ram, done = batch.ram, batch.done
        for token, _, _, into, _, length, status in run:
            ram[status] = S_OK
            done += (token, length + 1 if into else 1)

    def start(self, run: Run) -> None:
        """Have a run done; the disk's `settle` is called at its end."""
        image = self._disk.image
        try:
            if run.kind == T_FLUSH:
                image.flush()
                done = 0
            else:
                done = (image.read if run.kind == T_IN else image.write)(run.views[:_IOV_MAX], run.offset)
                if run.kind == T_OUT and self._disk.durable_writes:
                    image.flush()
        except OSError as error:
            done = -(error.errno or errno.EIO)
        self._disk.settle(run, done)

    def submit(self) -> None:
        """All runs of a batch were started."""
        self._misses = False


class Uring(SystemCalls):
    """What the page cache has, and what goes into it, is transferred by system calls, which do not wait. All that may wait goes into the worker's
    io_uring: one system call for all of a batch; runs are done in any order."""

    _ENTRIES = 4096  # at most

    def __init__(self, disk: Blk, fd: int, worker: VringEpollHandler) -> None:
        """For transfers with the file `fd`. Raises OSError."""
        super().__init__(disk)
        self._worker = worker
        self._ring = IoUring(min(sum(ring.max_queue_size for ring in worker.vrings), self._ENTRIES), [fd])
        self._runs: dict[int, Run] = {}
        self._prepared: list[int] = []  # of `_runs`, those that have not been submitted
        self._count = 0
        worker.register_listener(self._ring.fd, select.EPOLLIN, len(worker.vrings))

    def at_once(self) -> tuple[Transfer | None, Transfer | None]:
        image = self._disk.image
        return image.read_cached, image.write if image.cached and self._disk.writes_at_once else None

    def start(self, run: Run) -> None:
        if run.views and not self._misses:
            transfer = self.at_once()[run.kind == T_OUT]
            if transfer:
                with suppress(OSError):
                    if transfer(run.views[:_IOV_MAX], run.offset) == run.length:
                        self._disk.settle(run, run.length)
                        return
                self._misses = True
        self._prepare(run)

    def _prepare(self, run: Run) -> None:
        while not self._ring.room:
            self._submit(wait=True)
        self._count = token = self._count + 1
        self._runs[token] = run
        self._prepared.append(token)
        prepare, views, offset = self._ring.prepare, run.views, run.offset
        flags = RWF_DSYNC if run.kind == T_OUT and self._disk.durable_writes else 0
        if run.kind == T_FLUSH:
            prepare(OP_FSYNC, 0, 0, 0, 0, FSYNC_DATASYNC, token)
        elif len(views) == 1:
            prepare(OP_READ if run.kind == T_IN else OP_WRITE, 0, address_of(views[0]), run.length, offset, flags, token)
        else:
            views = views[:_IOV_MAX]
            run.pairs = pairs = (ctypes.c_uint64 * (2 * len(views)))(*concatenate.from_iterable((address_of(view), len(view)) for view in views))
            prepare(OP_READV if run.kind == T_IN else OP_WRITEV, 0, ctypes.addressof(pairs), len(views), offset, flags, token)

    def submit(self) -> None:
        super().submit()
        if self._prepared:
            self._submit()

    def _submit(self, wait: bool = False) -> None:
        flying = self._ring.flying
        try:
            self._ring.submit(wait)
        except OSError as error:  # not to be expected: a filter that came later, say
            log.warning("io_uring failed: %s", error)
            for token in self._prepared[len(self._prepared) - (flying - self._ring.flying) :]:  # which it has not taken
                self._disk.settle(self._runs.pop(token), -(error.errno or errno.EIO))
        self._prepared.clear()
        if wait:  # for room; all else is seen to when the listener is called, by the batch for each ring
            self.settle()

    def settle(self) -> None:
        """Complete the requests whose transfers are done."""
        pop, settle = self._runs.pop, self._disk.settle
        for token, done in self._ring.completions():
            settle(pop(token), done)

    def wait(self, index: int) -> None:
        """Until nothing of ring `index` is on its way; from another thread than the worker's."""
        while any(run.vring.index == index for run in list(self._runs.values())):
            time.sleep(0.001)

    def close(self) -> None:
        """Wait until nothing is on its way."""
        self._worker.unregister_listener(self._ring.fd)
        self._ring.close()


# ---------------------------------------------------------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------------------------------------------------------


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
        """`threads` workers share the queues. `block_size`: of logical blocks, a power of two from 512. `serial`: cut off after 20 bytes; the image's
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
        self.durable_writes = False  # a write is only done when it is durable
        self._transfers: dict[int, Uring] = {}  # by ring
        self._system_calls = SystemCalls(self)
        self._negotiated: int | None = None  # of FLUSH and CONFIG_WCE
        self._chosen_writeback = mmap.mmap(-1, 1)  # what the driver has chosen last; shared by worker processes, which are new for each front-end
        self._chosen_writeback[0] = 1
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
        self._others: dict[int, Callable[[_Shape], int]] = {
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
                reload()  # it may have grown before it was watched
            except OSError as error:  # no inotify left, say
                log.warning("%s is not watched for growth, SIGHUP still works: %s", self.image.path, error)

    def connected(self) -> None:
        self._settle_writeback()

    def acked_features(self, features: int) -> None:
        self._negotiated = features & (F_FLUSH | F_CONFIG_WCE)
        self._settle_writeback()

    @property
    def writes_at_once(self) -> bool:
        """Whether a write is done when the storage has taken it."""
        return not (self.durable_writes or self.read_only)

    def _settle_writeback(self) -> None:
        """The cache mode, by what was negotiated and chosen."""
        # A driver that cannot flush expects that a write is durable when it is done (virtio 1.3 §5.2.6.2).
        can_choose = self._negotiated in (None, F_FLUSH | F_CONFIG_WCE)
        writeback = self._chosen_writeback[0] if can_choose else int(self._negotiated == F_FLUSH)
        self.config.writeback = writeback
        self.durable_writes = not writeback

    def reset_device(self) -> None:
        # What the driver has chosen stays. QEMU resets the device whenever the VM is stopped, and when that goes on, the driver has noticed
        # nothing and does not say it again: it would not flush, and believe that what it wrote is durable. A driver that really begins anew
        # reads what holds in config space, and chooses again.
        self._negotiated = None
        self._settle_writeback()

    def disconnected(self) -> None:
        super().disconnected()
        for index, transfers in self._transfers.copy().items():  # a worker may only just begin
            transfers.wait(index)  # a late one must not meet those of the next front-end
        # The cache mode stays, as over a reset: a front-end that comes back, for a driver that does not notice, does not say it again.

    def cancel_in_flight(self, index: int) -> None:
        if index in self._transfers:
            self._transfers[index].wait(index)

    def worker_started(self, worker: VringEpollHandler) -> None:
        if self.image.uring_fd is not None:
            transfers = Uring(self, self.image.uring_fd, worker)
            self._transfers.update((ring.index, transfers) for ring in worker.vrings)

    def worker_ended(self, worker: VringEpollHandler) -> None:
        for transfers in {self._transfers.pop(ring.index) for ring in worker.vrings if ring.index in self._transfers}:
            transfers.close()

    def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
        if device_event < len(vrings):
            return super().handle_event(device_event, evset, vrings, thread_id)
        with ExitStack() as stack:
            for vring in vrings:
                stack.enter_context(vring.batch())
            self._transfers[vrings[0].index].settle()
        return False

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        if offset != BlkConfig.writeback.offset or len(data) != 1 or data[0] > 1:
            raise Refused(f"only the writeback byte of config space can be written, not {len(data)} bytes at {offset}")
        if self._negotiated != F_FLUSH | F_CONFIG_WCE:
            raise Refused("writeback is the driver's to choose with VIRTIO_BLK_F_FLUSH and VIRTIO_BLK_F_CONFIG_WCE alone")
        self._chosen_writeback[0] = data[0]
        self._settle_writeback()
        if self.durable_writes:
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
        transfers = self._transfers.get(vring.index, self._system_calls)
        for batch in vring.requests(REQUEST_HEADER):
            rest = self._copy(batch) if self.image.copies_reads else batch.requests
            if rest:
                rest = transfers.do(batch, rest, self._capacity * SECTOR)
            if rest or batch.chains:
                self._serve(vring, transfers, [*batch.chains, *map(batch.chain, rest)])
                transfers.submit()

    def _copy(self, batch: RequestBatch) -> list[FlatRequest]:
        """Do what is a copy within memory. Returns all other requests."""
        pages, capacity = truncation.pages, self._capacity
        try:
            image = self.image.content()
        except OSError:  # cut short just now
            return batch.requests
        ram, done = batch.ram, batch.done.append
        writing = T_OUT if self.image.copies_writes and self.writes_at_once else None
        rest: list[FlatRequest] = []
        usual, last = 0, -1  # a length, and the last sector where that many bytes may begin
        for request in batch.requests:
            token, (kind, _, sector), _, into, at, length, status = request
            if length != usual:
                usual, last = length, -1 if length % SECTOR else capacity - length // SECTOR
            if sector <= last:
                offset = sector * SECTOR
                try:
                    if into:
                        if kind == T_IN:
                            ram[at : at + length] = image[offset : offset + length]
                            ram[status] = S_OK
                            done(token)
                            done(length + 1)
                            continue
                    elif kind == writing:
                        image[offset : offset + length] = ram[at : at + length]
                        ram[status] = S_OK
                        done(token)
                        done(1)
                        continue
                except ValueError:  # the image has grown, or is shorter than it was
                    pass
            rest.append(request)
        if truncation.pages != pages:
            batch.done.clear()
            return batch.requests
        return rest

    def _serve(self, vring: VringT, transfers: SystemCalls, chains: Sequence[DescriptorChain]) -> None:
        """Any requests: they are completed now, or by `settle`."""
        runs: list[Run] = []
        for chain in chains:
            shape = chain.memo
            if shape is None:
                if chain.readable_len < HEADER_BYTES or not chain.writable_len:
                    self._refuse(chain)
                    vring.add_used(chain, chain.writable_len)
                    continue
                shape = chain.memo = _Shape(chain)
            kind, _, sector = REQUEST_HEADER.unpack(shape.header or b"".join(_cut(chain.readable, 0, HEADER_BYTES)))
            if kind == T_FLUSH:
                runs.append(Run(vring, kind, 0, chain, shape, (), 0))
                continue
            if kind == T_IN:
                sectors, length, views = shape.into_sectors, shape.into_len, shape.into
            elif kind == T_OUT and not self.read_only:
                sectors, length, views = shape.out_sectors, shape.out_len, shape.out
            else:
                shape.status[0] = self._other(kind, shape)
                vring.add_used(chain, chain.writable_len)
                continue
            offset = sector * SECTOR
            if sector > self._capacity - sectors:
                shape.status[0] = S_IOERR
                vring.add_used(chain, chain.writable_len)
            elif not runs or not runs[-1].takes(kind, offset, chain, shape, views, length):
                runs.append(Run(vring, kind, offset, chain, shape, views, length))
        for run in runs:
            transfers.start(run)

    def settle(self, run: Run, done: int) -> None:
        """Complete the requests of a run, of whose bytes `done` were transferred; a negative error number: none that count."""
        add_used = run.vring.add_used
        if done == run.length:
            for chain, shape in run.requests:
                shape.status[0] = S_OK
                add_used(chain, chain.writable_len)
            return
        offset = run.offset
        for chain, shape in run.requests:
            views, length = (shape.into, shape.into_len) if run.kind == T_IN else (shape.out, shape.out_len)
            if run.kind == T_FLUSH:
                log.warning("%s: flush failed: %s", self.image.name, os.strerror(-done))
                shape.status[0] = S_IOERR
            else:
                shape.status[0] = self._alone(run.kind, views, offset, length)
            offset += length
            add_used(chain, chain.writable_len)

    def _alone(self, kind: int, views: Views, offset: int, length: int) -> int:
        """All of one request by itself, which did not work out at once: its status is to be its own."""
        transfer = self.image.read if kind == T_IN else self.image.write
        done = 0
        try:
            while done < length:
                step = transfer(_cut(views, done, length)[:_IOV_MAX], offset + done)
                if not step:
                    return S_IOERR  # the end of an image that has shrunk
                done += step
            if kind == T_OUT and self.durable_writes:
                self.image.flush()
        except OSError as error:
            log.warning("%s: request %d at sector %d failed: %s", self.image.name, kind, offset // SECTOR, error)
            return S_IOERR
        return S_OK

    def _other(self, kind: int, shape: _Shape) -> int:
        """A request that is rare, or a write to a disk that cannot be written: done at once."""
        if kind not in self._others:
            return S_IOERR if kind == T_OUT else S_UNSUPP
        try:
            return self._others[kind](shape)
        except OSError as error:
            log.warning("%s: request %d failed: %s", self.image.name, kind, error)
            return S_IOERR

    @staticmethod
    def _refuse(chain: DescriptorChain) -> None:
        """A chain that is no request: without header, or without room for a status."""
        log.debug("%r is no request", chain)
        if chain.writable:
            chain.writable[-1][-1] = S_IOERR

    def _in_range(self, sector: int, sectors: int) -> bool:
        return 0 <= sectors <= self._capacity - sector

    def _get_id(self, shape: _Shape) -> int:
        at = 0
        for view in _cut(shape.into, 0, ID_BYTES):
            view[:] = self._serial[at : at + len(view)]
            at += len(view)
        return S_OK

    def _discard(self, shape: _Shape) -> int:
        return self._each_segment(shape, F_DISCARD, 0, lambda offset, length, flags: self.image.discard(offset, length))

    def _write_zeroes(self, shape: _Shape) -> int:
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
        if self.durable_writes:
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
        choices=AIO,
        default="auto",
        help="how transfers get done: each by a system call, many at a time (io_uring), or by copies from and to a mapping; "
        "auto: mmap where the file is in memory, as in /dev/shm, else io_uring, or sync where there is none",
    )
    parser.add_argument("--direct", action="store_true", help="past the page cache (O_DIRECT)")
    parser.add_argument("--ram", metavar="SIZE", type=parse_size, help="a disk in memory instead: 512M, 1G …")
    parser.add_argument("--read-only", action="store_true", help="the guest cannot write")
    parser.add_argument("--num-queues", type=int, default=1, metavar="N", help="virtqueues (default 1); the VMM must not use more")
    parser.add_argument("--threads", type=int, metavar="N", help="worker threads (default: 1; on a free-threaded Python one for each queue)")
    parser.add_argument("--block-size", type=int, default=SECTOR, metavar="BYTES", help="size of logical blocks (default 512)")
    parser.add_argument("--serial", default="", help="what the guest sees as serial number, cut off after 20 bytes (default: the file's name)")


def _build(arguments: argparse.Namespace) -> Blk:
    if (arguments.blk_file is None) == (arguments.ram is None):
        raise ValueError("one of --blk-file and --ram is needed")
    if arguments.ram is not None and (arguments.aio != "auto" or arguments.direct):
        raise ValueError("--aio and --direct are for files")
    image = (
        RamImage(arguments.ram, shared=arguments.processes > 1)
        if arguments.ram is not None
        else FileImage(arguments.blk_file, arguments.read_only, arguments.aio, arguments.direct)
    )
    return Blk(
        image,
        read_only=arguments.read_only,
        num_queues=arguments.num_queues,
        threads=arguments.threads or (1 if has_gil() else arguments.num_queues),
        block_size=arguments.block_size,
        serial=arguments.serial,
        watch=True,
    )


def main() -> int:
    """The program: `--blk-file` and `--read-only` are the conventions' (vhost-user, "vhost-user-blk"), whose name of the type is "block"."""
    return run_device("block", _build, _options, features=("read-only", "blk-file"))


if __name__ == "__main__":
    sys.exit(main())
