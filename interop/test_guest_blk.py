"""A Linux guest under QEMU on the disk under test: every configuration that changes the rings, and its life cycle."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from . import diskcheck
from .diskcheck import EVENT_IDX, IN_ORDER, INDIRECT_DESC, MIB, MQ, RING_PACKED, RO
from .guest import NEWEST, OLDEST, Machine, QemuGuest, disk_device
from .peers import Disk, Process, needs_disk, serve_disk
from .support import InteropTest

SIZE = 48 * MIB

# Our disk, which tells when it makes data durable. With `aio="sync"`.
TELLS_WHEN_DURABLE = """
import os, sys
from devices import blk

fdatasync = os.fdatasync

def told(fd):
    print("made durable", file=sys.stderr, flush=True)
    fdatasync(fd)

os.fdatasync = told
sys.exit(blk.main())
"""


class SharedGuest(InteropTest):
    """Tests that plug their disk into one running guest; a test that fails takes the guest with it."""

    machine: ClassVar[Machine]
    cpus: ClassVar[int] = 2
    _guest: ClassVar[QemuGuest | None] = None
    _folder: ClassVar[tempfile.TemporaryDirectory[str]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.machine.require()
        cls._folder = tempfile.TemporaryDirectory(prefix="vu-")
        cls.addClassCleanup(cls._folder.cleanup)
        cls.addClassCleanup(cls._drop_guest)

    @classmethod
    def _drop_guest(cls) -> None:
        if cls._guest:
            cls._guest.kill()
            cls._guest = None

    def shared_guest(self) -> QemuGuest:
        cls = type(self)
        if cls._guest is None:
            cls._guest = QemuGuest(cls.machine, Path(cls._folder.name), cpus=cls.cpus)
            cls._guest.wait_ready()
        cls.machine.note()
        return cls._guest

    @contextlib.contextmanager
    def plugged(self, reconnect: bool | int = False, **properties: bool | int) -> Iterator[QemuGuest]:
        """The disk appears as /dev/vda and goes away again."""
        guest = self.shared_guest()
        try:
            device = replace(disk_device(self.dir / "disk.sock", **properties), reconnect=bool(reconnect))
            device.plug(guest.qmp)
            guest.wait("[ -b /dev/vda ]")
            yield guest
            device.unplug(guest.qmp)
            guest.wait("[ ! -e /dev/vda ]")
        except BaseException:
            self.show_logs(Path(self._folder.name))
            self._drop_guest()
            raise

    def exercise(
        self,
        with_: Sequence[int],
        without: Sequence[int] = (),
        processes: int = 1,
        aio: str = "auto",
        direct: bool = False,
        **properties: bool | int,
    ) -> None:
        """One configuration: file system, verified random writes, and the image on the host has it all."""
        image = self.image("disk.img", SIZE)
        queues = properties.get("num_queues", 1)
        serve_disk(self, Disk(image, num_queues=queues, processes=processes, aio=aio, direct=direct), self.dir / "disk.sock")
        with self.plugged(**properties) as guest:
            diskcheck.expect_features(guest, with_, without)
            diskcheck.filesystem(guest)
            diskcheck.fio_verify(guest)
            diskcheck.same_content(guest, image)
            self.assertEqual(guest.run("ls /sys/block/vda/mq | wc -l"), str(queues))


class Newest(SharedGuest):
    """QEMU 11.1 and Linux 7.2."""

    machine = NEWEST

    def test_default(self) -> None:
        self.exercise((INDIRECT_DESC, EVENT_IDX), without=(RING_PACKED, MQ))

    def test_two_queues_on_two_cpus(self) -> None:
        self.exercise((MQ,), num_queues=2)

    def test_two_processes(self) -> None:
        """Each queue in a process of its own; what one has written is what the other reads."""
        needs_disk("processes")
        self.exercise((MQ, EVENT_IDX), num_queues=2, processes=2)

    def test_two_processes_packed(self) -> None:
        needs_disk("processes", "packed")
        self.exercise((MQ, RING_PACKED), num_queues=2, processes=2, packed=True)

    def test_each_way_to_transfer(self) -> None:
        needs_disk("aio")
        for aio, direct in ("sync", False), ("sync", True), ("mmap", False), ("io_uring", False), ("io_uring", True):
            with self.subTest(aio, direct=direct):
                self.exercise((INDIRECT_DESC, EVENT_IDX), aio=aio, direct=direct)

    def test_the_guest_switches_the_write_cache_off(self) -> None:
        image = self.image("disk.img", SIZE)
        serve_disk(self, Disk(image), self.dir / "disk.sock")
        with self.plugged() as guest:
            cache = "/sys/class/block/vda/cache_type"
            self.assertEqual(guest.run(f"cat {cache}; echo 'write through' >{cache}; cat {cache}"), "write back\nwrite through")
            diskcheck.filesystem(guest)
            diskcheck.same_content(guest, image)

    def test_write_through_outlives_a_stop_of_the_vm(self) -> None:
        """QEMU resets the device then, and the guest notices nothing: it goes on without flushes."""
        needs_disk("aio")
        backend = serve_disk(self, Disk(self.image("disk.img", SIZE), aio="sync", code=TELLS_WHEN_DURABLE), self.dir / "disk.sock")
        with self.plugged() as guest:
            guest.run("echo 'write through' >/sys/class/block/vda/cache_type")
            guest.qmp.execute("stop")
            guest.qmp.execute("cont")
            self.assertEqual(guest.run("cat /sys/class/block/vda/cache_type"), "write through")
            before = backend.log.read_text(encoding="utf-8").count("made durable")
            guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=8 oflag=direct conv=notrunc")
            self.assertGreaterEqual(backend.log.read_text(encoding="utf-8").count("made durable"), before + 8)
            self.assertIn("<- SET_STATUS 0x0\n", backend.log.read_text(encoding="utf-8"), "QEMU no longer does that")

    def test_event_idx_off(self) -> None:
        self.exercise((INDIRECT_DESC,), without=(EVENT_IDX,), event_idx=False)

    def test_indirect_off(self) -> None:
        self.exercise((EVENT_IDX,), without=(INDIRECT_DESC,), indirect_desc=False)

    def test_packed(self) -> None:
        needs_disk("packed")
        self.exercise((RING_PACKED,), without=(IN_ORDER,), packed=True)

    def test_packed_in_order(self) -> None:
        needs_disk("packed", "in_order")
        self.exercise((RING_PACKED, IN_ORDER), packed=True, in_order=True)

    def test_read_only(self) -> None:
        image = self.image("disk.img", SIZE)
        content = os.urandom(SIZE)
        image.write_bytes(content)
        serve_disk(self, Disk(image, read_only=True), self.dir / "disk.sock")
        with self.plugged() as guest:
            diskcheck.expect_features(guest, (RO,), ())
            self.assertEqual(guest.run("cat /sys/block/vda/ro"), "1")
            diskcheck.same_content(guest, image)
            status, output = guest.status("dd if=/dev/urandom of=/dev/vda bs=4k count=1 conv=fsync,notrunc")
            self.assertNotEqual(status, 0, output)
        self.assert_same_bytes(image.read_bytes(), content, "the image")

    def test_unplugged_and_plugged_again(self) -> None:
        """The back-end outlives the device and serves the next one, with what the first one wrote."""
        image = self.image("disk.img", SIZE)
        backend = serve_disk(self, Disk(image), self.dir / "disk.sock")
        with self.plugged() as guest:
            written = write_random(guest)
        with self.plugged() as guest:
            self.assertEqual(read_sum(guest), written)
            diskcheck.filesystem(guest)
            diskcheck.same_content(guest, image)
        self.assertTrue(backend.running())

    def test_resized(self) -> None:
        """The image grows under the running guest, which sees the new size and can use it."""
        needs_disk("resize")
        image = self.image("disk.img", SIZE)
        backend = serve_disk(self, Disk(image), self.dir / "disk.sock")
        with self.plugged() as guest:
            self.assertEqual(guest.run("blockdev --getsize64 /dev/vda"), str(SIZE))
            os.truncate(image, 2 * SIZE)
            backend.signal(signal.SIGHUP)
            guest.wait(f"[ $(blockdev --getsize64 /dev/vda) = {2 * SIZE} ]")
            guest.run(f"dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek={2 * SIZE // MIB - 1} conv=fsync,notrunc")
            diskcheck.same_content(guest, image)


class NewestLife(InteropTest):
    """The disk is there from the start: what happens when the guest or QEMU starts anew."""

    machine = NEWEST

    def start(self, disk: Disk) -> tuple[Process, QemuGuest]:
        backend = serve_disk(self, disk, self.dir / "disk.sock")
        return backend, self.boot()

    def boot(self) -> QemuGuest:
        guest = QemuGuest(self.machine, self.dir, [disk_device(self.dir / "disk.sock")])
        self.addCleanup(guest.kill)
        guest.wait_ready()
        return guest

    def test_rebooted_twice(self) -> None:
        image = self.image("disk.img", SIZE)
        backend, guest = self.start(Disk(image))
        for _ in range(2):
            written = write_random(guest)
            guest.reboot()
            self.assertEqual(read_sum(guest), written)
        diskcheck.filesystem(guest)
        diskcheck.same_content(guest, image)
        self.assertTrue(backend.running())

    def test_qemu_killed_and_started_again(self) -> None:
        """QEMU dies by SIGKILL while the guest writes; a new QEMU finds the same back-end, and what was flushed."""
        image = self.image("disk.img", SIZE)
        backend, guest = self.start(Disk(image))
        written = write_random(guest)
        guest.run("(dd if=/dev/urandom of=/dev/vda bs=64k seek=256 count=1000 oflag=direct >/dev/null 2>&1 &)")
        guest.kill()
        guest = self.boot()
        self.assertEqual(read_sum(guest), written)
        diskcheck.filesystem(guest)
        diskcheck.same_content(guest, image)
        self.assertTrue(backend.running())


class Oldest(SharedGuest):
    """QEMU 7.2 and Linux 6.1, as Debian 12 has them; SeaBIOS is the first to touch a disk there."""

    machine = OLDEST

    def test_default(self) -> None:
        self.exercise((INDIRECT_DESC, EVENT_IDX), without=(RING_PACKED,))

    def test_packed(self) -> None:
        needs_disk("packed")
        self.exercise((RING_PACKED,), packed=True)


class OldestLife(NewestLife):
    """The same life on the oldest."""

    machine = OLDEST


def write_random(guest: QemuGuest) -> str:
    """4 MiB of random data, flushed; returns their sum."""
    guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=64 conv=fsync,notrunc")
    return read_sum(guest)


def read_sum(guest: QemuGuest) -> str:
    return guest.run("dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | md5sum")
