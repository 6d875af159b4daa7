"""A disk of two worker processes, which are killed under load, one or all: the guest notices nothing, and nothing is lost.

Who is who: the program that was started has the front-end's connection; its child, the nursery, starts the worker processes, which have the rings.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import diskcheck
from .diskcheck import MIB, MQ, RING_PACKED
from .guest import NEWEST, QemuGuest, disk_device
from .peers import IN_ANY_ORDER, Disk, Process, needs_disk, serve_disk
from .support import PATIENCE, InteropTest, wait_for
from .test_guest_blk import SharedGuest

SIZE = 48 * MIB
QUIET = 24  # MiB from where on the load writes nothing
QUEUES = 2

# Random writes that verify what they wrote, again and again until /tmp/stop is there; /tmp/done has how it went. A job on each CPU: one alone
# would mostly stay on one, whose queue is served by one process. The page cache is left alone (invalidate=0): see _READER.
_LOAD = """
rm -f /tmp/stop /tmp/done /tmp/fio
(n=0; while [ ! -e /tmp/stop ]; do n=$((n+1))
fio --name=verify --filename=/dev/vda --size=6m --offset_increment=16m --numjobs=2 --cpus_allowed=0,1 --cpus_allowed_policy=split \\
    --rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --direct=1 --invalidate=0 \\
    --verify=crc32c --verify_fatal=1 --randseed=$n --output=/tmp/fio || { echo "run $n failed" >/tmp/done; exit; }
done; echo "$n runs" >/tmp/done) >/dev/null 2>&1 &
"""
_END = "touch /tmp/stop; for i in $(seq 600); do [ -e /tmp/done ] && break; sleep 0.1; done; cat /tmp/done /tmp/fio"

# A block through each queue, past the guest's page cache: ends when both are served.
_EACH_QUEUE = "for cpu in 0 1; do taskset -c $cpu dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct || exit 1; done"

# When /tmp/go is there, the page cache is filled through each queue: pages that nobody but the back-end writes to, of which the load has too few.
# The disk is kept open, so that the cache stays. Until then memory is written all the time, so that the migration does not end before.
_READER = f"""
(while [ ! -e /tmp/read ]; do dd if=/dev/urandom of=/tmp/dirt bs=64k count=128 conv=notrunc; done) >/dev/null 2>&1 &
(exec 3</dev/vda
while [ ! -e /tmp/go ]; do sleep 0.05; done
for cpu in 0 1; do taskset -c $cpu dd if=/dev/vda of=/dev/null bs=1M skip=$(({QUIET} + 12 * cpu)) count=12; done
touch /tmp/read
sleep 1000) >/dev/null 2>&1 &
"""
_READ = f"dd if=/dev/vda bs=1M skip={QUIET} 2>/dev/null | md5sum"


def children(pid: int) -> list[int]:
    """The processes that one has started, in that order."""
    with contextlib.suppress(OSError):
        lists = [task.read_text(encoding="ascii") for task in Path(f"/proc/{pid}/task").glob("*/children")]
        return [int(word) for line in lists for word in line.split()]
    return []


def is_running(pid: int) -> bool:
    """And not just waiting for somebody to ask for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def nursery(backend: Process) -> int:
    [pid] = children(backend.pid)
    return pid


def workers(backend: Process) -> list[int]:
    return children(nursery(backend))


class Killed(SharedGuest):
    """SIGKILL of one of the processes, or of all of them."""

    machine = NEWEST

    def setUp(self) -> None:
        needs_disk("processes")
        self.seed = random.randrange(1 << 32)
        self.moments = random.Random(self.seed)
        self.disk = Disk(self.image("disk.img", SIZE), num_queues=QUEUES, processes=2)
        self.socket = self.dir / "disk.sock"

    def test_all_split(self) -> None:
        self.all_are_killed()

    def test_all_packed(self) -> None:
        needs_disk("packed")
        self.all_are_killed(packed=True)

    def all_are_killed(self, **properties: bool) -> None:
        """What a worker had in flight is served by one of another life."""
        disk = replace(self.disk, aio="sync", code=IN_ANY_ORDER)
        backend = serve_disk(self, disk, self.socket)
        with self.load(**properties):
            for _ in range(8):
                self.pause()
                backend.kill()
                backend = serve_disk(self, disk, self.socket)

    def test_one_worker_split(self) -> None:
        self.one_worker_is_killed()

    def test_one_worker_packed(self) -> None:
        needs_disk("packed")
        self.one_worker_is_killed(packed=True)

    def one_worker_is_killed(self, **properties: bool) -> None:
        """The connection ends, the other worker with it; QEMU connects again, and the same program serves it with new workers."""
        backend = serve_disk(self, self.disk, self.socket)
        with self.load(**properties) as guest:
            for number in (0, 1) * 3:
                self.pause()
                old = workers(backend)
                self.assertEqual(len(old), 2, f"seed {self.seed}")
                os.kill(old[number], signal.SIGKILL)
                self.wait_for_new_workers(backend, old)
                guest.run(_EACH_QUEUE)
        self.assertTrue(backend.running())

    def test_program_without_its_workers(self) -> None:
        """They end with it: none goes on with rings that the next program serves."""
        backend = serve_disk(self, self.disk, self.socket)
        with self.load() as guest:
            for _ in range(4):
                self.pause()
                orphans = [nursery(backend), *workers(backend)]
                backend.signal(signal.SIGKILL)
                backend.wait()
                backend = serve_disk(self, self.disk, self.socket)
                guest.run(_EACH_QUEUE)
                wait_for(lambda: not any(map(is_running, orphans)), f"the workers' end (seed {self.seed})")  # noqa: B023 - called here

    def test_nursery(self) -> None:
        """There can be no workers any more, so the program ends, for its service manager to start it again."""
        backend = serve_disk(self, self.disk, self.socket)
        with self.load() as guest:
            self.pause()
            os.kill(nursery(backend), signal.SIGKILL)
            self.assertEqual(backend.wait(), 1)  # at QEMU's next attempt
            backend = serve_disk(self, self.disk, self.socket)
            guest.run(_EACH_QUEUE)

    def pause(self) -> None:
        time.sleep(self.moments.uniform(0.05, 0.5))

    def wait_for_new_workers(self, backend: Process, old: list[int]) -> None:
        def there() -> bool:
            self.assertTrue(backend.running(), f"seed {self.seed}")
            new = workers(backend)
            return len(new) == 2 and not set(new) & set(old)

        wait_for(there, f"new workers (seed {self.seed})")

    @contextlib.contextmanager
    def load(self, **properties: bool) -> Iterator[QemuGuest]:
        """The guest with the disk under load; in the end all that was written is there."""
        with self.plugged(reconnect=True, num_queues=QUEUES, **properties) as guest:
            diskcheck.expect_features(guest, (MQ, RING_PACKED) if properties.get("packed") else (MQ,), ())
            guest.run(_LOAD)
            yield guest
            check_load(self, guest, self.disk.image, f"seed {self.seed}")


class Migration(InteropTest):
    """From one QEMU to another, under load: both workers of the source tell what they have written, in one log."""

    def setUp(self) -> None:
        needs_disk("processes")

    def test_split(self) -> None:
        self.migrate()

    def test_packed(self) -> None:
        needs_disk("packed")
        self.migrate(packed=True)

    def migrate(self, **properties: bool) -> None:
        image = self.image("disk.img", SIZE)
        image.write_bytes(bytes(QUIET * MIB) + os.urandom(SIZE - QUIET * MIB))
        disk = Disk(image, num_queues=QUEUES, processes=2)
        source, target = (self.machine(disk, side, **properties) for side in ("source", "target"))
        source.wait_ready()
        source.run(_LOAD)
        source.run(_READER)
        uri = f"unix:{self.dir}/migration.sock"
        target.qmp.execute("migrate-incoming", uri=uri)
        source.qmp.execute("migrate-set-parameters", **{"max-bandwidth": 32 * MIB, "downtime-limit": 1})
        source.qmp.execute("migrate", uri=uri)
        wait_for(lambda: self.state(source).get("ram", {}).get("dirty-sync-count", 0) >= 2, "pages that were sent once are sent again")
        source.run("touch /tmp/go")
        source.wait("[ -e /tmp/read ]")
        source.qmp.execute("migrate-set-parameters", **{"max-bandwidth": 4 << 30, "downtime-limit": 1000})
        wait_for(lambda: self.state(source)["status"] == "completed", "the migration")
        with open(disk.image, "rb") as file:
            file.seek(QUIET * MIB)
            wanted = hashlib.md5(file.read()).hexdigest()
        self.assertEqual(target.run(_READ).split()[0], wanted)
        target.run(_EACH_QUEUE)
        check_load(self, target, disk.image)

    def machine(self, disk: Disk, side: str, **properties: bool) -> QemuGuest:
        socket = self.dir / f"{side}.sock"
        serve_disk(self, disk, socket)
        device = disk_device(socket, num_queues=QUEUES, **properties)
        guest = QemuGuest(NEWEST, self.dir, [device], cpus=QUEUES, incoming=side == "target")
        self.addCleanup(guest.kill)
        return guest

    def state(self, source: QemuGuest) -> dict[str, Any]:
        state: dict[str, Any] = source.qmp.execute("query-migrate")
        self.assertNotEqual(state.get("status"), "failed", state)
        return state


def check_load(case: InteropTest, guest: QemuGuest, image: Path, note: str = "") -> None:
    """Ends the load: every block that was written was read back as it was, by both jobs, and the image has it all."""
    output = guest.run(_END, timeout=2 * PATIENCE)
    case.assertRegex(output, r"^\d+ runs", note)
    case.assertEqual(re.findall(r"err= *(\d+)", output), ["0", "0"], f"{note}: {output}")
    diskcheck.same_content(guest, image)
