"""A running guest moves from one QEMU to another, and its disk from one back-end to another."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vhost_user import VhostUserProtocolFeatures

from .diskcheck import MIB, same_content
from .guest import NEWEST, Device, QemuGuest, disk_device
from .peers import Disk, needs_disk, serve_disk, start_backend
from .support import PATIENCE, InteropTest
from .test_recovery import LOAD

SIZE = 32 * MIB

# The same disk, whose log misses every page: what a test of the log must notice.
WITHOUT_LOG = "import sys, guest_memory; from devices import blk; guest_memory.DirtyLog.mark = lambda *_: None; sys.exit(blk.main())"

# Fills the page cache from both disks when /tmp/go is there, and keeps them open, so that the cache stays. Until then memory is written all
# the time, so that the migration does not end before.
_READER = """
(while [ ! -e /tmp/read ]; do dd if=/dev/urandom of=/tmp/dirt bs=64k count=128 conv=notrunc; done) >/dev/null 2>&1 &
(exec 3</dev/vda 4</dev/vdb
while [ ! -e /tmp/go ]; do sleep 0.05; done
cat /dev/vda /dev/vdb >/dev/null
touch /tmp/read
sleep 1000) >/dev/null 2>&1 &
"""


class Migration(InteropTest):
    """From QEMU 11.1 to QEMU 11.1, over a socket on this machine."""

    def test_split(self) -> None:
        """Two disks share the front-end's log."""
        self.assertTrue(self.pages_arrive(self.start_logging))

    def test_packed(self) -> None:
        needs_disk("packed")
        self.assertTrue(self.pages_arrive(self.start_logging, packed=True))

    def test_without_the_log_pages_are_lost(self) -> None:
        """The negative control: the two above can fail."""
        self.assertFalse(self.pages_arrive(self.start_silent))

    def start_logging(self, image: Path, name: str) -> None:
        serve_disk(self, Disk(image), self.dir / name)

    def start_silent(self, image: Path, name: str) -> None:
        argv = [sys.executable, "-c", WITHOUT_LOG, "--socket-path", str(self.dir / name), "--blk-file", str(image)]
        start_backend(self, argv, self.dir / name)

    def machines(self, start: Callable[[Path, str], None], images: list[Path], **properties: bool) -> tuple[QemuGuest, QemuGuest]:
        """A guest that runs, and a QEMU that waits for it, with back-ends of their own on the same images."""
        guests = []
        for side in "source", "target":
            devices = []
            for number, image in enumerate(images):
                socket = f"{side}{number}.sock"
                start(image, socket)
                device = disk_device(self.dir / socket, **properties)
                devices.append(replace(device, name=f"disk{number}", bus=f"port{number}"))
            guests.append(QemuGuest(NEWEST, self.dir, devices, incoming=side == "target"))
            self.addCleanup(guests[-1].kill)
        guests[0].wait_ready()
        return guests[0], guests[1]

    def pages_arrive(self, start: Callable[[Path, str], None], **properties: bool) -> bool:
        """Whether what the disks put into guest memory during the copy is there on the other side."""
        images = [self.image(f"disk{number}.img", SIZE) for number in range(2)]
        for image in images:
            image.write_bytes(os.urandom(SIZE))
        source, target = self.machines(start, images, **properties)
        source.run(_READER)
        # Pages that were sent once are written again, by the disks alone.
        self.begin(source, target, bandwidth=32 * MIB)
        self.wait(source, lambda state: state.get("ram", {}).get("dirty-sync-count", 0) >= 2)
        source.run("touch /tmp/go; for i in $(seq 600); do [ -e /tmp/read ] && exit; sleep 0.1; done; exit 1")
        self.finish(source)
        inside = target.run("cat /dev/vda /dev/vdb | md5sum").split()[0]
        return inside == hashlib.md5(b"".join(image.read_bytes() for image in images)).hexdigest()

    def test_under_load(self) -> None:
        """Random writes that verify themselves go on across the migration."""
        self.migrate_under_load()

    def test_under_load_with_the_record_of_what_is_in_flight(self) -> None:
        """QEMU takes the in-flight region along (GET_VRING_BASE_INFLIGHT)."""
        self.migrate_under_load(inflight_migration=True)
        source, target = ((self.dir / f"{side}0.log").read_text() for side in ("source", "target"))
        self.assertIn("<- GET_INFLIGHT_FD", source)
        self.assertNotIn("<- GET_INFLIGHT_FD", target)  # it has the source's
        for log in source, target:
            acked = re.findall(r"<- SET_PROTOCOL_FEATURES (0x[0-9a-f]+)", log)[-1]
            self.assertTrue(int(acked, 16) & VhostUserProtocolFeatures.GET_VRING_BASE_INFLIGHT, acked)
            self.assertIn("<- SET_INFLIGHT_FD", log)

    def migrate_under_load(self, **properties: bool) -> None:
        image = self.image("disk.img", SIZE)
        source, target = self.machines(self.start_logging, [image], **properties)
        source.run(LOAD)
        time.sleep(1)
        self.begin(source, target, bandwidth=1 << 30)
        self.finish(source)
        time.sleep(1)
        output = target.run("touch /tmp/stop; for i in $(seq 600); do [ -e /tmp/done ] && break; sleep 0.1; done; cat /tmp/done /tmp/fio")
        self.assertRegex(output, r"^\d+ runs")
        self.assertIn("err= 0", output)
        same_content(target, image)

    def test_postcopy(self) -> None:
        """The guest moves before most of its memory has: the rings and buffers that the disk touches come when they are touched."""
        image = self.image("disk.img", SIZE)
        source, target = self.machines(self.start_postcopy, [image])
        for guest in source, target:
            guest.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
        source.run(LOAD)
        source.run("(while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/tmp/dirt bs=64k count=500 conv=notrunc; done) >/dev/null 2>&1 &")
        self.begin(source, target, bandwidth=16 * MIB)
        self.wait(source, lambda state: state.get("ram", {}).get("transferred", 0) > 4 * MIB)
        source.qmp.execute("migrate-start-postcopy")
        self.finish(source)
        time.sleep(1)
        output = target.run("touch /tmp/stop; for i in $(seq 600); do [ -e /tmp/done ] && break; sleep 0.1; done; cat /tmp/done /tmp/fio")
        self.assertRegex(output, r"^\d+ runs")
        self.assertIn("err= 0", output)
        same_content(target, image)
        log = (self.dir / "target0.log").read_text()
        order = re.findall(r"<- (POSTCOPY_\w+|SET_MEM_TABLE \d+ regions|SET_VRING_KICK)", log)
        self.assertEqual(order[:2], ["POSTCOPY_ADVISE", "POSTCOPY_LISTEN"], order)
        self.assertRegex(order[2], "SET_MEM_TABLE [1-9]")
        self.assertEqual(order[3:5], ["SET_MEM_TABLE 0 regions", "SET_VRING_KICK"])
        self.assertIn("POSTCOPY_END", order)

    def start_postcopy(self, image: Path, name: str) -> None:
        serve_disk(self, Disk(image, postcopy=True, log_level="debug"), self.dir / name)

    def test_device_state(self) -> None:
        """What a device alone knows goes from one back-end through both QEMUs to the other, more of it than a pipe holds."""
        guests = []
        state = os.urandom(3 * MIB + 1)
        for side in "source", "target":
            socket, file = self.dir / f"{side}.sock", self.dir / f"{side}.state"
            file.write_bytes(state if side == "source" else b"nothing yet")
            argv = [sys.executable, "-m", "interop.stateful_fs", "--log-level", "debug", "--socket-path", str(socket), "--state", str(file)]
            start_backend(self, argv, socket)
            device = Device("vhost-user-fs-pci", socket, {"tag": "files", "num-request-queues": 1, "queue-size": 128})
            guests.append(QemuGuest(NEWEST, self.dir, [device], incoming=side == "target"))
            self.addCleanup(guests[-1].kill)
        source, target = guests
        source.wait_ready()
        self.begin(source, target, bandwidth=1 << 30)
        self.finish(source)
        self.assertEqual(target.run("echo here").strip(), "here")
        self.assertTrue((self.dir / "target.state").read_bytes() == state, "the state is another one")
        for side, direction in ("source", 0), ("target", 1):
            log = (self.dir / f"{side}.log").read_text()
            self.assertIn(f"<- SET_DEVICE_STATE_FD direction {direction}, phase 0 -> 0x100", log)
            self.assertIn("<- CHECK_DEVICE_STATE  -> 0x0", log)

    def begin(self, source: QemuGuest, target: QemuGuest, bandwidth: int) -> None:
        uri = f"unix:{self.dir}/migration.sock"
        target.qmp.execute("migrate-incoming", uri=uri)
        source.qmp.execute("migrate-set-parameters", **{"max-bandwidth": bandwidth, "downtime-limit": 1})
        source.qmp.execute("migrate", uri=uri)

    def finish(self, source: QemuGuest) -> None:
        source.qmp.execute("migrate-set-parameters", **{"max-bandwidth": 4 << 30, "downtime-limit": 1000})
        self.wait(source, lambda state: state["status"] == "completed")

    def wait(self, guest: QemuGuest, condition: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition(state := guest.qmp.execute("query-migrate")):
            if state.get("status") == "failed" or time.monotonic() > deadline:
                raise AssertionError(f"the migration: {state}")
            time.sleep(0.05)
