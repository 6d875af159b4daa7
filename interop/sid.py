"""The newest peers: a chroot of Debian sid, built when it is missing, and commands run inside it.

The chroot lives in the cache folder (``VHOST_USER_INTEROP_CACHE``, else /var/cache/vhost-user-interop) and is built
under a temporary name, so that a broken build never looks like a finished one. A stamp inside names what was
installed: another package list builds it anew. ``python3 -m interop.sid`` builds it ahead of time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

CACHE = Path(os.environ.get("VHOST_USER_INTEROP_CACHE", "/var/cache/vhost-user-interop"))
ROOT = CACHE / "sid"

PACKAGES = (
    "qemu-system-x86",
    "qemu-utils",
    "qemu-block-extra",  # qemu-io and qemu-img as front-ends: virtio-blk-vhost-user
    "libblkio1",
    "user-mode-linux",
    "cargo",  # builds rust-peer, from Debian's packaged crates
    "gcc",
    "libc6-dev",
    "librust-vhost-user-backend-dev",
    "librust-virtio-queue-dev",
)
# The kernel as its parts: linux-image would bring an initramfs generator along. V is the newest that is offered.
KERNEL_PACKAGES = ("linux-modules-V", "linux-binary-V", "linux-base-V")
KERNEL_NAME = re.compile(r"linux-modules-(\d[\w.+~-]*-amd64)")

# Documentation is left out, and no service is started in the chroot.
DPKG_CONF = """\
path-exclude /usr/share/doc/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/man/*
force-unsafe-io
"""
POLICY_RC_D = "#!/bin/sh\nexit 101\n"
APT_GET = (
    "env",
    "DEBIAN_FRONTEND=noninteractive",
    "apt-get",
    "-q",
    "-y",
    "-o",
    "Acquire::Check-Valid-Until=false",
    "-o",
    "APT::Sandbox::User=root",
)

# Mounts disappear with the namespace, whatever becomes of the command. $1 is the chroot, $2 how many folders to bind.
_ENTER = """
set -e
root=$1 n=$2; shift 2
for d in /dev /proc /sys; do mount --rbind "$d" "$root$d"; done
while [ "$n" -gt 0 ]; do mkdir -p "$root$1"; mount --bind "$1" "$root$1"; shift; n=$((n - 1)); done
exec chroot "$root" "$@"
"""


class SidError(Exception):
    """The chroot can't be built or used here; the text says why."""


def command(argv: Iterable[str], *, binds: Iterable[Path] = (), root: Path | None = None) -> list[str]:
    """The command line that runs `argv` inside the chroot, under the same process id as the caller gives it.

    The temporary folder and `binds` show there under their own names. /tmp is a bind like the others.
    """
    folders = dict.fromkeys(str(p.resolve()) for p in (Path(tempfile.gettempdir()), *binds))
    enter = ["unshare", "-m", "--propagation", "private", "sh", "-c", _ENTER, "enter-sid"]
    return [*enter, str(root or ROOT), str(len(folders)), *folders, *argv]


def ensure() -> Path:
    """The chroot's path; builds it first when it is missing or its package list changed."""
    if _is_current():
        return ROOT
    if os.geteuid() != 0:
        raise SidError(f"{ROOT} is missing or out of date, and only root can build it: python3 -m interop.sid")
    for tool in ("debootstrap", "unshare", "chroot"):
        if shutil.which(tool) is None:
            raise SidError(f"{tool} is needed to build {ROOT}")
    with locked("sid"):
        if not _is_current():
            _build()
    return ROOT


def kernel_release() -> str:
    """The release name of the chroot's kernel, as its modules folder is called."""
    return max((ROOT / "usr/lib/modules").iterdir(), key=lambda p: version_key(p.name)).name


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time builds `name` in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{name}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _stamp() -> str:
    return hashlib.sha256("\n".join(PACKAGES + KERNEL_PACKAGES).encode()).hexdigest()


def _is_current() -> bool:
    try:
        return (ROOT / "interop.stamp").read_text(encoding="ascii") == _stamp()
    except FileNotFoundError:
        return False


def _build() -> None:
    """debootstrap and one apt-get install under a temporary name; the rename is the last step."""
    for left in CACHE.glob("sid.building-*"):
        shutil.rmtree(left)
    new = Path(tempfile.mkdtemp(prefix="sid.building-", dir=CACHE))
    try:
        new.chmod(0o755)
        log = CACHE / "sid.log"
        with open(log, "wb") as out:
            _install(new, _Logged(log, out.fileno()))
        (new / "interop.stamp").write_text(_stamp(), encoding="ascii")
        if ROOT.exists():
            ROOT.rename(new.with_name(new.name + "-old"))
        new.rename(ROOT)
    finally:
        for left in CACHE.glob("sid.building-*"):
            shutil.rmtree(left)


def _install(new: Path, run: _Logged) -> None:
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    run(["debootstrap", "--variant=minbase", f"--keyring={keyring}", "sid", str(new), mirror()])
    (new / "etc/dpkg/dpkg.cfg.d/interop").write_text(DPKG_CONF, encoding="ascii")
    policy = new / "usr/sbin/policy-rc.d"
    policy.write_text(POLICY_RC_D, encoding="ascii")
    policy.chmod(0o755)
    # What this machine needs to reach the mirror (a proxy, say), the chroot needs too.
    acquire = subprocess.run(["apt-config", "dump", "--no-empty", "--format", '%f "%v";%n', "Acquire"], stdout=subprocess.PIPE, check=True)
    (new / "etc/apt/apt.conf.d/90interop").write_bytes(acquire.stdout)
    for name in ("/etc/hosts", "/etc/resolv.conf"):
        if os.path.exists(name):
            shutil.copyfile(name, str(new) + name)
    run(command([*APT_GET, "update"], root=new))
    kernel = _newest_kernel(new)
    wanted = [*PACKAGES, *(p[:-1] + kernel for p in KERNEL_PACKAGES)]
    run(command([*APT_GET, "--no-install-recommends", "install", *wanted], root=new))
    run(command([*APT_GET, "clean"], root=new))


class _Logged:
    """Runs commands with their output in the build's log, and shows its end when one fails."""

    def __init__(self, log: Path, fd: int) -> None:
        self.log = log
        self.fd = fd

    def __call__(self, argv: list[str]) -> None:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=self.fd, stderr=self.fd, check=False)
        if done.returncode:
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise SidError(f"status {done.returncode} from: {shlex.join(argv)}\n" + "\n".join(tail))


def _newest_kernel(root: Path) -> str:
    search = subprocess.run(
        command(["apt-cache", "search", "--names-only", "^linux-modules-.*-amd64$"], root=root),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    names = [m[1] for line in search.stdout.splitlines() if (m := KERNEL_NAME.fullmatch(line.split()[0]))]
    plain = [n for n in names if "cloud" not in n and "rt" not in n.split("-")]
    if not plain:
        raise SidError("the mirror offers no linux-modules-…-amd64")
    return max(plain, key=version_key)


def version_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", name)]


def mirror() -> str:
    """The Debian mirror that this machine's own apt uses."""
    texts = [p.read_text(encoding="utf-8") for p in sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.list"))]
    lines = [line for p in lists if p.exists() for line in p.read_text(encoding="utf-8").splitlines()]
    for uri in (*_deb822_uris(texts), *_one_line_uris(lines)):
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise SidError("no Debian mirror in /etc/apt/sources.list and sources.list.d")


def _deb822_uris(texts: Iterable[str]) -> Iterator[str]:
    for stanza in re.split(r"\n\s*\n", "\n\n".join(texts)):
        fields = {k.lower(): v.split() for k, _, v in (line.partition(":") for line in stanza.splitlines())}
        if "deb" in fields.get("types", []) and "main" in fields.get("components", []):
            yield from fields.get("uris", [])


def _one_line_uris(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        words = re.sub(r"\[[^]]*\]", "", line).split()
        if words[:1] == ["deb"] and "main" in words[3:]:
            yield words[1]


def main() -> int:
    try:
        print(ensure())
    except SidError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
