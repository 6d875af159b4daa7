"""What every test here stands on: a folder that is gone afterwards, logs after a failure, and what is missing."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from . import sid, traces

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIRED = os.environ.get("VHOST_USER_INTEROP_REQUIRED") == "1"

# Every wait is bounded by this; it is long because the machines are slow and shared, never a measure of anything.
PATIENCE = 90.0
LOG_TAIL = 40


def missing(what: str) -> NoReturn:
    """A peer isn't there: a skip for a person, a failure where all of them are required."""
    if REQUIRED:
        raise AssertionError(f"{what} is required here (VHOST_USER_INTEROP_REQUIRED=1)")
    raise unittest.SkipTest(what)


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            missing(f"{program} is missing")


@functools.cache
def _sid_problem() -> str:
    try:
        sid.ensure()
    except sid.SidError as error:
        return str(error)
    return "" if os.geteuid() == 0 else "only root can enter the chroot of Debian sid"


def needs_sid() -> None:
    """The chroot with the newest peers; built on the first use."""
    if problem := _sid_problem():
        missing(problem)


def wait_for(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:.0f} s")
        time.sleep(0.02)


def tail(log: Path, lines: int = LOG_TAIL) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class InteropTest(unittest.TestCase):
    """Each test has a folder of its own for sockets, images and logs; after a failure the logs' ends are shown."""

    dir: Path

    def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
        # Around run and not in setUp: clean-ups have stopped all processes by then, and the verdict is known.
        result = result or self.defaultTestResult()
        bad = len(result.errors) + len(result.failures)
        with tempfile.TemporaryDirectory(prefix="vu-") as folder:
            self.dir = Path(folder)
            super().run(result)
            traces.collect(self.dir, type(self).__module__)
            if len(result.errors) + len(result.failures) > bad:
                self.show_logs(self.dir)
        return result

    def show_logs(self, folder: Path) -> None:
        for log in sorted(folder.glob("*.log")):
            print(f"\n--- {self.id()}: end of {log.name}\n{tail(log)}", file=sys.stderr)

    def image(self, name: str, size: int) -> Path:
        """A sparse file of `size` bytes."""
        path = self.dir / name
        with open(path, "wb") as f:
            f.truncate(size)
        return path

    def assert_same_bytes(self, found: bytes, wanted: bytes, what: str) -> None:
        """assertEqual would spend a minute on how to print two images."""
        if found != wanted:
            at = next((n for n, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
            self.fail(f"{what}: {len(found)} bytes, {len(wanted)} expected; the first that differs is at {at}")


def overwrite(image: Path, content: bytes) -> None:
    """In place: a served image that is truncated and written anew would be seen without size in between."""
    with open(image, "r+b") as f:
        f.write(content)
