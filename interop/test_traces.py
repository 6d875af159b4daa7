"""README.md's table of messages and protocol features: whoever it says has used one was seen to, in the tests that ran before these."""

from __future__ import annotations

import re
import unittest

from . import traces
from .support import REPOSITORY, missing


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
