"""A display without acceleration that asks its front-end for all that the GPU socket has, and paints one picture: for test_requests."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from typing import Any

from vhost_user import FLAG_REPLY, GPU_REQUESTS, VhostUserBackendMut, VringT, run_device

_HEADER = struct.Struct("=III")  # request, flags, size
WIDTH, HEIGHT = 64, 48
RESP_ERR_UNSPEC = 0x1200  # to whatever the driver wants (virtio 1.3 §5.7.6.7)
EDID = 1 << 0  # protocol feature of the socket (vhost-user-gpu, "Protocol features")


def pixel(x: int, y: int) -> bytes:
    """Blue, green, red, unused: another colour at each place."""
    return bytes((4 * x, 5 * y, x ^ y, 0))


class Gpu(VhostUserBackendMut):
    num_queues = 2
    features = 1 << 1  # VIRTIO_GPU_F_EDID

    def process_queue(self, vring: VringT) -> None:
        for chain in vring:
            vring.add_used(chain, chain.write(struct.pack("<IIQII", RESP_ERR_UNSPEC, 0, 0, 0, 0)))

    def get_config(self, offset: int, size: int) -> bytes:
        return struct.pack("<4I", 0, 0, 1, 0)[offset : offset + size]  # one scanout (virtio 1.3 §5.7.4)

    def set_gpu_socket(self, sock: socket.socket) -> None:
        threading.Thread(target=self.paint, args=(sock,), name="paints", daemon=True).start()

    def paint(self, sock: socket.socket) -> None:
        features = self.ask(sock, "GET_PROTOCOL_FEATURES")[0]
        print("features:", features, flush=True)
        self.ask(sock, "SET_PROTOCOL_FEATURES", features & EDID)
        display = self.ask(sock, "GET_DISPLAY_INFO")
        print("display:", display[5:11], flush=True)  # behind the header
        if features & EDID:
            size, edid = self.ask(sock, "GET_EDID", 0)[5:]
            print("EDID:", edid[:8].hex(), size, flush=True)
        self.ask(sock, "SCANOUT", 0, WIDTH, HEIGHT)
        picture = b"".join(pixel(x, y) for y in range(HEIGHT) for x in range(WIDTH))
        self.ask(sock, "UPDATE", 0, 0, 0, WIDTH, HEIGHT, more=picture)
        print("painted", flush=True)

    def ask(self, sock: socket.socket, name: str, *fields: int, more: bytes = b"") -> tuple[Any, ...]:
        number, layout, reply = GPU_REQUESTS[name]
        payload = layout.pack(*fields) + more
        sock.sendall(_HEADER.pack(number, 0, len(payload)) + payload)
        if reply is None:
            return ()
        data = sock.recv(_HEADER.size + reply.size, socket.MSG_WAITALL)
        assert _HEADER.unpack_from(data) == (number, FLAG_REPLY, reply.size), data[: _HEADER.size]
        return reply.unpack_from(data, _HEADER.size)


if __name__ == "__main__":
    sys.exit(run_device("gpu", lambda _: Gpu()))
