"""README.md stays true: its example is run, its commands are run as far as they need nothing but Python, its names and tables are compared."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vhost_user
import vring
from tools.bundle import ROOT
from vhost_user import (
    BACKEND_REQUESTS,
    DRAFTS,
    HOOKS,
    PROTOCOL_FEATURES,
    REQUESTS,
    Frontend,
    FrontendQueue,
    VhostUserBackend,
    VhostUserDaemon,
    VhostUserProtocolFeatures,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The shell commands, comments off and continued lines joined."""
    lines = "".join(blocks("sh")).replace("\\\n", "").splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def row(name: str) -> set[str]:
    """The words of a row in the table of what is supported."""
    found = re.search(rf"^\| {name} \| (.*) \|$", README, re.MULTILINE)
    assert found, f"no row {name}"
    return set(found.group(1).split())


def offered_by(feature: VhostUserProtocolFeatures) -> str:
    """What has a protocol feature offered, in README.md's words."""
    if feature & PROTOCOL_FEATURES:
        return "always"
    words = ["config"] if feature is VhostUserProtocolFeatures.CONFIG else []
    words += [name for name, hooked in HOOKS if hooked is feature]
    words += ["drafts"] if feature & DRAFTS else ["postcopy"] if feature is VhostUserProtocolFeatures.PAGEFAULT else []
    return " or ".join(f"`{word}`" for word in words or ["protocol_features"])


class FolderTest(unittest.TestCase):
    """A folder for each test."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="vhost-user-test-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.socket = self.folder / "socket"

    @contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """A program in the repository, ended with SIGTERM."""
        with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            try:
                yield child
            finally:
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(10)
                finally:
                    child.kill()

    def connect(self, child: subprocess.Popen[bytes]) -> Frontend:
        deadline = time.monotonic() + 30
        while True:
            try:
                return Frontend.connect(self.socket, timeout=0.1)
            except OSError:
                if child.poll() is not None or time.monotonic() > deadline:
                    assert child.stderr
                    self.fail(f"{child.args!r} does not listen: {child.stderr.read().decode() if child.poll() is not None else ''}")


class Examples(FolderTest):
    """The devices of the README, and its front-end."""

    def program(self, call: str, name: str) -> tuple[str, int]:
        """The example that has this call for /tmp/NAME.sock, as a file, and its lines."""
        path = f"/tmp/{name}.sock"
        [source] = [block for block in blocks("python") if f'{call}("{path}")' in block]
        program = self.folder / f"{call}.py"
        program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + source.replace(path, str(self.socket)), encoding="utf-8")
        return str(program), len(source.splitlines())

    @contextmanager
    def example(self, name: str, most_lines: int) -> Iterator[Frontend]:
        """The device that is served there, and a front-end that is connected to it."""
        program, lines = self.program("serve", name)
        self.assertLessEqual(lines, most_lines)
        with self.running(sys.executable, program) as child, self.connect(child) as frontend:
            yield frontend

    def test_frontend(self) -> None:
        """It is given random bytes."""
        device, _ = self.program("serve", "rng")
        program, _ = self.program("connect", "rng")
        with self.running(sys.executable, device) as child:
            self.connect(child).close()
            done = subprocess.run([sys.executable, program], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        self.assertRegex(done.stdout + done.stderr, r"\A\[\('a token', 16\)\]\n[0-9a-f]{32}\n\Z")

    def test_rng(self) -> None:
        """It gives random bytes."""
        for packed in (False, True):
            with self.subTest(packed=packed), self.example("rng", 20) as frontend:
                queue = frontend.setup(packed=packed)[0]
                data = []
                for _ in range(2):
                    queue.submit([], [(frontend.arena[0], 100), (frontend.arena[0] + 4096, 28)], "token")
                    self.assertEqual(queue.wait(), [("token", 128)])
                    data.append(frontend.memory.read(frontend.arena[0], 100) + frontend.memory.read(frontend.arena[0] + 4096, 28))
                self.assertNotEqual(data[0], data[1])
                self.assertGreater(len(set(data[0])), 60)

    def test_disk(self) -> None:
        """It keeps what is written, and refuses what it cannot do."""
        for packed in (False, True):
            with self.subTest(packed=packed), self.example("disk", 40) as frontend:
                [queue] = frontend.setup(packed=packed)
                sectors = int.from_bytes(frontend.get_config(0, 8), "little")
                for sector in (0, 100, sectors - 1):
                    self.assertEqual(self.ask(frontend, queue, 1, sector, bytes([sector & 0xFF, 7]) * 256), (0, b""))
                for sector in (0, 100, sectors - 1):
                    self.assertEqual(self.ask(frontend, queue, 0, sector, length=512), (0, bytes([sector & 0xFF, 7]) * 256))
                for kind, sector, data, length, status in (
                    (0, sectors, b"", 512, 1),
                    (1, sectors - 1, bytes(1024), 0, 1),
                    (8, 0, b"", 20, 2),
                    (4, 0, b"", 0, 2),
                ):
                    self.assertEqual(self.ask(frontend, queue, kind, sector, data, length)[0], status)

    def ask(self, frontend: Frontend, queue: FrontendQueue, kind: int, sector: int, data: bytes = b"", length: int = 0) -> tuple[int, bytes]:
        """A disk's request: its status, and the data that came."""
        at = frontend.arena[0]
        frontend.memory.write(at, struct.pack("<IIQ", kind, 0, sector) + b"\xff")
        frontend.memory.write(at + 4096, data)
        buffers = [(at + 4096, len(data))] if data else []
        into = [(at + 8192, length)] if length else []
        queue.submit([(at, 16), *buffers], [*into, (at + 16, 1)], None)
        self.assertEqual([token for token, _ in queue.wait()], [None])
        return frontend.memory.read(at + 16, 1)[0], frontend.memory.read(at + 8192, length)


class Commands(FolderTest):
    """Each command that is shown is of a kind that is known here, and works as far as it can be tried."""

    def test_each(self) -> None:
        tried = 0
        for command in commands():
            with self.subTest(command):
                self.try_command(shlex.split(command))
                tried += 1
        self.assertGreaterEqual(tried, 12)

    def try_command(self, words: list[str]) -> None:
        if words[0] in ("qemu-system-x86_64", "truncate", "cp"):
            self.check_options(words)
        elif "--socket-path" in words:
            self.serves(words)
        elif words[:3] == ["python3", "-m", "tools.bundle"]:
            words[-1] = str(self.folder / Path(words[-1]).name)
            self.succeeds(words)
        elif words == ["python3", "-m", "tools.demo"]:
            self.succeeds([*words, "--seconds", "0.05", "--size", "2"])
        elif words[:3] in (["python3", "-m", "tools.layouts"], ["python3", "-m", "unittest"], ["python3", "-m", "interop"]):
            self.succeeds([*words, "--help"])
        else:
            self.fail("a command of a new kind: say here how it is tried")

    def check_options(self, words: list[str]) -> None:
        """What cannot be run here is looked at for what matters to this side."""
        if words[0] == "qemu-system-x86_64":
            self.assertIn("memory-backend-memfd,id=mem,size=1G,share=on", words)
            self.assertIn("q35,memory-backend=mem", words)
        elif words[0] == "cp":
            self.assertEqual([name for name in words[1:-1] if not (ROOT / name).is_file()], [])

    def succeeds(self, words: list[str]) -> None:
        argv = [sys.executable if word == "python3" else word for word in words]
        done = subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def serves(self, words: list[str]) -> None:
        image = self.folder / "disk.img"
        image.write_bytes(bytes(1 << 20))
        place = {"python3": sys.executable, "disk.img": str(image), "./vhost-user-blk": str(self.folder / "vhost-user-blk")}
        words = [place.get(word, word) for word in words]
        words[words.index("--socket-path") + 1] = str(self.socket)
        with self.running(*words) as child, self.connect(child) as frontend:
            frontend.setup()
        self.assertEqual(child.returncode, 0)


class Names(unittest.TestCase):
    """What the tables and the text name is there, and the other way round."""

    def test_supported(self) -> None:
        rows = re.findall(r"^\| (<-|->|bit) (\d+) \| `([A-Z_]+)` \| ([^|]*)\|", README, re.MULTILINE)
        for way, table in ("<-", REQUESTS), ("->", BACKEND_REQUESTS):
            told = [(int(number), name, gate.strip()) for which, number, name, gate in rows if which == way]
            self.assertEqual(told, [(request.number, request.name, request.gate.name or "") for request in table.values()])
        bits = [(1 << int(number), name, source.strip()) for way, number, name, source in rows if way == "bit"]
        self.assertEqual(bits, [(int(feature), feature.name, offered_by(feature)) for feature in VhostUserProtocolFeatures])
        offered = {name for name in dir(vring) if name.startswith("VIRTIO_F_") and vhost_user.FEATURES >> getattr(vring, name) & 1}
        self.assertEqual({f"VIRTIO_F_{name}" for name in row("Ring features")}, offered)

    def test_device_s_methods(self) -> None:
        for name, parameters in re.findall(r"`(\w+)\(([\w, ]*)\)`", README.partition("| method | called |")[2].partition("A ring is iterated")[0]):
            with self.subTest(name):
                self.assertEqual([*inspect.signature(getattr(VhostUserBackend, name)).parameters][1:], re.findall(r"\w+", parameters))

    def test_device_s_attributes(self) -> None:
        table = README.partition("| attribute | what the device is |")[2].partition("\n\n")[0]
        names = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
        self.assertEqual(set(names), {name for name in VhostUserBackend.__annotations__ if not name.startswith("_")})

    def test_all_hooks_are_told(self) -> None:
        for name, _ in inspect.getmembers(VhostUserBackend, inspect.isfunction):
            if not name.startswith("_"):
                self.assertRegex(README, rf"`{name}\(", f"{name} is not in README.md")

    def test_chain_and_daemon(self) -> None:
        for name in "readable", "writable", "readable_len", "writable_len", "read", "write", "memo":
            self.assertTrue(hasattr(vring.DescriptorChain, name), name)
        for name in re.findall(r"`(\w+)\(", README.partition("`VhostUserDaemon(name, device)` serves it")[2].partition("`run_device")[0]):
            self.assertTrue(hasattr(VhostUserDaemon, name), name)

    def test_options(self) -> None:
        """Each option of the disk has a row, and each row is an option."""
        rows = set(re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE))
        done = subprocess.run([sys.executable, "-m", "devices.blk", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        self.assertEqual(rows, set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)))

    def test_file_for_management_software(self) -> None:
        """Its fields are those of VhostUserBackend in QEMU's docs/interop/vhost-user.json; the program is the one that is bundled just before."""
        [text] = blocks("json")
        fields = json.loads(text)
        self.assertEqual({name: type(value) for name, value in fields.items()}, {"description": str, "type": str, "binary": str})
        self.assertIn(f"-o {os.path.basename(fields['binary'])}", README[: README.index(text)])
        done = subprocess.run([sys.executable, "-m", "devices.blk", "--print-capabilities"], cwd=ROOT, capture_output=True, timeout=60, check=True)
        self.assertEqual(json.loads(done.stdout)["type"], fields["type"])

    def test_files(self) -> None:
        table = README.partition("## What is where")[2]
        for name in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE):
            self.assertTrue(os.path.exists(ROOT / name), name)


if __name__ == "__main__":
    unittest.main()
