"""Virtqueues: split and packed, device side and driver side.

Part of a framework for vhost-user back-ends in pure Python; needs the standard library alone, on Linux. Licensed under the Apache License,
Version 2.0.

In reading order:

- Facts              descriptor flags, feature bits and layouts of virtio 1.3 §2.7 and §2.8
- Descriptor chains  `DescriptorChain`, what a device works with; `RequestBatch`, many chains of the commonest shape as plain numbers
- In-flight tracking `SplitInflight`, `PackedInflight`: what a back-end that dies leaves to its next life
- Device side        `Queue`, and its two formats `SplitQueue` and `PackedQueue`: chains in, completions out, notifications
- Rings of a daemon  `VringState` (a queue with its eventfds and switches), `VringMutex` and `VringRwLock` (the same, shared by threads)
- Driver side        `SplitDriverQueue` and `PackedDriverQueue`, for front-ends and tests

Whatever the driver writes is taken as hostile: it is copied once, the copy is checked, and only the copy is used. A bad chain is
returned with length 0 and counted; a bad ring is broken until it is started again.

Cost is per batch, not per request: one look at the available index takes all that is there, one store publishes what is done,
one signal tells the driver. A chain object stays with its place in the ring and remembers the bytes of its descriptors: when the
driver comes with the same ones, nothing is parsed and nothing made; they are the content that was checked, so that this needs no check.
"""

from __future__ import annotations

import logging
import os
import select
import struct
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import chain as concatenate
from typing import TYPE_CHECKING, Any, ContextManager, Literal, Protocol

if TYPE_CHECKING or not __package__:
    from guest_memory import (
        ACCESS_READ,
        ACCESS_WRITE,
        EVENT,
        STRONGLY_ORDERED,
        AddressSpace,
        DirtyLog,
        Fence,
        FlatMemory,
        GuestMemoryAtomic,
        GuestMemoryError,
        Iotlb,
        IotlbMiss,
        IovaMemory,
        clear_event,
        event_writer,
        freed,
        has_room,
        make_room,
    )
else:
    from .guest_memory import (
        ACCESS_READ,
        ACCESS_WRITE,
        EVENT,
        STRONGLY_ORDERED,
        AddressSpace,
        DirtyLog,
        Fence,
        FlatMemory,
        GuestMemoryAtomic,
        GuestMemoryError,
        Iotlb,
        IotlbMiss,
        IovaMemory,
        clear_event,
        event_writer,
        freed,
        has_room,
        make_room,
    )

__all__ = [
    "DescriptorChain",
    "DriverQueue",
    "FlatRequest",
    "MAX_QUEUE_SIZE",
    "NoLock",
    "PackedDriverQueue",
    "PackedQueue",
    "Parts",
    "Queue",
    "RequestBatch",
    "SplitDriverQueue",
    "SplitQueue",
    "TurnLock",
    "VIRTIO_F_ACCESS_PLATFORM",
    "VIRTIO_F_IN_ORDER",
    "VIRTIO_F_INDIRECT_DESC",
    "VIRTIO_F_EVENT_IDX",
    "VIRTIO_F_RING_PACKED",
    "VIRTIO_F_RING_RESET",
    "VIRTIO_F_VERSION_1",
    "VringError",
    "VringMutex",
    "VringRwLock",
    "VringState",
    "VringT",
]

log = logging.getLogger("vhost_user")

# ---------------------------------------------------------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------------------------------------------------------

VIRTIO_F_INDIRECT_DESC = 28  # bit numbers of virtio 1.3 §6
VIRTIO_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_ACCESS_PLATFORM = 33
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_IN_ORDER = 35
VIRTIO_F_RING_RESET = 40

MAX_QUEUE_SIZE = 32768
"""Most entries of a virtqueue (virtio 1.3 §2.7, §2.8)."""

MAX_INDIRECT = 1024
"""Most entries of an indirect table on a smaller queue. The specification stops at the queue size, but Linux's drivers go by seg_max
alone and QEMU takes 1024: a guest with a queue of 64 that sends 128 segments works everywhere, and shall here."""

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
PACKED_F_AVAIL = 1 << 7
PACKED_F_USED = 1 << 15
PACKED_F_BOTH = PACKED_F_AVAIL | PACKED_F_USED

AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

EVENT_FLAGS_ENABLE = 0  # event suppression structures of the packed ring (virtio 1.3 §2.8.14)
EVENT_FLAGS_DISABLE = 1
EVENT_FLAGS_DESC = 2

_DESCRIPTOR_SIZE = 16
_THREE = 3 * _DESCRIPTOR_SIZE
_CHAIN_FLAGS = DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT
_NEXT_WRITE = DESC_F_NEXT | DESC_F_WRITE
_NEXT_OF_BYTE = bytes(value & DESC_F_NEXT for value in range(256))
_MOST_DATA = 1 << 31  # bytes of a request's data that go as plain numbers: with header and status it is under _MOST_BYTES
_SWAP = sys.byteorder == "big"  # rings are little-endian, but for those of legacy drivers
_DESCRIPTOR = struct.Struct("<QIHH")  # address, length, then flags, next (split) or id, flags (packed)
_UNPACK_ONE = _DESCRIPTOR.unpack_from
_THREE_DESCRIPTORS = struct.Struct("<" + 3 * "QIHH")
_UNPACK_THREE, _PACK_THREE = _THREE_DESCRIPTORS.unpack_from, _THREE_DESCRIPTORS.pack
_BIG_DESCRIPTOR = struct.Struct(">QIHH")
# Of a descriptor that the other side is looking at, all but the flags: pack_into clears its whole target first, and flags that are 0 for
# a moment may mean "available" (or, on the device side, "used").
_PACKED_DESCRIPTOR_HIDDEN = struct.Struct("<QIH")
_MOST_BYTES = 1 << 32  # a chain's length is a u32 in the used ring


def _align(offset: int, unit: int) -> int:
    return -(-offset // unit) * unit


def _swap16(value: int) -> int:
    return (value & 0xFF) << 8 | value >> 8


def _swap64(value: int) -> int:
    return int.from_bytes(value.to_bytes(8, "little"), "big")


@lru_cache(maxsize=256)
def _table_struct(entries: int, big_endian: bool) -> struct.Struct:
    return struct.Struct(("<", ">")[big_endian] + "QIHH" * entries)


@lru_cache(maxsize=256)
def _used_struct(entries: int, big_endian: bool) -> struct.Struct:
    return struct.Struct(("<", ">")[big_endian] + "II" * entries)


class VringError(Exception):
    """A use of a ring that is wrong: in a device, or in the configuration that a front-end gave."""


class _MalformedChain(Exception):
    """The driver made a chain that breaks the rules; the ring goes on."""


class _Scrambled(Exception):
    """Descriptors that are not one chain in the order in which they stand: each has to be looked up."""


class _BrokenRing(Exception):
    """The driver broke the ring itself: nothing behind this point can be trusted."""


# ---------------------------------------------------------------------------------------------------------------------------
# Descriptor chains
# ---------------------------------------------------------------------------------------------------------------------------


Parts = tuple[tuple[memoryview, ...], tuple[memoryview, ...], int, int]
"""Of a chain: the device-readable ones, the device-writable ones, and how many bytes each are."""


class DescriptorChain:
    """One buffer that the driver made available (virtio 1.3 §2.7.13), from the ring's iterator until `add_used`.

    readable      the device-readable parts, views straight into guest RAM, in order
    writable      the device-writable parts, likewise
    readable_len  bytes in `readable`
    writable_len  bytes in `writable`
    memo          whatever the device wants to keep about these parts; None at first. A driver uses its buffers again and again, and
                  the framework then hands out the same object with a new content: what depends on the parts alone may stay in here

    Don't use a chain after `add_used`.
    """

    __slots__ = (
        *("_content", "_descriptors", "_holder", "_read_at", "_table", "_token", "_used", "_write_at"),
        *("memo", "readable", "readable_len", "writable", "writable_len"),
    )

    def __init__(self, token: int, parts: Parts = ((), (), 0, 0)) -> None:
        self._token = token
        self._used: int | None = None
        self._read_at = 0
        self._write_at = 0
        self._holder: Queue | None = None  # the queue it was taken from, until it is completed
        self._learn(b"", None, b"", parts)

    def _learn(self, descriptors: bytes, table: memoryview | None, content: bytes, parts: Parts) -> None:
        """These are the chain's parts for as long as the same `descriptors` stand in its place of the ring, with that `content` of the indirect
        `table`, if they name one."""
        self._descriptors = descriptors
        self._table = table
        self._content = content
        self.readable, self.writable, self.readable_len, self.writable_len = parts
        self.memo: Any = None

    @property
    def id(self) -> int:
        """What the driver calls it: the index of the head descriptor (split) or the buffer id (packed), 0 … 65535."""
        return self._token & 0xFFFF

    def read(self, length: int = -1) -> bytes:
        """The next `length` device-readable bytes, or all that are left; shorter at the end."""
        start = self._read_at
        end = self.readable_len if length < 0 else min(start + length, self.readable_len)
        self._read_at = end
        return b"".join(_span(self.readable, start, end))

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Put `data` into the next device-writable bytes; as much as fits. Returns how many bytes were written by this call."""
        source = memoryview(data).cast("B")
        start = self._write_at
        end = min(start + len(source), self.writable_len)
        done = 0
        for part in _span(self.writable, start, end):
            part[:] = source[done : done + len(part)]
            done += len(part)
        self._write_at = end
        return done

    def __repr__(self) -> str:
        return f"<chain {self.id}: {self.readable_len} bytes readable, {self.writable_len} writable>"


FlatRequest = tuple[int, tuple[Any, ...], int, bool, int, int, int]
"""A chain of three descriptors as numbers: token, the header's fields, where the header is, whether the data is device-writable, where the data is,
its length in bytes (more than 0), where the status is. Places are guest addresses; all of it was checked."""


class RequestBatch:
    """What a ring's `requests` gives at a time. Mostly a chain is a header for the device to read, data in one piece, and a status for it to write:
    such a one is a `FlatRequest` of plain numbers, and costs a fraction of an object with views. The next batch is in the same object.

    ram       most of guest RAM, as one view with guest addresses for indices: the data of a request is ram[at : at + length]
    requests  the chains of that shape
    chains    all others, for `add_used` as ever
    done      for the device to fill: token, length written, token, length written … of the requests that it has done. They are published with
              the chains that were completed meanwhile, when the device asks for the next batch

    A request that is not done by then has to be made a chain (`chain`) before. Its header in guest RAM may have changed since it was unpacked.
    """

    __slots__ = ("_header", "_queue", "_shape", "chains", "done", "ram", "requests")

    ram: memoryview
    _queue: Queue

    def __init__(self, header: struct.Struct, status: int) -> None:
        self._header = header
        self._shape = header.size, status
        self.requests: list[FlatRequest] = []
        self.chains: list[DescriptorChain] = []
        self.done: list[int] = []

    def chain(self, request: FlatRequest) -> DescriptorChain:
        """One of `requests` as a chain, for `add_used`, now or later."""
        token, _, header_at, into, at, length, status_at = request
        ram, (size, written) = self.ram, self._shape
        header, data, status = ram[header_at : header_at + size], ram[at : at + length], ram[status_at : status_at + written]
        parts: Parts = ((header,), (data, status), size, length + written) if into else ((header, data), (status,), size + length, written)
        chain = DescriptorChain(token, parts)
        chain._holder = self._queue
        return chain


def _span(parts: tuple[memoryview, ...], start: int, end: int) -> Iterator[memoryview]:
    """The bytes from start to end of all the parts taken together."""
    for part in parts:
        size = len(part)
        if end <= 0:
            return
        if start < size:
            yield part[max(start, 0) : end]
        start -= size
        end -= size


# ---------------------------------------------------------------------------------------------------------------------------
# In-flight tracking
# ---------------------------------------------------------------------------------------------------------------------------
# What is in flight is noted in memory that the front-end keeps, so that a back-end that dies, at whatever instruction, can take it up
# again (vhost-user, "Inflight I/O tracking"). The order of stores is the specification's; within one process a mapping keeps it.


class InflightTracker(ABC):
    """One queue's part of the in-flight region, which the front-end keeps for the next life of the back-end. Native byte order."""

    HEADER: int
    ENTRY: int
    VERSION = 1

    def __init__(self, area: memoryview, size: int) -> None:
        """`area` for a queue of `size` entries: see `bytes_for`. All zero when it is new. Raises VringError when it is for another size."""
        if len(area) < self.bytes_for(size):
            raise VringError(f"the in-flight region has {len(area)} bytes for a queue of {size}, which needs {self.bytes_for(size)}")
        self._size = size
        self._u8 = area
        self._u16 = area.cast("H")
        self._u32 = area.cast("I")
        self._u64 = area.cast("Q")
        self.fresh = self._u16[4] != self.VERSION
        if self.fresh:
            self._u16[5] = size
            self._reset()
            self._u16[4] = self.VERSION
        elif self._u16[5] != size:
            raise VringError(f"the in-flight region is for a queue of {self._u16[5]}, this one has {size}")
        self._counter = 0

    @classmethod
    def bytes_for(cls, size: int) -> int:
        """What a queue of `size` entries takes, rounded up so that the next one is aligned."""
        return _align(cls.HEADER + cls.ENTRY * size, 64)

    @abstractmethod
    def _reset(self) -> None:
        """Initial values, in a region of zeroes."""

    def _continue_counter(self, counters: Iterable[int]) -> None:
        """Behind those of what is in flight. Raises VringError when no life could have counted so far."""
        self._counter = max(counters, default=0) + 1
        if self._counter >> 63:
            raise VringError(f"the in-flight region has counted to {self._counter - 1:#x}")


class SplitInflight(InflightTracker):
    """Of a split queue (QueueRegionSplit, DescStateSplit): entries by head descriptor."""

    HEADER, ENTRY = 16, 16
    _LAST_BATCH_HEAD, _USED_IDX = 6, 7  # items of the u16 view

    def _reset(self) -> None:
        pass

    def recover(self, used_index: int) -> list[int]:
        """What was in flight at the end of the life before, in the order in which it was taken: head descriptors. Raises VringError.

        Finishes the batch that was being published then: all of its entries, not the last one alone."""
        u8, u16, u64, size = self._u8, self._u16, self._u64, self._size
        head = u16[self._LAST_BATCH_HEAD]
        for _ in range(min((used_index - u16[self._USED_IDX]) & 0xFFFF, size)):
            if head >= size:
                break  # not ours, or torn
            u8[16 + 16 * head] = 0
            head = u16[11 + 8 * head]
        u16[self._USED_IDX] = used_index
        heads = [head for head in range(size) if u8[16 + 16 * head]]
        heads.sort(key=lambda head: u64[3 + 2 * head])
        self._continue_counter(u64[3 + 2 * head] for head in heads)
        return heads

    def note_taken(self, heads: Iterable[int]) -> None:
        """These are in flight from here on."""
        u8, u64, counter = self._u8, self._u64, self._counter
        for head in heads:
            u64[3 + 2 * head] = counter
            counter += 1
            u8[16 + 16 * head] = 1
        self._counter = counter

    def note_put_back(self, heads: Iterable[int]) -> None:
        """These were not taken after all, the last one first."""
        for head in heads:
            self._u8[16 + 16 * head] = 0

    def note_used(self, heads: Iterable[int]) -> None:
        """These are about to be published."""
        u16 = self._u16
        last = u16[self._LAST_BATCH_HEAD]
        for head in heads:
            u16[11 + 8 * head] = last
            u16[self._LAST_BATCH_HEAD] = last = head

    def note_published(self, heads: Iterable[int], used_index: int) -> None:
        """They have been."""
        u8 = self._u8
        for head in heads:
            u8[16 + 16 * head] = 0
        self._u16[self._USED_IDX] = used_index


class PackedInflight(InflightTracker):
    """Of a packed queue (QueueRegionPacked, DescStatePacked): entries in a free list; they keep the descriptors, which the ring does not.

    What the region says of the free list and of chains is read once, and checked (`recover`). From then on it is written alone: the front-end may
    spoil it at any time, which then concerns the next life."""

    HEADER, ENTRY = 32, 32
    _FREE_HEAD, _OLD_FREE_HEAD = 6, 7  # items of the u16 view
    _POSITIONS = struct.Struct("=HHBB2x")  # item 2 of the u64 view: used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter

    def _reset(self) -> None:
        for index in range(self._size):
            self._u16[17 + 16 * index] = index + 1
        self._set_used(1 << 15, 1 << 15)

    def __init__(self, area: memoryview, size: int) -> None:
        super().__init__(area, size)
        self._entries: dict[int, list[int]] = {}  # by buffer id: entries in flight, the oldest first
        self._next = list(range(1, size + 1))  # by entry: the next one of its chain, or of the free list
        self._last = [0] * size  # by a chain's first entry: its last one
        self._free_head = 0
        self._used = 1 << 15  # the used position, with its wrap counter in bit 15, when all that was about to be published has been

    def _set_used(self, used: int, old: int) -> None:
        # All of it in one store: a position with the other lap's wrap counter is somewhere else.
        positions = self._POSITIONS.pack(used & 0x7FFF, old & 0x7FFF, used >> 15, old >> 15)
        self._u64[2] = int.from_bytes(positions, sys.byteorder)

    def begin(self, used: int) -> None:
        """A new region's ring begins at this used position, with its wrap counter in bit 15."""
        self._used = used
        self._commit()

    # Entry i begins at byte 32 + 32 i: u8 inflight, u8, u16 next, u16 last, u16 num, u64 counter, u16 id, u16 flags, u32 len, u64 addr.

    def recover(self, ring_flags: Callable[[int], int]) -> tuple[list[tuple[int, bytes]], int]:
        """What was in flight, in the order in which it was taken: (token, descriptors) each; and the next used position, with its wrap
        counter in bit 15. `ring_flags`: the flags of a ring's descriptor as they stand. Raises VringError when the region does not hold together."""
        u8, u16, size = self._u8, self._u16, self._size
        used_idx, position, used_wrap, wrap = self._POSITIONS.unpack(self._u64[2].to_bytes(8, sys.byteorder))
        self._used, self._free_head = position & 0x7FFF | (wrap & 1) << 15, u16[self._OLD_FREE_HEAD]
        if (used_idx, used_wrap) != (position, wrap):
            available = PACKED_F_AVAIL if wrap else PACKED_F_USED
            if position < size and ring_flags(position) & PACKED_F_BOTH != available:  # the driver has seen them
                self._used, self._free_head = used_idx & 0x7FFF | (used_wrap & 1) << 15, u16[self._FREE_HEAD]
        u16[self._FREE_HEAD] = self._free_head
        self._commit()
        self._next = [u16[17 + 16 * index] for index in range(size)]
        free = self._chain(self._free_head, size)
        for index in free:
            u8[32 + 32 * index] = 0
        heads = [index for index in range(size) if u8[32 + 32 * index]]
        heads.sort(key=lambda index: self._u64[5 + 4 * index])
        self._continue_counter(self._u64[5 + 4 * index] for index in heads)
        chains = [self._chain(head, u16[19 + 16 * head]) for head in heads]
        if not all(chains) or sorted([*free, *concatenate.from_iterable(chains)]) != list(range(size)):
            raise VringError("the in-flight region does not hold together: not each entry is either free or of one chain")
        found = []
        for chain in chains:
            descriptors = bytearray()
            for index in chain:
                identity, flags = u16[24 + 16 * index], u16[25 + 16 * index]
                descriptors += _DESCRIPTOR.pack(self._u64[7 + 4 * index], self._u32[13 + 8 * index], identity, flags)
            self._last[chain[0]] = index
            self._entries.setdefault(identity, []).append(chain[0])
            found.append((len(chain) << 16 | identity, bytes(descriptors)))
        return found, self._used

    def _chain(self, index: int, count: int) -> list[int]:
        """Up to `count` entries from one on, as long as they are any."""
        chain: list[int] = []
        while index < self._size and len(chain) < count:
            chain.append(index)
            index = self._next[index]
        return chain

    def note_taken(self, chains: Iterable[tuple[int, bytes]]) -> None:
        """These are in flight from here on: (token, descriptors) each."""
        u8, u16, u32, u64, following = self._u8, self._u16, self._u32, self._u64, self._next
        for token, content in chains:
            head = index = free = self._free_head
            u16[19 + 16 * head] = 0
            u64[5 + 4 * head] = self._counter
            self._counter += 1
            u8[32 + 32 * head] = 1
            for count, (address, length, identity, flags) in enumerate(_DESCRIPTOR.iter_unpack(content), 1):
                index = free
                u16[19 + 16 * head] = count
                u64[7 + 4 * index] = address
                u32[13 + 8 * index] = length
                u16[25 + 16 * index] = flags
                u16[24 + 16 * index] = identity
                u16[self._FREE_HEAD] = free = following[index]
            u16[18 + 16 * head] = self._last[head] = index
            u16[self._OLD_FREE_HEAD] = self._free_head = free
            self._entries.setdefault(token & 0xFFFF, []).append(head)

    def note_put_back(self, tokens: Iterable[int]) -> None:
        """These were not taken after all, the last one first."""
        for token in tokens:
            head = self._entries[token & 0xFFFF].pop()
            self._free(head)
            self._u16[self._OLD_FREE_HEAD] = head  # first: one that is neither free nor in flight would be lost
            self._u8[32 + 32 * head] = 0

    def _free(self, head: int) -> None:
        last = self._last[head]
        self._u16[17 + 16 * last] = self._next[last] = self._free_head
        self._u16[self._FREE_HEAD] = self._free_head = head

    def note_used(self, tokens: Iterable[int], used: int) -> list[int]:
        """These are about to be published; `used` is the position after that, with its wrap counter in bit 15. Returns their entries."""
        heads = []
        for token in tokens:
            identity = token & 0xFFFF
            head = self._entries[identity].pop(0)
            if not self._entries[identity]:
                del self._entries[identity]
            self._free(head)
            heads.append(head)
        self._set_used(used, self._used)
        self._used = used
        return heads

    def note_published(self, heads: Iterable[int]) -> None:
        """They have been."""
        for head in heads:
            self._u8[32 + 32 * head] = 0
        self._commit()

    def _commit(self) -> None:
        self._u16[self._OLD_FREE_HEAD] = self._free_head
        self._set_used(self._used, self._used)


# ---------------------------------------------------------------------------------------------------------------------------
# Device side
# ---------------------------------------------------------------------------------------------------------------------------


class _Ring:
    """Either side of a virtqueue: numbers in shared memory, in the ring's byte order."""

    def __init__(self, big_endian: bool) -> None:
        self.big_endian = big_endian
        self._swap = big_endian != _SWAP
        self._descriptor = _BIG_DESCRIPTOR if big_endian else _DESCRIPTOR

    def _load(self, view: memoryview, item: int) -> int:
        value: int = view[item]
        return _swap16(value) if self._swap else value

    def _store(self, view: memoryview, item: int, value: int) -> None:
        view[item] = _swap16(value) if self._swap else value


class Queue(_Ring, ABC):
    """The device side of a virtqueue in guest RAM. Callers see to it that one thread at a time is inside.

    size         entries
    outstanding  descriptors-in-ring that the device has taken and not yet published as used (split: chains)
    completed    token, length, token, length … of chains that are done and not yet published; any thread may extend it by such a pair
    taken        chains taken so far
    malformed    chains that were refused so far
    stalled      what the next chain waits for, if its addresses have no translation yet
    most_waiting  the most chains that any `take` has found, where the format tells (split); whoever goes by it sets it back to 0
    event_idx, in_order   whether VIRTIO_F_EVENT_IDX and VIRTIO_F_IN_ORDER were negotiated
    log          where what the device writes is marked; None: nowhere
    log_used_at  where the log has the used ring; None: that is not logged
    """

    _MOST_KEPT = 1 << 14  # descriptors, at some 200 bytes each, whose parts are remembered

    def __init__(
        self,
        memory: AddressSpace,
        size: int,
        areas: tuple[int, int, int],
        features: int,
        complaint: Callable[[str], None],
        big_endian: bool = False,
    ) -> None:
        """`areas` are the addresses in `memory` of descriptor table or ring, driver area and device area; `big_endian`: the driver is a legacy one
        of such a guest. Raises GuestMemoryError when an area is not in RAM, IotlbMiss when it may be, VringError for a size or alignment that the
        format does not have."""
        self._check_size(size)
        super().__init__(big_endian)
        self.size = size
        self.outstanding = 0
        self.taken = 0
        self.malformed = 0
        self.stalled: IotlbMiss | None = None
        self.most_waiting = 0
        self.completed: list[int] = []
        self.event_idx = bool(features >> VIRTIO_F_EVENT_IDX & 1)
        self.in_order = bool(features >> VIRTIO_F_IN_ORDER & 1)
        self._indirect = bool(features >> VIRTIO_F_INDIRECT_DESC & 1)
        self._order: deque[DescriptorChain] = deque()
        self._again: deque[DescriptorChain] = deque()  # in flight when the back-end's last life ended, not taken yet in this one
        self._taken_again = False  # whether the last `take` was of those
        self._fence = Fence()
        self._complain = complaint
        self.log: DirtyLog | None = None
        self.log_used_at: int | None = None
        self.move(memory, areas)

    def move(self, memory: AddressSpace, areas: tuple[int, int, int]) -> None:
        """Go on in another snapshot of guest memory, or at other addresses; the ring's state stays. Raises as the constructor does."""
        self._extents: list[tuple[int, int]] = []
        self._map(memory, *areas)
        self._memory = memory
        self._written = (
            [piece for extent in self._device_written() for piece in memory.guest_pieces(*extent)] if isinstance(memory, IovaMemory) else []
        )
        self._spans = [slice(at, at + _DESCRIPTOR_SIZE) for at in range(0, self.size * _DESCRIPTOR_SIZE, _DESCRIPTOR_SIZE)]
        self.forget()

    def forget(self) -> None:
        """Translate all addresses of chains anew from here on."""
        self._flat: FlatMemory = self._memory.flat
        self._limits: tuple[int, ...] = ()
        self._forget_chains()

    def _forget_chains(self) -> None:
        """Remember no chain from here on."""
        self._long: dict[bytes, Parts] = {}
        self._kept = 0

    def _keep(self, parts: Parts) -> Parts:
        """These are about to be remembered. How much memory that takes is not the driver's choice: at some point all others are forgotten."""
        count = len(parts[0]) + len(parts[1])
        if count > 3:  # of short ones there are not that many
            if self._kept + count > self._MOST_KEPT:
                self._forget_chains()
            self._kept += count
        return parts

    def _set_limits(self, header: int, status: int) -> None:
        """Where in flat memory the parts of a FlatRequest with a header and a status of so many bytes may begin: these sizes; where the two ranges
        start; the last places in each of a header, a status, a table of three; and where the ranges end."""
        _, (start, end), (start2, end2) = self._flat
        ends = (end - header, end2 - header, end - status, end2 - status, end - _THREE, end2 - _THREE, end, end2)
        self._limits = (header, status, start, start2, *ends)

    def lies_in(self, address: int, size: int) -> bool:
        """Whether the ring itself has a byte in that range."""
        return any(start < address + size and address < start + length for start, length in self._extents)

    def _area(self, memory: AddressSpace, address: int, length: int, alignment: int, access: int, name: str) -> memoryview:
        if address % alignment:
            raise VringError(f"{name} at guest address {address:#x} is not aligned to {alignment}")
        self._extents.append((address, length))
        try:
            return memory.view(address, length, access)
        except GuestMemoryError as error:
            raise GuestMemoryError(f"{name}: {error}") from None

    # The format's own part

    @abstractmethod
    def _check_size(self, size: int) -> None: ...

    @abstractmethod
    def _map(self, memory: AddressSpace, desc: int, driver: int, device: int) -> None: ...

    @property
    @abstractmethod
    def used_index(self) -> int:
        """The next used position (split: the used index as it stands in guest memory)."""

    @property
    @abstractmethod
    def base(self) -> int:
        """The position as SET_VRING_BASE and GET_VRING_BASE have it (vhost-user, "vring state description")."""

    @abstractmethod
    def start(self, base: int, inflight: memoryview | None = None) -> None:
        """Begin at `base`, with nothing in flight; or, with the ring's part of an in-flight region, where that one says. What was in flight
        then is taken again before anything else."""

    @abstractmethod
    def available(self) -> bool:
        """Whether the driver has made a chain available that was not taken."""

    @abstractmethod
    def take(self, limit: int) -> list[DescriptorChain]:
        """Up to `limit` chains that the driver made available, in order. Raises _BrokenRing.

        Chains that break the rules are completed with length 0 at once, and not among them."""

    @abstractmethod
    def _take_flat(self, batch: RequestBatch, limit: int) -> bool:
        """Up to `limit` chains from the next one on that have the shape of a FlatRequest. Returns whether it met one that has another. Raises
        _BrokenRing."""

    @abstractmethod
    def put_back(self, chains: Sequence[DescriptorChain]) -> None:
        """Undo `take` for the last ones it gave."""

    @abstractmethod
    def _publish(self, batch: list[int]) -> None: ...

    @abstractmethod
    def _device_written(self) -> list[tuple[int, int]]:
        """Those of `_extents` that the device writes to."""

    @abstractmethod
    def enable_notification(self) -> bool:
        """Ask the driver to notify again. Returns whether there are chains already, for which no notification may come."""

    @abstractmethod
    def disable_notification(self) -> None:
        """Tell the driver that it need not notify (a hint)."""

    @abstractmethod
    def needs_notification(self) -> bool:
        """Whether the driver wants to be notified of what was published since the last call."""

    # What both formats share

    def take_requests(self, batch: RequestBatch, limit: int) -> None:
        """`take` for a batch that is empty: those that have the shape as numbers, all others as chains. Raises _BrokenRing."""
        batch._queue = self
        batch.ram = self._flat.view
        if self._again or self.in_order or self.log or self._swap or _SWAP:  # what needs more than its completion goes by chains
            batch.chains = self.take(limit)
            return
        requests, chains = batch.requests, batch.chains
        others = 1
        while limit > 0:
            before, count = self.taken, len(requests)
            try:
                if not self._take_flat(batch, limit):
                    return
                # Where one is of another shape, the next one mostly is as well.
                others = 1 if len(requests) > count else 2 * others
                chains += self.take(others)
            except _BrokenRing:
                if not (requests or chains):
                    raise
                return  # these first: it comes again
            if self.taken == before:
                return
            limit -= self.taken - before

    def complete_in_order(self, chain: DescriptorChain, length: int) -> None:
        """Note that the chain is done, and pass on as completed all that now are in the order of `take` (VIRTIO_F_IN_ORDER)."""
        chain._used = length
        order = self._order
        while order and order[0]._used is not None:
            first = order.popleft()
            self.completed.extend((first._token, first._used or 0))

    def publish(self) -> None:
        """Write all completions to the ring and show them to the driver."""
        batch = self.completed[:]
        del self.completed[: len(batch)]
        if batch:
            self._publish(batch)
            if self.log:
                self.log.commit()

    def log_written(self, chain: DescriptorChain) -> None:
        """Mark all that the device may have written into a chain, whatever length it reports."""
        if self.log:
            for view in chain.writable:
                for address, length in self._memory.guest_ranges(view):
                    self.log.mark(address, length)

    def _log_used(self, offset: int, length: int) -> None:
        """Mark what was written to the used ring (packed: to the device event suppression area). With an IOMMU: all of it, where it lies."""
        if self.log and self.log_used_at is not None:
            for piece in self._written or ((self.log_used_at + offset, length),):
                self.log.mark(*piece)

    def _begin(self) -> None:
        self._signalled: int | None = None
        self.outstanding = 0
        self._order.clear()
        self._again.clear()

    def _take_again(self, limit: int) -> list[DescriptorChain]:
        """What was in flight in the last life."""
        chains = [self._again.popleft() for _ in range(min(limit, len(self._again)))]
        for chain in chains:
            chain._holder = self
            chain._read_at = chain._write_at = 0
        self.outstanding += sum(map(self._slots, chains))
        self._hand_out(chains)
        self._taken_again = True
        return chains

    def _put_back_again(self, chains: Sequence[DescriptorChain]) -> None:
        self._again.extendleft(reversed(chains))
        self.outstanding -= sum(map(self._slots, chains))
        self._undo_hand_out(chains)

    @staticmethod
    @abstractmethod
    def _slots(chain: DescriptorChain) -> int:
        """What the chain counts in `outstanding`."""

    def _hand_out(self, chains: list[DescriptorChain]) -> None:
        """Bookkeeping of a batch that `take` returns."""
        self.taken += len(chains)
        if self.in_order:
            for chain in chains:
                chain._used = None
            self._order.extend(chains)

    def _undo_hand_out(self, chains: Sequence[DescriptorChain]) -> None:
        self.taken -= len(chains)
        for chain in chains:
            chain._holder = None
            if self.in_order:
                self._order.pop()

    def _reject(self, token: int, reason: _MalformedChain) -> None:
        """Give a bad chain back with length 0, so that the driver's slot is not lost. Its caller counts it as outstanding."""
        self.malformed += 1
        self.taken += 1
        self._complain(f"chain {token & 0xFFFF} refused: {reason}")
        if self.in_order:
            chain = DescriptorChain(token)
            self._order.append(chain)
            self.complete_in_order(chain, 0)
        else:
            self.completed.extend((token, 0))

    def _table(self, address: int, length: int) -> memoryview:
        """The view of an indirect table, checked."""
        if not self._indirect:
            raise _MalformedChain("an indirect descriptor, though VIRTIO_F_INDIRECT_DESC was not negotiated")
        if not length or length % _DESCRIPTOR_SIZE:
            raise _MalformedChain(f"an indirect table of {length} bytes, not a multiple of {_DESCRIPTOR_SIZE}")
        if length // _DESCRIPTOR_SIZE > max(self.size, MAX_INDIRECT):
            raise _MalformedChain(f"an indirect table of {length // _DESCRIPTOR_SIZE} descriptors on a queue of {self.size}")
        try:
            return self._memory.view(address, length, ACCESS_READ)
        except GuestMemoryError as error:
            raise _MalformedChain(f"indirect table: {error}") from None

    def _table_parts(self, content: bytes) -> Parts:
        """`_parts` of an indirect table. Long ones are remembered by their content: drivers put the same buffers into other tables."""
        if len(content) <= _THREE:
            return self._parse_table(content)
        parts = self._long.get(content)
        if parts is None:
            parts = self._keep(self._parse_table(content))
            self._long[content] = parts
        return parts

    @abstractmethod
    def _parse_table(self, content: bytes) -> Parts:
        """The parts that an indirect table tells of."""

    def _parts(self, content: bytes, first: int | None) -> Parts:
        """`_any_parts`, which is short for what is in flat memory and right: header, data, status, as a disk's driver makes them."""
        if len(content) == _THREE and not self._swap:
            a, a_len, a_flags, a_next, b, b_len, b_flags, b_next, c, c_len, c_flags, c_next = _UNPACK_THREE(content)
            if first is None:
                a_flags, b_flags, c_flags = a_next | DESC_F_NEXT, b_next | DESC_F_NEXT, c_next & ~DESC_F_NEXT
                linked = True
            else:
                linked = a_next == first + 1 and b_next == first + 2
            ram, (start, end), (start2, end2) = self._flat
            if (
                linked
                and a_flags & _CHAIN_FLAGS == DESC_F_NEXT
                and b_flags & (DESC_F_NEXT | DESC_F_INDIRECT) == DESC_F_NEXT
                and c_flags & _CHAIN_FLAGS == DESC_F_WRITE
                and a_len
                and b_len
                and c_len
                and (start <= a <= end - a_len or start2 <= a <= end2 - a_len)
                and (start <= b <= end - b_len or start2 <= b <= end2 - b_len)
                and (start <= c <= end - c_len or start2 <= c <= end2 - c_len)
                and a_len + b_len + c_len < _MOST_BYTES
            ):
                header, data, status = ram[a : a + a_len], ram[b : b + b_len], ram[c : c + c_len]
                if b_flags & DESC_F_WRITE:
                    return (header,), (data, status), a_len, b_len + c_len
                return (header, data), (status,), a_len + b_len, c_len
        return self._any_parts(content, first)

    def _any_parts(self, content: bytes, first: int | None) -> Parts:
        """The parts of the chain whose descriptors are `content`, checked: everything in RAM, readable before writable, under 4 GiB. Raises
        IotlbMiss after all of its missing translations were asked for.

        `first`: for split, the index that the first one has in its table; raises _Scrambled when they are not one chain just like this.
        None: packed, where they follow by position."""
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        readable_len = writable_len = 0
        ram, (start, end), (second_start, second_end) = self._flat
        number = first
        miss: IotlbMiss | None = None
        for address, length, third, fourth in self._descriptor.iter_unpack(content):
            flags = third if number is not None else fourth
            if flags & DESC_F_INDIRECT:
                if number is not None:
                    raise _Scrambled
                raise _MalformedChain("an indirect descriptor inside a chain or inside an indirect table")
            if flags & DESC_F_WRITE:
                parts = writable
                writable_len += length
            elif writable_len:
                raise _MalformedChain("a device-readable descriptor behind a device-writable one")
            else:
                parts = readable
                readable_len += length
            if (start <= address <= end - length or second_start <= address <= second_end - length) and length:
                parts.append(ram[address : address + length])
            else:
                try:
                    parts += self._memory.views(address, length, ACCESS_READ if parts is readable else ACCESS_WRITE)
                except GuestMemoryError as error:
                    raise _MalformedChain(str(error)) from None
                except IotlbMiss as one:
                    miss = one
            if number is not None:
                if not flags & DESC_F_NEXT:
                    break
                number += 1
                if fourth != number:
                    raise _Scrambled
        else:
            if number is not None:
                raise _Scrambled
        if miss:
            raise miss
        if readable_len + writable_len >= _MOST_BYTES:
            raise _MalformedChain(f"{readable_len + writable_len:#x} bytes in one chain")
        return tuple(readable), tuple(writable), readable_len, writable_len


# Where a request's descriptors are, those, the indirect table if they name one and its content; and what these say: five numbers of a FlatRequest.
_KnownRequest = tuple[slice, bytes, memoryview | None, bytes, int, bool, int, int, int]
_UNKNOWN: _KnownRequest = (slice(0), b"none", None, b"", 0, False, 0, 0, 0)


class SplitQueue(Queue):
    """The split virtqueue (virtio 1.3 §2.7)."""

    def _check_size(self, size: int) -> None:
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise VringError(f"a split queue of {size} entries: must be a power of two up to {MAX_QUEUE_SIZE}")

    def _map(self, memory: AddressSpace, desc: int, avail: int, used: int) -> None:
        size = self.size
        self._desc = self._area(memory, desc, 16 * size, 16, ACCESS_READ, "descriptor table")
        self._avail = self._area(memory, avail, 6 + 2 * size, 2, ACCESS_READ, "available ring").cast("H")
        self._used = self._area(memory, used, 6 + 8 * size, 4, ACCESS_WRITE, "used ring")
        self._used16 = self._used.cast("H")
        self._used_event = 2 + size
        self._avail_event = 2 + 4 * size

    def _forget_chains(self) -> None:
        super()._forget_chains()
        self._known: list[DescriptorChain | None] = [None] * self.size  # by head

    def forget(self) -> None:
        super().forget()
        self._shapes: list[_KnownRequest] = []  # requests, by head too
        self._familiar = True
        self._misses = 0
        self._reckoning = self.taken + 4 * self.size

    def _device_written(self) -> list[tuple[int, int]]:
        return self._extents[2:]

    @property
    def used_index(self) -> int:
        return self._load(self._used16, 1)

    @property
    def base(self) -> int:
        return (self._next_avail - len(self._again)) & 0xFFFF

    def start(self, base: int, inflight: memoryview | None = None) -> None:
        self._begin()
        # The used index is the ring's own: a front-end gives the available index alone (vhost-user, "vring state description").
        self._next_avail = base & 0xFFFF
        self._next_used = self._load(self._used16, 1)
        self._inflight = None if inflight is None else SplitInflight(inflight, self.size)
        if self._inflight and self._inflight.fresh:
            self._inflight.note_published((), self._next_used)  # a new region may come to a ring that is not new, as after a migration
        elif self._inflight:
            self._recover(self._inflight.recover(self._next_used))

    def _recover(self, heads: list[int]) -> None:
        self._next_avail = (self._next_used + len(heads)) & 0xFFFF
        for head in heads:
            try:
                self._again.append(self._chain_at(head))
            except _MalformedChain as reason:
                self._reject(head, reason)
                self.outstanding += 1

    @staticmethod
    def _slots(chain: DescriptorChain) -> int:
        return 1

    def available(self) -> bool:
        index = self._avail[1]
        if self._swap:
            index = _swap16(index)
        return (index != self._next_avail and self.stalled is None) or bool(self._again)

    def _set_limits(self, header: int, status: int) -> None:
        super()._set_limits(header, status)
        self._shapes = [_UNKNOWN] * self.size

    def _heads(self, limit: int) -> list[int]:
        """The next head descriptors that the driver made available, about `limit` at most. Raises _BrokenRing."""
        self.stalled = None
        avail, swap, size, position = self._avail, self._swap, self.size, self._next_avail
        index = avail[1]
        if swap:
            index = _swap16(index)
        waiting = (index - position) & 0xFFFF
        if waiting > size - self.outstanding:
            raise _BrokenRing(f"available index {index} is {waiting} ahead of {position}, with {self.outstanding} of {size} entries in flight")
        if waiting > self.most_waiting:
            self.most_waiting = waiting
        if not STRONGLY_ORDERED:
            self._fence()
        start = position & (size - 1)
        count = waiting if waiting < limit + limit // 2 else limit  # a small rest is not worth a batch of its own
        if start + count <= size:
            heads = avail[2 + start : 2 + start + count].tolist()
        else:
            heads = avail[2 + start : 2 + size].tolist() + avail[2 : 2 + start + count - size].tolist()
        return [_swap16(head) for head in heads] if swap else heads

    def take(self, limit: int) -> list[DescriptorChain]:
        if self._again:
            return self._take_again(limit)
        heads = self._heads(limit)
        taken: list[DescriptorChain] = []
        chain_at = self._chain_at
        rejected = 0
        for head in heads:
            # What is wrong ends the batch: those before it go first, so that they can be put back, and then it comes again.
            try:
                chain = chain_at(head)
            except IndexError:
                if taken or rejected:
                    break
                raise _BrokenRing(f"available ring entry names descriptor {head} of {self.size}") from None
            except _MalformedChain as reason:
                if taken:
                    break
                if self._inflight:
                    self._inflight.note_taken((head,))
                self._reject(head, reason)
                rejected += 1
                continue
            except IotlbMiss as miss:
                self.stalled = None if taken else miss
                break
            chain._holder = self
            chain._read_at = chain._write_at = 0
            taken.append(chain)
        if self._inflight:
            self._inflight.note_taken(heads[rejected : rejected + len(taken)])
        self._advance(len(taken) + rejected)
        self._hand_out(taken)
        return taken

    def _advance(self, count: int) -> None:
        self._next_avail = (self._next_avail + count) & 0xFFFF
        self.outstanding += count
        self._taken_again = False

    def _take_flat(self, batch: RequestBatch, limit: int) -> bool:
        heads = self._heads(limit)
        requests = batch.requests
        append, before = requests.append, len(requests)
        if self._limits[:2] != batch._shape:
            self._set_limits(*batch._shape)
        header, status, start, start2, header_end, header_end2, status_end, status_end2, table_end, table_end2, end, end2 = self._limits
        ram, unpack = self._flat.view, batch._header.unpack_from
        desc, indirect, shapes, familiar = self._desc, self._indirect, self._shapes, self._familiar
        misses = 0
        try:
            for head in heads:
                if familiar:
                    place, descriptors, table, content, first, into, second, length, third = shapes[head]
                    if desc[place].tobytes() == descriptors and (table is None or table.tobytes() == content):
                        append((head, unpack(ram, first), first, into, second, length, third))
                        continue
                    misses += 1
                first, size1, flags1, next1 = _UNPACK_ONE(desc, head << 4)
                table = None
                if flags1 == DESC_F_INDIRECT:
                    if size1 != _THREE or not indirect or not (start <= first <= table_end or start2 <= first <= table_end2):
                        break
                    if familiar:
                        descriptors = _DESCRIPTOR.pack(first, size1, flags1, next1)
                        table = ram[first : first + _THREE]
                        content = table.tobytes()
                        first, size1, flags1, next1, second, length, flags2, next2, third, size3, flags3, _ = _UNPACK_THREE(content)
                    else:
                        first, size1, flags1, next1, second, length, flags2, next2, third, size3, flags3, _ = _UNPACK_THREE(ram, first)
                    if next1 != 1 or next2 != 2:
                        break
                else:
                    second, length, flags2, next2 = _UNPACK_ONE(desc, next1 << 4)
                    third, size3, flags3, next3 = _UNPACK_ONE(desc, next2 << 4)
                into = flags2 == _NEXT_WRITE
                if not (  # as in PackedQueue: a call would cost more than the check
                    size1 == header
                    and flags1 == DESC_F_NEXT
                    and (into or flags2 == DESC_F_NEXT)
                    and flags3 == DESC_F_WRITE
                    and size3 == status
                    and 0 < length < _MOST_DATA
                    and (start <= first <= header_end or start2 <= first <= header_end2)
                    and (start <= second <= end - length or start2 <= second <= end2 - length)
                    and (start <= third <= status_end or start2 <= third <= status_end2)
                ):
                    break
                append((head, unpack(ram, first), first, into, second, length, third))
                if not familiar:
                    continue
                at = head << 4
                if table is not None:
                    shapes[head] = slice(at, at + 16), descriptors, table, content, first, into, second, length, third
                elif next1 == head + 1 and next2 == head + 2:
                    descriptors = _PACK_THREE(first, size1, flags1, next1, second, length, flags2, next2, third, size3, flags3, next3)
                    shapes[head] = slice(at, at + _THREE), descriptors, None, b"", first, into, second, length, third
        except (IndexError, struct.error):
            pass  # a head that the table does not have, or not with two more behind it
        count = len(requests) - before
        if self._inflight:
            self._inflight.note_taken(heads[:count])
        self._advance(count)
        self.taken += count
        self._misses += misses
        if self.taken >= self._reckoning:
            self._reckon()
        return count < len(heads)

    def _reckon(self) -> None:
        """Whether the driver uses its buffers again and again. If not, nothing is remembered nor looked for, but for a try now and then."""
        self._familiar = not self._familiar or self._misses < 2 * self.size
        self._misses = 0
        self._reckoning = self.taken + (4 if self._familiar else 256) * self.size

    def put_back(self, chains: Sequence[DescriptorChain]) -> None:
        if self._taken_again:
            self._put_back_again(chains)
            return
        if self._inflight:
            self._inflight.note_put_back(chain._token for chain in reversed(chains))
        self._next_avail = (self._next_avail - len(chains)) & 0xFFFF
        self.outstanding -= len(chains)
        self._undo_hand_out(chains)

    def _chain_at(self, head: int) -> DescriptorChain:
        """The chain that begins at `head`. Raises IndexError, _MalformedChain, IotlbMiss."""
        descriptors = self._desc[self._spans[head]].tobytes()
        chain = self._known[head]
        if chain is None or chain._holder is not None:  # a driver may name what the device still has
            chain = self._known[head] = DescriptorChain(head)
        elif chain._descriptors == descriptors:
            table = chain._table
            if table is None:
                return chain
            content = table.tobytes()
            if content != chain._content:
                chain._learn(descriptors, table, content, self._table_parts(content))
            return chain
        self._parse(chain, head, descriptors)
        return chain

    def _parse(self, chain: DescriptorChain, head: int, descriptors: bytes) -> None:
        """Have `chain` be the one at `head`. `descriptors`: what stood there, as many as the chain had last time."""
        address, length, flags, _ = self._descriptor.unpack_from(descriptors)
        if flags & (DESC_F_INDIRECT | DESC_F_NEXT) == DESC_F_INDIRECT:
            self._spans[head] = slice(16 * head, 16 * head + 16)
            table = self._table(address, length)
            content = table.tobytes()
            chain._learn(descriptors[:16], table, content, self._table_parts(content))
            return
        try:
            parts = self._parts(descriptors, head)
        except _Scrambled:
            pass
        else:
            more = descriptors[13 if self.big_endian else 12 :: _DESCRIPTOR_SIZE].translate(_NEXT_OF_BYTE)
            descriptors = descriptors[: 16 * (more.index(0) + 1)]  # the last chain here may have had more
            self._spans[head] = slice(16 * head, 16 * head + len(descriptors))
            chain._learn(descriptors, None, b"", self._keep(parts))
            return
        copies = self._follow(self._desc, self.size, head)
        address, length, flags, _ = self._descriptor.unpack(copies[-1])
        if flags & DESC_F_INDIRECT:  # the last one of several may be (virtio 1.3 §2.7.5.3.2)
            if flags & DESC_F_NEXT:
                raise _MalformedChain("a descriptor with both INDIRECT and NEXT")
            content = self._table(address, length).tobytes()
            copies[-1:] = self._follow(content, len(content) // 16, 0, nested=True)
        else:
            self._spans[head] = slice(16 * head, 16 * (head + len(copies)))  # a guess for the next time: they mostly stand together
        chain._learn(b"", None, b"", self._keep(self._parts(self._renumbered(copies), 0)))

    def _parse_table(self, content: bytes) -> Parts:
        try:
            return self._parts(content, 0)
        except _Scrambled:
            return self._parts(self._renumbered(self._follow(content, len(content) // 16, 0, nested=True)), 0)

    def _renumbered(self, copies: list[bytes]) -> bytes:
        """Descriptors of a chain as they would stand one after another at the start of a table."""
        content = bytearray()
        for number, copy in enumerate(copies, 1):
            address, length, flags, _ = self._descriptor.unpack(copy)
            more = number < len(copies)
            content += self._descriptor.pack(address, length, flags | DESC_F_NEXT if more else flags & ~DESC_F_NEXT, number if more else 0)
        return bytes(content)

    def _follow(self, table: memoryview | bytes, entries: int, index: int, nested: bool = False) -> list[bytes]:
        """Copies of the descriptors from `index` on, up to one without NEXT or one with INDIRECT, which may not be in a `nested` table."""
        name = "indirect table" if nested else "table"
        copies: list[bytes] = []
        while True:
            if index >= entries:
                raise _MalformedChain(f"next is {index}, the {name} has {entries} descriptors")
            if len(copies) == entries:
                raise _MalformedChain(f"the descriptors of the {name} form a loop")
            copy = bytes(table[16 * index : 16 * index + 16])
            copies.append(copy)
            _, _, flags, index = self._descriptor.unpack(copy)
            if nested and flags & DESC_F_INDIRECT:
                raise _MalformedChain("an indirect descriptor inside an indirect table")
            if not flags & DESC_F_NEXT or flags & DESC_F_INDIRECT:
                return copies

    def _publish(self, batch: list[int]) -> None:
        if self._inflight:
            self._inflight.note_used(batch[::2])
        size, count = self.size, len(batch) // 2
        start = self._next_used & (size - 1)
        if start + count <= size:
            _used_struct(count, self.big_endian).pack_into(self._used, 4 + 8 * start, *batch)
        else:
            fits = size - start
            _used_struct(fits, self.big_endian).pack_into(self._used, 4 + 8 * start, *batch[: 2 * fits])
            _used_struct(count - fits, self.big_endian).pack_into(self._used, 4, *batch[2 * fits :])
        if not STRONGLY_ORDERED:
            self._fence()
        self._next_used = index = (self._next_used + count) & 0xFFFF
        self._used16[1] = _swap16(index) if self._swap else index
        if self.log:
            self._log_used(0, 4)
            self._log_used(4 + 8 * start, 8 * min(count, size - start))
            self._log_used(4, 8 * max(0, start + count - size))
        self.outstanding -= count
        if self._inflight:
            self._inflight.note_published(batch[::2], index)

    def enable_notification(self) -> bool:
        if self.event_idx:  # as it stands, not `_next_avail`: behind chains that the device leaves, no event would ever come
            self._used16[self._avail_event] = self._avail[1]
        else:
            self._used16[0] = 0
        if self.log:
            self._log_used(2 * self._avail_event, 2)
            self._log_used(0, 2)
            self.log.commit()
        self._fence()
        return self.available()

    def disable_notification(self) -> None:
        if not self.event_idx:  # with it, an event index that lies behind does
            self._store(self._used16, 0, USED_F_NO_NOTIFY)

    def needs_notification(self) -> bool:
        self._fence()
        if not self.event_idx:
            return not self._load(self._avail, 0) & AVAIL_F_NO_INTERRUPT
        new, old = self._next_used, self._signalled
        self._signalled = new
        if old is None:
            return True
        event = self._avail[self._used_event]
        if self._swap:
            event = _swap16(event)
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


def _is_one_chain(content: bytes) -> bool:
    """Whether NEXT is in all of the packed ring's descriptors but the last."""
    flags = content[14::_DESCRIPTOR_SIZE]  # their lower bytes
    return flags.translate(_NEXT_OF_BYTE).find(0) == len(flags) - 1


class PackedQueue(Queue):
    """The packed virtqueue (virtio 1.3 §2.8)."""

    def _check_size(self, size: int) -> None:
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise VringError(f"a packed queue of {size} entries: must be 1 to {MAX_QUEUE_SIZE}")

    def _map(self, memory: AddressSpace, desc: int, driver: int, device: int) -> None:
        self._desc = self._area(memory, desc, 16 * self.size, 16, ACCESS_READ | ACCESS_WRITE, "descriptor ring")
        self._flags = self._desc.cast("H")
        self._words = self._desc.cast("Q")
        self._driver_event = self._area(memory, driver, 4, 4, ACCESS_READ, "driver event suppression").cast("H")
        self._device_event = self._area(memory, device, 4, 4, ACCESS_WRITE, "device event suppression").cast("H")

    def _forget_chains(self) -> None:
        super()._forget_chains()
        self._known: dict[bytes, DescriptorChain] = {}  # by descriptors, with the flags of odd laps and of even ones

    def _device_written(self) -> list[tuple[int, int]]:
        return self._extents[::2]

    @property
    def used_index(self) -> int:
        return self._next_used

    @property
    def base(self) -> int:
        position, wrap = self._step(self._next_avail, self._avail_wrap, -sum(map(self._slots, self._again)))
        return position | wrap << 15 | (self._next_used | self._used_wrap << 15) << 16

    def _step(self, position: int, wrap: int, count: int) -> tuple[int, int]:
        """`count` descriptors on, or back."""
        laps, position = divmod(position + count, self.size)
        return position, wrap ^ laps & 1

    @staticmethod
    def _slots(chain: DescriptorChain) -> int:
        return chain._token >> 16

    def start(self, base: int, inflight: memoryview | None = None) -> None:
        self._begin()
        if base == 0 and not self._load(self._flags, 7) & PACKED_F_USED:
            # Position 0 with both wrap counters 0 means one lap done, which leaves the first descriptor's USED bit set. Without it the
            # ring is new, and the front-end (User-mode Linux) sent the split ring's 0.
            base = 1 << 15 | 1 << 31
        self._next_avail, self._avail_wrap = base & 0x7FFF, base >> 15 & 1
        self._next_used, self._used_wrap = base >> 16 & 0x7FFF, base >> 31 & 1
        if self._next_avail >= self.size or self._next_used >= self.size:
            raise VringError(f"ring base {base:#x} lies outside a queue of {self.size}")
        self._inflight = None if inflight is None else PackedInflight(inflight, self.size)
        if self._inflight and self._inflight.fresh:
            self._inflight.begin(self._next_used | self._used_wrap << 15)
        elif self._inflight:
            self._recover(*self._inflight.recover(lambda position: self._load(self._flags, 8 * position + 7)))

    def _recover(self, kept: list[tuple[int, bytes]], used: int) -> None:
        self._next_used, self._used_wrap = used & 0x7FFF, used >> 15
        count = sum(token >> 16 for token, _ in kept)
        if self._next_used >= self.size or count > self.size:
            raise VringError(f"the in-flight region has position {self._next_used} and {count} descriptors of a queue of {self.size}")
        self._next_avail, self._avail_wrap = self._step(self._next_used, self._used_wrap, count)
        self._take_back(count)
        for token, content in kept:
            try:
                self._again.append(self._parse_kept(token, content))
            except _MalformedChain as reason:
                self._reject(token, reason)
                self.outstanding += token >> 16

    def _take_back(self, count: int) -> None:
        """Have none of the next `count` descriptors look used. The last life may have ended within a batch, with all but the first written: as soon
        as that one was used, the driver would take the others for what is used now."""
        position, wrap = self._next_used, self._used_wrap
        for _ in range(count):
            flags = self._load(self._flags, 8 * position + 7)
            if flags & PACKED_F_BOTH == (PACKED_F_BOTH if wrap else 0):
                self._store(self._flags, 8 * position + 7, flags & ~PACKED_F_BOTH | (PACKED_F_AVAIL if wrap else PACKED_F_USED))
            position, wrap = self._step(position, wrap, 1)

    def _parse_kept(self, token: int, content: bytes) -> DescriptorChain:
        """A chain from the in-flight region, which kept its descriptors."""
        if len(content) == _DESCRIPTOR_SIZE:
            address, length, _, flags = _DESCRIPTOR.unpack(content)
            if flags & DESC_F_INDIRECT:
                content = self._table(address, length).tobytes()
        return DescriptorChain(token, self._parts(content, None))

    def available(self) -> bool:
        flags = self._load(self._flags, 8 * self._next_avail + 7)
        waiting = flags & PACKED_F_BOTH == (PACKED_F_AVAIL if self._avail_wrap else PACKED_F_USED)
        return (waiting and not self.stalled) or bool(self._again)

    def take(self, limit: int) -> list[DescriptorChain]:
        if self._again:
            return self._take_again(limit)
        self.stalled = None
        flags, inflight, chain_at = self._flags, self._inflight, self._chain_at
        position, size, room = self._next_avail, self.size, self.size - self.outstanding
        wanted = PACKED_F_AVAIL if self._avail_wrap else PACKED_F_USED
        taken: list[DescriptorChain] = []
        rejected = 0
        chain: DescriptorChain | None
        for _ in range(limit):
            value = flags[8 * position + 7]
            if (_swap16(value) if _SWAP else value) & PACKED_F_BOTH != wanted:
                break
            if not STRONGLY_ORDERED:
                self._fence()
            # What is wrong ends the batch: those before it go first, so that they can be put back, and then it comes again.
            chain = refusal = None
            try:
                chain = chain_at(position)
                token = chain._token
            except _BrokenRing:
                if taken or rejected:
                    break
                raise
            except _MalformedChain as reason:
                if taken:
                    break
                token, refusal = self._extent(position), reason
            except IotlbMiss as miss:
                self.stalled = None if taken else miss
                break
            count = token >> 16
            if count > room:
                if taken or rejected:
                    break
                raise self._too_many(count, room)
            room -= count
            if inflight:
                inflight.note_taken(((token, b"".join(self._descriptors(position, count))),))
            if chain is not None:
                chain._holder = self
                chain._read_at = chain._write_at = 0
                taken.append(chain)
            elif refusal is not None:
                self._reject(token, refusal)
                rejected += 1
            position += count
            if position >= size:
                position -= size
                wanted ^= PACKED_F_BOTH
        self._advance(position, wanted, room)
        self._hand_out(taken)
        return taken

    def _too_many(self, count: int, room: int) -> _BrokenRing:
        return _BrokenRing(f"{count} more descriptors are available, with {self.size - room} of {self.size} descriptors in flight")

    def _advance(self, position: int, wanted: int, room: int) -> None:
        self._next_avail = position
        self._avail_wrap = int(wanted == PACKED_F_AVAIL)
        self.outstanding = self.size - room
        self._taken_again = False

    def _take_flat(self, batch: RequestBatch, limit: int) -> bool:
        self.stalled = None
        requests = batch.requests
        append, before = requests.append, len(requests)
        if self._limits[:2] != batch._shape:
            self._set_limits(*batch._shape)
        header, status, start, start2, header_end, header_end2, status_end, status_end2, table_end, table_end2, end, end2 = self._limits
        ram, unpack = self._flat.view, batch._header.unpack_from
        desc, ring_flags, indirect, inflight = self._desc, self._flags, self._indirect, self._inflight
        position, size, room = self._next_avail, self.size, self.size - self.outstanding
        wanted = PACKED_F_AVAIL if self._avail_wrap else PACKED_F_USED
        other = True
        for _ in range(limit):
            flags = ring_flags[8 * position + 7]
            if flags & PACKED_F_BOTH != wanted:
                other = False
                break
            if not STRONGLY_ORDERED:
                self._fence()
            if flags & ~PACKED_F_BOTH == DESC_F_INDIRECT:
                address, length, identity, _ = _UNPACK_ONE(desc, position << 4)
                if length != _THREE or not indirect or not (start <= address <= table_end or start2 <= address <= table_end2):
                    break
                first, size1, _, flags1, second, length, _, flags2, third, size3, _, flags3 = _UNPACK_THREE(ram, address)
                count, follow, into = 1, 0, flags2 == DESC_F_WRITE
            elif position <= size - 3:
                first, size1, _, flags1, second, length, _, flags2, third, size3, identity, flags3 = _UNPACK_THREE(desc, position << 4)
                flags1 &= ~PACKED_F_BOTH
                flags2 &= ~PACKED_F_BOTH
                flags3 &= ~PACKED_F_BOTH
                count, follow, into = 3, DESC_F_NEXT, flags2 == _NEXT_WRITE
            else:
                break
            if not (
                size1 == header
                and flags1 == follow
                and (into or flags2 == follow)
                and flags3 == DESC_F_WRITE
                and size3 == status
                and count <= room
                and 0 < length < _MOST_DATA
                and (start <= first <= header_end or start2 <= first <= header_end2)
                and (start <= second <= end - length or start2 <= second <= end2 - length)
                and (start <= third <= status_end or start2 <= third <= status_end2)
            ):
                break
            if inflight:
                inflight.note_taken(((count << 16 | identity, desc[position << 4 : position + count << 4].tobytes()),))
            append((count << 16 | identity, unpack(ram, first), first, into, second, length, third))
            room -= count
            position += count
            if position >= size:
                position -= size
                wanted ^= PACKED_F_BOTH
        else:
            other = False
        self._advance(position, wanted, room)
        self.taken += len(requests) - before
        return other

    def put_back(self, chains: Sequence[DescriptorChain]) -> None:
        if self._taken_again:
            self._put_back_again(chains)
            return
        if self._inflight:
            self._inflight.note_put_back(chain._token for chain in reversed(chains))
        count = sum(map(self._slots, chains))
        self._next_avail, self._avail_wrap = self._step(self._next_avail, self._avail_wrap, -count)
        self.outstanding -= count
        self._undo_hand_out(chains)

    def _descriptors(self, position: int, count: int = 0) -> list[bytes]:
        """Copies of the descriptors from `position` to the end of the chain, or of just `count`."""
        copies: list[bytes] = []
        while len(copies) < self.size:
            copy = bytes(self._desc[16 * position : 16 * position + 16])
            copies.append(copy)
            if len(copies) == count or not (count or _DESCRIPTOR.unpack(copy)[3] & DESC_F_NEXT):
                return copies
            position = position + 1 if position + 1 < self.size else 0
        raise _BrokenRing(f"a chain of more than {self.size} descriptors")

    def _extent(self, position: int) -> int:
        """The token of a chain that cannot be parsed: its id and how many descriptors it takes."""
        copies = self._descriptors(position)
        identity: int = _DESCRIPTOR.unpack(copies[-1])[2]
        return len(copies) << 16 | identity

    def _chain_at(self, position: int) -> DescriptorChain:
        """The chain that begins at `position`. Raises _BrokenRing, _MalformedChain, IotlbMiss."""
        descriptors = self._desc[self._spans[position]].tobytes()
        chain = self._known.get(descriptors)
        if chain is None or chain._holder is not None:
            return self._parse(position, descriptors)
        table = chain._table
        if table is not None:
            content = table.tobytes()
            if content != chain._content:
                chain._learn(descriptors, table, content, self._table_parts(content))
        return chain

    def _parse(self, position: int, descriptors: bytes) -> DescriptorChain:
        """The same, of one that is not known. `descriptors`: what stood there, as many as the chain had last time."""
        if not _is_one_chain(descriptors):
            descriptors = b"".join(self._descriptors(position))
        count = len(descriptors) // _DESCRIPTOR_SIZE
        address, length, identity, flags = _DESCRIPTOR.unpack_from(descriptors, 16 * (count - 1))
        self._spans[position] = slice(16 * position, 16 * (position + count))  # a guess for the next time
        chain = DescriptorChain(count << 16 | identity)
        if not flags & DESC_F_INDIRECT or count > 1:
            chain._learn(descriptors, None, b"", self._keep(self._parts(descriptors, None)))
        elif flags & DESC_F_NEXT:
            raise _MalformedChain("a descriptor with both INDIRECT and NEXT")
        else:
            table = self._table(address, length)
            content = table.tobytes()
            chain._learn(descriptors, table, content, self._table_parts(content))
        if len(self._known) >= 4 * self.size:
            self._known.clear()
        self._known[descriptors] = chain
        return chain

    def _parse_table(self, content: bytes) -> Parts:
        return self._parts(content, None)

    def _publish(self, batch: list[int]) -> None:
        words, size, position = self._words, self.size, self._next_used
        tokens, lengths = batch[::2], batch[1::2]
        count = sum([token >> 16 for token in tokens])
        end, end_wrap = self._step(position, self._used_wrap, count)
        entries = self._inflight.note_used(tokens, end | end_wrap << 15) if self._inflight else []
        # Length, id and flags of a used descriptor are one aligned 64-bit store, and so seen as a whole; the first one's comes last: it
        # shows the batch.
        bits = PACKED_F_BOTH << 48 if self._used_wrap else 0
        first, first_value = 2 * position + 1, -1
        for token, length in zip(tokens, lengths):
            value = length | (token & 0xFFFF) << 32 | bits | (DESC_F_WRITE << 48 if length else 0)
            if _SWAP:
                value = _swap64(value)
            if first_value < 0:
                first_value = value
            else:
                words[2 * position + 1] = value
            position += token >> 16
            if position >= size:
                position -= size
                bits ^= PACKED_F_BOTH << 48
        if not STRONGLY_ORDERED:
            self._fence()
        words[first] = first_value
        if self.log and self.log_used_at is not None:  # the ring itself, which the front-end has no other address for
            for piece in self._written or self._extents[:1]:
                self.log.mark(*piece)
        self.outstanding -= count
        self._next_used, self._used_wrap = end, end_wrap
        if self._inflight:
            self._inflight.note_published(entries)

    def enable_notification(self) -> bool:
        by_event = self.event_idx and not self.available()  # behind chains that the device leaves, no event would ever come
        if by_event:
            self._store(self._device_event, 0, self._next_avail | self._avail_wrap << 15)
            if not STRONGLY_ORDERED:
                self._fence()
        self._store(self._device_event, 1, EVENT_FLAGS_DESC if by_event else EVENT_FLAGS_ENABLE)
        if self.log:
            self._log_used(0, 4)
            self.log.commit()
        self._fence()
        return self.available()

    def disable_notification(self) -> None:
        self._store(self._device_event, 1, EVENT_FLAGS_DISABLE)

    def needs_notification(self) -> bool:
        self._fence()
        flags = self._load(self._driver_event, 1)
        new, old = self._next_used, self._signalled
        self._signalled = new
        if flags != EVENT_FLAGS_DESC or not self.event_idx or old is None:
            return flags != EVENT_FLAGS_DISABLE
        event = self._load(self._driver_event, 0)
        offset = event & 0x7FFF
        if event >> 15 != self._used_wrap:
            offset -= self.size
        if new <= old:
            old -= self.size
        return (new - offset - 1) & 0xFFFF < (new - old) & 0xFFFF


# ---------------------------------------------------------------------------------------------------------------------------
# Rings of a daemon
# ---------------------------------------------------------------------------------------------------------------------------


class VringT(Protocol):
    """What a device may do with a ring; the crate's trait of that name. `VringState` documents the methods."""

    @property
    def index(self) -> int: ...
    @property
    def enabled(self) -> bool: ...
    @property
    def malformed(self) -> int: ...
    def __iter__(self) -> Iterator[DescriptorChain]: ...
    def batches(self) -> Iterator[list[DescriptorChain]]: ...
    def requests(self, header: struct.Struct, status: int = 1) -> Iterator[RequestBatch]: ...
    def add_used(self, chain: DescriptorChain, length: int) -> None: ...
    def add_used_all(self, chains: Iterable[DescriptorChain]) -> None: ...
    def batch(self) -> ContextManager[None]: ...
    def get_ref(self) -> ContextManager[VringState]: ...
    def get_mut(self) -> ContextManager[VringState]: ...
    def signal_used_queue(self) -> None: ...
    def enable_notification(self) -> bool: ...
    def disable_notification(self) -> None: ...
    def needs_notification(self) -> bool: ...
    def set_enabled(self, enabled: bool) -> None: ...
    def set_queue_info(self, desc_table: int, avail_ring: int, used_ring: int) -> None: ...
    def queue_next_avail(self) -> int: ...
    def queue_used_idx(self) -> int: ...
    def set_queue_next_avail(self, base: int) -> None: ...
    def set_queue_next_used(self, used: int) -> None: ...
    def set_queue_size(self, num: int) -> None: ...
    def set_queue_event_idx(self, enabled: bool) -> None: ...
    @property
    def byteorder(self) -> Literal["little", "big"]: ...
    def set_queue_ready(self, ready: bool) -> None: ...
    def set_kick(self, fd: int | None) -> None: ...
    def read_kick(self) -> bool: ...
    def set_call(self, fd: int | None) -> None: ...
    def set_err(self, fd: int | None) -> None: ...


class NoLock:
    """Stands in for a TurnLock where nothing needs one."""

    wanted = False

    def acquire(self, wait: bool = True) -> bool:
        return True

    def acquire_first(self, timeout: float) -> bool:
        return True

    def release(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class TurnLock:
    """A reentrant lock for workers that take it batch after batch (`acquire`), and for others who need it now and then (`with`).

    Python's locks are not fair: a busy worker that releases and takes again would keep everybody else out. So who has to wait stands in a gate
    meanwhile, and the others wait for that gate: they, and whoever comes next.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._waited_for = False  # by who stands in the gate
        self._lock = threading.RLock()
        self._is_mine: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]  # as threading.Condition asks it
        self.release = self._lock.release

    def acquire(self, wait: bool = True) -> bool:
        """As the worker, or (with `wait` false) as anybody who can do without."""
        if (not (self._waited_for and wait) or self._is_mine()) and self._lock.acquire(False):
            return True
        return wait and self._stand_in_gate(-1)

    def acquire_first(self, timeout: float) -> bool:
        """Before a worker's next batch. Returns whether the lock was had within `timeout` seconds (-1: waits without end)."""
        return self._stand_in_gate(timeout)

    def _stand_in_gate(self, timeout: float) -> bool:
        if self._is_mine():
            return self._lock.acquire()
        if not self._gate.acquire(timeout=timeout):
            return False
        try:
            self._waited_for = True
            return self._lock.acquire(timeout=timeout)
        finally:
            self._waited_for = False
            self._gate.release()

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for whoever has it."""
        return self._gate.locked()

    def __enter__(self) -> None:
        self.acquire_first(timeout=-1)

    def __exit__(self, *_: object) -> None:
        self.release()


class _ReadersLock(TurnLock):
    """The same, and any number of threads may read while nobody changes anything."""

    def __init__(self) -> None:
        super().__init__()
        self._readers = 0
        self._counting = threading.Lock()
        self._nobody_reads = threading.Lock()  # held by who changes something, or by the readers
        self._depth = 0
        self.release = self._release

    def acquire(self, wait: bool = True) -> bool:
        return super().acquire(wait) and self._keep_readers_out(-1 if wait else 0)

    def acquire_first(self, timeout: float) -> bool:
        return super().acquire_first(timeout) and self._keep_readers_out(timeout)

    def _keep_readers_out(self, timeout: float) -> bool:
        if not self._depth and not self._nobody_reads.acquire(timeout != 0, timeout if timeout else -1):
            self._lock.release()
            return False
        self._depth += 1
        return True

    def _release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._nobody_reads.release()
        self._lock.release()

    def acquire_shared(self) -> None:
        if self._is_mine():
            self.acquire()
            return
        with self._gate, self._counting:
            self._waited_for = True
            if not self._readers:
                self._nobody_reads.acquire()
            self._readers += 1
            self._waited_for = False

    def release_shared(self) -> None:
        if self._is_mine():
            self.release()
            return
        with self._counting:
            self._readers -= 1
            if not self._readers:
                self._nobody_reads.release()


class VringState:
    """A ring of a daemon: a queue, its eventfds, its two switches. No lock: for one thread alone.

    A ring is served while it is *active*: started (SET_VRING_KICK) and enabled (SET_VRING_ENABLE), each switch kept while the other
    is off; placed (its addresses are in guest memory); and not broken. With `serves_disabled` it need not be enabled: the device looks.

    For a device: iterate over it for the chains that are available, give each to `add_used`, now or later and from any thread. While
    the iteration runs, completions are gathered, published and signalled in batches; outside of it each is published at once, and
    the driver notified if it wants that. `batch()` gathers there too.

    index            its number, from 0 on
    max_queue_size   the most entries that it may have
    started, enabled, active   see above
    broken           why it is broken, or None
    device_failed    whether that was the device: chains that it had may never come back
    serves_disabled  whether the device looks at it also while it is disabled
    turn             chains of one iteration and, nearly, of one drain: then others get at the ring, and the worker at its other rings
    wake             makes the ring's worker look at it
    linger           polls for a while before the ring's worker would sleep: True: there is something again; None: to be called again soon
    notify           in place of eventfds that are not there: sends VRING_CALL or VRING_ERR
    """

    TURN, SHARED_TURN = 512, 128  # values for `turn`: of a worker's only ring, and of one that has others beside it
    _LEAST_CHUNK, _MOST_CHUNK = 4, 64
    _PASSES = 4  # iterations of one drain

    def __init__(self, memory: GuestMemoryAtomic, max_queue_size: int = MAX_QUEUE_SIZE, index: int = 0) -> None:
        self.index = index
        self.max_queue_size = max_queue_size
        self.started = False
        self.enabled = False
        self.active = False
        self.broken: str | None = None
        self.device_failed = False
        self.serves_disabled = False
        self.turn = self.TURN
        self.wake: Callable[[], None] = lambda: None
        self.linger: Callable[[Callable[[], bool]], bool | None] | None = None
        self.notify: Callable[[str], object] | None = None
        self._lock: NoLock | TurnLock = self._make_lock()
        self._memory = memory
        self._features = 0
        self._iotlb: Iotlb | None = None
        self._big_endian: bool | None = None  # what SET_VRING_ENDIAN said
        self._size = max_queue_size
        self._base = 0
        self._info: tuple[int, int, int] | None = None
        self._inflight: memoryview | None = None
        self._log: DirtyLog | None = None
        self._log_used_at: int | None = None
        self._ready = False
        self._queue: Queue | None = None
        self._completed: list[int] = []
        self._depth = 0
        self._chunk = 16  # chains that are taken, served and published together
        self._found = 0  # chains since the ring was last empty
        self._mostly_waiting = 32.0  # chains
        self._idle: threading.Event | None = None  # of whoever waits until nothing is in flight
        self._kick: int | None = None
        self._call: int | None = None
        self._write_call: Callable[[int, bytes], int] = os.write
        self._call_polled = False  # the front-end looks at the ring by itself
        self._call_room = select.poll()  # tells whether the call eventfd can be written without waiting
        self._writing: int | None = None  # an eventfd that the lock's holder writes
        self._err: int | None = None
        self._complaints = 0
        self._quiet_until = 0.0

    @staticmethod
    def _make_lock() -> NoLock | TurnLock:
        return NoLock()

    def __repr__(self) -> str:
        switches = [name for name in ("started", "enabled", "active", "broken") if getattr(self, name)]
        return f"<ring {self.index}: {', '.join(switches) or 'stopped'}>"

    # Access

    @contextmanager
    def get_mut(self) -> Iterator[VringState]:
        """The ring for this thread alone, ahead of its worker's next batch."""
        patience = 0.1
        while not self._lock.acquire_first(patience):
            patience = 0.001 if self.unblock() else 0.1
        try:
            yield self
        finally:
            self._lock.release()
            if self._completed and not self._depth:
                with freed(self.unblock):  # a worker is freed by who waits for it; nobody waits for the control thread
                    self._flush_late()

    def get_ref(self) -> ContextManager[VringState]:
        """The ring to read from, with nobody changing it."""
        return self.get_mut()

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the ring, whose worker has it."""
        return self._lock.wanted

    @property
    def queue(self) -> Queue | None:
        """The queue in guest memory, while the ring is started and placed."""
        return self._queue

    @property
    def in_flight(self) -> int:
        """Chains (split) or descriptors (packed) that the device has taken and the driver has not seen come back."""
        return self._queue.outstanding if self._queue else 0

    @property
    def malformed(self) -> int:
        """Chains refused since the ring was started."""
        return self._queue.malformed if self._queue else 0

    # Serving

    def __iter__(self) -> Iterator[DescriptorChain]:
        """Every chain that is available, up to a budget. The ring's lock is held meanwhile. What a loop that is left early has not
        been given stays available."""
        for chains in self.batches():
            coming = iter(chains)
            try:
                yield from coming
            finally:
                rest = list(coming)
                if rest and self._queue:
                    self._queue.put_back(rest)

    def batches(self) -> Iterator[list[DescriptorChain]]:
        """The same by the batch: what is completed until the next one is asked for is published together, and the driver notified once.

        All of a batch is the device's, to be completed now or later."""
        self._enter()
        try:
            budget = self.turn
            while budget > 0:
                chains = self._take()
                if not chains:
                    break
                budget -= len(chains)
                self._found += len(chains)
                yield chains
                self._flush()
        finally:
            self._leave()

    def requests(self, header: struct.Struct, status: int = 1) -> Iterator[RequestBatch]:
        """`batches` for devices whose requests mostly are a header, data and a status of that many bytes: see RequestBatch.

        The fields of `header` are unpacked already."""
        self._enter()
        try:
            budget = self.turn
            batch = RequestBatch(header, status)
            while budget > 0:
                count = self._take_requests(batch)
                if not count:
                    break
                budget -= count
                self._found += count
                try:
                    yield batch
                finally:
                    self._completed += batch.done
                self._flush()
        finally:
            self._leave()

    def _take(self) -> list[DescriptorChain]:
        queue = self._available()
        try:
            return queue.take(self._chunk) if queue else []
        except _BrokenRing as reason:
            self.fail(str(reason))
            return []

    def _take_requests(self, batch: RequestBatch) -> int:
        """The same, put into the batch. Returns how many they are."""
        batch.requests, batch.chains, batch.done = [], [], []
        queue = self._available()
        if queue:
            try:
                queue.take_requests(batch, self._chunk)
            except _BrokenRing as reason:
                self.fail(str(reason))
        return len(batch.requests) + len(batch.chains)

    def _available(self) -> Queue | None:
        """The queue, if it has chains for the device."""
        queue = self._queue
        if queue is None or not self.active:
            return None
        if queue.available() or queue.stalled:
            return queue
        self._learn()
        return None

    def _learn(self) -> None:
        """The ring is empty after `_found` chains: go half as far at a time as the driver mostly has waiting.

        What is published after the first half lets it send more during the second, so that neither side waits for the other, and a
        finished request waits no longer for its batch than it must. Where the ring does not tell what waits (packed), a total that came
        at one go is what the driver has; a larger one may have come bit by bit, and is believed slowly."""
        total, self._found = self._found, 0
        if total <= self._LEAST_CHUNK:
            return
        mostly = self._mostly_waiting
        waiting = self._queue.most_waiting if self._queue else 0
        if self._queue and waiting:
            mostly += (waiting - mostly) * 0.25
            self._queue.most_waiting = 0
        elif total <= self._chunk:
            mostly = float(total)
        else:
            mostly += (min(total, 2 * mostly) - mostly) * 0.05
        self._mostly_waiting = mostly
        self._chunk = min(max(round(mostly / 2), self._LEAST_CHUNK), self._MOST_CHUNK)

    def add_used(self, chain: DescriptorChain, length: int) -> None:
        """The device is done with `chain`, and has written `length` bytes into it. From any thread, in any order.

        Raises VringError when the chain was completed already. Of a ring that was stopped meanwhile, a chain is dropped.
        """
        queue = self._queue
        if queue is None or chain._holder is not queue:
            if chain._holder is None:
                raise VringError(f"ring {self.index}: {chain} is given to add_used twice")
            chain._holder = None
            return
        chain._holder = None
        if queue.in_order or queue.log:
            self._lock.acquire()
            try:
                queue.log_written(chain)
                if queue.in_order:
                    queue.complete_in_order(chain, length)
                else:
                    queue.completed.extend((chain._token, length))
            finally:
                self._lock.release()
        else:
            queue.completed.extend((chain._token, length))  # of this one, though another thread may stop the ring just now
        if not self._depth:
            self._flush_late()

    def add_used_all(self, chains: Iterable[DescriptorChain]) -> None:
        """`add_used` for each, with all of its device-writable bytes written."""
        queue = self._queue
        if queue is None or queue.in_order or queue.log:
            for chain in chains:
                self.add_used(chain, chain.writable_len)
            return
        extend = queue.completed.extend
        for chain in chains:
            if chain._holder is queue:
                chain._holder = None
                extend((chain._token, chain.writable_len))
            else:
                self.add_used(chain, chain.writable_len)
        if not self._depth:
            self._flush_late()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Gather the completions made inside, publish them together at the end, and signal once. Nests."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def _leave(self) -> None:
        try:
            if self._depth == 1:
                self._flush()
        finally:
            self._depth -= 1
            self._lock.release()
            if self._completed and not self._depth:
                self._flush_late()

    def drain(self, process: Callable[[VringT], object]) -> bool:
        """Let `process` (which iterates over the ring) take all there is, then arm notifications. Returns whether chains are left.

        The order is suppress, process, publish, signal if wanted, poll if the worker does, re-enable, fence, look again.
        """
        armed = False
        served = 0
        for _ in range(self._PASSES):
            if served >= self.turn:
                break
            self._enter()
            try:
                queue = self._queue
                if queue is None or not self.active:
                    return False
                before, waiting = queue.taken, queue.available()
                if not armed:
                    queue.disable_notification()
                process(self)
                self._flush()
                if self.broken is not None:
                    return False
                served += queue.taken - before
                declined = waiting and queue.taken == before  # the device leaves them where they are, until the next kick
                if declined and armed:
                    return False
                more = not declined and (queue.available() or (self.linger is not None and self.linger(self._has_work)))
                if more is None:
                    return True  # and no notification is wanted meanwhile
                if not more:
                    if not queue.enable_notification():
                        return False
                    armed = declined  # something came before that: look again, the last time if the device declines
            finally:
                self._leave()
        return True

    def _has_work(self) -> bool:
        """Whether chains are available, or completed by somebody who left publishing them to whoever holds the lock."""
        queue = self._queue
        return bool(self._completed) or not self.active or (queue is not None and queue.available())

    def _flush(self) -> None:
        """Publish what is completed, and notify the driver if it wants that. The lock is held."""
        queue = self._queue
        if queue is not None and self._completed:
            queue.publish()
            if queue.needs_notification():
                self._signal()
            if self._idle and not queue.outstanding:
                self._idle.set()

    def _flush_late(self) -> None:
        """The same without the lock. Whoever has it will see `_completed` when it lets go: nobody waits here."""
        while self._completed and self._lock.acquire(wait=False):
            try:
                if self._depth or self._queue is None:
                    return
                self._flush()
            finally:
                self._lock.release()

    def enable_notification(self) -> bool:
        """Ask the driver to notify. Returns whether chains are available already, for which no notification may come."""
        with self.get_mut():
            return self._queue is not None and self._queue.enable_notification()

    def disable_notification(self) -> None:
        """Tell the driver that it need not notify."""
        with self.get_mut():
            if self._queue:
                self._queue.disable_notification()

    def needs_notification(self) -> bool:
        """Whether the driver wants to be notified of what was published since the last call."""
        with self.get_mut():
            return self._queue is not None and self._queue.needs_notification()

    def signal_used_queue(self) -> None:
        """Notify the driver, whether it wants that or not."""
        with self.get_mut():
            self._signal()

    def _signal(self) -> None:
        if self._call is None:
            if self.notify and not self._call_polled:
                self.notify("VRING_CALL")
        # A full one would block the write: it is signalled already.
        elif self._call_room.poll(0):
            self._writing = self._call
            try:
                self._write_call(self._call, EVENT)
            except BlockingIOError:
                pass  # just filled: likewise
            except OSError as error:
                self.complain(f"call eventfd: {error}")
            finally:
                self._writing = None

    def unblock(self) -> bool:
        """Free whoever holds the lock and is stuck in a write, since the front-end filled an eventfd just before. Returns whether one was full. One
        who is merely slow has nothing to write: what the driver is to be notified of would be gone."""
        writing = self._writing
        full = writing is not None and make_room(writing)
        return (self._log is not None and self._log.unblock()) or full

    def complain(self, text: str) -> None:
        """Count what is wrong with the driver, and log it once in a while."""
        self._complaints += 1
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + 1.0
            log.warning("ring %d: %s (complaint %d)", self.index, text, self._complaints)

    def fail(self, reason: str, by_device: bool = False) -> None:
        """Break the ring until it is started again: log why, and signal its err eventfd."""
        with self.get_mut():
            self.device_failed |= by_device
            if self.broken is None:
                self.broken = reason
                self.active = False
                log.error("ring %d is broken until it is started again: %s", self.index, reason)
                if self._err is None:
                    if self.notify:
                        self.notify("VRING_ERR")
                elif has_room(self._err):
                    self._writing = self._err
                    try:
                        with freed(self.unblock):
                            event_writer(self._err)(self._err, EVENT)
                    except OSError as error:
                        log.warning("ring %d: err eventfd: %s", self.index, error)
                    finally:
                        self._writing = None

    # Configuration

    def set_queue_features(self, features: int) -> None:
        """The negotiated virtio features (bits of virtio 1.3 §6) as far as they concern rings. Takes effect when the ring starts."""
        with self.get_mut():
            self._features = features

    def set_queue_endian(self, big: bool) -> None:
        """The byte order of a legacy driver (SET_VRING_ENDIAN). Takes effect when the ring starts."""
        with self.get_mut():
            self._big_endian = big

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """The ring's byte order, and that of the device's own structures in its buffers: "little" with VIRTIO_F_VERSION_1, else the driver's,
        which is this host's unless the front-end said otherwise (virtio 1.3 §2.7.3)."""
        if self._features >> VIRTIO_F_VERSION_1 & 1:
            return "little"
        return sys.byteorder if self._big_endian is None else "big" if self._big_endian else "little"

    def set_queue_size(self, num: int) -> None:
        """Entries. Raises VringError when there are more than the device allows, or none."""
        if not 0 < num <= self.max_queue_size:
            raise VringError(f"ring {self.index}: {num} entries, the device allows 1 to {self.max_queue_size}")
        with self.get_mut():
            self._size = num

    def set_queue_info(self, desc_table: int, avail_ring: int, used_ring: int) -> None:
        """Guest addresses (or IOVAs) of the descriptor table (or packed ring), the driver area and the device area, in the current memory.

        A ring that runs goes on there. Raises GuestMemoryError when an area is not in RAM, IotlbMiss when a translation is missing, VringError
        when one is misaligned.
        """
        with self.get_mut():
            self._info = (desc_table, avail_ring, used_ring)
            if self._queue:
                self._queue.move(self._space(), self._info)

    def set_iotlb(self, iotlb: Iotlb | None) -> None:
        """From here on addresses are IOVAs, which this translates; None: guest addresses. To be followed by `set_queue_info`."""
        with self.get_mut():
            self._iotlb = iotlb

    def _space(self) -> AddressSpace:
        memory = self._memory.memory()
        return memory if self._iotlb is None else IovaMemory(memory, self._iotlb)

    def forget(self, iova: int, size: int) -> bool:
        """A translation has gone. Returns whether the ring itself is where it was: then it needs a place again (`set_queue_info`)."""
        with self.get_mut():
            if self._queue is None:
                return False
            self._queue.forget()
            return self._queue.lies_in(iova, size)

    def retry(self, iova: int, size: int) -> None:
        """A translation has come: look at the ring, if it may have waited for that."""
        stalled = self._queue.stalled if self._queue else None
        if stalled is None or stalled.answered_by(iova, size):
            self.wake()

    @property
    def placed(self) -> bool:
        """Whether the ring has its place in guest memory, as far as it needs one."""
        return self._ready and (self._queue is not None or not self.started)

    def set_queue_next_avail(self, base: int) -> None:
        """Where to go on (SET_VRING_BASE). Takes effect when the ring starts."""
        with self.get_mut():
            self._base = base

    def set_queue_next_used(self, used: int) -> None:
        """Where a packed ring puts its next used descriptor: index and wrap counter as in SET_VRING_BASE's upper half. A split ring
        keeps that in guest memory."""
        with self.get_mut():
            self._base = self._base & 0xFFFF | used << 16

    def set_inflight(self, area: memoryview | None) -> None:
        """The ring's part of the in-flight region, or None. Takes effect when the ring starts: it then takes again what was in flight."""
        with self.get_mut():
            self._inflight = area

    def set_log(self, log: DirtyLog | None) -> None:
        """From here on, mark in `log` whatever the device writes into chains; None: nothing."""
        with self.get_mut():
            self._log = log
            if self._queue:
                self._queue.log = log

    def set_used_log(self, guest_addr: int | None) -> None:
        """Where a log has the used ring (the address need not be in RAM); None: writes to it are not logged."""
        with self.get_mut():
            self._log_used_at = guest_addr
            if self._queue:
                self._queue.log_used_at = guest_addr

    def set_queue_event_idx(self, enabled: bool) -> None:
        """Whether VIRTIO_F_EVENT_IDX is negotiated. Takes effect when the ring starts."""
        with self.get_mut():
            self._features = self._features & ~(1 << VIRTIO_F_EVENT_IDX) | enabled << VIRTIO_F_EVENT_IDX

    def queue_next_avail(self) -> int:
        """Where the ring goes on (GET_VRING_BASE)."""
        with self.get_ref():
            return self._queue.base if self._queue else self._base

    def queue_used_idx(self) -> int:
        """The used index (split: as in guest memory). Raises VringError when the ring is not started."""
        with self.get_ref():
            if self._queue is None:
                raise VringError(f"ring {self.index} is not started")
            return self._queue.used_index

    def set_enabled(self, enabled: bool) -> None:
        """The ring's second switch (SET_VRING_ENABLE)."""
        with self.get_mut():
            self.active &= enabled == self.enabled  # what changes anything has the ring looked at
            self.enabled = enabled
            self._settle()

    def set_queue_ready(self, ready: bool) -> None:
        """Whether the addresses of `set_queue_info` are good in the current guest memory."""
        with self.get_mut():
            self._ready = ready
            self._settle()

    def start(self) -> None:
        """The ring's first switch on (SET_VRING_KICK). Raises VringError, with the switch as it was, when it cannot run as configured; or
        GuestMemoryError, with the switch on, when it has no place in guest memory yet."""
        with self.get_mut():
            before = self.started
            if not before:
                self.broken = None
                self.device_failed = False
            self.started = True
            try:
                self._settle()
            except VringError:
                self.started = before
                raise

    def suspend(self) -> None:
        """The first switch off: no further chain is taken. What is in flight may still be completed."""
        self.started = self.active = False  # ends the worker's iteration
        with self.get_mut():
            self._settle()

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is in flight. Returns whether that is so."""
        with self.get_mut():
            if not self.in_flight:
                return True
            self._idle = idle = threading.Event()
        idle.wait(timeout)
        with self.get_mut():
            self._idle = None
            return not self.in_flight

    def stop(self) -> int:
        """Let go of the queue and of the kick and call eventfds; configuration stays. Returns where the ring would go on. A chain that
        is still in flight is lost to the driver."""
        with self.get_mut():
            self.started = False
            if self._queue:
                self._base = self._queue.base
                if self._log:
                    with freed(self.unblock):
                        self._log.commit()  # what was written into chains that are lost to the driver is written all the same
            self._queue = None
            self._completed = []
            self._settle()
            self.read_kick()
            self.set_kick(None)
            self.set_call(None)
            return self._base

    def reset(self) -> None:
        """Stop, disable and forget all configuration: as new, but for the err eventfd."""
        with self.get_mut():
            self.stop()
            self.enabled = self._ready = self.device_failed = False
            self.broken = self._info = self._inflight = self._log = self._log_used_at = self._iotlb = self._big_endian = None
            self._base = self._features = 0
            self._size = self.max_queue_size

    def _settle(self) -> None:
        """Bring the queue and `active` in line with the switches. A ring that becomes active is looked at, kick or no kick; one that stays active is
        so all the time, or a kick that its worker takes meanwhile would be lost."""
        was_active = self.active
        if self.started and self._ready and self._queue is None and self._info:
            self.active = False  # nor later, if there can be no queue
            with suppress(IotlbMiss):  # an update of the IOTLB places it again
                self._queue = self._make_queue(self._info)
                self._completed = self._queue.completed
        served = self.started and (self.enabled or self.serves_disabled)
        self.active = served and self._ready and self._queue is not None and self.broken is None
        if self.active and not was_active:
            self.wake()

    def _make_queue(self, areas: tuple[int, int, int]) -> Queue:
        kind = PackedQueue if self._features >> VIRTIO_F_RING_PACKED & 1 else SplitQueue
        queue = kind(self._space(), self._size, areas, self._features, self.complain, self.byteorder == "big")
        queue.start(self._base, self._inflight)
        queue.log, queue.log_used_at = self._log, self._log_used_at
        return queue

    # Eventfds

    @property
    def kick(self) -> int | None:
        """The kick eventfd's number. None for a ring that is polled."""
        return self._kick

    def set_kick(self, fd: int | None) -> None:
        """The ring owns the eventfd from here on; the one before is closed."""
        with self.get_mut():
            _close(self._kick)
            self._kick = fd

    def set_call(self, fd: int | None, polled: bool = False) -> None:
        """As set_kick. Not only eventfds: User-mode Linux gives a socket. `polled`: without one the front-end polls, and wants no messages either."""
        with self.get_mut():
            _close(self._call)
            self._call, self._call_polled = fd, polled
            self._write_call = os.write if fd is None else event_writer(fd)
            self._call_room = select.poll()
            if fd is not None:
                self._call_room.register(fd, select.POLLOUT)

    def set_err(self, fd: int | None) -> None:
        """As set_kick."""
        with self.get_mut():
            _close(self._err)
            self._err = fd

    def read_kick(self) -> bool:
        """Clear the kick eventfd, without ever waiting. Returns whether the ring is active."""
        if self._kick is not None:
            clear_event(self._kick)
        return self.active


class VringMutex(VringState):
    """A ring behind a lock: for any number of threads."""

    @staticmethod
    def _make_lock() -> TurnLock:
        return TurnLock()


class VringRwLock(VringState):
    """A ring behind a readers-writer lock: `get_ref` in several threads at once."""

    @staticmethod
    def _make_lock() -> _ReadersLock:
        return _ReadersLock()

    @contextmanager
    def get_ref(self) -> Iterator[VringState]:
        lock = self._lock
        assert isinstance(lock, _ReadersLock)
        lock.acquire_shared()
        try:
            yield self
        finally:
            lock.release_shared()
            if self._completed and not self._depth:
                self._flush_late()


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


# ---------------------------------------------------------------------------------------------------------------------------
# Driver side
# ---------------------------------------------------------------------------------------------------------------------------

Buffer = tuple[int, int]
"""Guest address and length in bytes of one part of a chain."""
_Piece = tuple[int, int, int]  # guest address, length in bytes, flags


class DriverQueue(_Ring, ABC):
    """The driver side of a virtqueue: adds chains, collects what was used. One thread at a time.

    Its memory: `layout(size)` says how much, and where in it the three areas are. With `tables`, the guest address of
    `size * TABLE_BYTES` more, chains go into indirect tables.
    """

    TABLE_ENTRIES = 32
    TABLE_BYTES = 16 * TABLE_ENTRIES

    def __init__(
        self, memory: AddressSpace, size: int, areas: tuple[int, int, int], features: int = 0, tables: int | None = None, big_endian: bool = False
    ) -> None:
        """`big_endian`: a legacy driver of a big-endian guest."""
        super().__init__(big_endian)
        self.size = size
        self.areas = areas
        self.free = size
        self._event_idx = bool(features >> VIRTIO_F_EVENT_IDX & 1)
        self._in_order = bool(features >> VIRTIO_F_IN_ORDER & 1)
        self._tables = tables
        self._memory = memory
        self._fence = Fence()
        self._tokens: dict[int, tuple[object, int]] = {}  # by id: what the caller gave, descriptors taken
        self._sequence: deque[int] = deque()  # ids in the order they were added
        self._unshown = 0
        self._map()

    @classmethod
    @abstractmethod
    def layout(cls, size: int) -> tuple[int, tuple[int, int, int]]:
        """How many bytes a queue of `size` entries takes, and the offsets of its areas therein."""

    @abstractmethod
    def _map(self) -> None: ...

    @abstractmethod
    def _place(self, pieces: list[_Piece]) -> int:
        """Write the descriptors; returns the chain's id."""

    @abstractmethod
    def _show(self) -> bool: ...

    @abstractmethod
    def _next_used(self) -> tuple[int, int] | None:
        """(id, length) of the next used element."""

    @abstractmethod
    def enable_notification(self) -> bool:
        """Ask the device to notify. Returns whether there is something used already."""

    @abstractmethod
    def disable_notification(self) -> None:
        """Tell the device that it need not notify."""

    def add(self, readable: Sequence[Buffer], writable: Sequence[Buffer], token: object = None) -> int:
        """Put a chain into the queue, not yet visible to the device: see `publish`. Returns its id.

        Raises VringError when there is no room, or the chain is too long for an indirect table."""
        pieces = [(address, length, 0) for address, length in readable] + [(address, length, DESC_F_WRITE) for address, length in writable]
        taken = 1 if self._tables is not None else len(pieces)
        if not pieces or taken > self.free:
            raise VringError(f"a chain of {len(pieces)} descriptors, with {self.free} of {self.size} free")
        if self._tables is not None and len(pieces) > self.TABLE_ENTRIES:
            raise VringError(f"a chain of {len(pieces)} descriptors, an indirect table has room for {self.TABLE_ENTRIES}")
        identity = self._place(pieces)
        self.free -= taken
        self._tokens[identity] = (token, taken)
        self._sequence.append(identity)
        self._unshown += 1
        return identity

    def publish(self) -> bool:
        """Show the device all that was added. Returns whether it wants to be notified."""
        if not self._unshown:
            return False
        wanted = self._show()
        self._unshown = 0
        return wanted

    def used(self) -> list[tuple[object, int]]:
        """What the device has used since the last call: each chain's token, and how many bytes the device says it wrote.

        Raises VringError when the device returns what it was not given."""
        found: list[tuple[object, int]] = []
        while True:
            element = self._next_used()
            if element is None:
                return found
            identity, length = element
            if identity not in self._tokens:
                raise VringError(f"the device returned chain {identity}, which it does not have")
            if self._in_order:
                # One element may stand for all before it, whose lengths are then not told (virtio 1.3 §2.7.9, §2.8.8)
                while self._sequence[0] != identity:
                    found.append((self._release(self._sequence[0]), 0))
            found.append((self._release(identity), length))

    def _release(self, identity: int) -> object:
        token, taken = self._tokens.pop(identity)
        self._sequence.remove(identity)
        self.free += taken
        self._recycle(identity, taken)
        return token

    @abstractmethod
    def _recycle(self, identity: int, taken: int) -> None: ...

    def _write_table(self, slot: int, pieces: list[_Piece], packed: bool) -> Buffer:
        assert self._tables is not None
        fields: list[int] = []
        for number, (address, length, write) in enumerate(pieces, 1):
            more = number < len(pieces)
            fields += (address, length, 0, write) if packed else (address, length, write | (DESC_F_NEXT if more else 0), number if more else 0)
        address = self._tables + slot * self.TABLE_BYTES
        self._memory.write(address, _table_struct(len(pieces), self.big_endian).pack(*fields))
        return address, 16 * len(pieces)


class SplitDriverQueue(DriverQueue):
    """The driver side of a split virtqueue (virtio 1.3 §2.7)."""

    @classmethod
    def layout(cls, size: int) -> tuple[int, tuple[int, int, int]]:
        used = _align(16 * size + 6 + 2 * size, 64)
        return used + 6 + 8 * size, (0, 16 * size, used)

    def _map(self) -> None:
        size = self.size
        self._desc = self._memory.view(self.areas[0], 16 * size)
        self._avail = self._memory.view(self.areas[1], 6 + 2 * size).cast("H")
        self._used = self._memory.view(self.areas[2], 6 + 8 * size)
        self._used16 = self._used.cast("H")
        self._free_heads = deque(range(size))
        self._chains: dict[int, list[int]] = {}
        self._index = 0  # the next available index, not yet shown
        self._seen = 0

    def _place(self, pieces: list[_Piece]) -> int:
        if self._tables is not None:
            slot = self._free_heads.popleft()
            indices = [slot]
            address, length = self._write_table(slot, pieces, packed=False)
            self._descriptor.pack_into(self._desc, 16 * slot, address, length, DESC_F_INDIRECT, 0)
        else:
            indices = [self._free_heads.popleft() for _ in pieces]
            for number, (slot, (address, length, write)) in enumerate(zip(indices, pieces), 1):
                more = number < len(pieces)
                flags = write | (DESC_F_NEXT if more else 0)
                self._descriptor.pack_into(self._desc, 16 * slot, address, length, flags, indices[number] if more else 0)
        head = indices[0]
        self._chains[head] = indices
        self._store(self._avail, 2 + self._index % self.size, head)
        self._index = (self._index + 1) & 0xFFFF
        return head

    def _recycle(self, identity: int, taken: int) -> None:
        self._free_heads.extend(self._chains.pop(identity))

    def _show(self) -> bool:
        old = (self._index - self._unshown) & 0xFFFF
        self._fence()
        self._store(self._avail, 1, self._index)
        self._fence()
        if not self._event_idx:
            return not self._load(self._used16, 0) & USED_F_NO_NOTIFY
        event = self._load(self._used16, 2 + 4 * self.size)
        return (self._index - event - 1) & 0xFFFF < (self._index - old) & 0xFFFF

    def _next_used(self) -> tuple[int, int] | None:
        if self._load(self._used16, 1) == self._seen:
            return None
        if not STRONGLY_ORDERED:
            self._fence()
        identity, length = _used_struct(1, self.big_endian).unpack_from(self._used, 4 + 8 * (self._seen % self.size))
        self._seen = (self._seen + 1) & 0xFFFF
        return identity, length

    def enable_notification(self) -> bool:
        if self._event_idx:
            self._store(self._avail, 2 + self.size, self._seen)
        else:
            self._store(self._avail, 0, 0)
        self._fence()
        return self._load(self._used16, 1) != self._seen

    def disable_notification(self) -> None:
        if self._event_idx:
            self._store(self._avail, 2 + self.size, (self._seen - 1) & 0xFFFF)
        else:
            self._store(self._avail, 0, AVAIL_F_NO_INTERRUPT)


class PackedDriverQueue(DriverQueue):
    """The driver side of a packed virtqueue (virtio 1.3 §2.8)."""

    @classmethod
    def layout(cls, size: int) -> tuple[int, tuple[int, int, int]]:
        return 16 * size + 8, (0, 16 * size, 16 * size + 4)

    def _map(self) -> None:
        self._desc = self._memory.view(self.areas[0], 16 * self.size)
        self._flags = self._desc.cast("H")
        self._driver_event = self._memory.view(self.areas[1], 4).cast("H")
        self._device_event = self._memory.view(self.areas[2], 4).cast("H")
        self._free_ids = deque(range(self.size))
        self._position = self._used_position = 0
        self._wrap = self._used_wrap = 1
        self._hidden: tuple[int, int] | None = None  # position and flags of the first descriptor that is not yet shown
        self._added = 0  # descriptors that are not yet shown

    def _place(self, pieces: list[_Piece]) -> int:
        identity = self._free_ids.popleft()
        if self._tables is not None:
            address, length = self._write_table(identity, pieces, packed=True)
            pieces = [(address, length, DESC_F_INDIRECT)]
        for number, (address, length, flags) in enumerate(pieces, 1):
            if number < len(pieces):
                flags |= DESC_F_NEXT
            flags |= PACKED_F_AVAIL if self._wrap else PACKED_F_USED
            if self._hidden is None:
                self._hidden = (self._position, flags)
                _PACKED_DESCRIPTOR_HIDDEN.pack_into(self._desc, 16 * self._position, address, length, identity)
            else:
                _DESCRIPTOR.pack_into(self._desc, 16 * self._position, address, length, identity, flags)
            self._position += 1
            if self._position == self.size:
                self._position = 0
                self._wrap ^= 1
        self._added += len(pieces)
        return identity

    def _recycle(self, identity: int, taken: int) -> None:
        self._free_ids.append(identity)
        self._used_position += taken
        if self._used_position >= self.size:
            self._used_position -= self.size
            self._used_wrap ^= 1

    def _show(self) -> bool:
        assert self._hidden is not None
        position, flags = self._hidden
        self._fence()
        self._store(self._flags, 8 * position + 7, flags)
        self._fence()
        count, self._added, self._hidden = self._added, 0, None
        suppression = self._load(self._device_event, 1)
        if suppression != EVENT_FLAGS_DESC or not self._event_idx:
            return suppression != EVENT_FLAGS_DISABLE
        event = self._load(self._device_event, 0)
        offset = event & 0x7FFF
        if event >> 15 != self._wrap:
            offset -= self.size
        new = self._position
        return (new - offset - 1) & 0xFFFF < count

    def _next_used(self) -> tuple[int, int] | None:
        flags = self._load(self._flags, 8 * self._used_position + 7)
        if flags & PACKED_F_BOTH != (PACKED_F_BOTH if self._used_wrap else 0):
            return None
        if not STRONGLY_ORDERED:
            self._fence()
        _, length, identity, _ = _DESCRIPTOR.unpack_from(self._desc, 16 * self._used_position)
        return identity, length

    def enable_notification(self) -> bool:
        if self._event_idx:
            self._store(self._driver_event, 0, self._used_position | self._used_wrap << 15)
            if not STRONGLY_ORDERED:
                self._fence()
        self._store(self._driver_event, 1, EVENT_FLAGS_DESC if self._event_idx else EVENT_FLAGS_ENABLE)
        self._fence()
        flags = self._load(self._flags, 8 * self._used_position + 7)
        return flags & PACKED_F_BOTH == (PACKED_F_BOTH if self._used_wrap else 0)

    def disable_notification(self) -> None:
        self._store(self._driver_event, 1, EVENT_FLAGS_DISABLE)
