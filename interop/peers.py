"""Programs that the tests start, and that are gone when a test ends: back-ends of all kinds.

Which disk is under test is one name (`DISK`), so that the same tests can be run on a back-end that is known to be good.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import sid
from .support import PATIENCE, REPOSITORY, InteropTest, missing, needs_sid, tail, wait_for

HERE = Path(__file__).resolve().parent
SO_ACCEPTCON = 0x10000  # in the flags of /proc/net/unix
DISK = os.environ.get("VHOST_USER_INTEROP_DISK", "ours")


# Buffered, a line is one write, and stays whole among those of other threads.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


class Process:
    """A program with its output in `log`; the kernel ends it too when the tests themselves are killed."""

    def __init__(self, argv: Sequence[str], log: Path, *, cwd: Path = REPOSITORY, pass_fds: Iterable[int] = ()) -> None:
        self.log = log
        self.argv = list(argv)
        with open(log, "ab") as out:
            self._child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=cwd,
                env=ENVIRONMENT,
                pass_fds=tuple(pass_fds),
                start_new_session=True,  # so that stop() reaches what the program itself started
            )
        self.pid = self._child.pid

    def running(self) -> bool:
        return self._child.poll() is None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        return self._child.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, to it and to its children; nothing happens if it is gone already."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._child.wait(PATIENCE)

    def stop(self) -> int:
        """Asks with SIGTERM first, as a service manager does; returns the exit status."""
        if self.running():
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
        self.kill()
        return self._child.returncode

    def died(self) -> str:
        return f"{self.log.stem} ended with status {self._child.returncode}:\n{tail(self.log)}"


def is_listening(socket: Path) -> bool:
    """From the kernel's table: a connection just to see would use up the one that a back-end serves at a time."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        rows = (line.split(maxsplit=7) for line in table)
        return any(r[-1].strip() == str(socket) and int(r[3], 16) & SO_ACCEPTCON for r in rows if r[0] != "Num")


def start_backend(case: InteropTest, argv: Sequence[str], socket: Path, listens: bool = True) -> Process:
    """Starts a back-end, and returns once it listens on `socket`, if it does. It ends with the test."""
    process = Process(argv, socket.with_suffix(".log"))
    case.addCleanup(process.stop)

    def ready() -> bool:
        if not process.running():
            raise AssertionError(process.died())
        return is_listening(socket)

    if listens:
        wait_for(ready, f"{argv[0]} listens on {socket.name}")
    return process


@dataclass(frozen=True)
class Disk:
    """What a back-end is asked to serve."""

    image: Path
    read_only: bool = False
    num_queues: int = 1
    packed: bool = True  # whether packed rings may be offered
    iommu: bool = False
    postcopy: bool = False
    log_level: str = "debug"  # for the traces
    processes: int = 1
    aio: str = "auto"
    direct: bool = False
    block_size: int = 512
    code: str = ""  # Python that runs our disk, changed in some way
    client: bool = False  # it connects, where the front-end listens, again and again


# User-mode Linux takes every feature that it is offered, so split rings there are for the device to ask for.
WITHOUT_PACKED = "import sys; from devices import blk; blk.Blk.withheld_features |= 1 << 34; sys.exit(blk.main())"

# What is done in order needs no record of what is in flight, since QEMU goes on where the used ring ends. With `aio="sync"`.
IN_ANY_ORDER = """
import random, sys, threading
from devices import blk

class Late(blk.SystemCalls):
    def at_once(self):
        return None, None
    def start(self, run):
        threading.Timer(random.uniform(0, 0.05), super().start, (run,)).start()

blk.SystemCalls = Late
sys.exit(blk.main())
"""


def _our_disk(disk: Disk, socket: Path) -> list[str]:
    if not (REPOSITORY / "devices/blk.py").exists():
        missing("devices/blk.py is missing")
    code = disk.code or (WITHOUT_PACKED if not disk.packed else "")
    program = ["-c", code] if code else ["-m", "devices.blk"]
    argv = [sys.executable, *program, "--socket-path", str(socket), "--blk-file", str(disk.image)]
    return [
        *argv,
        f"--num-queues={disk.num_queues}",
        *(["--read-only"] if disk.read_only else []),
        *(["--iommu"] if disk.iommu else []),
        *(["--postcopy"] if disk.postcopy else []),
        f"--log-level={disk.log_level}",
        f"--processes={disk.processes}",
        f"--aio={disk.aio}",
        *(["--direct"] if disk.direct else []),
        *(["--client", "--reconnect"] if disk.client else []),
        f"--block-size={disk.block_size}",
    ]


def storage_daemon(disk: Disk, socket: Path, *, aio: str = "io_uring", poll_max_ns: int = 32768) -> list[str]:
    """Debian 12's own qemu-storage-daemon; `sid.command` around it makes it the newest. It polls for as long as it does by default."""
    writable = "off" if disk.read_only else "on"
    return [
        "qemu-storage-daemon",
        "--blockdev",
        f"driver=file,node-name=f,filename={disk.image},aio={aio},read-only={'on' if disk.read_only else 'off'}",
        "--object",
        f"iothread,id=t0,poll-max-ns={poll_max_ns}",
        "--export",
        f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable={writable},num-queues={disk.num_queues},iothread=t0",
    ]


def _sid_storage_daemon(disk: Disk, socket: Path) -> list[str]:
    needs_sid()
    return sid.command(storage_daemon(disk, socket), binds=[disk.image.parent])


def rust_peer(disk: Disk, socket: Path) -> list[str]:
    argv = [str(build_rust_peer()), "--socket", str(socket), "--file", str(disk.image)]
    return [*argv, "--queues", str(disk.num_queues)]


@dataclass(frozen=True)
class DiskKind:
    """A disk back-end that the tests can be run on, and what it can't do."""

    command: Callable[[Disk, Path], list[str]]
    lacks: frozenset[str] = frozenset()


DISKS = {
    "ours": DiskKind(_our_disk),
    "qsd": DiskKind(_sid_storage_daemon, frozenset({"aio", "packed", "in_order", "processes", "resize", "client"})),
}


def needs_disk(*abilities: str) -> None:
    """The disk under test can do all of this; ours can, or the test shows that it can't."""
    for lacking in sorted(DISKS[DISK].lacks.intersection(abilities)):
        missing(f"{DISK} has no {lacking}")


def serve_disk(case: InteropTest, disk: Disk, socket: Path) -> Process:
    """The disk under test."""
    return start_backend(case, DISKS[DISK].command(disk, socket), socket, listens=not disk.client)


def serve_rng(case: InteropTest, socket: Path) -> Process:
    if not (REPOSITORY / "devices/rng.py").exists():
        missing("devices/rng.py is missing")
    return start_backend(case, [sys.executable, "-m", "devices.rng", "--socket-path", str(socket), "--log-level=debug"], socket)


def build_rust_peer() -> Path:
    """The Rust crate's disk; built in the chroot from Debian's packaged crates, it runs on Debian 12 too."""
    needs_sid()
    source = HERE / "rust-peer"

    def compile_into(folder: Path) -> list[str]:
        shutil.copytree(source, folder / "source")
        script = 'cd "$1/source" && CARGO_HOME="$1/home" cargo build --release --offline && mv target/release/$2 "$1"'
        return ["sh", "-c", script, "build", str(folder), "rust-peer"]

    return _built("rust-peer", [p for p in sorted(source.rglob("*")) if p.is_file()], compile_into)


def build_load() -> Path:
    """vublk-load, static: it is built with the chroot's compiler and runs outside."""
    needs_sid()
    source = HERE / "vublk-load.c"

    def compile_into(folder: Path) -> list[str]:
        shutil.copy(source, folder)
        out = str(folder / "vublk-load")
        return ["gcc", "-O2", "-fno-strict-aliasing", "-static", "-o", out, str(folder / source.name)]

    return _built("vublk-load", [source], compile_into)


def _built(name: str, sources: list[Path], compile_into: Callable[[Path], list[str]]) -> Path:
    """The program `name`, built in the cache once per content of its sources."""
    digest = hashlib.sha256(b"\0".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    program = sid.CACHE / f"{name}-{digest}"
    with sid.locked(name):
        if not program.exists():
            folder = sid.CACHE / f"{name}.building"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            argv = sid.command(compile_into(folder), binds=[folder])
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode:
                raise AssertionError(f"building {name} failed:\n{done.stdout}{done.stderr}")
            (folder / name).rename(program)
            shutil.rmtree(folder)
    return program
