"""A back-end that is killed under load and started again: the guest notices nothing, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import struct
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

from guest_memory import GuestMemoryMmap
from vhost_user import Frontend, Inflight, VhostUserBackend, VhostUserDaemon, VringT
from vring import VIRTIO_F_RING_PACKED, DescriptorChain, DriverQueue, PackedDriverQueue, SplitDriverQueue

from . import diskcheck
from .diskcheck import MIB
from .guest import NEWEST, QemuGuest, disk_device
from .peers import DISK, IN_ANY_ORDER, Disk, needs_disk, serve_disk
from .support import InteropTest

SIZE = 48 * MIB
KILLS = 30

# Random writes that verify what they wrote, again and again until /tmp/stop is there; /tmp/done has how it went.
LOAD = """
(n=0; while [ ! -e /tmp/stop ]; do n=$((n+1))
fio --name=verify --filename=/dev/vda --size=16m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --direct=1 \\
    --verify=crc32c --verify_fatal=1 --randseed=$n --output=/tmp/fio || { echo "run $n failed" >/tmp/done; exit; }
done; echo "$n runs" >/tmp/done) >/dev/null 2>&1 &
"""


class Killed(InteropTest):
    """SIGKILL at any instruction, thirty times."""

    def test_split(self) -> None:
        self.kill_under_load()

    def test_packed(self) -> None:
        needs_disk("packed")
        self.kill_under_load(packed=True)

    def kill_under_load(self, **properties: bool) -> None:
        seed = random.randrange(1 << 32)
        moments = random.Random(seed)
        disk, socket = Disk(self.image("disk.img", SIZE)), self.dir / "disk.sock"
        any_order = replace(disk, aio="sync", code=IN_ANY_ORDER) if DISK == "ours" else disk
        backend = serve_disk(self, disk, socket)
        device = replace(disk_device(socket, **properties), reconnect=True)
        guest = QemuGuest(NEWEST, self.dir, [device])
        self.addCleanup(guest.kill)
        guest.wait_ready()
        guest.run(LOAD)
        for number in range(KILLS):
            time.sleep(moments.uniform(0.05, 0.5))
            backend.kill()
            backend = serve_disk(self, any_order if number % 2 else disk, socket)
        status, output = guest.status("touch /tmp/stop; for i in $(seq 600); do [ -e /tmp/done ] && break; sleep 0.1; done; cat /tmp/done /tmp/fio")
        self.assertEqual(status, 0, f"seed {seed}: {output}")
        self.assertRegex(output, r"^\d+ runs", f"seed {seed}")
        self.assertIn("err= 0", output, f"seed {seed}")
        diskcheck.same_content(guest, disk.image)


class Shuffler(VhostUserBackend):
    """Answers a number with its complement: in any order, from a thread of its own, with many in flight."""

    def __init__(self, seed: float) -> None:
        self._random = random.Random(seed)
        self._held: list[tuple[VringT, DescriptorChain]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._complete, daemon=True).start()

    def process_queue(self, vring: VringT) -> None:
        for chain in vring:
            with self._lock:
                self._held.append((vring, chain))

    def _complete(self) -> None:
        while True:
            with self._lock:
                self._random.shuffle(self._held)
                done, self._held = self._held[:4], self._held[4:]
            for vring, chain in done:
                [number] = struct.unpack("<Q", chain.read())
                vring.add_used(chain, chain.write(struct.pack("<Q", ~number & 0xFFFFFFFFFFFFFFFF)))
            time.sleep(0.0002)


class OwnFrontend(InteropTest):
    """The same with our own front-end, which counts every request: each is answered, and none twice."""

    KILLS = 250  # of each ring format
    SIZE, SLOTS, RAM = 32, 64, 1 << 30

    def test_split(self) -> None:
        self.lives(SplitDriverQueue)

    def test_packed(self) -> None:
        self.lives(PackedDriverQueue)

    def lives(self, kind: type[DriverQueue]) -> None:
        seed = random.randrange(1 << 32)
        random_ = random.Random(seed)
        packed = kind is PackedDriverQueue
        memory = GuestMemoryMmap.from_ranges([(self.RAM, 1 << 20)])
        _, (desc, driver_area, device_area) = kind.layout(self.SIZE)
        areas = (self.RAM + desc, self.RAM + driver_area, self.RAM + device_area)
        driver = kind(memory, self.SIZE, areas, Frontend.RING_FEATURES | packed << VIRTIO_F_RING_PACKED, self.RAM + 0x10000)
        free = [self.RAM + 0x40000 + 64 * slot for slot in range(self.SLOTS)]
        waiting: dict[int, int] = {}
        region: tuple[Inflight, int] | None = None
        number = 0
        for life in range(self.KILLS + 1):
            socket = self.dir / f"{life}.sock"
            child = self.start(socket, random_.random())
            try:
                with Frontend.connect(socket) as frontend:
                    frontend.negotiate(Frontend.RING_FEATURES | packed << VIRTIO_F_RING_PACKED)
                    frontend.share_memory(memory)
                    if region is None:
                        region = frontend.get_inflight(1, self.SIZE)
                        self.addCleanup(os.close, region[1])
                    frontend.set_inflight(*region)
                    queue = frontend.start_queue(0, driver)
                    end = time.monotonic() + (random_.uniform(0, 0.02) if life < self.KILLS else 10)
                    while time.monotonic() < end and (life < self.KILLS or waiting):
                        while life < self.KILLS and driver.free and free:
                            slot = free.pop()
                            memory.write(slot, struct.pack("<QQ", number, 0))
                            driver.add([(slot, 8)], [(slot + 8, 8)], number)
                            waiting[number] = slot
                            number += 1
                        queue.publish()
                        for token, _ in driver.used():
                            assert isinstance(token, int)
                            self.assertIn(token, waiting, f"seed {seed}: completed twice")
                            slot = waiting.pop(token)
                            self.assertEqual(memory.read(slot + 8, 8), struct.pack("<Q", ~token & 0xFFFFFFFFFFFFFFFF), f"seed {seed}")
                            free.append(slot)
                    os.kill(child, signal.SIGKILL)
            finally:
                with_status = os.waitpid(child, 0)[1]
            self.assertTrue(os.WIFSIGNALED(with_status), f"seed {seed}: the back-end failed")
        self.assertEqual(waiting, {}, f"seed {seed}: lost")

    def start(self, socket: Path, seed: float) -> int:
        """A back-end in a process of its own: a fork, since 500 new interpreters would take minutes."""
        child = os.fork()
        if not child:
            try:
                VhostUserDaemon("shuffler", Shuffler(seed)).serve(socket)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        return child
