"""Guests under QEMU: boot with shared memory, commands inside, and QMP beside them.

QEMU inherits one end of a socket pair for the agent's serial line and another for QMP, so nothing has to be waited for
or removed. A guest that panics or hangs ends the wait with its console's last lines.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import initramfs, sid, traces
from .peers import Process
from .support import PATIENCE, needs, needs_sid, tail

PANIC = re.compile(rb"Kernel panic|BUG: |Oops: |soft lockup|blocked for more than")


class GuestError(AssertionError):
    """The guest died, hung, or a command in it failed; the text has what it said."""


class Channel:
    """Lines and blocks over a socket, with a deadline, and a look at the guest's health while waiting."""

    def __init__(self, sock: socket.socket, check: Callable[[], None]) -> None:
        self._sock = sock
        self._check = check
        self._data = bytearray()
        sock.settimeout(0.5)

    def send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            self._check()
            raise GuestError(f"the channel was closed: {error}") from None

    def line(self, deadline: float) -> bytes:
        while b"\n" not in self._data:
            self._more(deadline)
        line, _, rest = self._data.partition(b"\n")
        self._data = bytearray(rest)
        return bytes(line)

    def block(self, size: int, deadline: float) -> bytes:
        while len(self._data) < size:
            self._more(deadline)
        block = bytes(self._data[:size])
        del self._data[:size]
        return block

    def _more(self, deadline: float) -> None:
        try:
            data = self._sock.recv(1 << 16)
        except TimeoutError:
            self._check()
            if time.monotonic() > deadline:
                raise GuestError("no answer in time") from None
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._check()
            raise GuestError("the channel was closed")
        self._data += data

    def close(self) -> None:
        self._sock.close()


class Agent:
    """Runs shell scripts in a guest, through the agent of initramfs.py."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        deadline = time.monotonic() + timeout
        while not self._channel.line(deadline).endswith(b"READY"):
            pass

    def post(self, script: str) -> None:
        """Sends a script without waiting for its end: for one that ends the guest."""
        self._channel.send(base64.b64encode(script.encode()) + b"\n")

    def run(self, script: str, timeout: float = PATIENCE) -> tuple[int, str]:
        """Exit status and output."""
        deadline = time.monotonic() + timeout
        self.post(script)
        status, size = self._channel.line(deadline).split()
        return int(status), self._channel.block(int(size), deadline).decode(errors="replace")


class Guest:
    """A running guest of any kind; what is told apart is how it is started."""

    def __init__(self, process: Process, console: Path, agent: socket.socket) -> None:
        self.process = process
        self.console = console
        self._channel = Channel(agent, self.check)
        self._agent = Agent(self._channel)

    def check(self) -> None:
        if not self.process.running():
            raise GuestError(f"the guest ended: {self.process.died()}")
        if trouble := PANIC.search(self.console.read_bytes()):
            raise GuestError(f"the guest's kernel is in trouble: {trouble[0].decode()}")

    def wait_ready(self) -> None:
        with self._console_on_error("the guest didn't boot"):
            self._agent.wait_ready()

    def run(self, script: str, timeout: float = PATIENCE) -> str:
        """The output of a script that must succeed."""
        status, output = self.status(script, timeout)
        if status:
            raise GuestError(f"status {status} from\n{script}\n--- output\n{output}")
        return output.strip()

    def status(self, script: str, timeout: float = PATIENCE) -> tuple[int, str]:
        with self._console_on_error(f"in the guest: {script}"):
            return self._agent.run(script, timeout)

    def wait(self, condition: str) -> None:
        """Until a shell condition holds inside."""
        self.run(f"for i in $(seq 300); do {condition} && exit; sleep 0.1; done; ls /dev; dmesg | tail; exit 1")

    def post(self, script: str) -> None:
        """Without waiting for its end: for a script that ends the guest."""
        self._agent.post(script)

    def reboot(self) -> None:
        """From inside, as `reboot` does it; the hypervisor stays."""
        self.post("reboot -f")
        self.wait_ready()

    def kill(self) -> None:
        self.process.kill()
        self._channel.close()

    @contextlib.contextmanager
    def _console_on_error(self, what: str) -> Iterator[None]:
        try:
            yield
        except GuestError as error:
            raise GuestError(f"{what}: {error}\n--- console\n{tail(self.console)}") from None


class Qmp:
    """QEMU's control socket."""

    def __init__(self, sock: socket.socket, check: Callable[[], None]) -> None:
        self._channel = Channel(sock, check)
        self.events: list[dict[str, Any]] = []
        self._receive(time.monotonic() + PATIENCE)  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        self._channel.send(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        deadline = time.monotonic() + PATIENCE
        while True:
            message = self._receive(deadline)
            if "error" in message:
                raise GuestError(f"QMP {command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self.events.append(message)

    def wait_event(self, name: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """The next event of that name; those before it are forgotten."""
        deadline = time.monotonic() + timeout
        while True:
            event = self.events.pop(0) if self.events else self._receive(deadline)
            if event.get("event") == name:
                return event

    def _receive(self, deadline: float) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._channel.line(deadline))
        return message

    def close(self) -> None:
        self._channel.close()


@dataclass(frozen=True)
class Machine:
    """A QEMU with a kernel: the oldest or the newest that we test with."""

    name: str
    newest: bool

    def command(self, argv: Sequence[str], binds: Sequence[Path]) -> list[str]:
        return sid.command(argv, binds=binds) if self.newest else list(argv)

    def require(self) -> None:
        needs("setpriv")
        if self.newest:
            needs_sid()
        else:
            needs("qemu-system-x86_64")

    def note(self) -> None:
        """The test at hand has a guest of this one."""
        traces.old_guest |= not self.newest

    def kernel(self) -> initramfs.Kernel:
        return initramfs.sid_kernel() if self.newest else initramfs.debian12_kernel()

    def options(self) -> list[str]:
        # The newest goes without SeaBIOS, so that Linux is the first to touch a device; the oldest has it.
        return ["-bios", "qboot.rom"] if self.newest else []


NEWEST = Machine("sid", newest=True)
OLDEST = Machine("debian12", newest=False)


def accelerator() -> list[str]:
    """KVM where it is the real one (a paravirtual kind boots no stock kernel), else emulation."""
    real = any(os.path.exists(f"/sys/module/{m}") for m in ("kvm_intel", "kvm_amd"))
    if real and os.access("/dev/kvm", os.R_OK | os.W_OK):
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]


class QemuGuest(Guest):
    """A guest under QEMU; It runs until `kill`."""

    def __init__(
        self,
        machine: Machine,
        folder: Path,
        devices: Sequence[Device] = (),
        *,
        cpus: int = 1,
        incoming: bool = False,
        iommu: bool = False,
        slots: int = 0,
        modules: Sequence[str] = (),
    ) -> None:
        """`incoming`: it waits for a migration instead of booting; its commands go to the guest that arrives. `iommu`: the machine has Intel's
        and the guest uses it, for the devices with `iommu_platform` and `ats`. `slots`: how many memory modules can be plugged in.
        `modules`: of the kernel, besides those that every guest loads."""
        machine.require()
        machine.note()
        kernel = machine.kernel()
        images = [initramfs.elf_kernel(kernel), initramfs.build(kernel.modules, initramfs.MODULES + tuple(modules))]
        name = "incoming" if incoming else "console"
        console = folder / f"{name}.log"
        console.write_bytes(b"")
        (agent, agent_far), (qmp, qmp_far) = socket.socketpair(), socket.socketpair()
        argv = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", *accelerator()),
            *("-machine", "q35,memory-backend=mem", "-object", "memory-backend-memfd,id=mem,size=512M,share=on"),
            *("-m", "512M" + (f",slots={slots},maxmem=2G" if slots else ""), "-smp", str(cpus), *machine.options()),
            *("-kernel", str(images[0]), "-initrd", str(images[1])),
            # init_on_alloc=0: else the guest itself dirties each page just before a device writes to it, and a lost dirty log goes unnoticed.
            *(
                "-append",
                "console=ttyS0 agent=/dev/ttyS1 loglevel=5 nokaslr mitigations=off hung_task_panic=0 init_on_alloc=0"
                + iommu * " intel_iommu=on"
                + bool(slots) * " memhp_default_state=online_movable",
            ),
            *("-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,fd={agent_far.fileno()}", "-serial", "chardev:agent"),
            *("-chardev", f"socket,id=qmp,fd={qmp_far.fileno()}", "-qmp", "chardev:qmp"),
            *(["-device", "intel-iommu,device-iotlb=on"] if iommu else []),  # before all that is to be behind it
            *("-device", "pcie-root-port,id=port0,slot=1", "-device", "pcie-root-port,id=port1,slot=2"),
            *(word for device in devices for word in device.command_line()),
            *(["-incoming", "defer"] if incoming else []),
        ]
        with agent_far, qmp_far:
            fds = (agent_far.fileno(), qmp_far.fileno())
            process = Process(machine.command(argv, [folder, sid.CACHE]), folder / f"qemu-{name}.log", pass_fds=fds)
        super().__init__(process, console, agent)
        self.qmp = Qmp(qmp, self.check)

    def kill(self) -> None:
        super().kill()
        self.qmp.close()


@dataclass(frozen=True)
class Device:
    """A vhost-user device with its socket: for the command line, or to be plugged into a running guest."""

    driver: str
    socket: Path
    properties: Mapping[str, bool | int | str]
    name: str = "disk0"
    bus: str = "port0"
    reconnect: bool = False  # whether QEMU tries again when the back-end goes away
    listens: bool = False  # whether it is QEMU that listens

    def arguments(self) -> dict[str, object]:
        chardev = f"c-{self.name}"
        return {"driver": self.driver, "id": self.name, "bus": self.bus, "chardev": chardev, **self.properties}

    def command_line(self) -> list[str]:
        chardev = f"socket,id=c-{self.name},path={self.socket}"
        chardev += ",reconnect-ms=100" if self.reconnect else ",server=on,wait=off" if self.listens else ""
        return ["-chardev", chardev, "-device", json.dumps(self.arguments())]

    def plug(self, qmp: Qmp) -> None:
        address = {"type": "unix", "data": {"path": str(self.socket)}}
        again = {"reconnect-ms": 100} if self.reconnect else {}
        backend = {"type": "socket", "data": {"addr": address, "server": False, **again}}
        qmp.execute("chardev-add", id=f"c-{self.name}", backend=backend)
        qmp.execute("device_add", **self.arguments())

    def unplug(self, qmp: Qmp) -> None:
        """Returns when the guest let the device go and QEMU its socket."""
        qmp.execute("device_del", id=self.name)
        while qmp.wait_event("DEVICE_DELETED")["data"].get("device") != self.name:
            pass
        qmp.execute("chardev-remove", id=f"c-{self.name}")


def disk_device(socket_path: Path, **properties: bool | int) -> Device:
    """One queue unless told: QEMU's default is one per CPU."""
    hyphenated = {"num_queues": "num-queues", "inflight_migration": "inflight-migration"}  # others have underscores
    named = {hyphenated.get(key, key): value for key, value in properties.items()}
    return Device("vhost-user-blk-pci", socket_path, {"num-queues": 1, **named})
