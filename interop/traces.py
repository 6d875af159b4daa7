"""What real front-ends said to our back-ends in this run, and took from them: read from the back-ends' logs, which have each message at their debug
level.

README.md's table of messages names the front-ends that used each; test_traces compares.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from vhost_user import VhostUserProtocolFeatures

# By module of tests: the front-end that its guests or programs have.
FRONT_ENDS = {
    "test_block_layer": "libblkio",
    "test_client": "QEMU",
    "test_guest_blk": "QEMU",
    "test_guest_crypto": "QEMU",
    "test_guest_rng": "QEMU",
    "test_hotplug": "QEMU",
    "test_iommu": "QEMU",
    "test_migration": "QEMU",
    "test_recovery": "QEMU",
    "test_requests": "QEMU",
    "test_uml": "UML",
}

_LINE = re.compile(r" (?:DEBUG|WARNING) vhost_user: (?:(<-|->) )?([A-Z_]+)(.*)")
_UNDONE = (" refused", " could not be sent", " is not answered", " is answered by")

seen: dict[str, set[str]] = defaultdict(set)
"""By "<- NAME" of a request that came and was done, "-> NAME" of one that we sent and that was not refused, or the name of a protocol feature
that was negotiated: front-ends."""
modules: set[str] = set()
"""Modules whose tests have run."""
old_guest = False
"""Whether the test at hand has a guest under QEMU 7.2, which is not the one that README.md means."""


def collect(folder: Path, module: str) -> None:
    """Read all logs in a test's folder."""
    global old_guest
    module = module.rpartition(".")[2]
    modules.add(module)
    front_end = FRONT_ENDS.get(module)
    if front_end == "QEMU" and old_guest:
        front_end = "QEMU 7.2"
    old_guest = False
    for log in folder.glob("*.log") if front_end else ():
        for used in uses(log.read_text(encoding="utf-8", errors="replace")):
            seen[used].add(front_end or "")


def uses(log: str) -> Iterator[str]:
    """The keys for `seen` that a back-end's log has."""
    sent: Counter[str] = Counter()
    for way, name, rest in _LINE.findall(log):
        if way == "<-":
            if rest.endswith("-> refused"):
                continue
            yield f"<- {name}"
            if name == "SET_PROTOCOL_FEATURES":
                yield from (str(feature.name) for feature in VhostUserProtocolFeatures if int(rest, 16) & feature)
        elif rest.startswith(_UNDONE):
            sent[name] -= 1
        elif way and not rest.startswith(" not sent"):
            sent[name] += 1
    yield from (f"-> {name}" for name, times in sent.items() if times > 0)
