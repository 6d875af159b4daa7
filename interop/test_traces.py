"""README.md's table of messages and protocol features: whoever it says has used one was seen to, in the tests that ran before these."""

from __future__ import annotations

import re
import unittest

from . import traces
from .support import REPOSITORY, missing


class Uses(unittest.TestCase):
    def test_what_was_refused_or_not_sent_is_no_use(self) -> None:
        log = """
2026-01-01 00:00:00,000 DEBUG vhost_user: <- SET_PROTOCOL_FEATURES 0x9
2026-01-01 00:00:00,000 DEBUG vhost_user: <- GET_FEATURES  -> 0x140000000
2026-01-01 00:00:00,000 DEBUG vhost_user: <- SET_STATUS 0x1 -> refused
2026-01-01 00:00:00,000 DEBUG vhost_user: -> CONFIG_CHANGE_MSG not sent: all rings are stopped
2026-01-01 00:00:00,000 DEBUG vhost_user: -> SHMEM_MAP region 0: 0x1000 bytes at 0x0, from 0x0, flags 0
2026-01-01 00:00:00,000 DEBUG vhost_user: -> SHMEM_MAP refused
2026-01-01 00:00:00,000 DEBUG vhost_user: -> IOTLB_MSG miss
2026-01-01 00:00:00,000 DEBUG vhost_user: IOTLB_MSG could not be sent: the peer is silent
2026-01-01 00:00:00,000 DEBUG vhost_user: -> VRING_CALL ring 0: 0x0
2026-01-01 00:00:00,000 WARNING vhost_user: VRING_CALL is not answered: closed
2026-01-01 00:00:00,000 DEBUG vhost_user: -> VRING_CALL ring 0: 0x0
"""
        self.assertEqual(set(traces.uses(log)), {"<- SET_PROTOCOL_FEATURES", "MQ", "REPLY_ACK", "<- GET_FEATURES", "-> VRING_CALL"})


class Table(unittest.TestCase):
    """Runs last: `__main__` sees to it."""

    def test_named_front_ends_were_seen(self) -> None:
        if not_run := set(traces.FRONT_ENDS) - traces.modules:
            missing(f"not run before this: {', '.join(sorted(not_run))}")
        text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| (<-|->|bit) \d+ \| `([A-Z_]+)` \|[^|\n]*\| ?([\w ,]*?) ?\|$", text, re.MULTILINE)
        self.assertGreater(len(rows), 70)
        for way, name, front_ends in rows:
            with self.subTest(name):
                key = name if way == "bit" else f"{way} {name}"
                self.assertLessEqual(set(front_ends.replace(",", " ").split()), traces.seen[key], f"{key} was seen from {traces.seen[key]}")
