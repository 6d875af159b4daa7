"""io_uring through ctypes: many transfers with one system call, done in any order (io_uring(7)).

One thread at a time uses a ring. Nothing here is guest memory's or the disk's: a transfer is an operation, a file, an address and a length.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import time
from collections.abc import Sequence

from guest_memory import STRONGLY_ORDERED, Fence

OP_READV, OP_WRITEV, OP_FSYNC, OP_READ, OP_WRITE = 1, 2, 3, 22, 23
FSYNC_DATASYNC = 1
RWF_DSYNC = 2

_SETUP, _ENTER, _REGISTER = 425, 426, 427  # system calls: the same numbers on all machines but Alpha
_SETUP_CLAMP, _SETUP_COOP_TASKRUN, _SETUP_SINGLE_ISSUER = 1 << 4, 1 << 8, 1 << 12
_FEAT_SINGLE_MMAP, _FEAT_NODROP, _FEAT_SUBMIT_STABLE = 1 << 0, 1 << 1, 1 << 2
_ENTER_GETEVENTS = 1
_REGISTER_FILES = 2
_OFFSET_RINGS, _OFFSET_ENTRIES = 0, 0x10000000
_FIXED_FILE = 1

_PARAMETERS = struct.Struct("=7I12x 8I8x 8I8x")  # struct io_uring_params: sizes, flags and features; offsets of both rings
_ENTRY = struct.Struct("=BBHiQQIIQ24x")  # struct io_uring_sqe up to user_data
_COMPLETION = struct.Struct("=QiI")  # struct io_uring_cqe

_syscall = ctypes.CDLL(None, use_errno=True)["syscall"]
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 7

REASONS = {
    errno.ENOSYS: "the kernel has none, or a filter of system calls forbids it",
    errno.EPERM: "the administrator (kernel.io_uring_disabled) or a filter of system calls forbids it",
    errno.EACCES: "a security module forbids it",
    errno.ENOMEM: "the limit of locked memory (ulimit -l) is too low",
}


def address_of(view: memoryview) -> int:
    """Where the view's bytes lie in this process. Raises TypeError for a view that is read-only."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class IoUring:
    """A submission ring and a completion ring.

    fd      readable (epoll) while there are completions
    room    how many transfers can be prepared before the next `submit`; none either while as many completions may be coming as there is room for
    flying  transfers that have been prepared and whose completion has not been returned yet
    """

    def __init__(self, entries: int, files: Sequence[int]) -> None:
        """Room for `entries` transfers between two calls of `submit`. `files`: what transfers are about, by position here.

        Raises OSError, with a likely cause, when the kernel has no io_uring for us."""
        self.flying = 0
        # Who submits is one thread, which looks for completions by itself and needs no interrupt for them: kernels from 6.0 on can make use of that.
        for flags in _SETUP_CLAMP | _SETUP_COOP_TASKRUN | _SETUP_SINGLE_ISSUER, _SETUP_CLAMP:
            parameters = bytearray(_PARAMETERS.pack(0, 0, flags, *bytes(20)))
            self.fd = _syscall(_SETUP, entries, address_of(memoryview(parameters)), 0, 0, 0, 0)
            if self.fd >= 0:
                break
        else:
            code = ctypes.get_errno()
            raise OSError(code, REASONS.get(code, os.strerror(code)))
        try:
            self._map(bytes(parameters))
            table = (ctypes.c_int * len(files))(*files)
            self._call(_REGISTER, _REGISTER_FILES, ctypes.addressof(table), len(files))
        except BaseException:
            os.close(self.fd)
            raise

    def _map(self, parameters: bytes) -> None:
        fields = _PARAMETERS.unpack(parameters)
        features = fields[5]
        self._entries, self._most = int(fields[0]), int(fields[1])  # of both rings
        submission, completion = fields[7:15], fields[15:23]
        wanted = _FEAT_SINGLE_MMAP | _FEAT_NODROP | _FEAT_SUBMIT_STABLE
        if features & wanted != wanted:
            raise OSError(errno.ENOSYS, "the kernel's io_uring is too old (Linux 5.5 has what is needed)")
        array, entries = submission[6], completion[5]
        size = max(array + 4 * self._entries, entries + _COMPLETION.size * self._most)
        rings = memoryview(mmap.mmap(self.fd, size, offset=_OFFSET_RINGS))
        self._submissions = memoryview(mmap.mmap(self.fd, 64 * self._entries, offset=_OFFSET_ENTRIES))
        self._numbers = rings[: size & ~3].cast("I")
        self._head, self._tail = completion[0] // 4, completion[1] // 4  # of completions
        self._our_tail = submission[1] // 4  # of submissions
        self._completions = rings[entries : entries + _COMPLETION.size * self._most]
        for number in range(self._entries):
            self._numbers[array // 4 + number] = number
        self._next = int(self._numbers[self._our_tail])  # behind what is prepared
        self._submitted = self._next
        self._fence = Fence()

    @property
    def room(self) -> int:
        return min(self._entries - (self._next - self._submitted), self._most - self.flying)

    def prepare(self, operation: int, file: int, address: int, length: int, offset: int, flags: int, token: int) -> None:
        """One more transfer for the next `submit`: `length` bytes at `address` (READ, WRITE), or that many pairs of address and length there
        (READV, WRITEV). `flags` are the operation's. What the transfer uses has to stay until its completion, the pairs until `submit`."""
        _ENTRY.pack_into(
            self._submissions, 64 * (self._next & self._entries - 1), operation, _FIXED_FILE, 0, file, offset, address, length, flags, token
        )
        self._next += 1
        self.flying += 1

    def submit(self, wait: bool = False) -> None:
        """Hand what was prepared to the kernel; `wait`: until something is completed.

        Raises OSError when the kernel does not take it; what it has not taken yet is forgotten then."""
        if not STRONGLY_ORDERED:
            self._fence()
        self._numbers[self._our_tail] = self._next & 0xFFFFFFFF
        try:
            while self._submitted != self._next or wait:
                self._submitted += self._call(_ENTER, self._next - self._submitted, int(wait), _ENTER_GETEVENTS if wait else 0)
                wait = False
        except OSError:
            self.flying -= self._next - self._submitted
            self._next = self._submitted
            self._numbers[self._our_tail] = self._next & 0xFFFFFFFF
            raise

    def completions(self) -> list[tuple[int, int]]:
        """(token, bytes or negative error) of all transfers that are complete since the last time."""
        numbers, ring, mask = self._numbers, self._completions, self._most - 1
        head, tail = numbers[self._head], numbers[self._tail]
        if head == tail:
            return []
        if not STRONGLY_ORDERED:
            self._fence()
        count = (tail - head) & 0xFFFFFFFF
        found = [_COMPLETION.unpack_from(ring, 16 * ((head + number) & mask))[:2] for number in range(count)]
        if not STRONGLY_ORDERED:
            self._fence()
        numbers[self._head] = tail
        self.flying -= count
        return found

    def close(self) -> None:
        """Wait for all transfers, since they use memory of others, and let go of the ring."""
        while self.flying:
            self.submit(wait=True)
            self.completions()
        os.close(self.fd)

    def _call(self, number: int, first: int, second: int, third: int) -> int:
        while True:
            result = int(_syscall(number, self.fd, first, second, third, 0, 0))
            if result >= 0:
                return result
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                time.sleep(0.001)  # the kernel is short of memory
            elif code != errno.EINTR:
                raise OSError(code, os.strerror(code))
