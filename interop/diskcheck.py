"""What is asked of a disk inside a guest: the same for each guest and each configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from .guest import Guest

MIB = 1 << 20

# VIRTIO feature bits as the guest shows them.
RO, MQ, INDIRECT_DESC, EVENT_IDX, ACCESS_PLATFORM, RING_PACKED, IN_ORDER = 5, 12, 28, 29, 33, 34, 35

_FILESYSTEM = """
set -e
mkfs.ext4 -q {dev}
mount -t ext4 {dev} /mnt
dd if=/dev/urandom of=/mnt/data bs=64k count=128 2>/dev/null
mkdir /mnt/many; for i in $(seq 50); do echo "file $i" >/mnt/many/$i; done
before=$(cat /mnt/data /mnt/many/* | md5sum)
umount /mnt
mount -t ext4 {dev} /mnt
[ "$before" = "$(cat /mnt/data /mnt/many/* | md5sum)" ] || {{ echo "other data after the remount"; exit 1; }}
umount /mnt
e2fsck -f -n {dev}
"""

_FIO = """
set -e
mount -t ext4 {dev} /mnt
fio --name=verify --filename=/mnt/fio --size=12m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --direct=1 \\
    --verify=crc32c --verify_fatal=1 --randseed={seed} --output=/tmp/fio || {{ cat /tmp/fio; exit 1; }}
umount /mnt
e2fsck -f -n {dev}
"""


def features(guest: Guest, dev: str = "/dev/vda") -> set[int]:
    """The feature bits that the guest's driver acknowledged."""
    bits = guest.run(f"cat /sys/block/{Path(dev).name}/device/features")
    return {n for n, bit in enumerate(bits) if bit == "1"}


def filesystem(guest: Guest, dev: str = "/dev/vda") -> None:
    """A file system is made, filled, found again after a remount, and clean."""
    guest.run(_FILESYSTEM.format(dev=dev), timeout=240)


def fio_verify(guest: Guest, dev: str = "/dev/vda", seed: int = 1) -> None:
    """Random writes at depth 32, each block read back and its checksum compared."""
    guest.run(_FIO.format(dev=dev, seed=seed), timeout=240)


def same_content(guest: Guest, image: Path, dev: str = "/dev/vda") -> None:
    """All of the image on the host equals what the guest reads back from the device itself."""
    inside = guest.run(f"sync; echo 3 >/proc/sys/vm/drop_caches; md5sum <{dev}", timeout=240)
    outside = hashlib.md5(image.read_bytes()).hexdigest()
    if inside.split()[0] != outside:
        raise AssertionError(f"the guest reads other data ({inside}) than {image} has ({outside})")


def expect_features(guest: Guest, with_: Iterable[int], without: Iterable[int], dev: str = "/dev/vda") -> None:
    acknowledged = features(guest, dev)
    if not acknowledged.issuperset(with_) or acknowledged.intersection(without):
        raise AssertionError(f"acknowledged {sorted(acknowledged)}; wanted {with_} and not {without}")
