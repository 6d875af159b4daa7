"""What real front-ends said to our back-ends in this run: read from the back-ends' logs, which have each message at their debug level.

README.md's table of messages names the front-ends that sent each; test_traces compares.
"""

from __future__ import annotations

import re
from collections import defaultdict
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

_MESSAGE = re.compile(r"DEBUG vhost_user: (<-|->) ([A-Z_]+)(?: (0x[0-9a-f]+))?")

seen: dict[str, set[str]] = defaultdict(set)
"""By "<- NAME" of a request that came, "-> NAME" of one that we sent, or the name of a protocol feature: front-ends."""
modules: set[str] = set()
"""Modules whose tests have run."""


def collect(folder: Path, module: str) -> None:
    """Read all logs in a test's folder."""
    module = module.rpartition(".")[2]
    modules.add(module)
    front_end = FRONT_ENDS.get(module)
    for log in folder.glob("*.log") if front_end else ():
        for way, name, value in _MESSAGE.findall(log.read_text(encoding="utf-8", errors="replace")):
            seen[f"{way} {name}"].add(front_end or "")
            if name == "SET_PROTOCOL_FEATURES":
                for feature in VhostUserProtocolFeatures:
                    if int(value, 16) & feature:
                        seen[str(feature.name)].add(front_end or "")
