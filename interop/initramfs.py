"""What a guest boots: a kernel, and an initramfs of busybox, modules, tools and the agent that runs commands.

Both are cached by the hash of all that goes into them. The kernel is unpacked to its ELF file: QEMU starts that through
PVH, which spares the guest the slow unpacking under emulation.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import re
import shutil
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import sid
from .support import missing, needs

# The agent: one line in (a script in base64), one line out (exit status, size of the output), then the output. The name
# of its terminal is the kernel's argument `agent=`. Modules are loaded in the order in which they were packed.
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /mnt /bin /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in /modules/*; do insmod "$module"; done
exec <"$agent" >"$agent"
stty raw -echo
echo READY
while read -r line; do
    echo "$line" | base64 -d >/tmp/.script
    sh /tmp/.script </dev/null >/tmp/.output 2>&1
    echo "$? $(stat -c %s /tmp/.output)"
    cat /tmp/.output
done
"""
TOOLS = ("fio", "mkfs.ext4", "e2fsck")
BUSYBOX = "/bin/busybox"
# Ext4's checksums are a module by themselves in Debian 12's kernel, and built in later: what isn't there is left out.
MODULES = ("virtio_pci", "virtio_blk", "virtio_rng", "crc32c_generic", "crc32c_intel", "ext4", "virtio_crypto")
LZ4_LEGACY = bytes.fromhex("02214c18")
ZSTD = bytes.fromhex("28b52ffd")


@dataclass(frozen=True)
class Kernel:
    image: Path  # a bzImage
    modules: Path  # the folder that has modules.dep


def debian12_kernel() -> Kernel:
    """The newest kernel that is installed on this machine."""
    found = [p for p in Path("/boot").glob("vmlinuz-*") if modules_of(p).is_dir()]
    if not found:
        missing("no kernel in /boot (linux-image-cloud-amd64)")
    newest = max(found, key=lambda p: sid.version_key(p.name))
    return Kernel(newest, modules_of(newest))


def modules_of(image: Path) -> Path:
    return Path("/lib/modules") / image.name.removeprefix("vmlinuz-")


def sid_kernel() -> Kernel:
    modules = sid.ROOT / "usr/lib/modules" / sid.kernel_release()
    return Kernel(modules / "vmlinuz", modules)


def elf_kernel(kernel: Kernel) -> Path:
    """The ELF file inside a bzImage; the boot protocol's header says where it is."""
    data = kernel.image.read_bytes()
    out = sid.CACHE / f"vmlinux-{hashlib.sha256(data).hexdigest()[:16]}"
    if not out.exists():
        offset, length = struct.unpack_from("<II", data, 0x248)
        start = (data[0x1F1] + 1) * 512 + offset
        _write(out, _decompress(data[start : start + length - 4]))  # the last 4 bytes are the unpacked size
    return out


def _decompress(data: bytes) -> bytes:
    if data.startswith(LZ4_LEGACY):
        return _pipe("lz4", data)
    if data.startswith(ZSTD):
        return _pipe("zstd", data)
    return lzma.decompress(data)


def _pipe(tool: str, data: bytes) -> bytes:
    needs(tool)
    return subprocess.run([tool, "-d", "-c", "-"], input=data, stdout=subprocess.PIPE, check=True).stdout


def _write(path: Path, data: bytes) -> None:
    """Under a temporary name first: a file in the cache is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sid.locked(path.name):
        new = path.with_name(path.name + ".new")
        new.write_bytes(data)
        new.rename(path)


@functools.cache
def build(modules: Path, names: tuple[str, ...] = MODULES, tools: tuple[str, ...] = TOOLS) -> Path:
    """The initramfs for the kernel of `modules`; busybox, fio and e2fsprogs come from this machine."""
    needs("busybox", *tools)
    files = {"init": (0o755, INIT.encode())}
    for number, module in enumerate(_load_order(modules, names)):
        files[f"modules/{number:02}-{module.name.removesuffix('.xz')}"] = (0o644, _module(module))
    for program in (BUSYBOX, *(str(shutil.which(t)) for t in tools)):
        for path in (Path(program), *_libraries(program)):
            files[str(path).lstrip("/")] = (0o755, path.read_bytes())
    archive = _cpio(files)
    out = sid.CACHE / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
    if not out.exists():
        _write(out, archive)
    return out


def _load_order(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """The modules' files, each after those that it needs. modules.dep lists what is needed last first."""
    needed: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text(encoding="ascii").splitlines():
        file, _, dependencies = line.partition(":")
        needed[Path(file).name.partition(".ko")[0].replace("-", "_")] = [file, *dependencies.split()]
    files = [f for name in names for f in reversed(needed.get(name, []))]
    return [modules / f for f in dict.fromkeys(files)]


def _module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _libraries(program: str) -> list[Path]:
    """The program's shared libraries and its loader, as ldd lists them."""
    listed = subprocess.run(["ldd", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return [Path(p) for p in re.findall(r"(/\S+) \(0x", listed.stdout)]


def _cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A "newc" archive of regular files, with their folders and a console for init."""
    folders = sorted({str(f) for name in files for f in Path(name).parents} - {"."})
    entries = [_entry(f, stat.S_IFDIR | 0o755, b"") for f in [*folders, *({"dev"} - set(folders))]]
    entries.append(_entry("dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1)))
    entries += [_entry(name, stat.S_IFREG | mode, data) for name, (mode, data) in sorted(files.items())]
    return b"".join([*entries, _entry("TRAILER!!!", 0, b"")])


def _entry(name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    # inode, mode, uid, gid, links, mtime, size, the file's device, a node's device, size of the name, checksum
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
