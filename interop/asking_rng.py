"""An entropy device that asks its front-end for shared memory and shared objects when a ring starts, and prints what became of that:
for test_guest_rng."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Sequence
from uuid import UUID

from devices.rng import Rng
from vhost_user import BackendChannel, run_device

OBJECT = UUID("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
PAGE = mmap.PAGESIZE


class AskingRng(Rng):
    """Has two shared memory regions and exports one object."""

    def __init__(self) -> None:
        self.channel: BackendChannel | None = None
        self.fd = os.memfd_create("object")
        os.ftruncate(self.fd, 4 * PAGE)

    def get_shmem_config(self) -> Sequence[int]:
        return (16 * PAGE, 0, 4 * PAGE)

    def get_shared_object(self, uuid: UUID) -> int | None:
        return os.dup(self.fd) if uuid == OBJECT else None

    def set_backend_req_fd(self, backend: BackendChannel) -> None:
        super().set_backend_req_fd(backend)
        self.channel = backend

    def resumed(self) -> None:
        threading.Thread(target=self.ask, name="asks", daemon=True).start()

    def ask(self) -> None:
        channel = self.channel
        assert channel, "no channel"
        print("map read-only:", channel.shmem_map(2, self.fd, PAGE, 0, PAGE, wait=True), flush=True)
        channel.reset()  # forgets it, so that the front-end has to find the overlap
        print("map over it:", channel.shmem_map(2, self.fd, PAGE, 0, 2 * PAGE, wait=True), flush=True)
        print("map:", channel.shmem_map(0, self.fd, 0, 2 * PAGE, 2 * PAGE, writable=True, wait=True), flush=True)
        print("unmap:", channel.shmem_unmap(0, 2 * PAGE, 2 * PAGE, wait=True), flush=True)
        print("map again:", channel.shmem_map(0, self.fd, 0, 3 * PAGE, PAGE, wait=True), flush=True)
        print("add:", channel.shared_object_add(OBJECT), flush=True)
        found = channel.shared_object_lookup(OBJECT)  # for which the front-end asks us, without saying which (QEMU 11.1)
        print("found:", found is not None and os.path.sameopenfile(found, self.fd), flush=True)
        if found is not None:
            os.close(found)
        print("remove:", channel.shared_object_remove(OBJECT), flush=True)


if __name__ == "__main__":
    sys.exit(run_device("rng", lambda _: AskingRng()))
