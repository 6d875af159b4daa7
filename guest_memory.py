"""Guest RAM that a front-end shares over file descriptors.

Part of a framework for vhost-user back-ends in pure Python; needs the standard library alone, on Linux. Licensed under the Apache License,
Version 2.0.

In reading order:

- Mappings           shared memory mapped through libc, unmapped when the last view of it dies
- Truncation         `survive_truncation`: memory whose owner cuts it off does not end the process
- Order between CPUs `Fence`, the full memory fence; `atomic_or`, the atomic OR on a shared word
- Event descriptors  `event_writer`, `has_room`, `make_room`, `freed`, `clear_event`: the front-end has eventfds too, and may not keep us waiting
- Page faults        `Userfault`: pages that have not come yet, for postcopy migration
- Regions            `GuestRegionMmap`: one mapped range of guest addresses
- Memory             `GuestMemoryMmap`: an immutable set of regions, address translation, reads and writes; `FlatMemory`, most of it as one view
- IOMMU              `Iotlb`, `IovaMemory`: the same memory by I/O virtual addresses
- Dirty log          `DirtyLog`: which pages were written, for live migration
- Snapshots          `GuestMemoryAtomic`: the current set, swapped as a whole

`vring` walks rings and buffers through `GuestMemoryMmap`; `vhost_user` builds the regions from messages.

Four kinds of address occur (vhost-user, "Memory region description"): a *guest address* is the guest's physical one, a *user
address* is the front-end's own pointer to the same byte, and a *host address* is where this process has mapped it. With an IOMMU the driver
uses I/O virtual addresses (*IOVAs*) in the place of guest addresses.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import platform
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import weakref
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol, cast

__all__ = [
    "ACCESS_READ",
    "ACCESS_WRITE",
    "AddressSpace",
    "DirtyLog",
    "EVENT",
    "Fence",
    "FlatMemory",
    "GuestMemoryAtomic",
    "GuestMemoryError",
    "GuestMemoryMmap",
    "GuestRegionMmap",
    "Iotlb",
    "IotlbMiss",
    "IovaMemory",
    "MAX_REGIONS",
    "STRONGLY_ORDERED",
    "Userfault",
    "atomic_or",
    "clear_event",
    "event_writer",
    "freed",
    "has_room",
    "make_room",
    "map_shared",
    "survive_truncation",
    "truncation",
]

log = logging.getLogger("vhost_user")

MAX_REGIONS = 509
"""Most regions one guest may have: what the kernel's vhost and KVM allow (KVM_USER_MEM_SLOTS), and so what VMMs expect."""

ADDRESS_LIMIT = 1 << 64
"""Addresses, of guests and of processes, are below this."""

ACCESS_READ, ACCESS_WRITE = 1, 2
"""What an IOMMU lets the device do (vhost-user, "An IOTLB message")."""


class GuestMemoryError(Exception):
    """An address, a range or a region that guest memory does not or cannot have. The message names it and the likely cause."""


# ---------------------------------------------------------------------------------------------------------------------------
# Mappings
# ---------------------------------------------------------------------------------------------------------------------------
# The standard library's mmap keeps a duplicate of the file descriptor for as long as the mapping lives (until CPython 3.13), cannot
# map hugetlbfs at an odd size, and does not tell the address. libc's mmap does what is needed.

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.syscall.restype = ctypes.c_long

_PROT_READ, _PROT_READ_WRITE = 1, 3
_MAP_SHARED = 1
_MAP_RESERVE = 0x2 | 0x20 | 0x4000  # private, anonymous, nothing set aside for it
_MREMAP_MAYMOVE_FIXED = 1 | 2
_MAP_FAILED = ctypes.c_void_p(-1).value
_PAGE = os.sysconf("SC_PAGESIZE")
_HUGE = 1 << 30  # no processor here has larger pages
_MOST_SPAN = min(1 << 45, sys.maxsize >> 2)  # bytes of address space that guest memory may take up as one view: some of what a process has

_mappings: dict[int, int] = {}  # address -> length of all that is mapped

_MMAP_CAUSES = {
    errno.EACCES: "the file is not open for reading and writing: is the memory object read-only (readonly=on)?",
    errno.ENODEV: "this kind of file cannot be mapped: is it a memfd, a file or a hugetlbfs file?",
    errno.EINVAL: "the kernel refuses this offset or size: is the offset a multiple of the file's (huge) page size?",
    errno.ENOMEM: "no room: too many mappings (vm.max_map_count), or no huge pages left",
}


def map_shared(fd: int, offset: int, size: int, writable: bool = True) -> memoryview:
    """Map `size` bytes of `fd` from `offset`, shared; the view (and every slice of it) keeps the mapping alive.

    Unless it is `writable`, nobody may write to the view: that would end the process.

    Raises GuestMemoryError, also for a file that is too short: touching what it has not would raise SIGBUS.
    """
    _check_backing(fd, offset + size)
    unit = _mapping_unit(fd)
    start = offset & -unit
    length = -(-(offset - start + size) // unit) * unit  # munmap of hugetlbfs takes whole huge pages only
    if length > sys.maxsize:
        raise GuestMemoryError(f"{size:#x} bytes at offset {offset:#x} leave the address space")
    protection = _PROT_READ_WRITE if writable else _PROT_READ
    address = _libc.mmap(None, length, protection, _MAP_SHARED, fd, start)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        cause = _MMAP_CAUSES.get(code, "see errno")
        raise GuestMemoryError(f"mmap of {size:#x} bytes at offset {offset:#x}: {os.strerror(code)} ({cause})")
    return _owned(address, length)[offset - start : offset - start + size]


def _owned(address: int, length: int) -> memoryview:
    """What is mapped there, unmapped when the last view of it dies."""
    mapped = (ctypes.c_ubyte * length).from_address(address)
    _mappings[address] = length
    weakref.finalize(mapped, _unmap, address, length).atexit = False
    return memoryview(mapped).cast("B")


def _joined(parts: Sequence[memoryview]) -> memoryview:
    """Views of shared mappings as one, mapped a second time side by side. Raises GuestMemoryError unless they meet where pages do."""
    offset = _address_of(parts[0]) % _PAGE
    ends = [(_address_of(part) % _PAGE, (_address_of(part) + len(part)) % _PAGE) for part in parts]
    if any(end for _, end in ends[:-1]) or any(start for start, _ in ends[1:]):
        raise GuestMemoryError(f"{len(parts)} pieces of memory that do not meet at pages of {_PAGE} bytes cannot be one area")
    size = sum(map(len, parts))
    whole = _reserved(offset + size)
    at = 0
    for part in parts:
        at += _map_again(part, whole, at)
    return whole[offset : offset + size]


def _reserved(length: int) -> memoryview:
    """Room for mappings, in which nothing may be touched yet. Raises GuestMemoryError."""
    length = -(-length // _PAGE) * _PAGE
    address = _libc.mmap(None, length, 0, _MAP_RESERVE, -1, 0)
    if address is None or address == _MAP_FAILED:
        raise GuestMemoryError(f"no room for an area of {length:#x} bytes: {os.strerror(ctypes.get_errno())}")
    return _owned(address, length)


def _map_again(part: memoryview, room: memoryview, at: int) -> int:
    """Map the pages of `part`, a view of a shared mapping, a second time: from offset `at` of `room`, that of a page. Returns the bytes they are.
    Raises GuestMemoryError."""
    source, target = _address_of(part), _address_of(room) + at
    pages = -(-(source % _PAGE + len(part)) // _PAGE) * _PAGE
    # With an old size of 0 a shared mapping stays where it is and gets a second one (mremap(2)).
    if _libc.mremap(source - source % _PAGE, 0, pages, _MREMAP_MAYMOVE_FIXED, target) != target:
        raise GuestMemoryError(f"a piece of memory cannot be mapped again (huge pages?): {os.strerror(ctypes.get_errno())}")
    return pages


def _check_backing(fd: int, end: int) -> None:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size < end:
        raise GuestMemoryError(
            f"the file has {status.st_size:#x} bytes, the region ends at {end:#x}: "
            "is it the file of the memory object, and not truncated (size= and offset= as shared)?"
        )
    if stat.S_ISSOCK(status.st_mode) or stat.S_ISFIFO(status.st_mode) or stat.S_ISDIR(status.st_mode):
        raise GuestMemoryError("the file descriptor is no memory at all: is guest memory shared (share=on)?")


def _unmap(address: int, length: int) -> None:
    del _mappings[address]
    _libc.munmap(address, length)


def _mapping_unit(fd: int) -> int:
    """The page size in bytes that a mapping of `fd` is made of: a huge page for hugetlbfs files."""
    return max(_PAGE, os.fstat(fd).st_blksize) if os.fstatvfs(fd).f_bsize > _PAGE else _PAGE


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view)) if view else 0


# ---------------------------------------------------------------------------------------------------------------------------
# Truncation
# ---------------------------------------------------------------------------------------------------------------------------
# Whoever shares memory without sealing its size can cut the file short later. Touching what is no longer there raises SIGBUS, which ends
# the process. In a system call it is only EFAULT.


class _Sigaction(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (("action", ctypes.c_void_p), ("mask", ctypes.c_ubyte * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p))


_SA_SIGINFO, _SA_NODEFER = 4, 0x40000000
_SI_ADDR = 16  # offset of si_addr in siginfo_t, with 64-bit pointers
_MAP_PRIVATE_FIXED_ANONYMOUS = 0x2 | 0x10 | 0x20


class _Truncation:
    """What has been met so far. When `pages` has changed across a copy, the copy may hold zeroes instead of data, or have gone nowhere.

    survived  whether this process lives on when it meets one: see `survive_truncation`"""

    def __init__(self) -> None:
        self.pages = 0
        self.survived = False


truncation = _Truncation()


def _on_sigbus(number: int, info: int, context: int) -> None:
    """Put a page of zeroes where guest memory has gone. Anywhere else SIGBUS has its usual effect.

    This is Python code in a signal handler. It is sound because the signal is synchronous: it comes from the one load or store, in C code,
    that touched the page, with nothing of the interpreter half done.
    """
    touched = ctypes.c_uint64.from_address(info + _SI_ADDR).value
    page = touched & -_PAGE
    for address, length in _mappings.copy().items():  # which others change
        inside = address <= touched < address + length
        if inside and _libc.mmap(page, _PAGE, _PROT_READ_WRITE, _MAP_PRIVATE_FIXED_ANONYMOUS, -1, 0) == page:
            truncation.pages += 1
            return
    _libc.sigaction(number, ctypes.byref(_Sigaction()), None)  # the default: the same access ends the process


_sigbus_handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_sigbus)


def survive_truncation() -> None:
    """From here on, guest memory that its owner has cut off reads as zeroes instead of ending the process with SIGBUS.

    Changes what SIGBUS does in the whole process; a fault outside guest memory ends it as before. Programs made with `run_device` do this.
    Raises OSError when the kernel refuses, and does nothing where pointers have not 64 bits.
    """
    if ctypes.sizeof(ctypes.c_void_p) == 8:
        action = _Sigaction(action=ctypes.cast(_sigbus_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO | _SA_NODEFER)
        if _libc.sigaction(signal.SIGBUS, ctypes.byref(action), None):
            raise OSError(ctypes.get_errno(), "sigaction(SIGBUS)")
        truncation.survived = True


# ---------------------------------------------------------------------------------------------------------------------------
# Order between CPUs
# ---------------------------------------------------------------------------------------------------------------------------

STRONGLY_ORDERED = platform.machine() in ("x86_64", "AMD64", "i386", "i686", "s390x")
"""Whether loads are never reordered with loads nor stores with stores here, so that acquire and release order need no fence."""


class Fence:
    """A full memory fence (store-load included), called like a function; one object for each ring, used under the ring's lock.

    The standard library has no fence, but a held lock gives one. `release()` is a store with release order or stronger, `acquire()` a
    read-modify-write with acquire order or stronger, both on the same word: nothing before the first sinks below it, nothing after
    the second rises above it, and the second may not overtake the first. On x86-64 each is a locked instruction, which alone is a
    full fence; on aarch64 it is a store-release followed by a load-acquire, which are ordered with each other (RCsc). No other
    thread ever waits for this lock, so that neither call blocks or makes a syscall. About 0.1 µs.
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self._release = lock.release
        self._acquire = lock.acquire

    def __call__(self) -> None:
        self._release()
        self._acquire()


_SYS_FUTEX = {
    "x86_64": 202,
    "aarch64": 98,
    "riscv64": 98,
    "loongarch64": 98,
    "armv7l": 240,
    "i686": 240,
    "s390x": 238,
    "ppc64le": 221,
    "ppc64": 221,
}.get(platform.machine())
_FUTEX_WAKE_OP = 5
_FUTEX_OP_OR = 2
_FUTEX_OP_SHIFT = 8  # the operand is 1 << operand
_FUTEX_OPERAND_BITS = 12  # sign-extended to 32


def atomic_or(word: memoryview, mask: int) -> None:
    """OR `mask` (0 … 2³²-1) atomically into the 32-bit word of shared memory that the 4-byte view `word`, aligned to 4, stands for.

    A read-modify-write in Python loses bits when another process changes the word at the same time, as a VMM does that harvests
    a dirty log with an atomic exchange. The kernel's FUTEX_WAKE_OP does an atomic OR on the word in every architecture, for waking
    nobody. It costs about 2 µs: gather the bits of a word first. The call takes a 12-bit operand or one bit, so that a mask in the
    low 11 bits or of all ones is one call, and any other one call for each bit.

    Raises OSError when the kernel refuses, ValueError for a word that is not 4 aligned bytes.
    """
    address = _address_of(word)
    if word.nbytes != 4 or address % 4:
        raise ValueError(f"an atomic OR needs 4 bytes aligned to 4, not {word.nbytes} bytes at {address:#x}")
    for operation, operand in _or_steps(mask):
        encoded = operation << 28 | operand << 12
        if (
            _libc.syscall(
                ctypes.c_long(_SYS_FUTEX or -1),
                ctypes.c_void_p(address),
                ctypes.c_int(_FUTEX_WAKE_OP),
                ctypes.c_int(0),
                ctypes.c_void_p(0),
                ctypes.c_void_p(address),
                ctypes.c_uint32(encoded),
            )
            < 0
        ):
            raise OSError(ctypes.get_errno(), "futex(FUTEX_WAKE_OP) on a shared word")


def _or_steps(mask: int) -> list[tuple[int, int]]:
    """(operation, operand) of the futex calls that OR `mask` into a word."""
    sign = 1 << (_FUTEX_OPERAND_BITS - 1)
    if mask < sign or mask >= (1 << 32) - sign:
        return [(_FUTEX_OP_OR, mask & (2 * sign - 1))] if mask else []
    return [(_FUTEX_OP_OR | _FUTEX_OP_SHIFT, bit) for bit in range(32) if mask >> bit & 1]


# ---------------------------------------------------------------------------------------------------------------------------
# Event descriptors
# ---------------------------------------------------------------------------------------------------------------------------
# Eventfds mostly, or what a front-end takes for one: User-mode Linux gives a socket. An eventfd's mode belongs to the open file, which is the
# front-end's too. The kernel has no write to it that does not wait whatever the mode (pwritev2 knows none, and it cannot be opened anew). So it is
# looked at before each write. A front-end that fills it just in between gets the writer stuck, until somebody who waits for the writer makes room.

EVENT = (1).to_bytes(8, sys.byteorder)
"""8 bytes that add 1 to an eventfd's count."""


def event_writer(fd: int) -> Callable[[int, bytes], int]:
    """How to write to an event descriptor: `os.write`, or what does the same and never waits, where there is that."""
    return _send_now if stat.S_ISSOCK(os.fstat(fd).st_mode) else os.write


def _send_now(fd: int, data: bytes) -> int:
    sent: int = _libc.send(ctypes.c_int(fd), data, ctypes.c_size_t(len(data)), ctypes.c_int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL))
    if sent < 0:
        raise OSError(ctypes.get_errno(), "send")
    return sent


def has_room(fd: int) -> bool:
    """Whether an event descriptor can be written without waiting. If not, it is signalled already."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def make_room(fd: int) -> bool:
    """Free whoever is stuck in a write to an eventfd. Returns whether it was full: it may be again before the writer has had its turn."""
    if has_room(fd):
        return False
    clear_event(fd)
    return True


@contextmanager
def freed(unblock: Callable[[], object]) -> Iterator[None]:
    """For a thread that writes event descriptors and that nobody else waits for: whoever fills one just before does not keep it."""
    done = threading.Event()

    def free() -> None:
        while not done.wait(0.05):
            unblock()

    thread = threading.Thread(target=free, name="unblock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def clear_event(fd: int) -> None:
    """Read an eventfd's counter or bytes without waiting, whatever mode the front-end keeps the shared open file in."""
    with suppress(OSError):  # nothing to clear, or nothing that can be cleared
        try:
            os.preadv(fd, [bytearray(1 << 16)], -1, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and not os.get_blocking(fd):  # a pipe, before Linux 6.5
                os.read(fd, 1 << 16)


# ---------------------------------------------------------------------------------------------------------------------------
# Page faults
# ---------------------------------------------------------------------------------------------------------------------------

_SYS_USERFAULTFD = {
    "x86_64": 323,
    "aarch64": 282,
    "riscv64": 282,
    "loongarch64": 282,
    "armv7l": 388,
    "i686": 374,
    "s390x": 355,
}.get(platform.machine())
_UFFDIO_API = 0xC018AA3F  # ioctls of linux/userfaultfd.h, as all these architectures number them
_UFFDIO_REGISTER = 0xC020AA00
_UFFD_API = struct.Struct("=QQQ")  # version, features, ioctls
_UFFD_API_VERSION = 0xAA
_UFFD_REGISTER = struct.Struct("=QQQQ")  # start, length, mode, ioctls
_UFFD_MODE_MISSING = 1


class Userfault:
    """A userfaultfd: whoever touches a page of registered memory that is not there yet, in this process, waits until somebody else who has the
    file descriptor has put it there (vhost-user, "Migration").

    When its last descriptor is closed, everywhere, nobody waits any more: pages that are not there are zeroes then.
    """

    def __init__(self) -> None:
        """Raises GuestMemoryError when the kernel has none for us."""
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        fd = -1 if _SYS_USERFAULTFD is None else _libc.syscall(ctypes.c_long(_SYS_USERFAULTFD), ctypes.c_int(flags))
        if fd < 0:
            code = errno.ENOSYS if _SYS_USERFAULTFD is None else ctypes.get_errno()
            # One that is for user space alone (UFFD_USER_MODE_ONLY) would not do: system calls read and write guest memory as well.
            cause = "it needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1" if code == errno.EPERM else "does a seccomp filter forbid it?"
            raise GuestMemoryError(f"no userfaultfd: {os.strerror(code)} ({cause})")
        self.fd = fd
        try:
            fcntl.ioctl(fd, _UFFDIO_API, _UFFD_API.pack(_UFFD_API_VERSION, 0, 0))
        except OSError as error:
            self.close()
            raise GuestMemoryError(f"no userfaultfd: {error}") from None

    def register(self, region: GuestRegionMmap) -> None:
        """From here on pages of the region that are missing are waited for. Raises GuestMemoryError when the kernel cannot do that."""
        region.only_here = True
        mapped = cast(ctypes.Array[ctypes.c_ubyte], region.view.obj)  # all of it: whole pages
        start, length = ctypes.addressof(mapped), ctypes.sizeof(mapped)
        try:
            fcntl.ioctl(self.fd, _UFFDIO_REGISTER, _UFFD_REGISTER.pack(start, length, _UFFD_MODE_MISSING, 0))
        except OSError as error:
            raise GuestMemoryError(f"{region} cannot be watched for page faults: {error} (is it a memfd or hugetlbfs?)") from None

    def close(self) -> None:
        """Close this descriptor. To do so again has no effect."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Userfault:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------------------------------
# Regions
# ---------------------------------------------------------------------------------------------------------------------------


class GuestRegionMmap:
    """One range of guest addresses, mapped here (vhost-user, "Memory region description").

    guest_addr    first guest address
    size          bytes, at least 1
    user_addr     the front-end's address of the first byte
    mmap_offset   where in the file the region starts, in bytes; any value
    view          the region's bytes; slices keep the mapping alive
    only_here     whether this mapping cannot be made a second time: of huge pages, or watched for page faults
    """

    __slots__ = ("__weakref__", "_file", "_inode", "guest_addr", "mmap_offset", "only_here", "size", "user_addr", "view")

    def __init__(self, fd: int, guest_addr: int, size: int, user_addr: int, mmap_offset: int = 0) -> None:
        """Map the region. `fd` stays the caller's, and may be closed at once.

        Raises GuestMemoryError when the range is no range, or the file cannot back it.
        """
        for name, start in ("guest address", guest_addr), ("user address", user_addr), ("mmap offset", mmap_offset):
            if size <= 0 or start < 0 or start + size > ADDRESS_LIMIT:
                raise GuestMemoryError(f"region of {size:#x} bytes at {name} {start:#x} is empty or leaves the address space")
        self.guest_addr = guest_addr
        self.size = size
        self.user_addr = user_addr
        self.mmap_offset = mmap_offset
        self._file: int | None = None
        self._inode = _inode(fd)
        self.only_here = False
        try:
            self.view = map_shared(fd, mmap_offset, size)
            _tell_guest_address(self.view, guest_addr)
            self.only_here = _mapping_unit(fd) != _PAGE
        except (GuestMemoryError, OSError) as error:
            raise GuestMemoryError(f"{self}: {error}") from error

    @classmethod
    def allocate(cls, guest_addr: int, size: int, user_addr: int | None = None) -> GuestRegionMmap:
        """A region of new zeroed memory in a memfd of its own, for a front-end to share. `user_addr` is the mapping's own unless given."""
        fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            region = cls(fd, guest_addr, size, user_addr or 0)
        except BaseException:
            os.close(fd)
            raise
        region.user_addr = user_addr or region.host_addr
        region._file = fd
        weakref.finalize(region, os.close, fd).atexit = False
        return region

    def is_of(self, fd: int, guest_addr: int, size: int, user_addr: int, mmap_offset: int) -> bool:
        """Whether it is just what the constructor would make of this."""
        same = (guest_addr, size, user_addr, mmap_offset) == (self.guest_addr, self.size, self.user_addr, self.mmap_offset)
        return same and _inode(fd) == self._inode

    @property
    def host_addr(self) -> int:
        """Where the first byte is mapped in this process."""
        return _address_of(self.view)

    def fileno(self) -> int:
        """The file descriptor of an allocated region, to share it with. Raises ValueError for a region that somebody else shared."""
        if self._file is None:
            raise ValueError(f"{self} was shared by somebody else: its file descriptor is not kept")
        return self._file

    def __str__(self) -> str:
        return f"region of {self.size:#x} bytes at guest {self.guest_addr:#x} (user {self.user_addr:#x}, offset {self.mmap_offset:#x})"


def _tell_guest_address(view: memoryview, guest_addr: int) -> None:
    """Have all views of this mapping know where in the guest they are, whatever snapshot they are from: see `guest_ranges`."""
    mapping: Any = view.obj
    mapping.guest_shift = guest_addr - _address_of(view)


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


# ---------------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------------


class FlatMemory(NamedTuple):
    """Most of guest RAM as one view, for those who go by numbers: no object for each buffer, no search for its region.

    view            the byte at guest address a is view[a]; slices keep the mapping alive
    first, second   the ranges (start, end) of guest addresses that it has, the two largest; (0, 0): none. Nothing else may be touched: that would end
                    the process, or worse
    """

    view: memoryview
    first: tuple[int, int]
    second: tuple[int, int]

    @classmethod
    def of(cls, regions: Sequence[GuestRegionMmap]) -> FlatMemory:
        """Of regions in the order of their guest addresses: all that can be mapped a second time, side by side; or the largest one, if that is
        more."""
        largest = max(regions, key=lambda region: region.size, default=None)
        if largest is None or regions[-1].guest_addr + regions[-1].size > sys.maxsize:
            return NOWHERE
        if len(regions) > 1:
            with suppress(GuestMemoryError):
                several = cls._side_by_side([region for region in regions if not region.only_here])
                if several.first[1] - several.first[0] >= largest.size:
                    return several
        start, end = largest.guest_addr, largest.guest_addr + largest.size
        return cls(_shifted(largest.view, start, end), (start, end), (0, 0))

    @classmethod
    def _side_by_side(cls, regions: Sequence[GuestRegionMmap]) -> FlatMemory:
        """Raises GuestMemoryError when that cannot be."""
        if not regions:
            return NOWHERE
        base, last = regions[0].guest_addr & -_HUGE, regions[-1].guest_addr + regions[-1].size
        if last - base > _MOST_SPAN:
            raise GuestMemoryError(f"guest memory that spans {last - base:#x} bytes")
        room = _reserved(last - base + _HUGE)
        room = room[-_address_of(room) % _HUGE :]  # so that the kernel can go on using huge pages
        ranges: list[tuple[int, int]] = []
        mapped = 0
        for region in regions:
            start, end = region.guest_addr, region.guest_addr + region.size
            page = start - start % _PAGE
            if page < mapped or (region.host_addr - start) % _PAGE:
                raise GuestMemoryError(f"{region} begins within a page")
            mapped = page + _map_again(region.view, room, page - base)
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, end))
        ranges.sort(key=lambda one: one[0] - one[1])
        return cls(_shifted(room, base, last), *[*ranges, (0, 0)][:2])


def _shifted(memory: memoryview, start: int, end: int) -> memoryview:
    """`memory`, whose first byte gets the index `start`; `end` is behind the last one that is needed."""
    shifted: Any = (ctypes.c_ubyte * end).from_address((_address_of(memory) - start) % ADDRESS_LIMIT)
    shifted.memory = memory  # which it keeps alive
    view = memoryview(shifted).cast("B")
    shifted.guest_shift = -ctypes.addressof(shifted)
    return view


NOWHERE = FlatMemory(memoryview(b""), (0, 0), (0, 0))
"""Where addresses are IOVAs, or there is no memory."""


class GuestMemoryMmap:
    """An immutable set of regions: zero to 509, without overlap in guest or in user addresses.

    Every method that takes an address checks it: nothing outside the regions is ever touched.
    """

    __slots__ = ("__weakref__", "_flat", "_starts", "_user_order", "_user_starts", "regions")

    def __init__(self, regions: Iterable[GuestRegionMmap] = ()) -> None:
        """Raises GuestMemoryError when there are too many regions, or two overlap."""
        self.regions: tuple[GuestRegionMmap, ...] = tuple(sorted(regions, key=lambda region: region.guest_addr))
        if len(self.regions) > MAX_REGIONS:
            raise GuestMemoryError(f"{len(self.regions)} memory regions, more than {MAX_REGIONS}")
        self._flat: FlatMemory | None = None
        self._user_order = sorted(self.regions, key=lambda region: region.user_addr)
        self._starts = [region.guest_addr for region in self.regions]
        self._user_starts = [region.user_addr for region in self._user_order]
        _check_overlap(self.regions, self._starts, "guest")
        _check_overlap(self._user_order, self._user_starts, "user")

    @property
    def flat(self) -> FlatMemory:
        """Most of it as one view, made when it is asked for first."""
        if self._flat is None:
            self._flat = FlatMemory.of(self.regions)
        return self._flat

    @classmethod
    def from_ranges(cls, ranges: Iterable[tuple[int, int]]) -> GuestMemoryMmap:
        """New zeroed memory at each (guest address, size in bytes), in memfds: for a front-end, and for tests."""
        return cls(GuestRegionMmap.allocate(guest_addr, size) for guest_addr, size in ranges)

    def insert_region(self, region: GuestRegionMmap) -> GuestMemoryMmap:
        """This memory and `region`. Raises GuestMemoryError as the constructor does."""
        return GuestMemoryMmap((*self.regions, region))

    def remove_region(self, guest_addr: int, user_addr: int, size: int) -> GuestMemoryMmap:
        """This memory without the region that has just these three (vhost-user, REM_MEM_REG). Raises GuestMemoryError when none has."""
        wanted = (guest_addr, user_addr, size)
        kept = [region for region in self.regions if (region.guest_addr, region.user_addr, region.size) != wanted]
        if len(kept) == len(self.regions):
            have = "; ".join(map(str, self.regions)) or "none"
            raise GuestMemoryError(f"no region of {size:#x} bytes at guest {guest_addr:#x}, user {user_addr:#x} (have {have})")
        return GuestMemoryMmap(kept)

    def find_region(self, guest_addr: int) -> GuestRegionMmap | None:
        """The region that has the guest address, if any."""
        position = bisect_right(self._starts, guest_addr) - 1
        if position >= 0:
            region = self.regions[position]
            if guest_addr - region.guest_addr < region.size:
                return region
        return None

    def guest_ranges(self, view: memoryview) -> list[tuple[int, int]]:
        """(guest address, length) of a view that `view`, `views` or `flat` gave, here or in another snapshot of this guest's memory, where there
        still is a region."""
        shift = getattr(view.obj, "guest_shift", None)
        if shift is None:
            return []
        guest_addr = (_address_of(view) + shift) % ADDRESS_LIMIT
        return [(guest_addr, len(view))] if self.find_region(guest_addr) else []

    def user_to_guest(self, user_addr: int, length: int = 1) -> int:
        """The guest address of the front-end's address. Raises GuestMemoryError unless `length` bytes from it lie in one region."""
        position = bisect_right(self._user_starts, user_addr) - 1
        if position >= 0:
            region = self._user_order[position]
            offset = user_addr - region.user_addr
            if offset + length <= region.size:
                return region.guest_addr + offset
        raise GuestMemoryError(f"{length:#x} bytes at user address {user_addr:#x} lie in no region")

    def user_views(self, user_addr: int, length: int) -> list[memoryview]:
        """`length` bytes at the front-end's address, one view for each region they span. Raises GuestMemoryError when a byte is in none."""
        found = []
        position, left = user_addr, length
        while left > 0:
            region = self.find_region(self.user_to_guest(position))
            assert region is not None
            offset = position - region.user_addr
            part = region.view[offset : offset + left]
            found.append(part)
            position += len(part)
            left -= len(part)
        return found

    def view(self, guest_addr: int, length: int, access: int = ACCESS_READ | ACCESS_WRITE) -> memoryview:
        """`length` bytes at the guest address, as one view into guest RAM, where any `access` is allowed. Raises GuestMemoryError unless they lie in
        one region."""
        region = self.find_region(guest_addr)
        if region is not None:
            offset = guest_addr - region.guest_addr
            if 0 <= length <= region.size - offset:
                return region.view[offset : offset + length]
        raise GuestMemoryError(f"{length:#x} bytes at guest address {guest_addr:#x} are not in one region")

    def views(self, guest_addr: int, length: int, access: int = ACCESS_READ | ACCESS_WRITE) -> list[memoryview]:
        """`length` bytes at the guest address, one view for each region they span. Raises GuestMemoryError when a byte is outside RAM."""
        found = []
        position, left = guest_addr, length
        while left > 0:
            region = self.find_region(position)
            if region is None:
                raise GuestMemoryError(f"{length:#x} bytes at guest address {guest_addr:#x} leave RAM at {position:#x}")
            offset = position - region.guest_addr
            part = region.view[offset : offset + left]
            found.append(part)
            position += len(part)
            left -= len(part)
        return found

    def read(self, guest_addr: int, length: int) -> bytes:
        """A copy of `length` bytes. Raises GuestMemoryError when a byte is outside RAM."""
        return b"".join(self.views(guest_addr, length))

    def write(self, guest_addr: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to the guest address. Raises GuestMemoryError, with nothing written, when a byte is outside RAM."""
        _copy_into(self.views(guest_addr, len(data)), data)


def _copy_into(parts: Sequence[memoryview], data: bytes | bytearray | memoryview) -> None:
    source = memoryview(data).cast("B")
    done = 0
    for part in parts:
        part[:] = source[done : done + len(part)]
        done += len(part)


def _check_overlap(regions: Sequence[GuestRegionMmap], starts: list[int], kind: str) -> None:
    for (lower, start), following, upper in zip(zip(regions, starts), starts[1:], regions[1:]):
        if start + lower.size > following:
            raise GuestMemoryError(f"{lower} and {upper} overlap in {kind} addresses")


# ---------------------------------------------------------------------------------------------------------------------------
# IOMMU
# ---------------------------------------------------------------------------------------------------------------------------


class AddressSpace(Protocol):
    """What addresses in rings and descriptors stand for: guest addresses (`GuestMemoryMmap`), or IOVAs (`IovaMemory`). Those two document the
    methods."""

    def view(self, address: int, length: int, access: int = ..., /) -> memoryview: ...
    def views(self, address: int, length: int, access: int = ..., /) -> list[memoryview]: ...
    def write(self, address: int, data: bytes | bytearray | memoryview, /) -> None: ...
    @property
    def flat(self) -> FlatMemory: ...
    def guest_ranges(self, view: memoryview) -> list[tuple[int, int]]: ...


class IotlbMiss(Exception):
    """Translations that are not known, and which the front-end has been asked for: try again when there is an update.

    last  the IOVA that was asked for last: before that is answered it is of no use to try; None: not all could be asked for"""

    def __init__(self, last: int | None) -> None:
        super().__init__("translations are missing" if last is None else f"the translation of IOVA {last:#x} is missing")
        self.last = last

    def answered_by(self, iova: int, size: int) -> bool:
        """Whether it is time to try, after an update of this range."""
        return self.last is None or iova <= self.last < iova + size


class Iotlb:
    """Translations of IOVAs to user addresses, as the front-end tells them (vhost-user, "IOMMU support"). For any thread.

    It keeps LIMIT of them. Then the oldest one goes, and is asked for when it is needed again.
    """

    LIMIT = 16384
    MOST_ASKED = 64  # misses that are told at a time
    ASK_AGAIN = 1.0  # seconds without an answer
    MISS, UPDATE, INVALIDATE, ACCESS_FAIL = 1, 2, 3, 4  # types of IOTLB messages
    _LARGE = 1 << 21  # bytes of an update whose pages are too many to look for them one by one

    def __init__(self, tell: Callable[[int, int, int], bool]) -> None:
        """`tell(kind, iova, access)` tells the front-end of a MISS or an ACCESS_FAIL, if that needs no waiting, and returns whether it did."""
        self._tell = tell
        self._lock = threading.Lock()
        self._page = 0x1000  # how far a translation reaches: as far as the last one that came; no IOMMU has smaller pages
        self._asked: dict[int, float] = {}  # number of a page, and when it was asked for; not answered yet
        self._starts: list[int] = []
        self._entries: dict[int, tuple[int, int, int]] = {}  # by IOVA, the oldest first: size, user address, access

    def __len__(self) -> int:
        return len(self._entries)

    def update(self, iova: int, size: int, user_addr: int, access: int) -> bool:
        """`size` bytes at the IOVA are those at the user address. Returns whether that replaces something else."""
        with self._lock:
            dropped = self._drop(iova, iova + size)
            self._page = max(0x1000, size & -size)
            if size <= self._LARGE:
                for page in range(iova >> 12, (iova + size - 1 >> 12) + 1):
                    self._asked.pop(page, None)
            else:  # what of it is still unknown is asked for once more
                self._asked.clear()
            insort(self._starts, iova)
            self._entries[iova] = (size, user_addr, access)
            while len(self._entries) > self.LIMIT:
                oldest = next(iter(self._entries))
                self._drop(oldest, oldest + 1)
            return any(entry != (iova, size, user_addr, access) for entry in dropped)

    def invalidate(self, iova: int, size: int) -> None:
        """What is known of these `size` bytes is no longer so."""
        with self._lock:
            self._drop(iova, iova + size)

    def clear(self) -> None:
        """Nothing is known any more, and nothing asked for."""
        with self._lock:
            self._starts.clear()
            self._entries.clear()
            self._asked.clear()

    def _drop(self, start: int, end: int) -> list[tuple[int, int, int, int]]:
        """Forget all translations that have a byte in that range, and return them."""
        starts = self._starts
        first, last = bisect_right(starts, start), bisect_left(starts, end)
        if first and starts[first - 1] + self._entries[starts[first - 1]][0] > start:
            first -= 1
        dropped = [(iova, *self._entries.pop(iova)) for iova in starts[first:last]]
        del starts[first:last]
        return dropped

    def find(self, iova: int) -> tuple[int, int, int, int] | None:
        """The translation that has this IOVA: its first IOVA, size, user address and access. For a thread that others do not disturb."""
        position = bisect_right(self._starts, iova) - 1
        if position >= 0:
            start = self._starts[position]
            size, user_addr, access = self._entries[start]
            if iova - start < size:
                return start, size, user_addr, access
        return None

    def translate(self, iova: int, length: int, access: int) -> list[tuple[int, int]]:
        """(user address, length) of the pieces that `length` bytes at the IOVA consist of.

        Raises IotlbMiss when some are not known, after asking for them, and GuestMemoryError when `access` is not allowed there."""
        if iova + length > ADDRESS_LIMIT:
            raise GuestMemoryError(f"{length:#x} bytes at IOVA {iova:#x} leave the address space")
        found: list[tuple[int, int]] = []
        missing: list[int] = []
        at, end = iova, iova + length
        with self._lock:
            while at < end and len(missing) < self.MOST_ASKED:
                entry = self.find(at)
                if entry is None:
                    missing.append(at)
                    at = (at | self._page - 1) + 1
                    continue
                start, size, user_addr, allowed = entry
                if access & ~allowed:
                    self._tell(self.ACCESS_FAIL, at, access)
                    raise GuestMemoryError(f"IOVA {at:#x} is mapped with access {allowed}, and {access} is wanted (1: read, 2: write)")
                user_addr += at - start
                piece = min(end, start + size) - at
                if found and sum(found[-1]) == user_addr:
                    found[-1] = (found[-1][0], found[-1][1] + piece)
                else:
                    found.append((user_addr, piece))
                at += piece
            if missing:
                raise IotlbMiss(missing[-1] if self._ask(missing, access) else None)
        return found

    def _ask(self, missing: list[int], access: int) -> bool:
        """Tell the front-end of misses, unless an answer is on its way already. Returns whether all could be told: where many others are waiting
        there, one of those will be answered first."""
        now, asked = time.monotonic(), self._asked
        for iova in missing:
            page = iova >> 12
            if now < asked.get(page, -self.ASK_AGAIN) + self.ASK_AGAIN:
                continue
            if not self._tell(self.MISS, iova, access):
                return False
            asked.pop(page, None)
            if len(asked) >= self.LIMIT:
                del asked[next(iter(asked))]
            asked[page] = now
        return True


class IovaMemory:
    """Guest memory by IOVAs: `memory` as an `iotlb` shows it.

    Every method that takes an address raises IotlbMiss where a translation is missing, after asking the front-end for it, and GuestMemoryError
    where what is wanted is not allowed or not in RAM.
    """

    def __init__(self, memory: GuestMemoryMmap, iotlb: Iotlb) -> None:
        self._memory = memory
        self._iotlb = iotlb

    def views(self, iova: int, length: int, access: int = ACCESS_READ | ACCESS_WRITE) -> list[memoryview]:
        """`length` bytes at the IOVA, in as many views as it takes."""
        return [view for piece in self._iotlb.translate(iova, length, access) for view in self._memory.user_views(*piece)]

    def view(self, iova: int, length: int, access: int = ACCESS_READ | ACCESS_WRITE) -> memoryview:
        """The same as one view, also when the pages lie apart: then they are mapped once more, side by side."""
        parts = self.views(iova, length, access)
        if len(parts) == 1:
            return parts[0]
        for part in parts:  # in the mapping that a userfaultfd watches, if one does: what is not there yet comes now
            part[::_PAGE].tobytes(), part[-1]
        return _joined(parts)

    def read(self, iova: int, length: int) -> bytes:
        """A copy of `length` bytes."""
        return b"".join(self.views(iova, length, ACCESS_READ))

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to the IOVA."""
        _copy_into(self.views(iova, len(data), ACCESS_WRITE), data)

    @property
    def flat(self) -> FlatMemory:
        """Nothing: IOVAs lie anywhere."""
        return NOWHERE

    def guest_ranges(self, view: memoryview) -> list[tuple[int, int]]:
        """As `GuestMemoryMmap.guest_ranges`."""
        return self._memory.guest_ranges(view)

    def guest_pieces(self, iova: int, length: int) -> list[tuple[int, int]]:
        """(guest address, length) of all that `length` bytes at the IOVA consist of."""
        return [found for view in self.views(iova, length, 0) for found in self._memory.guest_ranges(view)]


# ---------------------------------------------------------------------------------------------------------------------------
# Dirty log
# ---------------------------------------------------------------------------------------------------------------------------


class DirtyLog:
    """The log of pages that this process has written, for a front-end that migrates the guest (vhost-user, "Migration").

    One bit for each 4 KiB page of guest addresses, shared with the front-end and with its other back-ends. `mark` gathers, `commit` sets
    the bits, after what they stand for has been written. Any thread may do either.
    """

    PAGE = 0x1000

    def __init__(self, view: memoryview, notify: int | None = None) -> None:
        """`view`: the shared bytes. `notify`: an eventfd to signal after changes; the caller's, who sees to it that a commit does not stay stuck
        there (`unblock`). Raises GuestMemoryError for bytes that cannot be changed atomically."""
        if _address_of(view) % 4:
            raise GuestMemoryError(f"a dirty log at {_address_of(view):#x}: its 32-bit words must be aligned (an odd offset in SET_LOG_BASE?)")
        self._view = view[: len(view) // 4 * 4]
        self._words = self._view.cast("I")
        self._notify = notify
        self._writers = 0  # threads that are about to signal it
        self._failed = False
        self._gathered: dict[int, int] = {}  # word -> bits
        self._lock = threading.Lock()
        self._fence = Fence()

    def mark(self, guest_addr: int, length: int) -> None:
        """Note that `length` bytes at the guest address were or are being written. Pages beyond the log are not noted."""
        if length <= 0:
            return
        last = min((guest_addr + length - 1) // self.PAGE, 32 * len(self._words) - 1)
        with self._lock:
            gathered = self._gathered  # not before: a commit takes it away
            for page in range(guest_addr // self.PAGE, last + 1):
                # Bytes hold eight pages each in rising order, whatever the byte order of words is.
                bit = page & 31 if sys.byteorder == "little" else page & 31 ^ 24
                gathered[page >> 5] = gathered.get(page >> 5, 0) | 1 << bit

    def commit(self) -> None:
        """Set the bits of all that was marked.

        A bit that is set already needs no store: the fence puts our look at it behind our writes, so that whoever clears it later copies
        the page with them."""
        with self._lock:
            if not self._gathered:
                return
            gathered, self._gathered = self._gathered, {}
            self._fence()
            changed = False
            for word, bits in gathered.items():
                missing = bits & ~self._words[word]
                if missing and not self._failed:
                    try:
                        atomic_or(self._view[4 * word : 4 * word + 4], missing)
                    except OSError as error:
                        self._failed = True
                        log.error("the dirty log cannot be written: %s; a migration with it loses data", error)
                    changed = True
        if changed and self._notify is not None and has_room(self._notify):
            self._write(self._notify)

    def _write(self, notify: int) -> None:
        with self._lock:
            self._writers += 1
        try:
            event_writer(notify)(notify, EVENT)  # without the lock: it may get stuck
        except OSError:
            pass  # nobody reads it
        finally:
            with self._lock:
                self._writers -= 1

    def unblock(self) -> bool:
        """Free whoever is stuck in a commit, since the front-end filled the eventfd just before. Returns whether it was full."""
        return self._writers > 0 and self._notify is not None and make_room(self._notify)


# ---------------------------------------------------------------------------------------------------------------------------
# Snapshots
# ---------------------------------------------------------------------------------------------------------------------------


class GuestMemoryAtomic:
    """The current guest memory. Whoever needs it takes a snapshot; a change swaps the whole set and leaves older snapshots usable."""

    __slots__ = ("_memory",)

    def __init__(self, memory: GuestMemoryMmap | None = None) -> None:
        self._memory = memory or GuestMemoryMmap()

    def memory(self) -> GuestMemoryMmap:
        """A snapshot of the current memory."""
        return self._memory

    def replace(self, memory: GuestMemoryMmap) -> None:
        """Make `memory` the current one. Callers who derive it from the old one serialise themselves (the daemon's control thread does)."""
        self._memory = memory
