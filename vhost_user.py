"""A framework for vhost-user back-ends: virtio devices in a process outside the VMM, in pure Python.

A back-end gets guest RAM and eventfds from a front-end (a VMM) over a Unix socket and serves the virtqueues itself. A device is a
subclass of `VhostUserBackend` or `VhostUserBackendMut`; `VhostUserDaemon` does the rest:

    class Rng(VhostUserBackendMut):
        def process_queue(self, vring):
            for chain in vring:
                vring.add_used(chain, chain.write(os.urandom(min(chain.writable_len, 1 << 16))))

    VhostUserDaemon("rng", Rng()).serve("/run/rng.sock")

Needs the standard library alone, on Linux, with CPython 3.10 or newer. Vendor it with its two siblings, `vring` and `guest_memory`.
Licensed under the Apache License, Version 2.0.

In reading order:

- Facts              feature bits, header flags
- Payloads           one typed class for each layout of the protocol, with its check
- Requests           the table: a row for each request, with payload, descriptors, reply and gate. Dispatcher, `Frontend` and log read it
- Wire               `Message`, `Connection`: messages over a Unix socket, with the descriptors they own
- Devices            `VhostUserBackend`, `VhostUserBackendMut`: what a device overrides
- Workers            `VringEpollHandler`: a thread that serves rings and the device's own listeners
- Device state       a migrating device's state, saved and loaded in a thread
- Sessions           one connection: its state, and a handler for each request
- Processes          one connection spread over worker processes, each with a session of its own
- Daemon             `Listener`, `VhostUserDaemon`
- Front-end          `Frontend`, `FrontendQueue`: the other side of all that
- Programs           `run_device`: makes any device a program by the specification's conventions

The peer is untrusted. What breaks the protocol raises `ProtocolError` and ends the connection; what cannot be done raises `Refused`
and goes into the acknowledgement.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import functools
import gc
import io
import json
import logging
import mmap
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from abc import ABC
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from enum import Enum, IntFlag
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple, TypeVar, cast
from uuid import UUID

if TYPE_CHECKING or not __package__:
    from guest_memory import (
        ACCESS_READ,
        ACCESS_WRITE,
        MAX_REGIONS,
        AddressSpace,
        DirtyLog,
        GuestMemoryAtomic,
        GuestMemoryError,
        GuestMemoryMmap,
        GuestRegionMmap,
        Iotlb,
        IotlbMiss,
        IovaMemory,
        Userfault,
        freed,
        map_shared,
        survive_truncation,
    )
    from vring import (
        VIRTIO_F_ACCESS_PLATFORM,
        VIRTIO_F_EVENT_IDX,
        VIRTIO_F_IN_ORDER,
        VIRTIO_F_INDIRECT_DESC,
        VIRTIO_F_RING_PACKED,
        VIRTIO_F_RING_RESET,
        VIRTIO_F_VERSION_1,
        Buffer,
        DriverQueue,
        NoLock,
        PackedDriverQueue,
        PackedInflight,
        SplitDriverQueue,
        SplitInflight,
        TurnLock,
        VringError,
        VringMutex,
        VringRwLock,
        VringState,
        VringT,
    )
else:
    from .guest_memory import (
        ACCESS_READ,
        ACCESS_WRITE,
        MAX_REGIONS,
        AddressSpace,
        DirtyLog,
        GuestMemoryAtomic,
        GuestMemoryError,
        GuestMemoryMmap,
        GuestRegionMmap,
        Iotlb,
        IotlbMiss,
        IovaMemory,
        Userfault,
        freed,
        map_shared,
        survive_truncation,
    )
    from .vring import (
        VIRTIO_F_ACCESS_PLATFORM,
        VIRTIO_F_EVENT_IDX,
        VIRTIO_F_IN_ORDER,
        VIRTIO_F_INDIRECT_DESC,
        VIRTIO_F_RING_PACKED,
        VIRTIO_F_RING_RESET,
        VIRTIO_F_VERSION_1,
        Buffer,
        DriverQueue,
        NoLock,
        PackedDriverQueue,
        PackedInflight,
        SplitDriverQueue,
        SplitInflight,
        TurnLock,
        VringError,
        VringMutex,
        VringRwLock,
        VringState,
        VringT,
    )

__all__ = [
    "BACKEND_REQUESTS",
    "FEATURES",
    "GPU_REQUESTS",
    "PROTOCOL_FEATURES",
    "REQUESTS",
    "STATE_LOAD",
    "STATE_SAVE",
    "VHOST_USER_F_PROTOCOL_FEATURES",
    "AsymmetricSession",
    "BackendChannel",
    "BackendMessage",
    "Connection",
    "Disconnected",
    "Frontend",
    "FrontendQueue",
    "GuestMemoryAtomic",
    "GuestMemoryMmap",
    "Listener",
    "Message",
    "ProtocolError",
    "Refused",
    "Request",
    "SymmetricSession",
    "VhostUserBackend",
    "VhostUserBackendMut",
    "VhostUserDaemon",
    "VhostUserError",
    "VhostUserProtocolFeatures",
    "VringEpollHandler",
    "VringMutex",
    "VringRwLock",
    "VringState",
    "VringT",
    "has_gil",
    "run_device",
]

log = logging.getLogger("vhost_user")

# ---------------------------------------------------------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------------------------------------------------------

VHOST_F_LOG_ALL = 26
"""The virtio feature bit that has the back-end log what it writes; switched on and off while rings run (vhost-user, "Migration")."""

VHOST_USER_F_PROTOCOL_FEATURES = 30
"""The virtio feature bit that says there are protocol features (vhost-user, "Feature negotiation")."""


class VhostUserProtocolFeatures(IntFlag):
    """vhost-user, "Protocol features"."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23
    """A draft: its number may change yet."""


_PF = VhostUserProtocolFeatures
_NO_GATE = VhostUserProtocolFeatures(0)

FEATURES = sum(
    1 << bit
    for bit in (
        VHOST_F_LOG_ALL,
        VIRTIO_F_INDIRECT_DESC,
        VIRTIO_F_EVENT_IDX,
        VHOST_USER_F_PROTOCOL_FEATURES,
        VIRTIO_F_VERSION_1,
        VIRTIO_F_RING_PACKED,
        VIRTIO_F_IN_ORDER,
        VIRTIO_F_RING_RESET,
    )
)
"""Virtio features that the framework implements for every device."""

PROTOCOL_FEATURES = (
    _PF.MQ
    | _PF.LOG_SHMFD
    | _PF.REPLY_ACK
    | _PF.BACKEND_REQ
    | _PF.BACKEND_SEND_FD
    | _PF.INFLIGHT_SHMFD
    | _PF.RESET_DEVICE
    | _PF.CONFIGURE_MEM_SLOTS
    | _PF.STATUS
    | _PF.GET_VRING_BASE_INFLIGHT
    | _PF.GPA_ADDRESSES
)
"""Protocol features that the framework implements for every device. `HOOKS` come with their hooks, CONFIG with a config space too."""

HOOKS = (
    ("get_config", _PF.CONFIG),
    ("send_rarp", _PF.RARP),
    ("set_mtu", _PF.MTU),
    ("create_crypto_session", _PF.CRYPTO_SESSION),
    ("get_shared_object", _PF.SHARED_OBJECT),
    ("save_state", _PF.DEVICE_STATE),
    ("set_device_state_fd", _PF.DEVICE_STATE),
    ("get_shmem_config", _PF.SHMEM),
)
"""Protocol features that are offered by a device which overrides the method."""

NEEDS = (
    (_PF.INBAND_NOTIFICATIONS, _PF.BACKEND_REQ | _PF.REPLY_ACK),
    (_PF.GET_VRING_BASE_INFLIGHT, _PF.INFLIGHT_SHMFD),
    (_PF.GET_VRING_BASE_SKIP_DRAIN, _PF.GET_VRING_BASE_INFLIGHT | _PF.INFLIGHT_SHMFD),
)
"""Protocol features that must only be negotiated beside others."""

DRAFTS = _PF.GET_VRING_BASE_SKIP_DRAIN
"""Protocol features of drafts: offered by a device that says `drafts`."""

_WANTED = PROTOCOL_FEATURES | _PF.PAGEFAULT | _PF.HOST_NOTIFIER | _PF.INBAND_NOTIFICATIONS | _PF.CROSS_ENDIAN | DRAFTS
for _, _feature in HOOKS:
    _WANTED |= _feature

VERSION = 1
FLAG_VERSION_MASK = 3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3
FLAG_MASK = FLAG_VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY

HEADER = struct.Struct("=III")  # request, flags, payload size
MAX_CONFIG = 0x1000  # bytes of config space, as in the kernel's vhost
MAX_PAYLOAD = 12 + MAX_CONFIG  # the longest there is: offset, size, flags, and all of config space
MAX_FDS = 32  # in one message; the specification's memory table has 8

CONFIG_FLAG_WRITABLE, CONFIG_FLAG_LIVE_MIGRATION = 0, 1
STATE_SAVE, STATE_LOAD = 0, 1  # direction of a device state transfer
STATE_FAILED, STATE_NO_FD = 1, 1 << 8  # in the reply to SET_DEVICE_STATE_FD
SHMEM_WRITABLE = 1  # flag of SHMEM_MAP
XEN_FOREIGN, XEN_GRANT, XEN_NO_ADVANCE_MAP = 1 << 0, 1 << 1, 1 << 8  # flags of memory regions on Xen


class VhostUserError(Exception):
    """Base of this module's own errors."""


class ProtocolError(VhostUserError):
    """The peer broke the protocol: the connection ends. The message names what is wrong and the likely cause."""


class Refused(VhostUserError):
    """A request that cannot be done: the acknowledgement says so, the connection stays."""


class Disconnected(VhostUserError):
    """The peer has closed the connection."""


# ---------------------------------------------------------------------------------------------------------------------------
# Payloads (native byte order; vhost-user, "Message specification")
# ---------------------------------------------------------------------------------------------------------------------------


class Payload(ABC):
    """The part of a message behind its header."""

    LAYOUT: ClassVar[struct.Struct]

    def pack(self) -> bytes:
        """The bytes on the wire."""
        return self.LAYOUT.pack(*astuple(cast(Any, self)))  # every payload is a dataclass

    @classmethod
    def unpack(cls: type[_P], data: bytes) -> _P:
        """From the bytes on the wire. Raises ProtocolError when they are not such a payload."""
        if len(data) != cls.LAYOUT.size:
            raise ProtocolError(f"payload of {len(data)} bytes, {cls.__name__} has {cls.LAYOUT.size}")
        payload = cls(*cls.LAYOUT.unpack(data))
        payload.check()
        return payload

    def check(self) -> None:  # noqa: B027 - most payloads need none
        """Raise ProtocolError when a value can never be right."""


_P = TypeVar("_P", bound=Payload)


@dataclass(frozen=True)
class Empty(Payload):
    """No payload."""

    LAYOUT: ClassVar = struct.Struct("=")

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class U64(Payload):
    """A number."""

    LAYOUT: ClassVar = struct.Struct("=Q")
    value: int

    def __str__(self) -> str:
        return f"{self.value:#x}"


@dataclass(frozen=True)
class VringStatePayload(Payload):
    """A ring's index and a number ("vring state description")."""

    LAYOUT: ClassVar = struct.Struct("=II")
    index: int
    num: int

    def __str__(self) -> str:
        return f"ring {self.index}: {self.num:#x}"


@dataclass(frozen=True)
class VringAddr(Payload):
    """A ring's areas, in user addresses ("vring address description")."""

    LAYOUT: ClassVar = struct.Struct("=IIQQQQ")
    LOG_USED: ClassVar = 1 << 0  # VHOST_VRING_F_LOG
    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    def __str__(self) -> str:
        return f"ring {self.index}: descriptors {self.descriptor:#x}, available {self.available:#x}, used {self.used:#x}, flags {self.flags:#x}"


@dataclass(frozen=True)
class VringFd(Payload):
    """A ring's index, and whether an eventfd comes along."""

    LAYOUT: ClassVar = struct.Struct("=Q")
    NO_FD: ClassVar = 1 << 8
    value: int

    @property
    def index(self) -> int:
        """The ring, 0 … 255."""
        return self.value & 0xFF

    @property
    def has_fd(self) -> bool:
        """Whether an eventfd must come along."""
        return not self.value & self.NO_FD

    def check(self) -> None:
        if self.value >> 9:
            raise ProtocolError(f"value {self.value:#x} has bits beyond ring index and no-fd flag")

    def __str__(self) -> str:
        return f"ring {self.index}" + ("" if self.has_fd else " without eventfd")


@dataclass(frozen=True)
class MemRegion(Payload):
    """A region of guest memory ("Memory region description"); with XEN_MMAP its size tells whether the two fields for Xen are there."""

    LAYOUT: ClassVar = struct.Struct("=QQQQ")
    XEN_LAYOUT: ClassVar = struct.Struct("=QQQQII")
    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    xen_flags: int | None = None  # XEN_FOREIGN, XEN_GRANT, XEN_NO_ADVANCE_MAP; 0: an ordinary file; None: no such field
    xen_domain: int = 0

    def pack(self) -> bytes:
        fields = (self.guest_addr, self.size, self.user_addr, self.mmap_offset)
        return self.LAYOUT.pack(*fields) if self.xen_flags is None else self.XEN_LAYOUT.pack(*fields, self.xen_flags, self.xen_domain)

    @classmethod
    def unpack(cls: type[_R], data: bytes) -> _R:
        for layout in cls.LAYOUT, cls.XEN_LAYOUT:
            if len(data) == layout.size:
                return cls(*layout.unpack(data))
        raise ProtocolError(f"payload of {len(data)} bytes, a memory region has {cls.LAYOUT.size}, or {cls.XEN_LAYOUT.size} on Xen")

    def __str__(self) -> str:
        xen = "" if self.xen_flags is None else f", Xen flags {self.xen_flags:#x} of domain {self.xen_domain}"
        return f"{self.size:#x} bytes at guest {self.guest_addr:#x}, user {self.user_addr:#x}, offset {self.mmap_offset:#x}{xen}"


_R = TypeVar("_R", bound=MemRegion)


@dataclass(frozen=True)
class MemReg(MemRegion):
    """The same, alone in a message ("Single memory region description")."""

    LAYOUT: ClassVar = struct.Struct("=8xQQQQ")
    XEN_LAYOUT: ClassVar = struct.Struct("=8xQQQQII")


@dataclass(frozen=True)
class MemTable(Payload):
    """All regions of guest memory ("Multiple memory regions description")."""

    LAYOUT: ClassVar = struct.Struct("=II")
    regions: tuple[MemRegion, ...]

    def pack(self) -> bytes:
        return self.LAYOUT.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> MemTable:
        head, item = cls.LAYOUT.size, MemRegion.LAYOUT.size
        if len(data) < head:
            raise ProtocolError(f"payload of {len(data)} bytes, a memory table has at least {head}")
        count, _ = cls.LAYOUT.unpack_from(data)
        if count > MAX_FDS:
            raise ProtocolError(f"a memory table of {count} regions, more than {MAX_FDS}")
        if count and len(data) == head + count * MemRegion.XEN_LAYOUT.size:
            item = MemRegion.XEN_LAYOUT.size
        if len(data) < head + count * item:
            raise ProtocolError(f"payload of {len(data)} bytes, a memory table of {count} regions has {head + count * item}")
        return cls(tuple(MemRegion.unpack(data[at : at + item]) for at in range(head, head + count * item, item)))

    def __str__(self) -> str:
        return f"{len(self.regions)} regions: " + "; ".join(map(str, self.regions))


@dataclass(frozen=True)
class Log(Payload):
    """The dirty log: `size` bytes at `offset` of the file that comes along ("Log description")."""

    LAYOUT: ClassVar = struct.Struct("=QQ")
    size: int
    offset: int

    def __str__(self) -> str:
        return f"{self.size:#x} bytes at {self.offset:#x}"


@dataclass(frozen=True)
class IotlbMessage(Payload):
    """A translation of I/O virtual addresses, or its end; or, from the back-end, one that is missing or does not suffice ("An IOTLB message").

    access  what is allowed, or wanted: ACCESS_READ, ACCESS_WRITE or both
    kind    MISS, UPDATE, INVALIDATE or ACCESS_FAIL of `Iotlb`
    """

    LAYOUT: ClassVar = struct.Struct("=QQQBB6x")
    iova: int
    size: int
    user_addr: int
    access: int
    kind: int

    def __str__(self) -> str:
        kind = {Iotlb.MISS: "miss", Iotlb.UPDATE: "update", Iotlb.INVALIDATE: "invalidate", Iotlb.ACCESS_FAIL: "access fail"}.get(
            self.kind, self.kind
        )
        return f"{kind}: {self.size:#x} bytes at IOVA {self.iova:#x}, user {self.user_addr:#x}, access {self.access}"


@dataclass(frozen=True)
class Config(Payload):
    """A part of the device's config space ("Virtio device config space")."""

    LAYOUT: ClassVar = struct.Struct("=III")
    offset: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Config:
        head = cls.LAYOUT.size
        if len(data) < head:
            raise ProtocolError(f"payload of {len(data)} bytes, a config space access has at least {head}")
        offset, size, flags = cls.LAYOUT.unpack_from(data)
        if len(data) != head + size:
            raise ProtocolError(f"payload of {len(data)} bytes, a config space access of {size} bytes has {head + size}")
        if offset + size > MAX_CONFIG:
            raise ProtocolError(f"config space access to {size} bytes at {offset}, the most is {MAX_CONFIG}")
        return cls(offset, flags, data[head:])

    def __str__(self) -> str:
        return f"{len(self.data)} bytes at {self.offset}, flags {self.flags}"


@dataclass(frozen=True)
class Inflight(Payload):
    """The in-flight region ("Inflight description"): `mmap_size` bytes at `mmap_offset`, for `num_queues` queues of `queue_size` entries."""

    LAYOUT: ClassVar = struct.Struct("=QQHH4x")
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    def __str__(self) -> str:
        return f"{self.num_queues} queues of {self.queue_size}: {self.mmap_size:#x} bytes at {self.mmap_offset:#x}"


@dataclass(frozen=True)
class Mac(Payload):
    """A MAC address: the first 6 bytes of 8 (SEND_RARP)."""

    LAYOUT: ClassVar = struct.Struct("=6s2x")
    address: bytes

    def __str__(self) -> str:
        return self.address.hex(":")


class SymmetricSession(NamedTuple):
    """Parameters of a symmetric crypto session; codes as in virtio 1.3 §5.9."""

    cipher: int
    key_len: int
    hash: int
    hash_result_len: int
    auth_key_len: int
    aad_len: int
    op_type: int
    direction: int
    hash_mode: int
    chain_order: int
    key: bytes
    auth_key: bytes


class AsymmetricSession(NamedTuple):
    """Parameters of an asymmetric crypto session; codes as in virtio 1.3 §5.9."""

    algorithm: int
    key_type: int
    key_len: int
    rsa_padding: int
    rsa_hash: int
    key: bytes


@dataclass(frozen=True)
class CryptoSession(Payload):
    """A crypto session, as QEMU 9 and newer have it on 64-bit hosts: its parameters in `opcode`'s form, and a number that the back-end gives.

    The specification leaves the layout to QEMU, which sends its own structures, pointers and all (they are passed over here)."""

    LAYOUT: ClassVar = struct.Struct("=Q1056sq")
    SYMMETRIC: ClassVar = struct.Struct("=6I4B4x16x64s512s")
    ASYMMETRIC: ClassVar = struct.Struct("=3I4x8xII1024s")
    AKCIPHER: ClassVar = 0x404  # the one opcode with asymmetric parameters (VIRTIO_CRYPTO_AKCIPHER_CREATE_SESSION)
    opcode: int
    data: bytes
    session_id: int

    @property
    def parameters(self) -> SymmetricSession | AsymmetricSession:
        """What the session is to be. The keys are cut to their lengths."""
        if self.opcode == self.AKCIPHER:
            asymmetric = AsymmetricSession(*self.ASYMMETRIC.unpack_from(self.data))
            return asymmetric._replace(key=asymmetric.key[: asymmetric.key_len])
        symmetric = SymmetricSession(*self.SYMMETRIC.unpack_from(self.data))
        return symmetric._replace(key=symmetric.key[: symmetric.key_len], auth_key=symmetric.auth_key[: symmetric.auth_key_len])

    @classmethod
    def of(cls, opcode: int, parameters: SymmetricSession | AsymmetricSession) -> CryptoSession:
        """A request for such a session."""
        layout = cls.SYMMETRIC if isinstance(parameters, SymmetricSession) else cls.ASYMMETRIC
        return cls(opcode, layout.pack(*parameters), 0)

    def check(self) -> None:
        given = self.parameters
        places = ((given.key_len, 1024),) if isinstance(given, AsymmetricSession) else ((given.key_len, 64), (given.auth_key_len, 512))
        if any(length > place for length, place in places):
            raise ProtocolError("a crypto session whose key is longer than its place (a front-end older than QEMU 9 has another layout)")

    def __str__(self) -> str:
        return f"session {self.session_id}, opcode {self.opcode:#x}"  # never the keys


@dataclass(frozen=True)
class Shared(Payload):
    """A shared object's UUID, big-endian components as in `UUID.bytes` ("VhostUserShared")."""

    LAYOUT: ClassVar = struct.Struct("=16s")
    uuid: UUID

    def pack(self) -> bytes:
        return self.uuid.bytes

    @classmethod
    def unpack(cls, data: bytes) -> Shared:
        if not data:
            return cls(UUID(int=0))  # QEMU 11.1 forgets it in GET_SHARED_OBJECT: then it is nobody's
        if len(data) != cls.LAYOUT.size:
            raise ProtocolError(f"payload of {len(data)} bytes, a UUID has {cls.LAYOUT.size}")
        return cls(UUID(bytes=data))

    def __str__(self) -> str:
        return str(self.uuid)


@dataclass(frozen=True)
class DeviceState(Payload):
    """What is transferred: `direction` STATE_SAVE or STATE_LOAD, `phase` 0, stopped ("Device state transfer parameters")."""

    LAYOUT: ClassVar = struct.Struct("=II")
    direction: int
    phase: int

    def __str__(self) -> str:
        return f"direction {self.direction}, phase {self.phase}"


@dataclass(frozen=True)
class VringArea(VringFd):
    """A ring's notification area, `size` bytes at `offset` of the file ("Vring area description")."""

    LAYOUT: ClassVar = struct.Struct("=QQQ")
    size: int
    offset: int

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.size:#x} bytes at {self.offset:#x}"


@dataclass(frozen=True)
class ShmemMap(Payload):
    """A map in a shared memory region: `size` bytes at `shm_offset`, from `fd_offset` of the file ("MMAP request")."""

    LAYOUT: ClassVar = struct.Struct("=B7xQQQQ")
    shmid: int
    fd_offset: int
    shm_offset: int
    size: int
    flags: int

    def overlaps(self, other: ShmemMap) -> bool:
        """Whether they have a byte of the region in common."""
        return self.shmid == other.shmid and self.shm_offset < other.shm_offset + other.size and other.shm_offset < self.shm_offset + self.size

    def fault(self, sizes: Sequence[int]) -> str | None:
        """What forbids it where shared memory regions have these sizes; None: nothing does."""
        if self.size <= 0 or any(number % mmap.PAGESIZE for number in (self.size, self.shm_offset, self.fd_offset)):
            return f"not whole pages of {mmap.PAGESIZE} bytes"
        if not 0 <= self.shmid < len(sizes) or not 0 <= self.shm_offset <= sizes[self.shmid] - self.size:
            return f"outside the regions of get_shmem_config, {sizes}"
        return None

    def covers(self, other: ShmemMap) -> bool:
        """Whether the two are the same range."""
        return (self.shmid, self.shm_offset, self.size) == (other.shmid, other.shm_offset, other.size)

    def __str__(self) -> str:
        return f"region {self.shmid}: {self.size:#x} bytes at {self.shm_offset:#x}, from {self.fd_offset:#x}, flags {self.flags}"


@dataclass(frozen=True)
class ShmemConfig(Payload):
    """Sizes of the device's shared memory regions, by shmid; 0: none ("VIRTIO Shared Memory Region configuration")."""

    LAYOUT: ClassVar = struct.Struct("=I4x256Q")
    sizes: tuple[int, ...]

    def pack(self) -> bytes:
        return self.LAYOUT.pack(sum(map(bool, self.sizes)), *self.sizes, *(256 - len(self.sizes)) * (0,))

    @classmethod
    def unpack(cls, data: bytes) -> ShmemConfig:
        if len(data) != cls.LAYOUT.size:
            raise ProtocolError(f"payload of {len(data)} bytes, shared memory regions have {cls.LAYOUT.size}")
        _, *sizes = cls.LAYOUT.unpack(data)
        while sizes and not sizes[-1]:
            sizes.pop()
        config = cls(tuple(sizes))
        config.check()
        return config

    def check(self) -> None:
        if len(self.sizes) > 256 or any(size % mmap.PAGESIZE for size in self.sizes):
            raise ProtocolError(f"shared memory regions of {self.sizes} bytes: must be up to 256, each a multiple of {mmap.PAGESIZE}")

    def __str__(self) -> str:
        return ", ".join(f"region {shmid}: {size:#x} bytes" for shmid, size in enumerate(self.sizes) if size) or "no regions"


# ---------------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------------


class Goes(Enum):
    """Which of a device's worker processes a request goes to; of a back-end's requests: whose copy is passed on."""

    FIRST = "to the first, which speaks for all"
    OWNER = "to the one that has the ring"
    ALL = "to all, which must answer alike"


@dataclass(frozen=True)
class Request:
    """A row of the request table.

    number    on the wire
    name      as in the specification, without its VHOST_USER_ prefix
    payload   its class
    reply     class of the reply's payload; None: acknowledged with a U64 if REPLY_ACK is negotiated and NEED_REPLY set (but SET_MEM_TABLE
              in postcopy is answered with a table)
    fds       fewest and most file descriptors that come along
    gate      the protocol feature that must have been negotiated; 0: none
    failed    the reply that says that it failed, where one can; its file descriptors do not go with it
    goes      with worker processes: to whom; from a back-end: from the first alone, or from any
    """

    number: int
    name: str
    payload: type[Payload] = Empty
    reply: type[Payload] | None = None
    fds: tuple[int, int] = (0, 0)
    gate: VhostUserProtocolFeatures = _NO_GATE
    failed: Payload | None = None
    goes: Goes = Goes.ALL

    def check_fds(self, count: int) -> None:
        """Raise ProtocolError unless `count` file descriptors may come with it."""
        fewest, most = self.fds
        if not fewest <= count <= most:
            hint = ": is guest memory shared (share=on)?" if self.name in ("SET_MEM_TABLE", "ADD_MEM_REG") else ""
            raise ProtocolError(f"{count} file descriptors with {self.name}, which takes {fewest} to {most}{hint}")


_ROWS = (
    Request(1, "GET_FEATURES", reply=U64),  # of all: a front-end may ask it to know that they have seen what came before
    Request(2, "SET_FEATURES", U64),
    Request(3, "SET_OWNER"),
    Request(4, "RESET_OWNER"),
    Request(5, "SET_MEM_TABLE", MemTable, fds=(0, MAX_FDS)),
    Request(6, "SET_LOG_BASE", Log, reply=U64, fds=(1, 1), gate=_PF.LOG_SHMFD),
    Request(7, "SET_LOG_FD", fds=(1, 1)),
    Request(8, "SET_VRING_NUM", VringStatePayload, goes=Goes.OWNER),
    Request(9, "SET_VRING_ADDR", VringAddr, goes=Goes.OWNER),
    Request(10, "SET_VRING_BASE", VringStatePayload, goes=Goes.OWNER),
    Request(11, "GET_VRING_BASE", VringStatePayload, reply=VringStatePayload, goes=Goes.OWNER),
    Request(12, "SET_VRING_KICK", VringFd, fds=(0, 1), goes=Goes.OWNER),
    Request(13, "SET_VRING_CALL", VringFd, fds=(0, 1), goes=Goes.OWNER),
    Request(14, "SET_VRING_ERR", VringFd, fds=(0, 1), goes=Goes.OWNER),
    Request(15, "GET_PROTOCOL_FEATURES", reply=U64, goes=Goes.FIRST),
    Request(16, "SET_PROTOCOL_FEATURES", U64),
    Request(17, "GET_QUEUE_NUM", reply=U64, gate=_PF.MQ, goes=Goes.FIRST),
    Request(18, "SET_VRING_ENABLE", VringStatePayload, goes=Goes.OWNER),
    Request(19, "SEND_RARP", Mac, gate=_PF.RARP, goes=Goes.FIRST),
    Request(20, "NET_SET_MTU", U64, gate=_PF.MTU),
    Request(21, "SET_BACKEND_REQ_FD", fds=(1, 1), gate=_PF.BACKEND_REQ),
    Request(22, "IOTLB_MSG", IotlbMessage, reply=U64, failed=U64(1)),
    Request(23, "SET_VRING_ENDIAN", VringStatePayload, gate=_PF.CROSS_ENDIAN, goes=Goes.OWNER),
    Request(24, "GET_CONFIG", Config, reply=Config, gate=_PF.CONFIG, failed=Empty(), goes=Goes.FIRST),
    Request(25, "SET_CONFIG", Config, gate=_PF.CONFIG),
    Request(26, "CREATE_CRYPTO_SESSION", CryptoSession, reply=CryptoSession, gate=_PF.CRYPTO_SESSION, failed=CryptoSession(0, b"", -1)),
    Request(27, "CLOSE_CRYPTO_SESSION", U64, gate=_PF.CRYPTO_SESSION),
    Request(28, "POSTCOPY_ADVISE", reply=Empty, gate=_PF.PAGEFAULT),
    Request(29, "POSTCOPY_LISTEN", gate=_PF.PAGEFAULT),
    Request(30, "POSTCOPY_END", reply=U64, gate=_PF.PAGEFAULT, failed=U64(1)),
    Request(31, "GET_INFLIGHT_FD", Inflight, reply=Inflight, gate=_PF.INFLIGHT_SHMFD, goes=Goes.FIRST),
    Request(32, "SET_INFLIGHT_FD", Inflight, fds=(1, 1), gate=_PF.INFLIGHT_SHMFD),
    Request(33, "GPU_SET_SOCKET", fds=(1, 1), goes=Goes.FIRST),
    Request(34, "RESET_DEVICE", gate=_PF.RESET_DEVICE),
    Request(35, "VRING_KICK", VringStatePayload, gate=_PF.INBAND_NOTIFICATIONS, goes=Goes.OWNER),
    Request(36, "GET_MAX_MEM_SLOTS", reply=U64, gate=_PF.CONFIGURE_MEM_SLOTS, goes=Goes.FIRST),
    Request(37, "ADD_MEM_REG", MemReg, fds=(1, 1), gate=_PF.CONFIGURE_MEM_SLOTS),
    Request(38, "REM_MEM_REG", MemReg, fds=(0, 1), gate=_PF.CONFIGURE_MEM_SLOTS),
    Request(39, "SET_STATUS", U64, gate=_PF.STATUS),
    Request(40, "GET_STATUS", reply=U64, gate=_PF.STATUS, goes=Goes.FIRST),
    Request(41, "GET_SHARED_OBJECT", Shared, reply=Shared, gate=_PF.SHARED_OBJECT, failed=Shared(UUID(int=0)), goes=Goes.FIRST),
    Request(42, "SET_DEVICE_STATE_FD", DeviceState, U64, (1, 1), gate=_PF.DEVICE_STATE, failed=U64(STATE_FAILED | STATE_NO_FD), goes=Goes.FIRST),
    Request(43, "CHECK_DEVICE_STATE", reply=U64, gate=_PF.DEVICE_STATE, failed=U64(STATE_FAILED), goes=Goes.FIRST),
    Request(44, "GET_SHMEM_CONFIG", reply=ShmemConfig, gate=_PF.SHMEM, goes=Goes.FIRST),
    Request(45, "GET_VRING_BASE_SKIP_DRAIN", VringStatePayload, reply=VringStatePayload, gate=_PF.GET_VRING_BASE_SKIP_DRAIN, goes=Goes.OWNER),
)
_BACKEND_ROWS = (
    Request(1, "IOTLB_MSG", IotlbMessage),
    Request(2, "CONFIG_CHANGE_MSG", gate=_PF.CONFIG, goes=Goes.FIRST),
    Request(3, "VRING_HOST_NOTIFIER_MSG", VringArea, fds=(0, 1), gate=_PF.HOST_NOTIFIER),
    Request(4, "VRING_CALL", VringStatePayload, gate=_PF.INBAND_NOTIFICATIONS),
    Request(5, "VRING_ERR", VringStatePayload, gate=_PF.INBAND_NOTIFICATIONS),
    Request(6, "SHARED_OBJECT_ADD", Shared, gate=_PF.SHARED_OBJECT),
    Request(7, "SHARED_OBJECT_REMOVE", Shared, gate=_PF.SHARED_OBJECT),
    Request(8, "SHARED_OBJECT_LOOKUP", Shared, reply=U64, gate=_PF.SHARED_OBJECT, failed=U64(1)),
    Request(9, "SHMEM_MAP", ShmemMap, fds=(1, 1), gate=_PF.SHMEM),
    Request(10, "SHMEM_UNMAP", ShmemMap, gate=_PF.SHMEM),
)

REQUESTS = {row.name: row for row in _ROWS}
"""What a front-end asks of a back-end (vhost-user, "Front-end message types")."""
BACKEND_REQUESTS = {row.name: row for row in _BACKEND_ROWS}
"""What a back-end asks of a front-end (vhost-user, "Back-end message types")."""

_BY_NUMBER = {row.number: row for row in _ROWS}
_BACKEND_BY_NUMBER = {row.number: row for row in _BACKEND_ROWS}

_GPU_UPDATE = struct.Struct("=5I")  # scanout, x, y, width, height
_GPU_CURSOR = struct.Struct("=3I")  # scanout, x, y
_GPU_HEADER = "<IIQIB3x"  # of replies that are virtio_gpu_ctrl_hdr (virtio 1.3 §5.7.6.7)

GPU_REQUESTS: dict[str, tuple[int, struct.Struct, struct.Struct | None]] = {
    "GET_PROTOCOL_FEATURES": (1, Empty.LAYOUT, U64.LAYOUT),
    "SET_PROTOCOL_FEATURES": (2, U64.LAYOUT, None),
    "GET_DISPLAY_INFO": (3, Empty.LAYOUT, struct.Struct(_GPU_HEADER + 16 * "6I")),  # for each scanout: x, y, width, height, enabled, flags
    "CURSOR_POS": (4, _GPU_CURSOR, None),
    "CURSOR_POS_HIDE": (5, _GPU_CURSOR, None),
    "CURSOR_UPDATE": (6, struct.Struct("=5I16384s"), None),  # scanout, x, y, hot x, hot y, 64 * 64 pixels
    "SCANOUT": (7, struct.Struct("=3I"), None),  # scanout, width, height
    "UPDATE": (8, _GPU_UPDATE, None),  # and the pixels
    "DMABUF_SCANOUT": (9, struct.Struct("=9Ii"), None),  # scanout, x, y, width, height; dma-buf's width, height, stride, flags, fourcc
    "DMABUF_UPDATE": (10, _GPU_UPDATE, Empty.LAYOUT),
    "GET_EDID": (11, struct.Struct("=I"), struct.Struct(_GPU_HEADER + "I4x1024s")),  # scanout; size, EDID
    "DMABUF_SCANOUT2": (12, struct.Struct("=9IiQ"), None),  # the same, and the modifier
}
"""What a back-end says over the socket of GPU_SET_SOCKET: number, payload and reply (vhost-user-gpu, "Message types"). Headers are as here,
with flags 0 in requests and FLAG_REPLY in replies."""


def _row_of(message: Message, table: dict[int, Request]) -> Request:
    row = table.get(message.request)
    if row is None:
        raise ProtocolError(f"unknown request {message.request}")
    return row


# ---------------------------------------------------------------------------------------------------------------------------
# Wire
# ---------------------------------------------------------------------------------------------------------------------------


class Message:
    """One message as received. It owns the file descriptors that came with it: `take_fd` hands one over, `close` closes the rest.

    It owns those in `reply_fds` too, which go out with the reply.
    """

    __slots__ = ("fds", "flags", "payload", "reply_fds", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = fds
        self.reply_fds: list[int] = []

    def take_fd(self) -> int:
        """The next file descriptor, the caller's from here on. Raises ProtocolError when there is none."""
        if not self.fds:
            raise ProtocolError("a file descriptor is missing")
        return self.fds.pop(0)

    def close(self) -> None:
        """Close what nobody took, and what was sent back."""
        _close_all(self.fds)
        _close_all(self.reply_fds)

    def __enter__(self) -> Message:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Connection:
    """Messages over a connected Unix stream socket, which it owns. Sending and receiving may be in different threads.

    Neither ever waits without end for a peer that is silent in the middle of a message: `interrupt` (a file descriptor, readable when
    it is time to give up) ends a receive, and `SEND_TIMEOUT` a send. The socket's own blocking mode is not touched, since the open
    file may be shared.
    """

    SEND_TIMEOUT = 10.0  # seconds

    def __init__(self, sock: socket.socket, interrupt: int | None = None) -> None:
        self.socket = sock
        self._interrupt = interrupt
        self._sending = threading.Lock()

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def receive(self, timeout: float | None = None) -> Message:
        """The next message, its header checked for form.

        Raises Disconnected when the peer has closed between messages, ProtocolError when within one or when the message is
        malformed, TimeoutError after `timeout` seconds, InterruptedError when the interrupt came.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        fds: list[int] = []
        try:
            header = self._read(HEADER.size, fds, deadline, "header")
            request, flags, size = HEADER.unpack(header)
            if flags & FLAG_VERSION_MASK != VERSION or flags & ~FLAG_MASK:
                raise ProtocolError(f"message {request} has flags {flags:#x}, not those of protocol version {VERSION}")
            if size > MAX_PAYLOAD:
                raise ProtocolError(f"message {request} has a payload of {size} bytes, the most is {MAX_PAYLOAD}")
            late: list[int] = []
            try:
                payload = self._read(size, late, deadline, "payload")
                if late:
                    raise ProtocolError(f"message {request} has file descriptors with its payload, not with its header")
            finally:
                _close_all(late)
            return Message(request, flags, payload, fds)
        except BaseException:
            _close_all(fds)
            raise

    def _read(self, size: int, fds: list[int], deadline: float | None, part: str) -> bytes:
        """Just `size` bytes: what lies behind them belongs to the next message, with its descriptors."""
        data = b""
        while len(data) < size:
            self._wait(select.POLLIN, deadline)
            try:
                piece, ancillary, flags, _ = self.socket.recvmsg(
                    size - len(data), socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                continue
            except ConnectionError as error:
                raise Disconnected(str(error)) from None
            _collect_fds(ancillary, fds)
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(f"more than {MAX_FDS} file descriptors with one message, or too many open files here")
            if not piece:
                if data or part != "header":
                    raise ProtocolError(f"the peer closed the connection within a {part}, after {len(data)} of {size} bytes")
                raise Disconnected("the peer closed the connection")
            data += piece
        return data

    def _wait(self, events: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self.socket, events)
        if self._interrupt is not None:
            poll.register(self._interrupt, select.POLLIN)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = dict(poll.poll(left))
        if self._interrupt in ready:
            raise InterruptedError("asked to stop")
        if not ready:
            raise TimeoutError("the peer is silent")

    def readable(self) -> bool:
        """Whether there is something to receive, be it the end."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def peer_gone(self) -> bool:
        """Whether the peer has closed the connection, or the interrupt came."""
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        if self._interrupt is not None:
            poll.register(self._interrupt, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, request: int, flags: int, payload: bytes = b"", fds: Sequence[int] = (), patience: float | None = None) -> None:
        """Send one message; `fds` stay the caller's.

        Raises Disconnected when the peer is gone, TimeoutError when it doesn't read for `patience` (SEND_TIMEOUT) seconds."""
        data = memoryview(HEADER.pack(request, VERSION | flags, len(payload)) + payload)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        deadline = time.monotonic() + (self.SEND_TIMEOUT if patience is None else patience)
        with self._sending:
            while data:
                try:
                    sent = self.socket.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    self._wait(select.POLLOUT, deadline)
                    continue
                except (ConnectionError, BrokenPipeError) as error:
                    raise Disconnected(str(error)) from None
                data = data[sent:]
                ancillary = []


def _collect_fds(ancillary: list[tuple[int, int, bytes]], fds: list[int]) -> None:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.extend(struct.unpack(f"={len(data) // 4}i", data[: len(data) // 4 * 4]))


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _take_socket(name: str, message: Message) -> socket.socket:
    fd = message.take_fd()
    try:
        return socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise ProtocolError(f"{name}: the file descriptor is no socket ({error})") from None


def _event_fd(message: Message, access: int) -> int:
    """The next file descriptor, an eventfd or what can take its place: a pipe, or a socket as User-mode Linux gives. Raises Refused for anything
    else, which might block in its own ways.

    A pipe is opened anew where that is possible: so it blocks nobody here, whatever mode the front-end has it in."""
    fd = message.take_fd()
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if not kind or stat.S_ISSOCK(kind):  # an eventfd is none of the kinds that have a number
        return fd
    if not stat.S_ISFIFO(kind):
        os.close(fd)
        raise Refused("the file descriptor is no eventfd, pipe or socket")
    with suppress(OSError):  # no /proc, another user's, or nobody at its other end
        again = os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_CLOEXEC)
        os.close(fd)
        return again
    return fd


class BackendChannel:
    """The back-end's own requests to the front-end, over the socket of SET_BACKEND_REQ_FD. From any thread.

    Each method but `shared_object_lookup` returns whether the front-end was told; with `wait`, whether it has agreed as well (if it negotiated
    REPLY_ACK). While all rings are stopped nothing is sent (vhost-user, "Suspended device state"): a config change is told when a ring starts (and
    counts as told), the others are not told.

    Waiting is for worker threads and the device's own, up to ANSWER_TIMEOUT. In the control thread, which calls most hooks, it raises
    RuntimeError: the front-end may be waiting for an answer of ours there, and would not answer before it has that.
    """

    ANSWER_TIMEOUT = 5.0  # seconds

    def __init__(
        self, sock: socket.socket, protocol_features: Callable[[], int], shmem_sizes: Callable[[], Sequence[int]] = tuple, suspended: bool = False
    ) -> None:
        """To be made in the control thread."""
        self._connection = Connection(sock)
        self._protocol_features = protocol_features
        self._shmem_sizes = shmem_sizes
        self._control = threading.get_ident()
        self._sending = threading.Lock()
        self._suspended = suspended
        self._config_changed = False  # not told yet
        self._asking = threading.Lock()
        self._owed = 0  # answers that are still to come
        self._maps: list[ShmemMap] = []

    # For the device

    def config_change(self) -> bool:
        """Config space has changed (CONFIG_CHANGE_MSG)."""
        with self._sending:
            if self._suspended and self._protocol_features() & _PF.CONFIG:
                self._config_changed = True
                return True
        return self._tell("CONFIG_CHANGE_MSG")

    def host_notifier(self, index: int, fd: int | None = None, offset: int = 0, size: int = mmap.PAGESIZE) -> bool:
        """Let the driver's notifications of ring `index` go to `size` bytes of this file at `offset`; None: no longer so
        (VRING_HOST_NOTIFIER_MSG; HOST_NOTIFIER must be among the device's `protocol_features`)."""
        area = VringArea(index | (VringArea.NO_FD if fd is None else 0), size, offset)
        return self._tell("VRING_HOST_NOTIFIER_MSG", area, () if fd is None else (fd,))

    def shared_object_add(self, uuid: UUID) -> bool:
        """The device exports this object: `get_shared_object` will be asked for it (SHARED_OBJECT_ADD)."""
        return self._tell("SHARED_OBJECT_ADD", Shared(uuid))

    def shared_object_remove(self, uuid: UUID) -> bool:
        """It does no longer (SHARED_OBJECT_REMOVE)."""
        return self._tell("SHARED_OBJECT_REMOVE", Shared(uuid))

    def shared_object_lookup(self, uuid: UUID) -> int | None:
        """The dma-buf of another device's object: a file descriptor, the caller's; None where there is none. Waits (SHARED_OBJECT_LOOKUP)."""
        answer = self._ask("SHARED_OBJECT_LOOKUP", 0, Shared(uuid))
        if answer is None:
            return None
        with answer:
            return answer.take_fd() if answer.payload == bytes(8) and answer.fds else None

    def shmem_map(self, shmid: int, fd: int, fd_offset: int, shm_offset: int, size: int, writable: bool = False, wait: bool = False) -> bool:
        """Map `size` bytes of a file, from `fd_offset`, at `shm_offset` of shared memory region `shmid` (SHMEM_MAP). A device reset unmaps it.

        Raises ValueError for a range that is not whole pages, lies outside the region, or overlaps what is mapped."""
        area = ShmemMap(shmid, fd_offset, shm_offset, size, SHMEM_WRITABLE if writable else 0)
        fault = area.fault(self._shmem_sizes())
        if fault:
            raise ValueError(f"{area}: {fault}")
        with self._sending:
            if any(area.overlaps(other) for other in self._maps):
                raise ValueError(f"{area}: overlaps what is mapped there; unmap that first")
            self._maps.append(area)
        told = self._tell("SHMEM_MAP", area, (fd,), wait)
        if not told:
            self._forget(area)
        return told

    def shmem_unmap(self, shmid: int, shm_offset: int, size: int, wait: bool = False) -> bool:
        """Undo `shmem_map` (SHMEM_UNMAP). Raises ValueError for what is not just one map."""
        area = ShmemMap(shmid, 0, shm_offset, size, 0)
        if not any(area.covers(other) for other in self._maps):
            raise ValueError(f"{area}: is not a whole map")
        told = self._tell("SHMEM_UNMAP", area, wait=wait)
        if told:
            self._forget(area)
        return told

    # For the session

    def iotlb(self, kind: int, iova: int, access: int) -> bool:
        """A translation is missing, or does not allow what is wanted (IOTLB_MSG): the answer is an update. Returns whether it could be told at
        once: the ring's worker must not wait for a front-end that may be waiting for that ring."""
        return self._send("IOTLB_MSG", 0, IotlbMessage(iova, 0, 0, access, kind), (), patience=0.0)

    def notify(self, name: str, index: int) -> None:
        """A ring's call or err in a message (VRING_CALL, VRING_ERR). Waits until the front-end has taken it, but in the control thread."""
        self._tell(name, VringStatePayload(index, 0), wait=threading.get_ident() != self._control)

    def suspend(self, suspended: bool) -> None:
        """All rings are stopped, or one is about to start."""
        with self._sending:
            self._suspended = suspended
            told = suspended or not self._config_changed
            if not suspended:
                self._config_changed = False
        if not told:
            self._tell("CONFIG_CHANGE_MSG")

    def reset(self) -> None:
        """The device was reset: the front-end has unmapped everything."""
        with self._sending:
            self._maps.clear()

    def close(self) -> None:
        """Close the socket; whoever waits gets no answer."""
        with suppress(OSError):
            self._connection.socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    # Sending

    def _forget(self, area: ShmemMap) -> None:
        with self._sending:
            self._maps = [other for other in self._maps if not area.covers(other)]

    def _tell(self, name: str, payload: Payload = Empty(), fds: Sequence[int] = (), wait: bool = False) -> bool:
        if not wait or not self._protocol_features() & _PF.REPLY_ACK:
            return self._send(name, 0, payload, fds)
        answer = self._ask(name, FLAG_NEED_REPLY, payload, fds)
        if answer is None:
            return False
        with answer:
            agreed = answer.payload == bytes(8)
        if not agreed:
            log.debug("-> %s refused", name)
        return agreed

    def _send(self, name: str, flags: int, payload: Payload, fds: Sequence[int], patience: float | None = None) -> bool:
        row = BACKEND_REQUESTS[name]
        missing = (row.gate | (_PF.BACKEND_SEND_FD if fds else 0)) & ~self._protocol_features()
        with self._sending:
            if missing or self._suspended:
                log.debug("-> %s not sent: %s", name, "the front-end did not negotiate it" if missing else "all rings are stopped")
                return False
            log.debug("-> %s %s", name, payload)
            try:
                self._connection.send(row.number, flags, payload.pack(), fds, patience)
            except (VhostUserError, OSError) as error:
                log.log(logging.DEBUG if patience == 0 else logging.WARNING, "%s could not be sent: %s", name, error)
                return False
        return True

    def _ask(self, name: str, flags: int, payload: Payload, fds: Sequence[int] = ()) -> Message | None:
        """Send a request and wait for its answer; None when it could not be sent or is not answered. Late answers to earlier ones are dropped."""
        if threading.get_ident() == self._control:
            raise RuntimeError(f"{name} would wait for the front-end in the control thread, which the front-end may be waiting for")
        with self._asking:
            if not self._send(name, flags, payload, fds):
                return None
            self._owed += 1
            deadline = time.monotonic() + self.ANSWER_TIMEOUT
            try:
                while True:
                    answer = self._connection.receive(max(0.0, deadline - time.monotonic()))
                    self._owed -= 1
                    if not self._owed:
                        break
                    answer.close()
            except (VhostUserError, OSError, ValueError) as error:  # ValueError: it was closed here
                log.warning("%s is not answered: %s", name, error)
                return None
        if (answer.request, answer.flags) != (BACKEND_REQUESTS[name].number, FLAG_REPLY | VERSION):
            log.warning("%s is answered by message %d with flags %#x", name, answer.request, answer.flags)
            answer.close()
            return None
        return answer


# ---------------------------------------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------------------------------------


class VhostUserBackend:
    """A device. Its methods are called from the control thread and from worker threads, several at once: see VhostUserBackendMut.

    Attributes that say what the device is (properties will do, but for `iommu` and `postcopy`, which the command line sets):

    num_queues          virtqueues, at least 1
    max_queue_size      most entries of each
    features            the device type's own virtio features, as a mask; the framework adds `FEATURES`
    withheld_features   those of `FEATURES` that this device does not want: 1 << VIRTIO_F_RING_PACKED, say
    protocol_features   protocol features that the device implements itself; the framework adds `PROTOCOL_FEATURES`
    withheld_protocol_features   likewise
    config              config space: bytes, or a ctypes structure, or None when the front-end owns it
    drafts              whether to offer `DRAFTS` as well: protocol features whose numbers may change yet
    serves_disabled     whether `process_queue` is called for a ring that is started and disabled too: with `vring.enabled` false, to serve it
                        without side effects (a network card discards what is sent, and supplies nothing). Else such a ring waits
                        (vhost-user, "Ring states")
    iommu               whether to offer VIRTIO_F_ACCESS_PLATFORM: the guest may have the device behind an IOMMU. Not for everybody: User-mode
                        Linux takes the bit and then cannot use the device
    postcopy            whether to offer PAGEFAULT, in the place of CONFIGURE_MEM_SLOTS: the guest may migrate to here and run before all of its
                        memory has come
    """

    num_queues: int = 1
    max_queue_size: int = 1024
    features: int = 0
    withheld_features: int = 0
    protocol_features: int = 0
    withheld_protocol_features: int = 0
    config: bytes | bytearray | ctypes.Structure | None = None
    drafts: bool = False
    serves_disabled: bool = False
    iommu: bool = False
    postcopy: bool = False

    _channel: BackendChannel | None = None
    _transfer: _Transfer | None = None

    # Serving

    def process_queue(self, vring: VringT) -> None:
        """Serve a ring: iterate over it, give each chain to `vring.add_used`, now or later. Called when the driver has made chains
        available. Re-arming and notification are the framework's."""
        # Not abstract: a device may have `handle_event` in its place.
        raise NotImplementedError(f"{type(self).__name__} has no process_queue")

    def handle_event(self, device_event: int, evset: int, vrings: Sequence[VringT], thread_id: int) -> bool | None:
        """The low-level entry: something happened to ring `vrings[device_event]` of this worker, or to a listener of the device's own,
        registered with `device_event` as its data; `evset` has the epoll events. Returns true to be called again soon.

        An exception marks the ring broken, or removes the listener."""
        if device_event >= len(vrings):  # only a device that registers listeners needs a method of its own
            raise NotImplementedError(f"{type(self).__name__} registers a listener and has no handle_event")
        ring = vrings[device_event]
        assert isinstance(ring, VringState)
        return ring.drain(self.process_queue)

    def queues_per_thread(self) -> Sequence[int]:
        """A mask of queues for each worker thread: bit i is queue i, and each queue is in just one of them. The default is one thread for all."""
        return [(1 << self.num_queues) - 1]

    def exit_event(self, thread_id: int) -> int | None:
        """An eventfd that ends the worker when it becomes readable; None: only `send_exit_event` does."""
        return None

    # Negotiation and state

    def acked_features(self, features: int) -> None:
        """The front-end has chosen these virtio features."""

    def set_event_idx(self, enabled: bool) -> None:
        """VIRTIO_F_EVENT_IDX was negotiated, or not."""

    def update_memory(self, memory: GuestMemoryAtomic) -> None:
        """Guest memory has changed."""

    def set_backend_req_fd(self, backend: BackendChannel) -> None:
        """The front-end takes requests from the back-end over this. The default keeps it for `config_changed`: call it too."""
        self._channel = backend

    def reset_device(self) -> None:
        """The device is as new: all rings are stopped."""

    def set_status(self, status: int) -> int:
        """The driver has set the device status (virtio 1.3 §2.1). Returns the status to read back."""
        return status

    # Config space

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of config space; what lies beyond its end reads as zero. Raises Refused when there is no config space."""
        if self.config is None:
            raise Refused("this device has no config space")
        return bytes(self.config)[offset : offset + size].ljust(size, b"\0")

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """The driver writes config space (`flags` 0), or a migration restores it (1). Raises Refused for what is read-only."""
        raise Refused(f"config space is read-only ({len(data)} bytes at {offset})")

    def config_changed(self) -> bool:
        """To be called by the device: config space has changed. Returns whether the front-end could be told."""
        return self._channel is not None and self._channel.config_change()

    # Network

    def send_rarp(self, mac: bytes) -> None:
        """The guest has moved here and cannot tell the network: broadcast a RARP from this address (SEND_RARP)."""
        raise Refused("this device sends no RARP")

    def set_mtu(self, mtu: int) -> None:
        """The MTU that the driver was told, in bytes (NET_SET_MTU). Raises Refused for one that doesn't suit."""
        raise Refused("this device has no MTU")

    # Crypto

    def create_crypto_session(self, opcode: int, parameters: SymmetricSession | AsymmetricSession) -> int:
        """Returns a number for the new session, 0 or more (CREATE_CRYPTO_SESSION; `opcode` as in virtio 1.3 §5.9.7). Raises Refused."""
        raise Refused("this device has no crypto sessions")

    def close_crypto_session(self, session_id: int) -> None:
        """Forget the session (CLOSE_CRYPTO_SESSION). Raises Refused when there is none."""
        raise Refused(f"there is no crypto session {session_id}")

    # Graphics

    def set_gpu_socket(self, sock: socket.socket) -> None:
        """The front-end's display is at the other end of this socket, the device's from here on (GPU_SET_SOCKET; vhost-user-gpu)."""
        sock.close()
        raise Refused("this device has no display")

    # Shared objects and shared memory

    def get_shared_object(self, uuid: UUID) -> int | None:
        """A new file descriptor of the dma-buf that the device exports, closed when it was sent; None: there is none (GET_SHARED_OBJECT)."""
        return None

    def get_shmem_config(self) -> Sequence[int]:
        """Sizes of the device's shared memory regions by shmid, in bytes, whole pages; asked once in a connection (GET_SHMEM_CONFIG)."""
        return ()

    # State for migration

    def save_state(self, file: BinaryIO) -> None:
        """Write all of the device's state. In a thread of its own, beside other methods, with all rings stopped; what it raises fails the migration,
        after which the device may go on."""
        # Not abstract, nor is `load_state`: DEVICE_STATE is only offered by a device that overrides it, or `set_device_state_fd`.
        raise NotImplementedError(f"{type(self).__name__} has no save_state")

    def load_state(self, file: BinaryIO) -> None:
        """Read what `save_state` of the same device elsewhere has written, to the end of the file. Likewise."""
        raise NotImplementedError(f"{type(self).__name__} has no load_state")

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        """The level below: begin to write the state to `fd` (`direction` STATE_SAVE) or to read it from there (STATE_LOAD), and close it, which
        ends the transfer (SET_DEVICE_STATE_FD). The descriptor is the device's, on every path. Must not wait.

        Returns None, or a better channel's end for the front-end to use instead, closed when it was sent. Raises Refused."""
        if self._transfer and self._transfer.running:
            os.close(fd)
            raise Refused("another transfer is under way")
        self._transfer = _Transfer(self.load_state if direction == STATE_LOAD else self.save_state, fd, direction == STATE_LOAD)
        return None

    def check_device_state(self) -> None:
        """At the transfer's end. Raises Refused when it failed, or there was none (CHECK_DEVICE_STATE)."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise Refused("no device state was transferred")
        transfer.finish()

    # What happened

    def started(self, reload: Callable[[], None]) -> None:
        """The daemon starts; whoever connects is served when this has returned. `reload`, from any thread: have the device's `reload` called, in
        each process that serves it. Threads of the device's own begin here. With worker processes this is called in the program's own process alone:
        what it changes in the device is in none of them."""

    def worker_started(self, worker: VringEpollHandler) -> None:
        """A worker is about to serve `worker.vrings`; called in its thread. Here is where listeners are registered."""

    def worker_ended(self, worker: VringEpollHandler) -> None:
        """It will serve no more; called in its thread, if `worker_started` was."""

    def connected(self) -> None:
        """A front-end has connected."""

    def disconnected(self) -> None:
        """The front-end has gone; rings are stopped. The default forgets what `set_backend_req_fd` has kept: call it too."""
        self._channel = None

    def ring_started(self, index: int, vring: VringT) -> None:
        """The front-end has started a ring. Raises Refused for one that cannot be served: it stays stopped."""

    def ring_stopped(self, index: int) -> None:
        """The ring has stopped, mostly with nothing in flight. What still is, after the front-end has gone, the device has failed or
        `cancel_in_flight` was called, is not waited for: `add_used` drops it."""

    def suspended(self) -> None:
        """All rings have stopped: from now on guest memory is not to be written, and the front-end takes no requests."""

    def resumed(self) -> None:
        """A ring is about to start, the first one."""

    def cancel_in_flight(self, index: int) -> None:
        """The ring stops at once: let what is in flight touch guest memory no more. It is recorded, and comes again when the ring starts
        (GET_VRING_BASE_SKIP_DRAIN). Completing it is of no effect from now on."""

    def reload(self) -> None:
        """The administrator asks to look at the device's resources again (SIGHUP). A worker process begins with it."""


class VhostUserBackendMut(VhostUserBackend):
    """A device whose methods the framework calls one at a time, whatever thread they are called from; but for `save_state` and `load_state`, which
    take long, and run beside others in a thread of their own, while all rings are stopped."""


def _offered_features(backend: VhostUserBackend) -> int:
    return backend.features | backend.iommu << VIRTIO_F_ACCESS_PLATFORM | FEATURES & ~backend.withheld_features


def _offered_protocol_features(backend: VhostUserBackend) -> int:
    features = PROTOCOL_FEATURES | (_PF.CONFIG if backend.config is not None else 0) | (DRAFTS if backend.drafts else 0)
    for name, feature in HOOKS:
        if getattr(type(backend), name) is not getattr(VhostUserBackend, name):
            features |= feature
    if backend.postcopy and _has_userfault():
        features = features & ~_PF.CONFIGURE_MEM_SLOTS | _PF.PAGEFAULT  # the two exclude each other (vhost-user, "Migration")
    return int(_supported(backend.protocol_features | features & ~backend.withheld_protocol_features))


def _supported(features: int) -> int:
    """Those protocol features that have beside them what they need."""
    for feature, needed in NEEDS:
        if needed & ~features:
            features &= ~feature
    return features


@functools.cache
def _has_userfault() -> bool:
    try:
        with Userfault():
            return True
    except GuestMemoryError as error:
        log.warning("postcopy is not offered: %s", error)
        return False


# ---------------------------------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------------------------------


class _Event:
    """An eventfd of our own that wakes an epoll; written, never read: it is registered edge-triggered, and each write is an edge."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """Wake whoever polls it. Safe in a signal handler."""
        with suppress(BlockingIOError):
            os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        os.close(self.fd)


class VringEpollHandler:
    """A worker: one thread that serves its rings, and listeners that the device registers.

    A kick eventfd is registered edge-triggered and not read: each kick is an edge, the count is of no interest, and a read could
    block, since the front-end shares the open file and its mode.
    """

    _POLLED_PAUSE = 0.001  # seconds between looks at an idle ring that has no kick eventfd

    def __init__(
        self, name: str, backend: VhostUserBackend, calls: TurnLock | NoLock, vrings: Sequence[VringState], thread_id: int, poll_us: int = 0
    ) -> None:
        self.vrings = vrings
        self.thread_id = thread_id
        self._backend = backend
        self._calls = calls
        self._epoll = select.epoll()
        self._wake = _Event()
        self._epoll.register(self._wake.fd, select.EPOLLIN | select.EPOLLET)
        self._exiting = False
        self._exit_fd = backend.exit_event(thread_id)
        if self._exit_fd is not None:
            self._epoll.register(self._exit_fd, select.EPOLLIN)
        self._kicks: dict[int, int] = {}  # kick eventfd -> position in vrings
        self._pipes: dict[int, int] = {}  # the same of pipes and sockets: those have to be read, or they are full one day
        self._listeners: dict[int, int] = {}  # fd -> the device's data
        self._pending: set[int] = set()  # positions to look at, kick or no kick
        self._polled: set[int] = set()  # positions of started rings without kick eventfd
        self._longest_poll = poll_us / 1e6  # seconds
        self._window = 0.0  # of the next poll
        self._asleep_since = 0.0
        self._events: list[tuple[int, int]] = []  # which come after the one that is being served
        self._seen: list[tuple[int, int]] = []  # events that a poll of a ring came across
        for position, vring in enumerate(vrings):
            vring.wake = self._waker(position)
            vring.turn = vring.TURN if len(vrings) == 1 else vring.SHARED_TURN
            if poll_us:
                vring.linger = functools.partial(self._linger, position)
        self._thread = threading.Thread(target=self._run, name=f"{name}-worker-{thread_id}", daemon=True)
        self._thread.start()

    def _waker(self, position: int) -> Callable[[], None]:
        def wake() -> None:
            self._pending.add(position)
            self._wake.set()

        return wake

    # For the device

    def register_listener(self, fd: int, events: int, data: int) -> None:
        """Call the device's `handle_event` with `data` when `fd` has one of the epoll `events`.

        Raises ValueError when `data` is a ring's number here, OSError when the fd cannot be polled."""
        if data < len(self.vrings):
            raise ValueError(f"data {data} is the number of a ring of this worker: use {len(self.vrings)} or more")
        before = self._listeners.get(fd)
        self._listeners[fd] = data  # first: an edge that is there already comes at once, and once only
        try:
            self._epoll.register(fd, events)
        except BaseException:
            if before is None:
                del self._listeners[fd]
            else:  # it is registered already
                self._listeners[fd] = before
            raise

    def unregister_listener(self, fd: int, events: int = 0, data: int = 0) -> None:
        """Undo `register_listener`; of its arguments, which the crate has, only the first one counts. Raises ValueError when it isn't registered."""
        if self._listeners.pop(fd, None) is None:
            raise ValueError(f"file descriptor {fd} is no registered listener")
        self._epoll.unregister(fd)

    def send_exit_event(self) -> None:
        """End the thread, after what it is doing."""
        self._exiting = True
        self._wake.set()

    # For the daemon

    def watch(self, position: int) -> None:
        """The ring at `position` was started with the kick eventfd that it has now. Raises OSError when it cannot be polled."""
        kick = self.vrings[position].kick
        if kick is None:
            self._polled.add(position)
            self._wake.set()
        else:
            self._epoll.register(kick, select.EPOLLIN | select.EPOLLET)
            (self._pipes if stat.S_IFMT(os.fstat(kick).st_mode) else self._kicks)[kick] = position

    def unwatch(self, position: int) -> None:
        """The ring's kick eventfd is about to be closed, or there is none."""
        self._polled.discard(position)
        kick = self.vrings[position].kick
        if kick is not None and (self._kicks.pop(kick, None), self._pipes.pop(kick, None)) != (None, None):
            with suppress(OSError):  # a descriptor that could not be registered
                self._epoll.unregister(kick)

    def join(self) -> None:
        """Wait for the thread's end, and let go of everything."""
        self._thread.join()
        self._epoll.close()

    # The thread

    def _run(self) -> None:
        self._tell(self._backend.worker_started)
        self._loop()
        self._tell(self._backend.worker_ended)

    def _tell(self, hook: Callable[[VringEpollHandler], None]) -> None:
        try:
            with self._calls:
                hook(self)
        except Exception:
            log.exception("%s of the device failed", hook.__name__)

    def _loop(self) -> None:
        kicks = self._kicks
        timeout: float | None = None
        while not self._exiting:
            events = self._events = self._next_events(timeout)
            while events:
                fd, evset = events.pop(0)
                position = kicks.get(fd)
                if position is not None:
                    self._serve(position, evset)
                elif fd in self._listeners:
                    self._listen(fd, evset)
                elif (position := self._pipes.get(fd)) is not None:
                    with self.vrings[position].get_mut() as vring:  # which nobody closes meanwhile
                        vring.read_kick()
                    self._serve(position, evset)
                elif fd == self._exit_fd:
                    return
            if self._pending:
                for position in self._each_of(self._pending):
                    self._serve(position, select.EPOLLIN)
            timeout = 0 if self._pending else self._look_at_polled() if self._polled else None

    def _each_of(self, positions: set[int]) -> list[int]:
        """Those in a set to which other threads add meanwhile: it cannot be iterated over."""
        return [position for position in range(len(self.vrings)) if position in positions]

    def _next_events(self, timeout: float | None) -> list[tuple[int, int]]:
        """What has happened, or happens within `timeout`."""
        if self._seen:
            events, self._seen = self._seen, []
            return events
        events = self._epoll.poll(timeout)
        if self._asleep_since:
            # It would have paid to poll as long as this, or not at all: the next time will be like the last one.
            slept, self._asleep_since = time.perf_counter() - self._asleep_since, 0.0
            self._window = self._longest_poll if slept < self._longest_poll else 0.0
        return events

    _LOOKS = 8  # at the ring, for each one at everything else

    def _linger(self, position: int, ready: Callable[[], bool]) -> bool | None:
        """Poll a ring that was emptied, for as long as it seems to pay. Returns whether it is `ready` again, or else there may be other things;
        None: what may complete its requests comes first, and then it is to be polled again."""
        if self._pending or self._events or self._seen:
            return False  # another ring has more, or something else has happened
        start = time.perf_counter()
        while time.perf_counter() < start + self._window:
            for _ in range(self._LOOKS):
                if ready():
                    return True
            # Its own kick says nothing new; to arm notifications because of it would bring the next one.
            self._seen = [event for event in self._epoll.poll(0) if self._kicks.get(event[0]) != position]
            if self._seen and self.vrings[position].in_flight and any(fd in self._listeners for fd, _ in self._seen):
                return None
            if self._seen or self._calls.wanted or self.vrings[position].wanted:
                return False
        self._asleep_since = start
        return False

    def _serve(self, position: int, evset: int) -> None:
        vring = self.vrings[position]
        self._pending.discard(position)  # this is that look
        if not vring.active:
            return  # the ring is looked at when it becomes active
        try:
            self._calls.acquire()  # behind those who take it with `with`
            try:
                more = self._backend.handle_event(position, evset, self.vrings, self.thread_id)
            finally:
                self._calls.release()
        except Exception:
            log.exception("ring %d: the device failed", vring.index)
            vring.fail("the device raised an exception", by_device=True)
            return
        if more:
            self._pending.add(position)

    def _listen(self, fd: int, evset: int) -> None:
        data = self._listeners.get(fd)
        if data is None:
            return  # another thread has unregistered it just now
        before = [vring.in_flight for vring in self.vrings] if self._longest_poll else ()
        try:
            self._calls.acquire()
            try:
                self._backend.handle_event(data, evset, self.vrings, self.thread_id)
            finally:
                self._calls.release()
        except Exception:
            with suppress(ValueError, OSError):
                self.unregister_listener(fd)
            log.exception("listener %d (file descriptor %d): the device failed; the listener is removed", data, fd)
        for position, count in enumerate(before):
            if self.vrings[position].in_flight < count:
                self._pending.add(position)  # more may follow what is done, and is polled for

    def _look_at_polled(self) -> float:
        """Serve the rings that have no kick eventfd. Returns how long to wait until the next look: nothing, after there was something."""
        pause = self._POLLED_PAUSE
        for position in self._each_of(self._polled):
            queue = self.vrings[position].queue
            before = queue.taken if queue else 0
            self._serve(position, select.EPOLLIN)
            if queue and queue.taken != before:
                pause = 0
        return pause


# ---------------------------------------------------------------------------------------------------------------------------
# Device state
# ---------------------------------------------------------------------------------------------------------------------------


class _StateFile(io.RawIOBase):
    """An end of the channel for device state, which it owns. Waits for the peer only where `abort` can end that, whatever the file's mode."""

    def __init__(self, fd: int, loads: bool) -> None:
        self._fd = fd
        self._loads = loads
        self._abort: _Event | None = _Event()
        self._abort_fd = self._abort.fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN if loads else select.POLLOUT)
        self._poll.register(self._abort_fd, select.POLLIN)
        self.waiting = False  # for the peer

    def abort(self) -> None:
        """No more is read or written. From any thread."""
        event = self._abort
        if event:
            event.set()

    def _wait(self) -> None:
        self.waiting = True
        if self._abort_fd in dict(self._poll.poll()):
            raise Disconnected("the transfer was given up")
        self.waiting = False

    def readable(self) -> bool:
        return self._loads

    def writable(self) -> bool:
        return not self._loads

    def readinto(self, buffer: Any) -> int:
        self._wait()
        return os.readv(self._fd, [buffer])

    def write(self, data: Any) -> int:
        self._wait()
        return os.write(self._fd, memoryview(data)[: select.PIPE_BUF])  # more might have to wait for room

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._fd)
            self._abort = None  # its descriptor goes as well


class _Transfer:
    """Device state on its way (vhost-user, "Migrating back-end state"), in a thread of its own."""

    PATIENCE = 10.0  # seconds that its end is waited for while it waits for the front-end, which waits for that end
    _LOOK = 0.1

    def __init__(self, method: Callable[[BinaryIO], None], fd: int, loads: bool) -> None:
        """Have `method` read the state from `fd`, or write it there. Owns the fd."""
        self._method = method
        self._loads = loads
        self._file = _StateFile(fd, loads)
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name=method.__name__, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        file = io.BufferedReader(self._file) if self._loads else io.BufferedWriter(self._file)
        try:
            with file:
                self._method(cast(BinaryIO, file))
                if self._loads and file.read(1):
                    raise Refused("there is more than the device has read")
        except Exception as error:
            log.warning("%s of the device failed: %s", self._method.__name__, error, exc_info=not isinstance(error, (VhostUserError, OSError)))
            self._failure = str(error) or type(error).__name__

    @property
    def running(self) -> bool:
        """Whether it is under way."""
        return self._thread.is_alive()

    def abort(self) -> None:
        """Give up."""
        self._file.abort()
        self._thread.join(1)

    def wait(self, gone: Callable[[], bool]) -> None:
        """Wait for its end, for as long as the device takes to it. Raises Disconnected when `gone` says that nobody wants to know any more."""
        waited = 0.0
        while self.running and waited < self.PATIENCE:
            self._thread.join(self._LOOK)
            waited = waited + self._LOOK if self._file.waiting else 0.0
            if gone():
                raise Disconnected(f"{self._method.__name__} of the device is given up")

    def finish(self) -> None:
        """What became of it. Raises Refused when it failed, or has not ended."""
        if self.running:
            self.abort()
            raise Refused(f"{self._method.__name__} of the device does not end")
        if self._failure:
            raise Refused(f"{self._method.__name__} of the device failed: {self._failure}")


# ---------------------------------------------------------------------------------------------------------------------------
# Sessions
# ---------------------------------------------------------------------------------------------------------------------------


class _Session:
    """One connection, from the first message to the last: what was negotiated, and a handler for each request."""

    _LOST_AFTER = 2  # seconds in which a device that has failed still may complete what it had

    def __init__(self, daemon: VhostUserDaemon, connection: Connection) -> None:
        self._daemon = daemon
        self._backend = daemon.backend
        self._connection = connection
        self._vrings = daemon.vrings
        self._memory = daemon.memory
        self._features = 0
        self._protocol_features = 0
        self._status = 0
        self._addresses: list[VringAddr | None] = [None] * len(self._vrings)
        self._channel: BackendChannel | None = None
        self._log: DirtyLog | None = None
        self._log_view: memoryview | None = None
        self._log_fd: int | None = None
        self._suspended = True  # no ring is started
        self._tracked = 0  # rings whose in-flight chains are recorded
        self._shmem_config: ShmemConfig | None = None
        self._iotlb: Iotlb | None = None
        self._userfault: Userfault | None = None  # since POSTCOPY_ADVISE
        self._listening = False  # since POSTCOPY_LISTEN
        self._unacked: GuestMemoryMmap | None = None  # memory whose addresses the front-end was told

    def run(self) -> None:
        """Serve the connection to its end. Raises ProtocolError, Disconnected, InterruptedError; whatever it is, rings are stopped and
        everything is let go."""
        try:
            self._call(self._backend.connected)
            while True:
                with self._connection.receive() as message:
                    self._dispatch(message)
        finally:
            self._tear_down()

    def _tear_down(self) -> None:
        with ExitStack() as steps:  # from the last to the first, each whatever becomes of the others
            steps.callback(self._tell_gone, self._backend.disconnected)
            steps.callback(self._tell_gone, self._backend.update_memory, self._memory)
            steps.callback(self._memory.replace, GuestMemoryMmap())
            steps.callback(self._end_postcopy)
            if self._log_fd is not None:
                steps.callback(os.close, self._log_fd)
            if self._channel:
                steps.callback(self._channel.close)
            steps.callback(self._abort_transfer)
            for index in reversed(range(len(self._vrings))):
                steps.callback(self._forget_ring, index)
                steps.callback(self._stop_ring, index, gone=True)

    def _forget_ring(self, index: int) -> None:
        vring = self._vrings[index]
        vring.reset()
        vring.set_err(None)
        vring.notify = None

    def _tell_gone(self, hook: Callable[..., None], *arguments: object) -> None:
        with suppress(Refused):  # logged; nobody is left to be told
            self._call(hook, *arguments)

    # Dispatch

    def _dispatch(self, message: Message) -> None:
        row = _row_of(message, _BY_NUMBER)
        if message.flags & FLAG_REPLY:
            raise ProtocolError(f"{row.name} is marked as a reply")
        if row.gate and not row.gate & self._protocol_features:
            raise ProtocolError(f"{row.name} without {row.gate.name} negotiated")
        row.check_fds(len(message.fds))
        if self._unacked and row.name != "SET_MEM_TABLE":
            raise ProtocolError(f"{row.name}, when a SET_MEM_TABLE without regions is due (postcopy)")
        try:
            payload = row.payload.unpack(message.payload)
        except ProtocolError as error:
            raise ProtocolError(f"{row.name}: {error}") from None
        handler: Callable[[Any, Message], Payload | None] = getattr(self, "_" + row.name.lower())
        reply: Payload | None
        try:
            reply, failure = handler(payload, message), None
        except (Refused, VringError, GuestMemoryError, OSError) as error:  # OSError: too many open files here, say
            reply, failure = None, error
            log.warning("%s %s refused: %s", row.name, payload, error)
        log.debug("<- %s %s%s", row.name, payload, f" -> {reply}" if reply else "" if failure is None else " -> refused")
        self._answer(row, message, reply, failure)

    def _answer(self, row: Request, message: Message, reply: Payload | None, failure: Exception | None) -> None:
        """An explicit reply, or else an acknowledgement if one is asked for: never both, or the stream is out of step."""
        if row.reply or reply:
            answer = row.failed if reply is None else reply
            if answer is None:
                raise ProtocolError(f"{row.name}: {failure}; its reply cannot say so")
            self._connection.send(row.number, FLAG_REPLY, answer.pack(), message.reply_fds if reply else ())
        elif message.flags & FLAG_NEED_REPLY and self._protocol_features & _PF.REPLY_ACK:
            self._connection.send(row.number, FLAG_REPLY, U64(1 if failure else 0).pack())

    def _call(self, method: Callable[..., Any], *arguments: object, gives: Callable[[Any], Any] | None = None) -> Any:
        """Call the device. Its exceptions are logged, and refuse the request; so does a result that `gives` cannot convert."""
        try:
            with self._daemon.turn():
                result = method(*arguments)
            return gives(result) if gives else result
        except Refused:
            raise
        except Exception as error:
            log.exception("%s of the device failed", method.__name__)
            raise Refused(f"the device failed in {method.__name__}: {error}") from error

    # Negotiation

    def _get_features(self, payload: Empty, message: Message) -> Payload:
        return U64(_offered_features(self._backend))

    def _set_features(self, payload: U64, message: Message) -> None:
        unknown = payload.value & ~_offered_features(self._backend)
        if unknown:
            raise ProtocolError(f"SET_FEATURES {payload.value:#x} has bits that were not offered: {unknown:#x}")
        self._features = payload.value
        for vring in self._vrings:
            vring.set_queue_features(payload.value)
            if not payload.value >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
                vring.set_enabled(True)  # there is no SET_VRING_ENABLE then (vhost-user, "Ring states")
        self._switch_iommu(bool(payload.value >> VIRTIO_F_ACCESS_PLATFORM & 1))
        self._switch_log()
        self._call(self._backend.acked_features, payload.value)
        self._call(self._backend.set_event_idx, bool(payload.value >> VIRTIO_F_EVENT_IDX & 1))

    def _set_owner(self, payload: Empty, message: Message) -> None:
        pass  # a session begins: it did with the connection

    def _offered_protocol_features(self) -> int:
        return _offered_protocol_features(self._backend) & ~self._daemon.withheld

    def _get_protocol_features(self, payload: Empty, message: Message) -> Payload:
        return U64(self._offered_protocol_features())

    def _set_protocol_features(self, payload: U64, message: Message) -> None:
        unknown = payload.value & ~self._offered_protocol_features()
        if unknown:
            raise ProtocolError(f"SET_PROTOCOL_FEATURES {payload.value:#x} has bits that were not offered: {unknown:#x}")
        for feature, needed in NEEDS:
            if payload.value & feature and needed & ~payload.value:
                raise ProtocolError(f"{feature.name} without {' and '.join(str(one.name) for one in _PF if one & needed)}")
        self._protocol_features = payload.value
        inband = payload.value & _PF.INBAND_NOTIFICATIONS
        for vring in self._vrings:
            vring.notify = functools.partial(self._notify, vring.index) if inband else None

    def _notify(self, index: int, name: str) -> None:
        if self._channel:
            self._channel.notify(name, index)

    def _get_queue_num(self, payload: Empty, message: Message) -> Payload:
        return U64(self._backend.num_queues)

    def _set_backend_req_fd(self, payload: Empty, message: Message) -> None:
        if self._channel:
            self._channel.close()
        sock = _take_socket("SET_BACKEND_REQ_FD", message)
        self._channel = BackendChannel(sock, lambda: self._protocol_features, lambda: self._shmem().sizes, self._suspended)
        self._call(self._backend.set_backend_req_fd, self._channel)

    # Memory

    def _set_mem_table(self, payload: MemTable, message: Message) -> Payload | None:
        if self._unacked:
            self._watch_memory(payload)
            return None
        if len(message.fds) != len(payload.regions):
            raise ProtocolError(
                f"{len(message.fds)} file descriptors for {len(payload.regions)} memory regions: is all of guest memory shared (share=on)?"
            )
        if self._listening:
            try:
                return self._map_for_postcopy(payload, message)
            except (Refused, GuestMemoryError, OSError) as error:
                if message.flags & FLAG_NEED_REPLY:
                    raise
                raise ProtocolError(f"SET_MEM_TABLE: {error} (postcopy: the front-end waits for a table)") from None
        regions = [self._map_region(region, message) for region in payload.regions]
        self._change_memory(GuestMemoryMmap(regions))
        return None

    def _add_mem_reg(self, payload: MemReg, message: Message) -> None:
        self._change_memory(self._memory.memory().insert_region(self._map_region(payload, message)))

    def _rem_mem_reg(self, payload: MemReg, message: Message) -> None:
        self._change_memory(self._memory.memory().remove_region(payload.guest_addr, self._user_addr(payload), payload.size))

    def _map_region(self, region: MemRegion, message: Message) -> GuestRegionMmap:
        if region.xen_flags is not None and not self._protocol_features & _PF.XEN_MMAP:
            raise ProtocolError(f"a memory region with Xen's fields without XEN_MMAP negotiated: {region}")
        if region.xen_flags:
            raise Refused(f"{region}: foreign and grant mappings of Xen are not supported, only memory shared as a file (flags 0)")
        fd = message.take_fd()
        try:
            return GuestRegionMmap(fd, region.guest_addr, region.size, self._user_addr(region), region.mmap_offset)
        finally:
            os.close(fd)

    def _user_addr(self, region: MemRegion) -> int:
        """With GPA_ADDRESSES there are guest addresses only: as user addresses they serve for rings and the IOTLB. The message should say so as
        well; QEMU 11.1 says 0."""
        return region.guest_addr if self._protocol_features & _PF.GPA_ADDRESSES else region.user_addr

    def _change_memory(self, memory: GuestMemoryMmap) -> None:
        self._memory.replace(memory)
        for index in range(len(self._vrings)):
            self._place_again(index)
        self._call(self._backend.update_memory, self._memory)

    # Postcopy: the guest runs here before all of its memory has come

    def _postcopy_advise(self, payload: Empty, message: Message) -> Payload:
        # A reply without a file descriptor says that there is none.
        if self._listening:
            log.error("POSTCOPY_ADVISE, when a postcopy migration is under way")
            return Empty()
        self._end_postcopy()
        try:
            self._userfault = Userfault()
            message.reply_fds.append(os.dup(self._userfault.fd))
        except (GuestMemoryError, OSError) as error:
            log.error("POSTCOPY_ADVISE: %s", error)
            self._end_postcopy()
        return Empty()

    def _postcopy_listen(self, payload: Empty, message: Message) -> None:
        if self._userfault is None:
            raise Refused("there was no POSTCOPY_ADVISE")
        if self._memory.memory().regions:
            raise Refused("guest memory is mapped already: its pages may have been touched before they came")
        self._listening = True

    def _map_for_postcopy(self, payload: MemTable, message: Message) -> Payload | None:
        """Map the table, touching nothing, and tell where: from the acknowledgement on the front-end can serve faults there."""
        known = self._memory.memory().regions
        if known:
            # The same again, as after a reboot. Nothing else could be watched: the userfaultfd is the front-end's alone by now.
            told = [(fd, r.guest_addr, r.size, self._user_addr(r), r.mmap_offset) for fd, r in zip(message.fds, payload.regions)]
            if len(told) != len(known) or not all(any(region.is_of(*one) for region in known) for one in told):
                raise Refused("other guest memory than before, while a postcopy migration is under way")
            memory = GuestMemoryMmap(known)
        else:
            memory = GuestMemoryMmap([self._map_region(region, message) for region in payload.regions])
        self._unacked = memory
        found = (memory.find_region(region.guest_addr) for region in payload.regions)
        return MemTable(tuple(replace(told, user_addr=mapped.host_addr) for told, mapped in zip(payload.regions, found) if mapped))

    def _watch_memory(self, payload: MemTable) -> None:
        """The front-end is ready to serve faults."""
        memory, self._unacked = self._unacked, None
        if payload.regions or memory is None:
            raise ProtocolError(f"SET_MEM_TABLE with {len(payload.regions)} regions as an acknowledgement, which has none")
        if self._userfault and self._userfault.fd >= 0:
            try:
                for region in memory.regions:
                    self._userfault.register(region)
            except GuestMemoryError as error:  # nobody waits for an answer, in which it could be refused
                raise ProtocolError(f"postcopy: {error}") from None
            # If the front-end dies, its descriptor must be the last one: a thread that waits for a page, maybe with the interpreter's lock, goes on.
            self._userfault.close()
        self._change_memory(memory)

    def _postcopy_end(self, payload: Empty, message: Message) -> Payload:
        if self._userfault is None:
            raise Refused("there was no POSTCOPY_ADVISE")
        self._end_postcopy()
        return U64(0)

    def _end_postcopy(self) -> None:
        if self._userfault:
            self._userfault.close()
        self._userfault = self._unacked = None
        self._listening = False

    # IOMMU

    def _switch_iommu(self, wanted: bool) -> None:
        """Ring addresses and those of chains are IOVAs, or are not."""
        if wanted != (self._iotlb is not None):
            self._iotlb = Iotlb(self._tell_iotlb) if wanted else None
            for index, vring in enumerate(self._vrings):
                vring.set_iotlb(self._iotlb)
                self._place_again(index)

    def _tell_iotlb(self, kind: int, iova: int, access: int) -> bool:
        if self._channel:
            return self._channel.iotlb(kind, iova, access)
        log.error("IOVA %#x has no translation, and the front-end gave no channel to ask for it (SET_BACKEND_REQ_FD)", iova)
        return False

    def _iotlb_msg(self, payload: IotlbMessage, message: Message) -> Payload:
        if self._iotlb is None:
            raise Refused("VIRTIO_F_ACCESS_PLATFORM is not negotiated")
        if payload.kind == Iotlb.UPDATE:
            self._update_iotlb(self._iotlb, payload)
        elif payload.kind == Iotlb.INVALIDATE:
            self._iotlb.invalidate(payload.iova, payload.size)
            self._forget(payload)
        else:
            raise Refused(f"neither an update ({Iotlb.UPDATE}) nor an invalidation ({Iotlb.INVALIDATE})")
        return U64(0)

    def _update_iotlb(self, iotlb: Iotlb, payload: IotlbMessage) -> None:
        if not payload.size or payload.iova + payload.size > 1 << 64:
            raise Refused("nothing, or more than the address space")
        self._memory.memory().user_to_guest(payload.user_addr, payload.size)
        if iotlb.update(payload.iova, payload.size, payload.user_addr, payload.access):
            self._forget(payload)
        for index, vring in enumerate(self._vrings):
            if vring.placed:
                vring.retry(payload.iova, payload.size)
            else:
                self._place_again(index)

    def _forget(self, payload: IotlbMessage) -> None:
        for index, vring in enumerate(self._vrings):
            if vring.forget(payload.iova, payload.size):
                self._place_again(index)

    # Dirty log

    def _set_log_base(self, payload: Log, message: Message) -> Payload:
        view = map_shared(message.fds[0], payload.offset, payload.size)
        DirtyLog(view)  # as a check, whether it is used now or later
        self._log_view = view
        self._switch_log()
        return U64(0)

    def _set_log_fd(self, payload: Empty, message: Message) -> None:
        before, self._log_fd = self._log_fd, _event_fd(message, os.O_WRONLY)
        self._switch_log()
        if before is not None:
            os.close(before)  # not before: workers write it

    def _switch_log(self) -> None:
        """Log, or do not, as the front-end wants it now."""
        view = self._log_view if self._features >> VHOST_F_LOG_ALL & 1 else None
        before, self._log = self._log, DirtyLog(view, self._log_fd) if view is not None else None
        for vring in self._vrings:
            vring.set_log(self._log)
        if before:
            with freed(before.unblock):
                before.commit()  # what was marked and waited for a ring to publish: the front-end looks there once more

    def _get_max_mem_slots(self, payload: Empty, message: Message) -> Payload:
        return U64(MAX_REGIONS)

    # Rings

    def _ring(self, index: int) -> VringState:
        if index >= len(self._vrings):
            raise ProtocolError(f"ring {index}: the device has {len(self._vrings)} (fewer queues here than the VMM was told?)")
        return self._vrings[index]

    def _stopped_ring(self, index: int) -> VringState:
        vring = self._ring(index)
        if vring.started:
            raise Refused(f"ring {index} is started")
        return vring

    def _set_vring_num(self, payload: VringStatePayload, message: Message) -> None:
        self._stopped_ring(payload.index).set_queue_size(payload.num)

    def _set_vring_endian(self, payload: VringStatePayload, message: Message) -> None:
        if payload.num > 1:
            raise ProtocolError(f"SET_VRING_ENDIAN of ring {payload.index} with {payload.num}, neither 0 (little) nor 1 (big)")
        self._stopped_ring(payload.index).set_queue_endian(bool(payload.num))

    def _set_vring_base(self, payload: VringStatePayload, message: Message) -> None:
        self._stopped_ring(payload.index).set_queue_next_avail(payload.num)

    def _set_vring_addr(self, payload: VringAddr, message: Message) -> None:
        self._ring(payload.index)
        self._addresses[payload.index] = payload
        self._place(payload.index)

    def _place(self, index: int) -> None:
        """Translate a ring's addresses in the current memory. They may come before the memory they are in, and outlast it."""
        vring, address = self._vrings[index], self._addresses[index]
        if address is None:
            return
        vring.set_used_log(address.log if address.flags & VringAddr.LOG_USED else None)
        areas = (address.descriptor, address.available, address.used)
        try:
            if self._iotlb is None:
                desc, available, used = map(self._memory.memory().user_to_guest, areas)
                areas = (desc, available, used)
            vring.set_queue_info(*areas)
            vring.set_queue_ready(True)
        except (GuestMemoryError, IotlbMiss) as error:
            vring.set_queue_ready(False)
            log.debug("ring %d has no place in guest memory now: %s", index, error)
        except VringError:
            vring.set_queue_ready(False)
            raise

    def _place_again(self, index: int) -> None:
        """The same when something else has changed. A ring that cannot be there is broken, and holds up nothing else."""
        try:
            self._place(index)
        except VringError as error:
            self._vrings[index].fail(str(error))

    def _set_vring_kick(self, payload: VringFd, message: Message) -> None:
        vring = self._ring(payload.index)
        kick = self._optional_fd(payload, message, os.O_RDONLY)
        self._daemon.unwatch(payload.index)
        vring.set_kick(kick)
        try:
            self._daemon.watch(payload.index)
        except OSError as error:
            vring.set_kick(None)
            raise Refused(f"ring {payload.index}: the kick file descriptor cannot be polled: {error}") from None
        self._start_ring(vring)

    def _vring_kick(self, payload: VringStatePayload, message: Message) -> None:
        vring = self._ring(payload.index)
        if payload.num:
            raise ProtocolError(f"VRING_KICK of ring {payload.index} with {payload.num}, which must be 0")
        if vring.started:
            vring.wake()  # without its lock: the worker may hold it while it waits for the front-end, which waits for us
        else:
            self._start_ring(vring)

    def _start_ring(self, vring: VringState) -> None:
        was_started = vring.started
        try:
            self._resume()
            try:
                vring.start()
            except GuestMemoryError as error:
                log.debug("ring %d waits for its memory: %s", vring.index, error)
            vring.wake()  # a kick may have come before its eventfd
            if not was_started:
                self._call(self._backend.ring_started, vring.index, vring)
        except (VringError, Refused):
            if not was_started:
                self._undo_start(vring)
            raise

    def _undo_start(self, vring: VringState) -> None:
        if vring.started:  # the device refuses
            self._stop_ring(vring.index)
            return
        self._daemon.unwatch(vring.index)
        vring.set_kick(None)
        with suppress(Refused):
            self._suspend()

    def _set_vring_call(self, payload: VringFd, message: Message) -> None:
        vring = self._ring(payload.index)
        vring.set_call(self._optional_fd(payload, message), polled=not payload.has_fd)

    def _set_vring_err(self, payload: VringFd, message: Message) -> None:
        self._ring(payload.index).set_err(self._optional_fd(payload, message))

    @staticmethod
    def _optional_fd(payload: VringFd, message: Message, access: int = os.O_WRONLY) -> int | None:
        if payload.has_fd != bool(message.fds):
            raise ProtocolError(f"{payload}, and {len(message.fds)} file descriptors")
        return _event_fd(message, access) if payload.has_fd else None

    def _set_vring_enable(self, payload: VringStatePayload, message: Message) -> None:
        vring = self._ring(payload.index)
        if payload.num > 1:
            raise ProtocolError(f"SET_VRING_ENABLE of ring {payload.index} with {payload.num}, neither 0 nor 1")
        vring.set_enabled(bool(payload.num))

    def _get_vring_base(self, payload: VringStatePayload, message: Message) -> Payload:
        self._ring(payload.index)
        return VringStatePayload(payload.index, self._stop_ring(payload.index))

    def _get_vring_base_skip_drain(self, payload: VringStatePayload, message: Message) -> Payload:
        self._ring(payload.index)
        # Without an in-flight region there is nowhere to record what is in flight: it has to be waited for.
        return VringStatePayload(payload.index, self._stop_ring(payload.index, drain=payload.index >= self._tracked))

    def _stop_ring(self, index: int, gone: bool = False, drain: bool = True) -> int:
        """Take nothing more, wait until nothing is in flight, let go of the ring. Returns where it would go on.

        `gone`: the front-end is no more; what is in flight gets a moment only. Without `drain` it is not waited for."""
        vring = self._vrings[index]
        was_started = vring.started
        vring.suspend()
        waited = 0
        given_up = False
        if not drain:
            self._call(self._backend.cancel_in_flight, index)
        while drain and not vring.wait_idle(1.0):
            waited += 1
            given_up = not gone and self._connection.peer_gone()
            if gone or given_up:
                break
            if vring.device_failed and waited >= self._LOST_AFTER:
                log.error("ring %d: %d in flight are lost, the device has failed", index, vring.in_flight)
                break
            log.log(logging.WARNING if waited % 5 == 0 else logging.DEBUG, "ring %d: %d in flight, waiting to stop", index, vring.in_flight)
        self._daemon.unwatch(index)
        base = vring.stop()
        if was_started:
            self._tell_stopped(index)
        if given_up:  # the daemon ends, say: where the ring would go on is behind what is lost, so that it is better not told
            raise Disconnected(f"the wait for what is in flight in ring {index} is given up")
        return base

    def _tell_stopped(self, index: int) -> None:
        """The ring has stopped, whatever the device thinks of it."""
        with suppress(Refused):  # logged
            self._call(self._backend.ring_stopped, index)
        with suppress(Refused):
            self._suspend()

    def _resume(self) -> None:
        """A ring is about to start."""
        if self._suspended:
            self._suspended = False
            self._abort_transfer(forget=False)
            if self._channel:
                self._channel.suspend(False)
            self._call(self._backend.resumed)

    def _suspend(self) -> None:
        """A ring has stopped. After the last one the front-end is told nothing more (vhost-user, "Suspended device state")."""
        if not self._suspended and not any(vring.started for vring in self._vrings):
            self._suspended = True
            if self._channel:
                self._channel.suspend(True)
            if self._iotlb:
                self._iotlb.clear()  # while no ring runs, front-ends do not tell what becomes invalid
            self._call(self._backend.suspended)

    def _reset_owner(self, payload: Empty, message: Message) -> None:
        for vring in self._vrings:  # deprecated; what the specification recommends for those who still send it
            vring.set_enabled(False)

    # In-flight tracking

    def _inflight_stride(self, queue_size: int) -> int:
        kind = PackedInflight if self._features >> VIRTIO_F_RING_PACKED & 1 else SplitInflight
        return kind.bytes_for(queue_size)

    def _get_inflight_fd(self, payload: Inflight, message: Message) -> Payload:
        if not 0 < payload.num_queues <= len(self._vrings) or not 0 < payload.queue_size <= self._backend.max_queue_size:
            raise ProtocolError(f"GET_INFLIGHT_FD for {payload.num_queues} queues of {payload.queue_size}")
        size = payload.num_queues * self._inflight_stride(payload.queue_size)
        fd = os.memfd_create("vhost-user-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        message.reply_fds.append(fd)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return Inflight(size, 0, payload.num_queues, payload.queue_size)

    def _set_inflight_fd(self, payload: Inflight, message: Message) -> None:
        stride = self._inflight_stride(payload.queue_size)
        if payload.num_queues > len(self._vrings) or payload.num_queues * stride > payload.mmap_size:
            raise ProtocolError(f"SET_INFLIGHT_FD: {payload}: too many queues, or too few bytes for them")
        area = map_shared(message.fds[0], payload.mmap_offset, payload.mmap_size)
        for index, vring in enumerate(self._vrings):
            vring.set_inflight(area[index * stride : (index + 1) * stride] if index < payload.num_queues else None)
        self._tracked = payload.num_queues

    # Config space

    def _get_config(self, payload: Config, message: Message) -> Payload:
        data = self._call(self._backend.get_config, payload.offset, len(payload.data), gives=bytes)
        if len(data) != len(payload.data):
            raise Refused(f"the device gave {len(data)} of {len(payload.data)} bytes of config space")
        return Config(payload.offset, payload.flags, data)

    def _set_config(self, payload: Config, message: Message) -> None:
        if payload.flags not in (CONFIG_FLAG_WRITABLE, CONFIG_FLAG_LIVE_MIGRATION):
            raise ProtocolError(f"SET_CONFIG with unknown flags {payload.flags:#x}")
        self._call(self._backend.set_config, payload.offset, payload.data, payload.flags)

    # Device

    def _reset_device(self, payload: Empty, message: Message) -> None:
        for index, vring in enumerate(self._vrings):
            self._stop_ring(index)
            vring.reset()
            vring.set_queue_features(self._features)
            vring.set_iotlb(self._iotlb)
        self._addresses = [None] * len(self._vrings)
        self._switch_log()
        self._status = 0
        self._tracked = 0
        self._abort_transfer()
        if self._channel:
            self._channel.reset()
        self._call(self._backend.reset_device)

    def _set_status(self, payload: U64, message: Message) -> None:
        if payload.value > 0xFF:
            raise ProtocolError(f"SET_STATUS {payload.value:#x}: the device status has 8 bits")
        if payload.value == 0:
            self._reset_device(Empty(), message)
        self._status = self._call(self._backend.set_status, payload.value, gives=int) & 0xFF

    def _get_status(self, payload: Empty, message: Message) -> Payload:
        return U64(self._status)

    def _send_rarp(self, payload: Mac, message: Message) -> None:
        self._call(self._backend.send_rarp, payload.address)

    def _net_set_mtu(self, payload: U64, message: Message) -> None:
        if not 68 <= payload.value <= 0xFFFF:  # virtio 1.3 §5.1.4.1
            raise Refused(f"an MTU of {payload.value}: must be 68 to 65535")
        self._call(self._backend.set_mtu, payload.value)

    def _create_crypto_session(self, payload: CryptoSession, message: Message) -> Payload:
        session_id = self._call(self._backend.create_crypto_session, payload.opcode, payload.parameters, gives=int)
        return CryptoSession(payload.opcode, payload.data, session_id)

    def _close_crypto_session(self, payload: U64, message: Message) -> None:
        self._call(self._backend.close_crypto_session, payload.value)

    def _gpu_set_socket(self, payload: Empty, message: Message) -> None:
        self._call(self._backend.set_gpu_socket, _take_socket("GPU_SET_SOCKET", message))

    def _get_shared_object(self, payload: Shared, message: Message) -> Payload:
        fd = self._call(self._backend.get_shared_object, payload.uuid)
        if fd is not None:
            message.reply_fds.append(fd)
        return payload

    def _get_shmem_config(self, payload: Empty, message: Message) -> Payload:
        return self._shmem()

    def _shmem(self) -> ShmemConfig:
        if self._shmem_config is None:
            config = ShmemConfig(self._call(self._backend.get_shmem_config, gives=tuple))
            config.check()
            self._shmem_config = config
        return self._shmem_config

    # Device state

    def _set_device_state_fd(self, payload: DeviceState, message: Message) -> Payload:
        if payload.direction not in (STATE_SAVE, STATE_LOAD) or payload.phase:
            raise Refused(f"a transfer of unknown kind, {payload}")
        if not self._suspended:
            raise Refused("a ring is started")
        fd = self._call(self._backend.set_device_state_fd, payload.direction, payload.phase, message.take_fd())
        if fd is None:
            return U64(STATE_NO_FD)
        message.reply_fds.append(fd)
        return U64(0)

    def _check_device_state(self, payload: Empty, message: Message) -> Payload:
        transfer = self._backend._transfer
        if transfer:
            transfer.wait(self._connection.peer_gone)
        self._call(self._backend.check_device_state)
        return U64(0)

    def _abort_transfer(self, forget: bool = True) -> None:
        transfer = self._backend._transfer
        if transfer:
            transfer.abort()
        if forget:
            self._backend._transfer = None


# ---------------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1

_NOT_SPREAD = _PF.PAGEFAULT | _PF.SHARED_OBJECT | _PF.DEVICE_STATE
"""Protocol features that worker processes do not have: for what there is one of, and each would have its own."""


class _Process:
    """A worker process, as its parent has it: a session over `connection`, and a leash whose end is an end on both sides.

    A byte on the leash asks for `reload`, and is answered when that is done."""

    PATIENCE = 5.0  # seconds

    def __init__(self, connection: Connection, leash: socket.socket) -> None:
        self.connection = connection
        self._leash = leash
        leash.settimeout(self.PATIENCE)

    def reload(self) -> None:
        """Have the device's `reload` called there, and wait for it."""
        with suppress(ConnectionError):  # it has just ended
            self._leash.send(b"r")
            self._leash.recv(1)

    def dismiss(self) -> None:
        """It need not go on."""
        self.connection.close()
        with suppress(OSError):
            self._leash.shutdown(socket.SHUT_WR)

    def ended(self) -> bool:
        """Wait for its end for a while. Returns whether it came."""
        with self._leash:
            try:
                while self._leash.recv(1):
                    pass
            except ConnectionError:
                pass
            except TimeoutError:
                return False
        return True


class _NurseryEnded(OSError):
    """There will be no worker processes any more: the daemon ends."""


class _Nursery:
    """A process that starts worker processes, and waits for them.

    It is forked when the daemon starts and has neither threads nor connections. So each worker is a copy of a process without those, and of the
    device as it was then: a lock that another thread holds, or a descriptor of another worker, would stay as it is in a copy for ever.
    """

    _START, _KILL = b"start", b"kill"

    def __init__(self, work: Callable[[int, socket.socket, socket.socket], None], ours: Sequence[socket.socket]) -> None:
        """`work` is what a worker does with its number, connection and leash. `ours` are sockets that are none of its business. Raises OSError."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _flush()
        self._pid = os.fork()
        if not self._pid:
            with _to_the_end():
                for sock in self._socket, *ours:
                    sock.close()
                self._tend(theirs, work)
        theirs.close()

    def start(self, number: int, interrupt: int) -> _Process:
        """A new worker process; it may fail at once. Raises OSError, _NurseryEnded when the nursery is no more."""
        pairs = [socket.socketpair() for _ in range(2)]
        (ours, theirs), (our_leash, their_leash) = pairs
        try:
            socket.send_fds(self._socket, [self._START + bytes([number])], [theirs.fileno(), their_leash.fileno()])
        except OSError as error:
            ours.close()
            our_leash.close()
            kind = _NurseryEnded if isinstance(error, ConnectionError) else OSError
            raise kind(error.errno, f"worker processes cannot be started: {error.strerror}") from None
        finally:
            theirs.close()
            their_leash.close()
        return _Process(Connection(ours, interrupt), our_leash)

    def dismiss(self, processes: Sequence[_Process]) -> None:
        """End these, which are all there are: those that do not end by themselves are killed."""
        for process in processes:
            process.dismiss()
        late = [process for process in processes if not process.ended()]
        if late:
            log.error("%d worker processes do not end, and are killed", len(late))
            with suppress(OSError):  # then it has no parent, and is killed for that
                self._socket.send(self._KILL)
                self._socket.recv(1)

    def close(self) -> None:
        """End the nursery."""
        self._socket.close()
        with suppress(ChildProcessError):  # the program ignores SIGCHLD
            os.waitpid(self._pid, 0)

    # In its process

    @classmethod
    def _tend(cls, sock: socket.socket, work: Callable[[int, socket.socket, socket.socket], None]) -> None:
        signal.set_wakeup_fd(-1)
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # meant for the parent, if a whole process group gets them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        children: dict[int, int] = {}  # a pidfd of each -> process id
        while True:
            poll = select.poll()
            for fd in sock.fileno(), *children:
                poll.register(fd, select.POLLIN)
            ready = [fd for fd, _ in poll.poll()]
            cls._bury([fd for fd in ready if fd in children], children)
            if sock.fileno() not in ready:
                continue
            order, fds, _, _ = socket.recv_fds(sock, 64, 2)
            if not order:
                break
            if order == cls._KILL:
                cls._kill(children)
                sock.send(b"k")
            else:
                cls._fork(order[-1], fds, sock, children, work)
        # The parent is gone, or wants no more: the leashes have told them.
        deadline = time.monotonic() + _Process.PATIENCE
        while children and time.monotonic() < deadline:
            poll = select.poll()
            for fd in children:
                poll.register(fd, select.POLLIN)
            cls._bury([fd for fd, _ in poll.poll(_Process.PATIENCE * 1000)], children)
        cls._kill(children)

    @staticmethod
    def _bury(ended: Sequence[int], children: dict[int, int]) -> None:
        for fd in ended:
            _, status = os.waitpid(children.pop(fd), 0)
            os.close(fd)
            if status:
                log.error("a worker process has ended by %s", f"signal {status}" if status < 128 else f"status {status >> 8}")

    @classmethod
    def _kill(cls, children: dict[int, int]) -> None:
        for pid in children.values():
            os.kill(pid, signal.SIGKILL)
        cls._bury(list(children), children)

    @staticmethod
    def _fork(
        number: int, fds: list[int], sock: socket.socket, children: dict[int, int], work: Callable[[int, socket.socket, socket.socket], None]
    ) -> None:
        nursery = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            log.error("a worker process cannot be started: %s", error)  # its parent sees the end of the connection
            _close_all(fds)
            return
        if not pid:
            with _to_the_end():
                sock.close()
                _close_all(list(children))
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
                if os.getppid() == nursery:
                    work(number, *(socket.socket(fileno=fd) for fd in fds))
        children[os.pidfd_open(pid)] = pid
        _close_all(fds)


@contextmanager
def _to_the_end() -> Iterator[None]:
    """What a forked process does, whose end is the process's: the code around it is another process's."""
    status = 1
    try:
        yield
        status = 0
    except BaseException:
        log.exception("process %d failed", os.getpid())
    finally:
        _flush()
        os._exit(status)


def _flush() -> None:
    for stream in sys.stdout, sys.stderr:
        with suppress(OSError, ValueError, AttributeError):  # none, closed, or nobody reads it
            stream.flush()


class _ChannelRelay:
    """The channel of SET_BACKEND_REQ_FD, shared by worker processes: each has a channel of its own, whose requests go to the front-end in a
    thread that never waits for an answer. Answers come in the order of the requests, and go to those who asked."""

    def __init__(self, sock: socket.socket, count: int, protocol_features: Callable[[], int]) -> None:
        self._protocol_features = protocol_features
        self._stop = _Event()
        self._front_end = Connection(sock, self._stop.fd)
        pairs = [socket.socketpair() for _ in range(count)]
        self._processes = [Connection(ours, self._stop.fd) for ours, _ in pairs]
        self.theirs = [theirs for _, theirs in pairs]
        """The workers' ends, the caller's."""
        self._asked: deque[Connection] = deque()  # for each answer that is still to come: whose it is
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the channel; whoever waits gets no answer."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        open_ends = {process.socket.fileno(): process for process in self._processes}
        try:
            while True:
                poll = select.poll()
                for fd in self._front_end.socket.fileno(), self._stop.fd, *open_ends:
                    poll.register(fd, select.POLLIN)
                for fd, _ in poll.poll():
                    if fd in open_ends:
                        try:
                            self._ask(open_ends[fd])
                        except Disconnected:
                            del open_ends[fd]
                    else:
                        self._answer()
        except (InterruptedError, Disconnected):
            pass
        except (VhostUserError, OSError) as error:
            log.warning("the channel for the device's requests ends: %s", error)
        finally:
            for connection in self._front_end, *self._processes:
                connection.close()

    def _ask(self, process: Connection) -> None:
        with process.receive() as message:
            row = _row_of(message, _BACKEND_BY_NUMBER)
            if row.goes is Goes.FIRST and process is not self._processes[0]:
                return
            if row.reply or (message.flags & FLAG_NEED_REPLY and self._protocol_features() & _PF.REPLY_ACK):
                self._asked.append(process)
            try:
                self._front_end.send(message.request, message.flags & ~VERSION, message.payload, message.fds)
            except Disconnected as error:
                raise ProtocolError(f"the front-end has closed it: {error}") from None

    def _answer(self) -> None:
        with self._front_end.receive() as message:
            if not self._asked:
                raise ProtocolError(f"the front-end answers message {message.request}, which was not sent")
            with suppress(Disconnected):
                self._asked.popleft().send(message.request, message.flags & ~VERSION, message.payload, message.fds)


class _Relay:
    """One connection that is spread over worker processes, each of which has an ordinary session: what the front-end says is handed on as the
    request table has it, and the answers are combined. Ring i belongs to process i modulo their number."""

    def __init__(self, connection: Connection, processes: Sequence[_Process], stop_fd: int) -> None:
        self._connection = connection
        self._processes = processes
        self._stop_fd = stop_fd
        self._protocol_features = 0
        self._channel: _ChannelRelay | None = None

    def run(self) -> None:
        """Serve the connection to its end. Raises ProtocolError, Disconnected, InterruptedError, VhostUserError when a worker process has ended."""
        try:
            while True:
                self._wait(self._connection)
                with self._connection.receive() as message:
                    self._hand_on(message)
        finally:
            if self._channel:
                self._channel.close()

    def _wait(self, source: Connection) -> None:
        """Until there is something to receive from `source`, or something has come to its end."""
        poll = select.poll()
        for connection in self._connection, *(process.connection for process in self._processes):
            poll.register(connection.socket, select.POLLIN if connection is source else select.POLLRDHUP)
        poll.register(self._stop_fd, select.POLLIN)
        ready = dict(poll.poll())
        if self._stop_fd in ready:
            raise InterruptedError("asked to stop")
        if source.socket.fileno() in ready:
            return
        for number, process in enumerate(self._processes):
            if process.connection.socket.fileno() in ready:
                raise self._ended(number)
        raise Disconnected("the peer closed the connection before it had its answer")

    @staticmethod
    def _ended(number: int) -> VhostUserError:
        return VhostUserError(f"worker process {number} has ended it, or is no more: see what it has logged")

    def _hand_on(self, message: Message) -> None:
        row = _row_of(message, _BY_NUMBER)
        numbers = self._numbers(row, message)
        if row.name == "SET_PROTOCOL_FEATURES":
            self._protocol_features = U64.unpack(message.payload).value
        answered = row.reply or (message.flags & FLAG_NEED_REPLY and self._protocol_features & _PF.REPLY_ACK)
        if row.name == "SET_BACKEND_REQ_FD" and len(message.fds) == 1:
            self._share_channel(message)
        else:
            for number in numbers:
                self._send(number, message, message.fds)
        if answered:
            self._answer(row, [self._receive(number, row) for number in numbers])

    def _numbers(self, row: Request, message: Message) -> Sequence[int]:
        if row.goes is Goes.FIRST:
            return (0,)
        if row.goes is Goes.ALL:
            return range(len(self._processes))
        payload: Any = row.payload.unpack(message.payload)
        return (payload.index % len(self._processes),)

    def _send(self, number: int, message: Message, fds: Sequence[int]) -> None:
        try:
            self._processes[number].connection.send(message.request, message.flags & ~FLAG_VERSION_MASK, message.payload, fds)
        except Disconnected:
            raise self._ended(number) from None

    def _receive(self, number: int, row: Request) -> Message:
        connection = self._processes[number].connection
        self._wait(connection)
        try:
            answer = connection.receive()
        except (Disconnected, ProtocolError):
            raise self._ended(number) from None
        return answer

    def _answer(self, row: Request, answers: Sequence[Message]) -> None:
        """One for all: the first that tells of a failure, or else what all say."""
        with ExitStack() as stack:
            for answer in answers:
                stack.enter_context(answer)
            failed = row.failed.pack() if row.failed else None
            good = answers[0].payload if row.reply else bytes(8)
            for answer in answers:
                if answer.payload == failed or (answer.payload != good and row.reply is None):
                    self._connection.send(row.number, FLAG_REPLY, answer.payload)
                    return
                if answer.payload != good:
                    raise VhostUserError(f"{row.name}: worker processes answer differently")
            self._connection.send(row.number, FLAG_REPLY, good, answers[0].fds)

    def _share_channel(self, message: Message) -> None:
        if self._channel:
            self._channel.close()
        sock = _take_socket("SET_BACKEND_REQ_FD", message)
        self._channel = _ChannelRelay(sock, len(self._processes), lambda: self._protocol_features)
        with ExitStack() as stack:
            for theirs in self._channel.theirs:
                stack.enter_context(theirs)
            for number, theirs in enumerate(self._channel.theirs):
                self._send(number, message, (theirs.fileno(),))


# ---------------------------------------------------------------------------------------------------------------------------
# Daemon
# ---------------------------------------------------------------------------------------------------------------------------


class Listener:
    """A listening Unix socket."""

    def __init__(self, path: str | os.PathLike[str], unlink: bool = True) -> None:
        """Bind and listen at `path`; with `unlink`, a socket that is there already is removed first. Raises OSError."""
        self.path: str | None = os.fspath(path)
        if unlink:
            with suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(self.path).st_mode):
                    os.unlink(self.path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self.socket.bind(self.path)
            self.socket.listen()
        except OSError as error:
            self.socket.close()
            raise OSError(error.errno, f"cannot listen at {self.path}: {error.strerror}") from None
        self._identity = os.lstat(self.path)

    @classmethod
    def from_socket(cls, sock: socket.socket) -> Listener:
        """One that somebody else has bound, and will remove."""
        self = cls.__new__(cls)
        self.path = None
        self.socket = sock
        return self

    def accept(self, interrupt: int) -> socket.socket | None:
        """The next connection; None when `interrupt` becomes readable first."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(interrupt, select.POLLIN)
        while True:
            if interrupt in dict(poll.poll()):
                return None
            try:
                return self.socket.accept()[0]
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.error("cannot accept a connection: %s", error)
                    time.sleep(0.1)  # nothing that polling would wait for
                elif error.errno not in (errno.EAGAIN, errno.EINTR, errno.ECONNABORTED):
                    raise

    def close(self) -> None:
        """Close the socket, and remove its path if it still is this one's."""
        self.socket.close()
        if self.path is not None:
            with suppress(FileNotFoundError):
                now = os.lstat(self.path)
                if (now.st_dev, now.st_ino) == (self._identity.st_dev, self._identity.st_ino):
                    os.unlink(self.path)
            self.path = None


def _connected(path: str | os.PathLike[str]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot connect to {os.fspath(path)}: {error.strerror}") from None
    return sock


def _wait_in_main_thread(fd: int) -> None:
    """Wait until `fd` is readable. Signal handlers run meanwhile; if the thread waited for a lock, or joined another, the handler of a signal that
    came just before would not run until that is over."""
    pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    previous = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(pipe[0], select.POLLIN)
        while fd not in dict(poll.poll()):
            with suppress(BlockingIOError):
                numbers = os.read(pipe[0], 4096)
                if previous != -1:
                    os.write(previous, numbers)
    finally:
        signal.set_wakeup_fd(previous)
        for end in pipe:
            os.close(end)


class VhostUserDaemon:
    """Serves a device to front-ends: one control thread for the connection, and a worker for each of `queues_per_thread`.

    One front-end at a time: the next one is accepted after it has left.

    With `processes`, queue i is served by worker process i modulo their number, so that a Python with a GIL uses several cores. Each has a copy of
    the device as it was when the daemon started, and workers of its own; front-ends see one device. All get each change of features, memory, config
    space and status. Requests for what there is one of (config space is read, say) go to the first. `suspended` and `resumed` are about the rings of
    the process where they are called; a config change is told when one of the first one's runs. What the device keeps elsewhere has to be in
    files or in shared memory. Each connection has new processes. Listeners are to be registered in `worker_started`, which each process calls.
    PAGEFAULT, SHARED_OBJECT and DEVICE_STATE are not offered then. To be started before there are other threads.
    """

    _FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds between attempts to reconnect

    def __init__(
        self,
        name: str,
        backend: VhostUserBackend,
        mem: GuestMemoryAtomic | None = None,
        vring: type[VringState] = VringMutex,
        poll_us: int = 0,
        processes: int = 1,
    ) -> None:
        """`vring` is the class of rings: VringMutex or VringRwLock. `poll_us`: how many microseconds a worker at most looks at a ring that it
        has emptied before it sleeps; it does so only while that pays. `processes`: worker processes, 1: none but this one. Raises ValueError for
        a device that cannot be."""
        if not issubclass(vring, (VringMutex, VringRwLock)):
            raise ValueError(f"{vring.__name__} has no lock, and a daemon has several threads")
        if not 1 <= backend.num_queues <= 256:
            raise ValueError(f"a device of {backend.num_queues} queues: must be 1 to 256")
        if poll_us < 0:
            raise ValueError(f"polling for {poll_us} µs")
        if processes < 1:
            raise ValueError(f"{processes} processes: must be at least 1")
        self.name = name
        self.backend = backend
        self.withheld = 0
        """Protocol features that are not offered here, whatever the device."""
        self.memory = mem or GuestMemoryAtomic()
        self.vrings = [vring(self.memory, backend.max_queue_size, index) for index in range(backend.num_queues)]
        for ring in self.vrings:
            ring.serves_disabled = backend.serves_disabled
        self.calls = TurnLock() if isinstance(backend, VhostUserBackendMut) else NoLock()
        self._poll_us = poll_us
        self._masks = [mask & (1 << backend.num_queues) - 1 for mask in backend.queues_per_thread()]
        if sum(mask.bit_count() for mask in self._masks) != backend.num_queues or sum(self._masks) != (1 << backend.num_queues) - 1:
            raise ValueError(f"queues_per_thread {self._masks} does not have each of {backend.num_queues} queues once")
        self._places: list[tuple[VringEpollHandler, int]] = []  # by ring: its worker, and its position there
        self._workers: list[VringEpollHandler] = []
        self._thread: threading.Thread | None = None
        self._stop = _Event()
        self._ended = _Event()
        self._failure: BaseException | None = None
        self._count = min(processes, backend.num_queues)  # of worker processes, if more than 1
        if processes > self._count:
            log.warning("%s: %d worker processes for %d queues: only %d have one", name, processes, backend.num_queues, self._count)
        self._nursery: _Nursery | None = None
        self._processes: Sequence[_Process] = ()  # of this connection
        self._reloading = threading.Lock()

    # What a program uses

    def start(self, listener: Listener | str | os.PathLike[str]) -> None:
        """Serve whoever connects, one after another, in threads of the daemon's own, until `shutdown`. Raises OSError when it cannot listen."""
        source = listener if isinstance(listener, Listener) else Listener(listener)
        self._start(lambda: self._serve_listener(source), source.socket)

    def start_client(self, path: str | os.PathLike[str], reconnect: bool = False) -> None:
        """Connect to a front-end that listens, and serve it until it leaves; with `reconnect`, try for it again and again, until `shutdown`.

        Raises OSError when there is none, unless it is to `reconnect`."""
        if reconnect:
            self._start(lambda: self._serve_client(path))
        else:
            self.start_socket(_connected(path))

    def start_socket(self, sock: socket.socket) -> None:
        """Serve a socket that was passed in: as `start` if it listens, as `start_client` if it is connected. The daemon owns it."""
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self.start(Listener.from_socket(sock))
        else:
            self._start(lambda: self._serve_connection(sock), sock)

    def serve(self, path: str | os.PathLike[str]) -> None:
        """`start` and `wait`."""
        self.start(path)
        self.wait()

    def wait(self) -> None:
        """Wait until the daemon has ended. Raises what ended it, unless that was `shutdown` or the front-end's leaving."""
        if self._thread:
            if threading.current_thread() is threading.main_thread():
                _wait_in_main_thread(self._ended.fd)
            self._thread.join()
        if self._failure:
            raise self._failure

    def shutdown(self) -> None:
        """End the daemon, connected or not. Returns at once; from any thread, and from a signal handler."""
        self._stop.set()

    def get_epoll_handlers(self) -> Sequence[VringEpollHandler]:
        """The workers, in the order of `queues_per_thread`, once the daemon is started; none here with worker processes."""
        return self._workers

    def reload(self) -> None:
        """Have the device look at its resources again, in all worker processes if there are any."""
        with self._reloading:
            for process in reversed(self._processes):  # the first comes last: it tells the front-end, when all others know
                try:
                    process.reload()
                except TimeoutError:
                    log.error("reload of the device does not end in a worker process")
        if self._nursery:
            return
        try:
            with self.calls:
                self.backend.reload()
        except Exception:
            log.exception("reload of the device failed")

    def __enter__(self) -> VhostUserDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.wait()

    # Threads

    def _start(self, control: Callable[[], None], *ours: socket.socket) -> None:
        if self._thread:
            raise RuntimeError(f"daemon {self.name} was started already")
        if self._count > 1:
            self._nursery = _Nursery(self._work, ours)
        else:
            self._start_workers()
        if not self.withheld:
            self._tell_started()
        self._thread = threading.Thread(target=self._run, args=(control,), name=f"{self.name}-control", daemon=True)
        self._thread.start()

    def _tell_started(self) -> None:
        try:
            with self.calls:
                self.backend.started(self.reload)
        except Exception:
            log.exception("started of the device failed")

    def _start_workers(self) -> None:
        for thread_id, mask in enumerate(self._masks):
            own = [vring for vring in self.vrings if mask >> vring.index & 1]
            self._workers.append(VringEpollHandler(self.name, self.backend, self.calls, own, thread_id, self._poll_us))
        self._places = sorted(
            ((worker, position) for worker in self._workers for position in range(len(worker.vrings))),
            key=lambda place: place[0].vrings[place[1]].index,
        )

    def _run(self, control: Callable[[], None]) -> None:
        try:
            control()
        except BaseException as error:
            log.exception("daemon %s ends", self.name)
            self._failure = error
        finally:
            for worker in self._workers:
                worker.send_exit_event()
            for worker in self._workers:
                worker.join()
            if self._nursery:
                self._nursery.close()
            self._ended.set()

    def _serve_listener(self, listener: Listener) -> None:
        try:
            while True:
                sock = listener.accept(self._stop.fd)
                if sock is None:
                    return
                self._serve_connection(sock)
        finally:
            listener.close()

    def _serve_client(self, path: str | os.PathLike[str]) -> None:
        pause = self._FIRST_PAUSE
        stop = select.poll()
        stop.register(self._stop.fd, select.POLLIN)
        while not stop.poll(0):
            try:
                sock = _connected(path)
            except OSError as error:
                log.log(logging.INFO if pause == self._FIRST_PAUSE else logging.DEBUG, "%s: %s; trying again", self.name, error)
                stop.poll(pause * 1000)
                pause = min(2 * pause, self._LONGEST_PAUSE)
            else:
                pause = self._FIRST_PAUSE
                self._serve_connection(sock)
                stop.poll(pause * 1000)  # one that hangs up at once is not tried without end

    def _serve_connection(self, sock: socket.socket) -> None:
        connection = Connection(sock, self._stop.fd)
        log.info("%s: a front-end has connected", self.name)
        try:
            if self._nursery:
                self._spread(connection, self._nursery)
            else:
                _Session(self, connection).run()
        except InterruptedError:
            log.info("%s: shutting down", self.name)
        except _NurseryEnded:
            raise
        except Disconnected as reason:
            log.info("%s: the front-end has left: %s", self.name, reason)
        except (VhostUserError, OSError) as error:
            log.error("%s: the connection ends: %s", self.name, error)
        except Exception:  # a fault of this program's: the next front-end is served all the same
            log.exception("%s: the connection ends", self.name)
        finally:
            connection.close()

    # Processes

    def _spread(self, connection: Connection, nursery: _Nursery) -> None:
        """Serve a connection with new worker processes."""
        processes: list[_Process] = []
        try:
            processes.extend(nursery.start(number, self._stop.fd) for number in range(self._count))  # those before one that fails are in it
            with self._reloading:
                self._processes = processes
            _Relay(connection, processes, self._stop.fd).run()
        finally:
            with self._reloading:
                self._processes = ()
            nursery.dismiss(processes)  # before there are others: they still have the guest's memory

    def _work(self, number: int, sock: socket.socket, leash: socket.socket) -> None:
        """What a worker process does, with its own copy of this daemon."""
        self._stop, self._ended = _Event(), _Event()  # the other ones are the parent's
        self.name = f"{self.name}-{number}"
        self.withheld = int(_NOT_SPREAD)
        self._count = 1
        self.reload()
        self._start(lambda: self._serve_connection(sock), sock)
        while leash.recv(1):
            self.reload()
            leash.send(b"r")
        self.shutdown()
        self.wait()
        leash.detach()  # it ends with the process, not before

    # For sessions

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The device for this thread alone, if its calls are serialised, ahead of the workers' next ones. A worker that is stuck is freed."""
        patience = 0.1
        while not self.calls.acquire_first(patience):
            patience = 0.001 if sum(vring.unblock() for vring in self.vrings) else 0.1
        try:
            yield
        finally:
            self.calls.release()

    def watch(self, index: int) -> None:
        """Have the ring's worker watch its kick eventfd. Raises OSError when it cannot be polled."""
        worker, position = self._places[index]
        worker.watch(position)

    def unwatch(self, index: int) -> None:
        """Undo `watch`."""
        worker, position = self._places[index]
        worker.unwatch(position)


# ---------------------------------------------------------------------------------------------------------------------------
# Front-end
# ---------------------------------------------------------------------------------------------------------------------------


class FrontendQueue:
    """One virtqueue of a `Frontend`: the driver side of the ring, and its eventfds."""

    def __init__(self, frontend: Frontend, index: int, driver: DriverQueue) -> None:
        self.index = index
        self.driver = driver
        self._frontend = frontend
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def submit(self, readable: Sequence[Buffer], writable: Sequence[Buffer], token: object = None) -> None:
        """Add one chain, show it to the device and notify it if it wants that. Raises VringError when the ring is full."""
        self.driver.add(readable, writable, token)
        self.publish()

    def publish(self) -> None:
        """Show the device what was added with `driver.add`, and notify it if it wants that."""
        if self.driver.publish():
            self.kick()

    def kick(self) -> None:
        """Notify the device, whether it wants that or not."""
        os.eventfd_write(self.kick_fd, 1)

    def wait(self, timeout: float = 10.0) -> list[tuple[object, int]]:
        """What the device has used, at least one element: the tokens of `submit`, and the lengths that the device told. What it asks about
        translations meanwhile is answered.

        Raises TimeoutError, VringError when the device signals that the ring is broken, Disconnected when it has gone."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        for fd in self.call_fd, self.err_fd:
            poll.register(fd, select.POLLIN)
        poll.register(self._frontend.connection.socket, select.POLLRDHUP)
        channel = self._frontend.channel if self._frontend.has_iommu else None
        if channel:
            poll.register(channel.socket, select.POLLIN)
        while True:
            if channel:
                self._frontend.answer_misses()
            with suppress(BlockingIOError):
                os.eventfd_read(self.call_fd)
            self.driver.enable_notification()
            found = self.driver.used()
            if found:
                return found
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                raise TimeoutError(f"ring {self.index}: the device has used nothing for {timeout} s")
            if self.err_fd in ready:
                raise VringError(f"ring {self.index}: the device says it is broken")
            if self._frontend.connection.socket.fileno() in ready:
                raise Disconnected(f"ring {self.index}: the back-end has gone")

    def close(self) -> None:
        """Close the eventfds."""
        for fd in self.kick_fd, self.call_fd, self.err_fd:
            os.close(fd)


@dataclass(frozen=True)
class BackendMessage:
    """A request of the back-end. The file descriptors that came with it are the reader's."""

    request: Request
    payload: Payload
    fds: list[int]

    @property
    def name(self) -> str:
        """The request's name in BACKEND_REQUESTS."""
        return self.request.name

    @property
    def number(self) -> int:
        """The request's number."""
        return self.request.number


class Frontend:
    """The front-end's side of a connection: what a VMM does, for tests, for load and for tools.

    Each request of the table is `request(NAME, payload, fds)`; the methods that follow give them a shape. `setup` does all that a VMM does until
    a device can be used.
    """

    TIMEOUT = 10.0  # seconds

    def __init__(self, sock: socket.socket) -> None:
        """Speak over a connected socket, which it owns."""
        self.connection = Connection(sock)
        self.features = 0
        self.protocol_features = _PF(0)
        self.memory = GuestMemoryMmap()
        self.queues: list[FrontendQueue] = []
        self.channel: Connection | None = None
        self.arena = (0, 0)  # guest address and size of the memory that rings don't use
        self.shared_objects: dict[UUID, int] = {}  # what the back-end may look up: file descriptors, the caller's
        self.exported: set[UUID] = set()  # what the back-end has added
        self.maps: list[ShmemMap] = []  # what it has mapped since its last reset
        self._shmem_sizes: Sequence[int] = ()
        self.iommu = Iotlb(lambda kind, iova, access: False)  # the guest's translations, which the back-end is told when it misses them
        self._early: list[BackendMessage] = []  # received, and not yet given to anybody

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout: float = TIMEOUT) -> Frontend:
        """Connect to a back-end that listens at `path`, waiting up to `timeout` seconds for it to. Raises OSError."""
        deadline = time.monotonic() + timeout
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.connect(os.fspath(path))
                return cls(sock)
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)
            except OSError:
                sock.close()
                raise

    def close(self) -> None:
        """Disconnect, and let go of everything."""
        self.connection.close()
        if self.channel:
            self.channel.close()
            self.channel = None
        while self.queues:
            self.queues.pop().close()
        self.memory = GuestMemoryMmap()

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One request

    def request(self, name: str, payload: Payload = Empty(), fds: Sequence[int] = (), reply_fds: list[int] | None = None) -> Any:
        """Make the request `name` of the table, and wait for its reply or, where negotiated, its acknowledgement.

        Returns the reply's payload, or None. File descriptors that come with it go into `reply_fds`, the caller's from then on.

        Raises Refused when the acknowledgement or a reply without payload says that it failed, ProtocolError when the answer is none,
        Disconnected, TimeoutError."""
        row = REQUESTS[name]
        acked = row.reply is None and bool(self.protocol_features & _PF.REPLY_ACK)
        log.debug("-> %s %s", name, payload)
        self.connection.send(row.number, FLAG_NEED_REPLY if acked else 0, payload.pack(), fds)
        if not row.reply and not acked:
            return None
        with self.connection.receive(self.TIMEOUT) as answer:
            if answer.request != row.number or answer.flags != FLAG_REPLY | VERSION:
                raise ProtocolError(f"{name} is answered by message {answer.request} with flags {answer.flags:#x}")
            if row.reply is None:
                if U64.unpack(answer.payload).value:
                    raise Refused(f"{name} {payload} failed in the back-end")
                if name == "RESET_DEVICE" or (name == "SET_STATUS" and payload == U64(0)):
                    self.maps.clear()
                return None
            if row.failed is not None and answer.payload == row.failed.pack():
                raise Refused(f"{name} {payload} failed in the back-end")
            if reply_fds is not None:
                reply_fds += answer.fds
                answer.fds.clear()
            return row.reply.unpack(answer.payload)

    def _ask(self, name: str) -> int:
        reply = self.request(name)
        assert isinstance(reply, U64)
        return reply.value

    # Negotiation

    def negotiate(self, features: int, protocol_features: int = -1) -> None:
        """Take those of `features` and of `protocol_features` that the back-end offers."""
        offered = self._ask("GET_FEATURES")
        self.features = offered & (features | 1 << VHOST_USER_F_PROTOCOL_FEATURES)
        if offered >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            self.protocol_features = _PF(_supported(self._ask("GET_PROTOCOL_FEATURES") & _WANTED & protocol_features))
            # Acknowledgements begin with the next message.
            row = REQUESTS["SET_PROTOCOL_FEATURES"]
            self.connection.send(row.number, 0, U64(int(self.protocol_features)).pack())
        self.request("SET_OWNER")
        self.request("SET_FEATURES", U64(self.features))
        if self.protocol_features & _PF.BACKEND_REQ:
            self._open_channel()

    def _open_channel(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.request("SET_BACKEND_REQ_FD", fds=(theirs.fileno(),))
        self.channel = Connection(ours)
        if self.protocol_features & _PF.SHMEM:
            self._shmem_sizes = self.get_shmem_config()

    def queue_num(self) -> int:
        """How many queues the back-end has; 1 if it does not say."""
        return self._ask("GET_QUEUE_NUM") if self.protocol_features & _PF.MQ else 1

    def next_backend_request(self, timeout: float = TIMEOUT) -> BackendMessage:
        """The back-end's next request to us, answered if it asks for that: shared objects are looked up in `shared_objects`, maps are kept in
        `maps`. Raises TimeoutError, ProtocolError, Disconnected."""
        return self._early.pop(0) if self._early else self._receive_backend_request(timeout)

    def _receive_backend_request(self, timeout: float) -> BackendMessage:
        if self.channel is None:
            raise ProtocolError("BACKEND_REQ was not negotiated")
        with self.channel.receive(timeout) as message:
            row = _row_of(message, _BACKEND_BY_NUMBER)
            if row.gate & ~self.protocol_features:
                raise ProtocolError(f"{row.name} without {row.gate.name} negotiated")
            row.check_fds(len(message.fds))
            payload = row.payload.unpack(message.payload)
            value, fds = self._answer(payload, row)
            if row.reply or (message.flags & FLAG_NEED_REPLY and self.protocol_features & _PF.REPLY_ACK):
                self.channel.send(row.number, FLAG_REPLY, U64(value).pack(), fds)
            taken, message.fds = message.fds, []
            return BackendMessage(row, payload, taken)

    def _answer(self, payload: Payload, row: Request) -> tuple[int, Sequence[int]]:
        """What a request of the back-end is answered with: 0 or an error, and a file descriptor where one goes with it."""
        if isinstance(payload, IotlbMessage):
            known = self.iommu.find(payload.iova)
            if payload.kind != Iotlb.MISS or known is None:
                return 1, ()
            iova, size, user_addr, access = known
            user_addr = self.user_addr(self.memory.user_to_guest(user_addr))
            self.request("IOTLB_MSG", IotlbMessage(iova, size, user_addr, access, Iotlb.UPDATE))
        elif isinstance(payload, ShmemMap):
            same = [other for other in self.maps if other.covers(payload)]
            if row.name == "SHMEM_UNMAP":
                self.maps = [other for other in self.maps if other not in same]
                return int(not same), ()
            if payload.fault(self._shmem_sizes) or any(other.overlaps(payload) for other in self.maps):
                return 1, ()
            self.maps.append(payload)
        elif row.name == "SHARED_OBJECT_ADD" and isinstance(payload, Shared):
            self.exported.add(payload.uuid)
        elif row.name == "SHARED_OBJECT_REMOVE" and isinstance(payload, Shared):
            self.exported.discard(payload.uuid)
        elif row.name == "SHARED_OBJECT_LOOKUP" and isinstance(payload, Shared):
            fd = self.shared_objects.get(payload.uuid)
            return (1, ()) if fd is None else (0, (fd,))
        return 0, ()

    # Memory

    def share_memory(self, memory: GuestMemoryMmap) -> None:
        """Make `memory`, of regions that were allocated here, the guest's: by slots where the back-end has them, else as a table."""
        if self.protocol_features & _PF.CONFIGURE_MEM_SLOTS:
            for region in self.memory.regions:
                self.request("REM_MEM_REG", MemReg(region.guest_addr, region.size, self._base(region), 0))
            for region in memory.regions:
                self.add_region(region)
        else:
            table = tuple(MemRegion(r.guest_addr, r.size, self._base(r), r.mmap_offset) for r in memory.regions)
            self.request("SET_MEM_TABLE", MemTable(table), [region.fileno() for region in memory.regions])
        self.memory = memory

    def share_for_postcopy(self, memory: GuestMemoryMmap) -> list[int]:
        """Make `memory` the guest's after POSTCOPY_LISTEN. Returns where the back-end has mapped each region: there the faults will be. It is to be
        acknowledged with `ready_for_faults`."""
        table = tuple(MemRegion(r.guest_addr, r.size, self._base(r), r.mmap_offset) for r in memory.regions)
        row = REQUESTS["SET_MEM_TABLE"]
        self.connection.send(row.number, 0, MemTable(table).pack(), [region.fileno() for region in memory.regions])
        with self.connection.receive(self.TIMEOUT) as answer:
            if answer.request != row.number or answer.flags != FLAG_REPLY | VERSION:
                raise ProtocolError(f"SET_MEM_TABLE in postcopy is answered by message {answer.request} with flags {answer.flags:#x}")
            mapped = MemTable.unpack(answer.payload)
        self.memory = memory
        return [region.user_addr for region in mapped.regions]

    def ready_for_faults(self) -> None:
        """From here on the back-end may touch pages that have not come."""
        self.connection.send(REQUESTS["SET_MEM_TABLE"].number, 0, MemTable(()).pack())

    def postcopy_advise(self) -> int:
        """POSTCOPY_ADVISE: the back-end's userfaultfd, the caller's. Faults in it are to be served from `ready_for_faults` to POSTCOPY_END. Raises
        Refused when there is none."""
        fds: list[int] = []
        self.request("POSTCOPY_ADVISE", reply_fds=fds)
        if len(fds) > 1:
            _close_all(fds)
            raise ProtocolError(f"POSTCOPY_ADVISE is answered with {len(fds)} file descriptors")
        if not fds:
            raise Refused("the back-end has no userfaultfd")
        return fds[0]

    def add_region(self, region: GuestRegionMmap) -> None:
        """Share one more region (ADD_MEM_REG)."""
        payload = MemReg(region.guest_addr, region.size, self._base(region), region.mmap_offset)
        self.request("ADD_MEM_REG", payload, [region.fileno()])

    def _base(self, region: GuestRegionMmap) -> int:
        """The region's user address in messages."""
        return region.guest_addr if self.protocol_features & _PF.GPA_ADDRESSES else region.user_addr

    def user_addr(self, guest_addr: int) -> int:
        """The user address of a guest address; the same with GPA_ADDRESSES. Raises ValueError outside RAM."""
        region = self.memory.find_region(guest_addr)
        if region is None:
            raise ValueError(f"guest address {guest_addr:#x} is not in RAM")
        return self._base(region) + guest_addr - region.guest_addr

    # IOMMU

    @property
    def has_iommu(self) -> bool:
        """Whether rings and buffers are given by IOVAs (VIRTIO_F_ACCESS_PLATFORM)."""
        return bool(self.features >> VIRTIO_F_ACCESS_PLATFORM & 1)

    def map_iova(self, iova: int, size: int, guest_addr: int, access: int = ACCESS_READ | ACCESS_WRITE) -> None:
        """From here on `size` bytes at the IOVA are those at the guest address. The back-end is told when it asks. Raises ValueError outside RAM."""
        region = self.memory.find_region(guest_addr)
        if region is None:
            raise ValueError(f"guest address {guest_addr:#x} is not in RAM")
        self.iommu.update(iova, size, region.user_addr + guest_addr - region.guest_addr, access)

    def unmap_iova(self, iova: int, size: int) -> None:
        """End the translations that have one of these bytes, here and in the back-end (IOTLB_MSG)."""
        self.iommu.invalidate(iova, size)
        self.request("IOTLB_MSG", IotlbMessage(iova, size, 0, 0, Iotlb.INVALIDATE))

    def answer_misses(self) -> None:
        """Answer what the back-end has asked about translations. `next_backend_request` gives what else there is."""
        while self.channel and self.channel.readable():
            request = self._receive_backend_request(self.TIMEOUT)
            if not isinstance(request.payload, IotlbMessage) or request.payload.kind != Iotlb.MISS:
                self._early.append(request)

    # Rings

    def start_queue(self, index: int, driver: DriverQueue, base: int = 0, enable: bool = True) -> FrontendQueue:
        """Start ring `index` with this driver side, whose memory is shared already."""
        queue = FrontendQueue(self, index, driver)
        self.queues.append(queue)
        desc, available, used = driver.areas if self.has_iommu else map(self.user_addr, driver.areas)
        self.request("SET_VRING_NUM", VringStatePayload(index, driver.size))
        self.request("SET_VRING_BASE", VringStatePayload(index, base))
        if driver.big_endian:
            self.request("SET_VRING_ENDIAN", VringStatePayload(index, 1))
        self.request("SET_VRING_ADDR", VringAddr(index, 0, desc, used, available, 0))
        self.request("SET_VRING_ERR", VringFd(index), (queue.err_fd,))
        self.request("SET_VRING_CALL", VringFd(index), (queue.call_fd,))
        self.request("SET_VRING_KICK", VringFd(index), (queue.kick_fd,))
        if enable and self.features >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            self.enable_queue(index)
        return queue

    def enable_queue(self, index: int, enabled: bool = True) -> None:
        """SET_VRING_ENABLE."""
        self.request("SET_VRING_ENABLE", VringStatePayload(index, int(enabled)))

    def stop_queue(self, queue: FrontendQueue, drain: bool = True) -> int:
        """Stop the ring (GET_VRING_BASE, or GET_VRING_BASE_SKIP_DRAIN) and close its eventfds. Returns where it would go on."""
        reply = self.request("GET_VRING_BASE" if drain else "GET_VRING_BASE_SKIP_DRAIN", VringStatePayload(queue.index, 0))
        self.queues.remove(queue)
        queue.close()
        assert isinstance(reply, VringStatePayload)
        return reply.num

    def get_inflight(self, queues: int, size: int) -> tuple[Inflight, int]:
        """A new in-flight region for `queues` rings of `size` entries, from the back-end: its description, and its file descriptor."""
        fds: list[int] = []
        region = self.request("GET_INFLIGHT_FD", Inflight(0, 0, queues, size), reply_fds=fds)
        if len(fds) != 1:
            _close_all(fds)
            raise ProtocolError(f"GET_INFLIGHT_FD is answered with {len(fds)} file descriptors")
        return region, fds[0]

    def set_inflight(self, region: Inflight, fd: int) -> None:
        """Give the region to the back-end, new or with what its last life left in flight, before the rings start."""
        self.request("SET_INFLIGHT_FD", region, [fd])

    def get_config(self, offset: int, size: int) -> bytes:
        """Part of config space. Raises Refused when the back-end has none there."""
        reply = self.request("GET_CONFIG", Config(offset, 0, bytes(size)))
        if not isinstance(reply, Config) or len(reply.data) != size:
            raise ProtocolError(f"GET_CONFIG of {size} bytes is answered by {reply}")
        return reply.data

    def set_config(self, offset: int, data: bytes, flags: int = CONFIG_FLAG_WRITABLE) -> None:
        """Write config space. Raises Refused where it is read-only, if the back-end acknowledges."""
        self.request("SET_CONFIG", Config(offset, flags, data))

    # Devices of some kinds

    def create_crypto_session(self, opcode: int, parameters: SymmetricSession | AsymmetricSession) -> int:
        """CREATE_CRYPTO_SESSION: the number of the new session. Raises Refused when the back-end makes none."""
        reply = self.request("CREATE_CRYPTO_SESSION", CryptoSession.of(opcode, parameters))
        if not isinstance(reply, CryptoSession) or reply.session_id < 0:
            raise Refused(f"the back-end has made no crypto session of opcode {opcode:#x}")
        return reply.session_id

    def get_shared_object(self, uuid: UUID) -> int | None:
        """GET_SHARED_OBJECT: the dma-buf that the back-end exports, a file descriptor of the caller's."""
        fds: list[int] = []
        with suppress(Refused):
            self.request("GET_SHARED_OBJECT", Shared(uuid), reply_fds=fds)
        if len(fds) > 1:
            _close_all(fds)
            raise ProtocolError("GET_SHARED_OBJECT is answered with more than one file descriptor")
        return fds[0] if fds else None

    def get_shmem_config(self) -> tuple[int, ...]:
        """GET_SHMEM_CONFIG: sizes of the shared memory regions, by shmid."""
        reply = self.request("GET_SHMEM_CONFIG")
        assert isinstance(reply, ShmemConfig)
        return reply.sizes

    # Migration

    def save_state(self) -> bytes:
        """The device's state, with all rings stopped. Raises Refused when the back-end could not save it."""
        ours, theirs = os.pipe()
        with open(self._state_channel(STATE_SAVE, ours, theirs), "rb") as file:
            state = file.read()
        self._check_state()
        return state

    def load_state(self, state: bytes) -> None:
        """Give the device this state, with all rings stopped. Raises Refused when the back-end could not load it."""
        theirs, ours = os.pipe()
        with suppress(BrokenPipeError), open(self._state_channel(STATE_LOAD, ours, theirs), "wb") as file:
            file.write(state)
        self._check_state()

    def _state_channel(self, direction: int, ours: int, theirs: int) -> int:
        """SET_DEVICE_STATE_FD with the back-end's end of a pipe. Returns ours, or that of the back-end's own channel."""
        fds: list[int] = []
        try:
            reply = self.request("SET_DEVICE_STATE_FD", DeviceState(direction, 0), [theirs], fds)
            if not isinstance(reply, U64) or reply.value & 0xFF or bool(reply.value & STATE_NO_FD) == bool(fds):
                _close_all(fds)
                raise Refused(f"SET_DEVICE_STATE_FD failed in the back-end: {reply}")
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        if not fds:
            return ours
        os.close(ours)
        return fds[0]

    def _check_state(self) -> None:
        if self._ask("CHECK_DEVICE_STATE"):
            raise Refused("the back-end could not save or load the device's state")

    # All of it

    RING_FEATURES = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_EVENT_IDX | 1 << VIRTIO_F_INDIRECT_DESC

    def setup(
        self,
        queues: int = 1,
        size: int = 256,
        *,
        features: int = RING_FEATURES,
        protocol_features: int = -1,
        packed: bool = False,
        indirect: bool = True,
        memory: int = 64 << 20,
        guest_addr: int = 1 << 30,
    ) -> list[FrontendQueue]:
        """Negotiate, share `memory` bytes of RAM at `guest_addr`, start and enable `queues` rings of `size` entries. `arena` is
        what is left of the RAM. With VIRTIO_F_ACCESS_PLATFORM, IOVAs are guest addresses.

        Raises ProtocolError when packed rings are wanted and the back-end does not offer them."""
        self.negotiate(features | packed << VIRTIO_F_RING_PACKED, protocol_features)
        if packed and not self.features >> VIRTIO_F_RING_PACKED & 1:
            raise ProtocolError("the back-end does not offer packed rings")
        ram = GuestMemoryMmap.from_ranges([(guest_addr, memory)])
        self.share_memory(ram)
        space: AddressSpace = ram
        if self.has_iommu:
            self.map_iova(guest_addr, memory, guest_addr)
            space = IovaMemory(ram, self.iommu)
        kind: type[DriverQueue] = PackedDriverQueue if packed else SplitDriverQueue
        tables = indirect and bool(self.features >> VIRTIO_F_INDIRECT_DESC & 1)
        at = guest_addr
        for index in range(queues):
            length, offsets = kind.layout(size)
            desc, driver, device = (at + offset for offset in offsets)
            at += -(-length // 4096) * 4096
            driver_side = kind(space, size, (desc, driver, device), self.features, at if tables else None)
            at += size * kind.TABLE_BYTES if tables else 0
            self.start_queue(index, driver_side)
        self.arena = (at, guest_addr + memory - at)
        return self.queues


# ---------------------------------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------------------------------

_SD_FIRST_FD = 3  # sd_listen_fds(3)


def run_device(
    kind: str,
    build: Callable[[argparse.Namespace], VhostUserBackend],
    options: Callable[[argparse.ArgumentParser], object] | None = None,
    features: Sequence[str] = (),
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a device as a program by the conventions (vhost-user, "Backend program conventions"):
    `sys.exit(run_device("rng", lambda arguments: Rng()))`.

    kind       the type of device, as in the conventions: "blk", "net" …
    build      makes the device from the parsed command line; OSError and ValueError are told the user
    options    adds the device's own options to the parser
    features   the type's features that --print-capabilities tells, as in the conventions
    arguments  the command line; sys.argv's by default

    Returns the exit status: 0 after SIGTERM, SIGINT or a client's end, 1 on failure; SystemExit(2) for a command line that the parser refuses. SIGHUP
    calls the device's `reload`. Readiness is told to systemd (NOTIFY_SOCKET), whose socket is taken (LISTEN_FDS) when no other is named.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "--print-capabilities" in words:
        print(json.dumps({"type": kind, "features": list(features)}))
        return 0
    parser = _parser(kind, options)
    parsed = parser.parse_args(words)
    logging.basicConfig(level=parsed.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    passed = _passed_fd(parsed.fd) if parsed.socket_path is None else None
    if parsed.socket_path is None and passed is None:
        parser.error("one of --socket-path and --fd is needed")
    if parsed.client and parsed.socket_path is None:
        parser.error("--client is for --socket-path")
    if parsed.reconnect and not parsed.client:
        parser.error("--reconnect is for --client")
    try:
        survive_truncation()  # first: a device may choose by it how it uses memory
        device = build(parsed)
        device.iommu |= parsed.iommu
        device.postcopy |= parsed.postcopy
        if parsed.processes > 1 and not has_gil():
            raise ValueError(
                "--processes is for a Python with a GIL: here threads use all cores, if the device has several (as the disk's --threads)"
            )
        daemon = VhostUserDaemon(kind, device, poll_us=parsed.poll_us, processes=parsed.processes)
        _install_signals(daemon)
        gc.freeze()  # what is there now stays: the collector need not look at it again
        if passed is not None:
            daemon.start_socket(socket.socket(fileno=passed))
        elif parsed.client:
            daemon.start_client(parsed.socket_path, parsed.reconnect)
        else:
            daemon.start(parsed.socket_path)
        _notify_ready()
        daemon.wait()
    except (OSError, ValueError, VhostUserError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def has_gil() -> bool:
    """Whether this Python runs threads one at a time: then only processes use more cores."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _parser(kind: str, options: Callable[[argparse.ArgumentParser], object] | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=f"vhost-user-{kind}: a virtio device for a VMM that connects over a Unix socket")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", help="listen at this Unix socket")
    where.add_argument("--fd", type=int, metavar="FDNUM", help="use this file descriptor: a socket that listens, or one that is connected")
    parser.add_argument("--client", action="store_true", help="connect to --socket-path, where the front-end listens")
    parser.add_argument("--reconnect", action="store_true", help="with --client: go on trying, also after the front-end has left")
    parser.add_argument("--postcopy", action="store_true", help="let a migration run the guest here before all of its memory has come")
    parser.add_argument("--poll-us", type=int, default=0, metavar="N", help="look at an emptied ring for up to N µs before sleeping, while that pays")
    parser.add_argument("--iommu", action="store_true", help="offer VIRTIO_F_ACCESS_PLATFORM: the device may be behind an IOMMU of the guest's")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="worker processes that share the queues (default 1), to use more cores")
    parser.add_argument("--print-capabilities", action="store_true", help="tell what this program can do, as JSON, and end")
    parser.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"), help="debug shows each message")
    if options:
        options(parser)
    return parser


def _passed_fd(number: int | None) -> int | None:
    """The file descriptor that was named, or else the first one of systemd's socket activation."""
    if number is not None:
        return number
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and int(os.environ.get("LISTEN_FDS", "0")) >= 1:
        return _SD_FIRST_FD
    return None


def _install_signals(daemon: VhostUserDaemon) -> None:
    def end(number: int, frame: FrameType | None) -> None:
        daemon.shutdown()

    def reload(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=daemon.reload, name="reload", daemon=True).start()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGHUP, reload)


def _notify_ready() -> None:
    """sd_notify(3): a datagram to the socket that the service manager named; an address that begins with @ is abstract."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, suppress(OSError):
            sock.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
