"""A virtio entropy device (virtio 1.3 §5.4): `python3 -m devices.rng --socket-path /run/rng.sock`."""

import os
import sys

from vhost_user import VhostUserBackendMut, VringT, run_device


class Rng(VhostUserBackendMut):
    """One queue; fills whatever the driver hands out with random bytes."""

    def process_queue(self, vring: VringT) -> None:
        for chain in vring:
            vring.add_used(chain, chain.write(os.urandom(chain.writable_len)))


if __name__ == "__main__":
    sys.exit(run_device("rng", lambda _: Rng()))
