"""A back-end that is killed under load and started again: the guest notices nothing, and nothing is lost."""

from __future__ import annotations

import random
import time
from dataclasses import replace

from . import diskcheck
from .diskcheck import MIB
from .guest import NEWEST, QemuGuest, disk_device
from .peers import Disk, needs_disk, serve_disk
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
        backend = serve_disk(self, disk, socket)
        device = replace(disk_device(socket, **properties), reconnect=True)
        guest = QemuGuest(NEWEST, self.dir, [device])
        self.addCleanup(guest.kill)
        guest.wait_ready()
        guest.run(LOAD)
        for _ in range(KILLS):
            time.sleep(moments.uniform(0.05, 0.5))
            backend.kill()
            backend = serve_disk(self, disk, socket)
        status, output = guest.status("touch /tmp/stop; for i in $(seq 600); do [ -e /tmp/done ] && break; sleep 0.1; done; cat /tmp/done /tmp/fio")
        self.assertEqual(status, 0, f"seed {seed}: {output}")
        self.assertRegex(output, r"^\d+ runs", f"seed {seed}")
        self.assertIn("err= 0", output, f"seed {seed}")
        diskcheck.same_content(guest, disk.image)
