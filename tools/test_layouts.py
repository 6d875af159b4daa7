"""Tests of tools/layouts.py, with few of the tests in test_all.py: the program runs all of them."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import unittest
from pathlib import Path

from tools import layouts


class Layouts(unittest.TestCase):
    """In this interpreter, and with what it says of others."""

    def run_all(self, *words: str) -> tuple[int, str]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = layouts.main(["--python", sys.executable, *words])
        return status, printed.getvalue()

    def test_each_finds_its_tests(self) -> None:
        status, output = self.run_all("-k", "overlap")
        self.assertEqual(status, 0, output)
        rows = [line.split() for line in output.splitlines()]
        self.assertEqual([row[1] for row in rows], ["flat", "package", "bundle"])
        self.assertEqual(len({row[3] for row in rows}), 1, f"as many tests in each:\n{output}")

    def test_no_tests_is_a_failure(self) -> None:
        status, output = self.run_all("-k", "no_such_test", "--layout", "flat")
        self.assertEqual(status, 1, output)

    def test_each_layout_uses_its_own_modules(self) -> None:
        """A layout without the modules doesn't find those of this repository instead."""
        for name, prepare in layouts.LAYOUTS.items():
            with self.subTest(name), tempfile.TemporaryDirectory(prefix="vhost-user-test-") as folder:
                prepare(Path(folder))
                modules = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.py") if not path.name.startswith(("test_", "__")))
                expected = {
                    "flat": ["guest_memory.py", "vhost_user.py", "vring.py"],
                    "package": [f"myapp/_vendor/{module}" for module in sorted(layouts.MODULES)],
                    "bundle": ["one/vhost_user.py"],
                }
                self.assertEqual(modules, expected[name])

    def test_interpreters(self) -> None:
        found = layouts.pythons()
        self.assertIn(sys.version.split()[0].rstrip("+"), [python.version for python in found])
        self.assertIsNone(layouts._try("/bin/false"))


if __name__ == "__main__":
    unittest.main()
