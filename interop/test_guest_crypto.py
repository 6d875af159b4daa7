"""A crypto device in a guest: the kernel's self-test of AES-CBC makes its sessions, which QEMU sends to the device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from vhost_user import SymmetricSession

from .guest import NEWEST, Device, QemuGuest
from .peers import start_backend
from .support import InteropTest, wait_for

PROGRAM = """
import itertools, sys
from vhost_user import VhostUserBackendMut, run_device

class Crypto(VhostUserBackendMut):
    sessions = itertools.count()
    def create_crypto_session(self, opcode, parameters):
        print("session:", (opcode, tuple(parameters)), flush=True)
        return next(self.sessions)

sys.exit(run_device("crypto", lambda _: Crypto()))
"""


@dataclass(frozen=True)
class CryptoDevice(Device):
    """QEMU's own device, with vhost-user behind it."""

    def command_line(self) -> list[str]:
        chardev = f"socket,id=c-{self.name},path={self.socket}"
        backend = f"cryptodev-vhost-user,id=b-{self.name},chardev=c-{self.name}"
        return ["-chardev", chardev, "-object", backend, "-device", f"virtio-crypto-pci,id={self.name},cryptodev=b-{self.name},bus={self.bus}"]


class Crypto(InteropTest):
    def test_sessions(self) -> None:
        """QEMU 11.1's layout is ours. (It never enables the data queue, so that no data comes.)"""
        socket: Path = self.dir / "crypto.sock"
        backend = start_backend(self, [sys.executable, "-c", PROGRAM, "--socket-path", str(socket), "--log-level", "debug"], socket)
        guest = QemuGuest(NEWEST, self.dir, [CryptoDevice("virtio-crypto-pci", socket, {}, name="crypto0")])
        self.addCleanup(guest.kill)
        guest.wait_ready()
        output = socket.with_suffix(".log")
        wait_for(lambda: output.read_text().count("session:") >= 2, "two sessions")
        key = bytes.fromhex("06a9214036b8a15b512e03d534120006")  # RFC 3602, case 1
        encrypt = SymmetricSession(3, len(key), 0, 0, 0, 0, 1, 1, 0, 0, key, b"")
        for session in encrypt, encrypt._replace(direction=2):
            self.assertIn(f"session: {(2, tuple(session))}\n", output.read_text())
        self.assertTrue(backend.running())
