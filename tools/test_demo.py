"""Tests of tools/demo.py: that it shows what it claims, that its verification can fail, and that nothing is left behind."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from typing import Any

from tools import demo

QUICK = ("--seconds", "0.05", "--size", "2")


class Demonstration(unittest.TestCase):
    """The program as a whole, in a process of its own."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="vhost-user-test-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def start(self, *words: str, **options: object) -> subprocess.Popen[str]:
        environment = dict(os.environ, TMPDIR=str(self.folder), PYTHONUTF8="1", TERM="xterm")
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        return subprocess.Popen([sys.executable, "-m", "tools.demo", *words], cwd=demo.ROOT, env=environment, text=True, **given)

    def assert_nothing_left(self) -> None:
        self.assertEqual(list(self.folder.iterdir()), [])
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            self.assertNotIn(os.fsencode(self.folder), command, f"process {process.name} is left")

    def test_all_is_shown(self) -> None:
        with self.start(*QUICK) as process:
            output, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, output)
        for expected in (
            "The split ring",
            "The packed ring",
            "RING_PACKED",
            "REPLY_ACK",
            "capacity 4096 sectors",
            "every byte right",
            "IOPS",
            "vhost-user-blk-pci",
            "All bytes were right.",
        ):
            self.assertIn(expected, output)
        self.assertEqual(len(re.findall(r"^  (?:split|packed)  .* [\d,.]+$", output, re.MULTILINE)), 6, output)
        self.assertNotIn("\x1b", output, "a pipe is no terminal")
        self.assertNotIn("\r", output)
        self.assert_nothing_left()

    def test_wrong_data_is_noticed(self) -> None:
        with self.start(*QUICK, "--break-data") as process:
            output, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, output)
        self.assertRegex(output, "FAILED  .* are not those that were written")
        self.assertNotIn("All bytes were right", output)
        self.assert_nothing_left()

    def test_interrupted(self) -> None:
        for number in signal.SIGINT, signal.SIGTERM:
            with self.subTest(number.name), self.start("--seconds", "30") as process:
                assert process.stdout
                seen = []
                for line in process.stdout:
                    seen.append(line)
                    if "image file compared" in line:  # amid the first load from here on
                        process.send_signal(number)
                process.wait(30)
                self.assertEqual(process.returncode, 130, "".join(seen))
                self.assertNotIn("Traceback", "".join(seen))
                self.assert_nothing_left()

    def test_reader_goes_away(self) -> None:
        with self.start(*QUICK, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stderr
            process.stdout.readline()
            process.stdout.close()
            complaint = process.stderr.read()
        self.assertEqual((process.returncode, complaint), (1, ""))
        self.assert_nothing_left()

    def test_on_a_terminal(self) -> None:
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        seen = bytearray()

        def read() -> None:
            try:
                while data := os.read(ours, 65536):
                    seen.extend(data)
            except OSError:
                pass  # EIO: the other side is closed

        with self.start(*QUICK, "--seconds", "0.2", stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            reader = threading.Thread(target=read)
            reader.start()
            process.wait(60)
            reader.join(10)
        text = seen.decode()
        self.assertEqual(process.returncode, 0, text)
        self.assertRegex(text, "\r\x1b\\[K  \\.\\.  .*█", "a bar that moves")
        self.assertIn("\x1b[32mok\x1b[0m", text)


if __name__ == "__main__":
    unittest.main()
