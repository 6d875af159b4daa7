"""A virtio entropy device (virtio 1.3 §5.4): `python3 -m devices.rng --socket-path /run/rng.sock`."""

import os
import sys

from vhost_user import VhostUserBackendMut, VringT, run_device

MOST = 1 << 16  # bytes for one chain: a device may use less than there is (virtio 1.3 §5.4.6), and 4 GiB are not the driver's to have us make


class Rng(VhostUserBackendMut):
    """One queue; fills whatever the driver hands out with random bytes."""

    def process_queue(self, vring: VringT) -> None:
        for chain in vring:
            data = os.urandom(min(chain.writable_len, MOST))
            vring.add_used(chain, chain.write(data))


if __name__ == "__main__":
    sys.exit(run_device("rng", lambda _: Rng()))
