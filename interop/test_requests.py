"""Requests that only some kinds of device get to see, from QEMU 11.1: what a network card and a display are told, and what they tell."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .asking_gpu import HEIGHT, WIDTH, pixel
from .guest import NEWEST, Device, QemuGuest
from .peers import start_backend
from .support import InteropTest, wait_for

NET = """
import sys
from vhost_user import VhostUserBackendMut, run_device

class Net(VhostUserBackendMut):
    num_queues = 2
    features = 1 << 3  # VIRTIO_NET_F_MTU
    def process_queue(self, vring):
        if vring.index == 1:
            for chain in vring:
                vring.add_used(chain, 0)
    def set_mtu(self, mtu):
        print("MTU:", mtu, flush=True)
    def send_rarp(self, mac):
        print("RARP:", mac.hex(":"), flush=True)

sys.exit(run_device("net", lambda _: Net()))
"""
NOTIFIED = """
import mmap, os, sys, threading, time
from devices.rng import Rng
from vhost_user import VhostUserProtocolFeatures, run_device

class Notified(Rng):
    protocol_features = VhostUserProtocolFeatures.HOST_NOTIFIER
    def set_backend_req_fd(self, channel):
        self.channel = channel
    def resumed(self):
        threading.Thread(target=self.ask, daemon=True).start()
    def ask(self):
        fd = os.memfd_create("notifier")
        os.pwrite(fd, b"\\xff" * mmap.PAGESIZE, 0)
        print("accepted:", self.channel.host_notifier(0, fd), flush=True)
        while os.pread(fd, 2, 0) == b"\\xff\\xff":
            time.sleep(0.01)
        print("notified of ring", int.from_bytes(os.pread(fd, 2, 0), "little"), flush=True)
        print("taken back:", self.channel.host_notifier(0), flush=True)

sys.exit(run_device("rng", lambda _: Notified()))
"""
MAC = "52:54:00:12:34:56"


@dataclass(frozen=True)
class NetDevice(Device):
    """QEMU's own network card, with vhost-user behind it."""

    def command_line(self) -> list[str]:
        chardev = f"socket,id=c-{self.name},path={self.socket}"
        netdev = f"vhost-user,id=n-{self.name},chardev=c-{self.name}"
        device = f"virtio-net-pci,id={self.name},netdev=n-{self.name},bus={self.bus},mac={MAC},host_mtu=1400,romfile="
        return ["-chardev", chardev, "-netdev", netdev, "-device", device]


class Requests(InteropTest):
    def start(self, argv: list[str], device: Device, module: str) -> QemuGuest:
        argv = [sys.executable, *argv, "--socket-path", str(device.socket), "--log-level", "debug"]
        start_backend(self, argv, device.socket)
        guest = QemuGuest(NEWEST, self.dir, [device], modules=[module])
        self.addCleanup(guest.kill)
        guest.wait_ready()
        return guest

    def test_a_network_card_is_told_its_mtu_and_whom_to_announce(self) -> None:
        socket = self.dir / "net.sock"
        guest = self.start(["-c", NET], NetDevice("virtio-net-pci", socket, {}, name="net0"), "virtio_net")
        output = socket.with_suffix(".log")
        wait_for(lambda: "MTU: 1400\n" in output.read_text(), "the MTU")
        self.assertEqual(guest.run("cat /sys/class/net/eth0/mtu"), "1400")
        guest.qmp.execute("announce-self", initial=50, max=550, rounds=5, step=50)
        wait_for(lambda: f"RARP: {MAC}\n" in output.read_text(), "a request to announce the guest")

    def test_a_display_is_given_its_socket_and_paints(self) -> None:
        socket = self.dir / "gpu.sock"
        guest = self.start(["-m", "interop.asking_gpu"], Device("vhost-user-gpu-pci", socket, {}, name="gpu0"), "virtio_gpu")
        output = socket.with_suffix(".log")
        wait_for(lambda: "painted" in output.read_text(), "the picture to be sent")
        self.assertRegex(output.read_text(), r"display: \(0, 0, [1-9]\d+, [1-9]\d+, 1, 0\)")
        self.assertRegex(output.read_text(), r"EDID: 00ffffffffffff00 [1-9]\d+")
        file = self.dir / "screen.ppm"

        def shown() -> bool:
            guest.qmp.execute("screendump", filename=str(file), device="gpu0")
            wait_for(file.exists, "the picture to be there")
            return file.read_bytes() == self.picture()

        wait_for(shown, "the picture to be shown")

    def test_notifications_of_a_driver_go_to_a_page_of_the_device(self) -> None:
        socket = self.dir / "rng.sock"
        device = Device("vhost-user-rng-pci", socket, {"page-per-vq": True}, name="rng0")
        guest = self.start(["-c", NOTIFIED], device, "virtio_rng")
        output = socket.with_suffix(".log")
        wait_for(lambda: "accepted: True" in output.read_text(), "the page to be accepted")
        guest.post("cat /dev/hwrng >/dev/null")
        wait_for(lambda: {"notified of ring 0", "taken back: True"} <= set(output.read_text().splitlines()), "the guest's notification")

    @staticmethod
    def picture() -> bytes:
        rows = (pixel(x, y)[2::-1] for y in range(HEIGHT) for x in range(WIDTH))
        return f"P6\n{WIDTH} {HEIGHT}\n255\n".encode() + b"".join(rows)
