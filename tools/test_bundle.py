"""Tests of tools/bundle.py."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path

from tools import bundle
from tools.demo import T_IN, T_OUT, Driver, Slot, nothing
from vhost_user import Frontend


def run(*words: str, cwd: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    """Python alone: no folder but `cwd` to import from."""
    environment = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": hash_seed, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


class FolderTest(unittest.TestCase):
    """A folder for each test."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="vhost-user-test-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


class TheFile(FolderTest):
    """What is written for this repository."""

    def test_same_bytes_each_time(self) -> None:
        for device in ([], ["--device", "blk"]):
            outputs = []
            for seed in "1", "2":
                done = run("-m", "tools.bundle", *device, "-o", str(self.folder / seed), cwd=str(bundle.ROOT), hash_seed=seed)
                self.assertEqual(done.returncode, 0, done.stderr)
                outputs.append((self.folder / seed).read_bytes())
            self.assertEqual(outputs[0], outputs[1])

    def test_nothing_is_lost(self) -> None:
        """All that the modules define is there, once, and in the same words."""
        text = bundle.bundle("blk")
        there = {ast.dump(statement) for statement in ast.parse(text).body}
        for module in bundle.collect("devices.blk"):
            gone = {id(statement) for statement in module.dropped}
            for statement in module.tree.body:
                if id(statement) not in gone:
                    self.assertIn(ast.dump(statement), there)
            for line in (ast.get_docstring(module.tree) or "").splitlines():
                self.assertIn(f"# {line}".rstrip() + "\n", text)

    def test_can_be_imported(self) -> None:
        (self.folder / "vhost_user.py").write_text(bundle.bundle(), encoding="utf-8")
        program = "import vhost_user as v; print(len([getattr(v, name) for name in v.__all__]), v.Frontend.__module__, v.PackedQueue.__module__)"
        done = run("-I", "-c", f"import sys; sys.path.insert(0, '.'); {program}", cwd=str(self.folder))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.split()[1:], ["vhost_user", "vhost_user"])

    def test_every_device_is_a_program(self) -> None:
        self.assertTrue({"blk", "rng"} <= set(bundle.devices()))
        for device in bundle.devices():
            with self.subTest(device):
                path = self.folder / device
                self.assertEqual(bundle.main(["--device", device, "-o", str(path)]), 0)
                self.assertTrue(os.access(path, os.X_OK))
                done = run(str(path), "--print-capabilities", cwd=str(self.folder))
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertIn("type", json.loads(done.stdout))

    def test_a_bundled_disk_serves(self) -> None:
        program, socket, image = (self.folder / name for name in ("vhost-user-blk", "socket", "image"))
        self.assertEqual(bundle.main(["--device", "blk", "-o", str(program)]), 0)
        image.write_bytes(bytes(1 << 20))
        words = [sys.executable, str(program), "--socket-path", str(socket), "--blk-file", str(image)]
        with subprocess.Popen(words, cwd=self.folder, stdin=subprocess.DEVNULL) as child:
            try:
                with Frontend.connect(socket, timeout=30) as frontend:
                    driver = Driver(frontend, frontend.setup()[0], 4, 4096)
                    data = os.urandom(4096)

                    def fill(slot: Slot) -> None:
                        slot.data[:] = data

                    def compare(slot: Slot) -> None:
                        self.assertEqual(slot.data, data)

                    driver.run(iter([(T_OUT, 8192, 4096)]), fill, nothing)
                    self.assertEqual(driver.run(iter([(T_IN, 8192, 4096)]), nothing, compare), 1)
            finally:
                child.send_signal(signal.SIGTERM)
        self.assertEqual(child.returncode, 0)
        self.assertEqual(image.read_bytes()[8192 : 8192 + 4096], data)

    def test_unknown_device(self) -> None:
        done = run("-m", "tools.bundle", "--device", "teapot", "-o", "-", cwd=str(bundle.ROOT))
        self.assertEqual(done.returncode, 2)
        self.assertIn("teapot", done.stderr)


class WhatIsRefused(FolderTest):
    """Each with modules made for it."""

    def made_of(self, vhost_user: str, **modules: str) -> str:
        for name, text in {"vhost_user": vhost_user, **modules}.items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        return bundle.bundle(root=self.folder)

    def refuses(self, expected: str, vhost_user: str, **modules: str) -> None:
        with self.assertRaisesRegex(bundle.BundleError, expected):
            self.made_of(vhost_user, **modules)

    def test_a_name_with_two_meanings(self) -> None:
        self.refuses(
            "limit is one thing in vring.py and another in vhost_user.py", "from vring import Ring\nlimit = 2", vring="limit = 1\nclass Ring: pass"
        )
        self.refuses("f is one thing", "from vring import x\ndef f(): return 1", vring="x = 1\ndef f(): return 2")
        self.refuses("wait is one thing", "from vring import x\nfrom select import poll as wait", vring="x = 1\nfrom os import wait")
        self.refuses("x is one thing", "from vring import y\nfor x in (1, 2): pass", vring="y = x = 1")
        self.refuses("x is one thing", "from vring import y\ntry:\n    x = 2\nexcept OSError:\n    x = 3", vring="y = x = 1")

    def test_python_s_own_names(self) -> None:
        self.refuses("open of vring.py would hide", "from vring import open", vring="def open(): pass")

    def test_imports_that_one_file_cannot_have(self) -> None:
        self.refuses("Ring is imported under another name", "from vring import Ring as R", vring="class Ring: pass")
        self.refuses("only at top level", "import vring", vring="")
        self.refuses("only at top level", "def f():\n    from vring import x", vring="x = 1")
        self.refuses("more than imports", "if not __package__:\n    from vring import x\n    x += 1", vring="x = 1")
        self.refuses("imports y from vring, which does not define it", "from vring import y", vring="x = 1")
        self.refuses(
            "modules import each other: vhost_user -> vring -> vhost_user", "from vring import x\ny = 1", vring="from vhost_user import y\nx = 1"
        )

    def test_what_must_not_run_in_the_middle(self) -> None:
        self.refuses("vring.py:2: a program in the middle", "from vring import x", vring="x = 1\nif __name__ == '__main__':\n    x = 2")

    def test_statements_that_share_a_line(self) -> None:
        self.refuses("shares a line", "from vring import x; y = 1", vring="x = 1")

    def test_what_is_said_twice_is_kept_once(self) -> None:
        """Twice would be wrong: the second `handle` would not have what was done to the first."""
        text = self.made_of("import os\nfrom vring import x\nhandle = object()\n", vring="import os\nhandle = object()\nx = handle\n")
        self.assertEqual(text.count("handle = object()"), 1)
        self.assertEqual(text.count("import os\n"), 2)

    def test_both_branches_of_the_import_block_go(self) -> None:
        block = """
            from typing import TYPE_CHECKING

            if TYPE_CHECKING or not __package__:
                from vring import x
            else:
                from .vring import x

            y = x + 1
            """
        text = self.made_of(block, vring="x = 1\n")
        names: dict[str, object] = {}
        exec(text, names)  # noqa: S102 - it was just made
        self.assertEqual(names["y"], 2)
        self.assertNotIn("__package__", text)

    def test_a_module_with_a_syntax_error(self) -> None:
        self.refuses("vhost_user.py: invalid syntax|vhost_user.py: .*syntax", "def def")


if __name__ == "__main__":
    unittest.main()
