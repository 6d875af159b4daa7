"""QEMU's block layer as the front-end (libblkio inside), without any guest: fast, and a driver of its own making."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tools import test_readme

from . import sid
from .diskcheck import MIB
from .peers import Disk, Process, serve_disk, start_backend
from .support import REPOSITORY, InteropTest, needs, needs_sid, overwrite, tail

SIZE = 64 * MIB


class BlockLayer(InteropTest):
    """Each command is a connection of its own: the back-end has to take the next one every time."""

    def setUp(self) -> None:
        needs("setpriv")
        needs_sid()
        self.socket = self.dir / "disk.sock"

    def serve(self, *, read_only: bool = False) -> tuple[Path, Process]:
        image = self.image("disk.img", SIZE)
        return image, serve_disk(self, Disk(image, read_only=read_only), self.socket)

    def disk(self, options: str = "") -> str:
        return f"driver=virtio-blk-vhost-user,path={self.socket},cache.direct=on{',' * bool(options)}{options}"

    def run_tool(self, *argv: str) -> tuple[int, str]:
        log = self.dir / f"{argv[0]}.log"
        process = Process(sid.command(argv, binds=[self.dir]), log)
        self.addCleanup(process.kill)
        try:
            status = process.wait()
        except subprocess.TimeoutExpired:
            self.fail(f"hangs: {shlex.join(argv)}\n{tail(log)}")
        output = log.read_text(encoding="utf-8")
        log.unlink()
        return status, output

    def tool(self, *argv: str) -> str:
        status, output = self.run_tool(*argv)
        self.assertEqual(status, 0, output)
        return output

    def qemu_io(self, *commands: str) -> tuple[int, str]:
        words = [word for command in commands for word in ("-c", command)]
        return self.run_tool("qemu-io", "--image-opts", self.disk(), *words)

    def succeeds(self, *commands: str) -> None:
        status, output = self.qemu_io(*commands)
        self.assertEqual(status, 0, output)
        self.assertNotIn("failed", output)

    def test_disk_in_one_file(self) -> None:
        """The framework and the disk as one file, for appliances, run by itself in an empty folder."""
        image, program = self.image("disk.img", SIZE), self.dir / "disk.py"
        subprocess.run([sys.executable, "-m", "tools.bundle", "--device", "blk", "-o", str(program)], cwd=REPOSITORY, check=True)
        argv = [sys.executable, "-I", str(program), "--socket-path", str(self.socket), "--blk-file", str(image)]
        start_backend(self, argv, self.socket)
        self.succeeds("write -P 0x5a 1M 64k", "read -P 0x5a 1M 64k", "flush")
        with open(image, "rb") as file:
            file.seek(MIB)
            self.assertEqual(file.read(64 << 10), b"\x5a" * (64 << 10))

    def test_disk_in_the_readme(self) -> None:
        """Its example, as it is shown."""
        [source] = [block for block in test_readme.blocks("python") if 'serve("/tmp/disk.sock")' in block]
        program = self.dir / "disk.py"
        program.write_text(source.replace("/tmp/disk.sock", str(self.socket)), encoding="utf-8")
        start_backend(self, [sys.executable, "-c", f"import runpy; runpy.run_path({str(program)!r})"], self.socket)
        self.succeeds("write -P 0x5a 1M 64k", "write -P 0xa5 63M 1M", "write -P 0xc3 512 512")
        self.succeeds("read -P 0x5a 1M 64k", "read -P 0xa5 63M 1M", "read -P 0xc3 512 512", "read -P 0 1088k 64k")
        for command in f"read {SIZE} 64k", f"write {SIZE - 4096} 64k":
            self.assertNotEqual(self.qemu_io(command)[0], 0, command)

    def test_write_and_read_with_pattern(self) -> None:
        image, _ = self.serve()
        self.succeeds("write -P 0x5a 1M 64k", "read -P 0x5a 1M 64k", "read -P 0 0 1M", "read -P 0 1088k 64k", "flush")
        self.succeeds("write -P 0xa5 512 512", "write -P 0xc3 63M 1M", "flush")
        self.succeeds("read -P 0x5a 1M 64k", "read -P 0xa5 512 512", "read -P 0xc3 63M 1M", "read -P 0 0 512")
        data = image.read_bytes()
        self.assert_same_bytes(data[MIB : MIB + 65536], b"\x5a" * 65536, "image at 1M")
        self.assert_same_bytes(data[512:1024], b"\xa5" * 512, "image at 512")
        self.assert_same_bytes(data[63 * MIB :], b"\xc3" * MIB, "image at 63M")

    def test_wrong_pattern_is_noticed(self) -> None:
        """The check itself works: other data than expected fails the command."""
        self.serve()
        status, output = self.qemu_io("write -P 0x5a 1M 64k", "read -P 0x5b 1M 64k")
        self.assertNotEqual(status, 0)
        self.assertIn("Pattern verification failed", output)

    def test_scattered_buffers(self) -> None:
        """One request of many buffers: long descriptor chains."""
        self.serve()
        self.succeeds("writev -P 0x11 4M 512 4k 64k 1k 8k 512", "readv -P 0x11 4M 1k 4k 64k 8k 512 512", "flush")
        self.succeeds("readv -P 0x11 4M " + "512 " * 156, "write -P 0x22 8M 8M", "read -P 0x22 8M 8M")

    def test_several_in_flight(self) -> None:
        self.serve()
        writes = [f"aio_write -P {n} {n}M 256k" for n in range(1, 49)]
        reads = [f"aio_read -P {n} {n}M 256k" for n in range(1, 49)]
        self.succeeds(*writes, "aio_flush", *reads, "aio_flush")

    def test_discard_and_write_zeroes(self) -> None:
        image, _ = self.serve()
        self.succeeds("write -P 0x5a 0 8M", "flush", "discard 1M 1M", "write -z 4M 64k", "write -z -u 5M 64k", "flush")
        self.succeeds("read -P 0 4M 64k", "read -P 0 5M 64k")
        self.succeeds("read -P 0x5a 0 1M", "read -P 0x5a 2M 2M", "read -P 0x5a 4160k 960k", "read -P 0x5a 5184k 2880k")
        self.assert_same_bytes(image.read_bytes()[4 * MIB : 4 * MIB + 65536], bytes(65536), "image at 4M")
        self.assertEqual(image.stat().st_size, SIZE)

    def test_file_system_in_memory_that_is_full(self) -> None:
        """The image is larger than what it lies in: what does not fit fails, the disk lives on, and the rest of its data too."""
        folder = self.dir / "full"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={8 * MIB}", "tmpfs", str(folder)], check=True)
        self.addCleanup(subprocess.run, ["umount", str(folder)], check=True)
        image = folder / "disk.img"
        image.touch()
        os.truncate(image, SIZE)
        backend = serve_disk(self, Disk(image), self.socket)
        self.addCleanup(backend.stop)  # before it is unmounted
        self.succeeds("write -P 1 0 4M", "write -P 2 60M 3M", "flush")
        for command in "write -P 3 16M 4M", "write -P 4 20M 4k":
            status, output = self.qemu_io(command, "read -P 1 0 4M")
            self.assertNotEqual(status, 0, output)
            self.assertIn("write failed: Input/output error", output)
        self.succeeds("read -P 1 0 4M", "read -P 2 60M 3M", "read -P 0 40M 4M")
        self.succeeds("write -z -u 0 2M", "discard 16M 4M", "flush", "write -P 6 30M 1M", "read -P 6 30M 1M", "read -P 1 2M 2M")
        self.assertTrue(backend.running())

    def test_past_the_end(self) -> None:
        """Refused, and the disk goes on."""
        self.serve()
        for command in (f"read {SIZE} 64k", f"write {SIZE} 64k", f"read {SIZE - 4096} 64k"):
            status, output = self.qemu_io(command)
            self.assertNotEqual(status, 0, output)
        self.succeeds(f"write -P 1 {SIZE - 4096} 4k", f"read -P 1 {SIZE - 4096} 4k")

    def test_read_only(self) -> None:
        image, _ = self.serve(read_only=True)
        content = os.urandom(SIZE)
        overwrite(image, content)
        status, output = self.qemu_io("write -P 1 0 64k")
        self.assertNotEqual(status, 0, output)
        self.tool("qemu-img", "convert", "--image-opts", self.disk("read-only=on"), "-O", "raw", str(self.dir / "out"))
        self.assert_same_bytes((self.dir / "out").read_bytes(), content, "the copy")
        self.assert_same_bytes(image.read_bytes(), content, "the image")

    def test_image_copied_in_and_out(self) -> None:
        image, _ = self.serve()
        source, out = self.dir / "source.raw", self.dir / "out.raw"
        source.write_bytes(os.urandom(SIZE // 2) + bytes(SIZE // 4) + os.urandom(SIZE // 4))
        self.tool("qemu-img", "convert", "-n", "-f", "raw", str(source), "--target-image-opts", self.disk())
        self.tool("qemu-img", "convert", "--image-opts", self.disk(), "-O", "raw", str(out))
        self.assert_same_bytes(out.read_bytes(), source.read_bytes(), "the copy")
        self.assert_same_bytes(image.read_bytes(), source.read_bytes(), "the image")

    def test_bench_at_depth(self) -> None:
        """The tool that reports every failed request: reads and writes, deep, small and large, with flushes."""
        self.serve()
        for options in ("-d 32 -s 4096", "-d 64 -s 4096 -w", "-d 8 -s 131072 -w --flush-interval=16", "-d 1 -s 512"):
            bench = ["qemu-img", "bench", "--image-opts", self.disk(), "-c", "4000"]
            self.assertIn("Run completed", self.tool(*bench, *options.split()))
