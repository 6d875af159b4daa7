"""The tests in each of the three ways to vendor the framework, on each CPython found.

    python3 -m tools.layouts                              all of it
    python3 -m tools.layouts --layout bundle -k Ring      some of it
    python3 -m tools.layouts --list                       the interpreters

flat       the three files and test_all.py in a folder of their own
package    the same inside a package, myapp/_vendor/
bundle     test_all.py against the one file of tools/bundle.py

Interpreters are python3.10 and later on PATH, and those of pyenv.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tools.bundle import ROOT, bundle

MODULES = ("guest_memory.py", "vring.py", "vhost_user.py")
TESTS = "test_all.py"
OLDEST = (3, 10)
TIMEOUT = 600.0


@dataclass(frozen=True)
class Python:
    """An interpreter."""

    path: str
    version: str


@dataclass(frozen=True)
class Outcome:
    """What a run of the tests came to."""

    python: Python
    layout: str
    status: int
    seconds: float
    output: str

    @property
    def closing(self) -> str:
        """The runner's own last words."""
        counted = re.findall(r"^Ran \d+ tests?", self.output, re.MULTILINE)
        return f"{counted[-1] if counted else 'no tests ran'}, {self.output.rstrip().rpartition(chr(10))[2] or 'no output'}"


# ---------------------------------------------------------------------------------------------------------------------------
# Interpreters
# ---------------------------------------------------------------------------------------------------------------------------


def pythons() -> list[Python]:
    """Each CPython from 3.10 on that runs here, once for each version, oldest first."""
    found: dict[tuple[int, ...], Python] = {}
    for path in _candidates():
        python = _try(path)
        if python is not None:
            found.setdefault(tuple(int(part) for part in re.findall(r"\d+", python.version)), python)
    return [found[version] for version in sorted(found)]


def _candidates() -> Iterator[str]:
    yield sys.executable
    for minor in range(OLDEST[1], 30):
        path = shutil.which(f"python3.{minor}")
        if path:
            yield path
    yield from sorted(map(str, Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob("versions/*/bin/python")))


def _try(path: str) -> Python | None:
    """The interpreter, if it runs (a shim of pyenv may not), and is one for us."""
    ask = "import os, platform, sys; print(platform.python_implementation(), sys.version_info[:2] >= (3, 10), platform.python_version())"
    done = subprocess.run([path, "-c", ask], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    answer = done.stdout.split()
    return Python(path, answer[2]) if done.returncode == 0 and answer[:2] == ["CPython", "True"] else None


# ---------------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------------


def _copy(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(ROOT / name, folder)


def flat(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Set the layout up in an empty folder. Returns what follows `python3 -m unittest` there, and additions to the environment."""
    _copy(folder, *MODULES, TESTS)
    return [], {}


def package(folder: Path) -> tuple[list[str], dict[str, str]]:
    """As `flat`."""
    vendor = folder / "myapp" / "_vendor"
    _copy(vendor, *MODULES, TESTS)
    for place in vendor, vendor.parent:
        (place / "__init__.py").touch()
    return ["myapp._vendor.test_all"], {}


def bundled(folder: Path) -> tuple[list[str], dict[str, str]]:
    """As `flat`."""
    _copy(folder, TESTS)
    one = folder / "one" / "vhost_user.py"  # not where an import would find it by chance
    one.parent.mkdir()
    one.write_text(bundle(), encoding="utf-8")
    return [], {"VHOST_USER_BUNDLE": str(one)}


LAYOUTS: dict[str, Callable[[Path], tuple[list[str], dict[str, str]]]] = {"flat": flat, "package": package, "bundle": bundled}


def run(python: Python, layout: str, select: Sequence[str] = ()) -> Outcome:
    """Run the tests in one layout on one interpreter."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"vhost-user-{layout}-") as folder:
        words, additions = LAYOUTS[layout](Path(folder))
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VHOST_USER_BUNDLE")}
        argv = [python.path, "-m", "unittest", *words, *(word for pattern in select for word in ("-k", pattern))]
        try:
            done = subprocess.run(
                argv,
                cwd=folder,
                env={**environment, **additions},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            )
            status, output = done.returncode, done.stdout.decode(errors="replace")
        except subprocess.TimeoutExpired as error:
            status, output = 1, f"{(error.output or b'').decode(errors='replace')}\nhangs: nothing after {TIMEOUT:.0f} s\n"
    if "Ran 0 tests" in output:
        status = status or 1  # a layout where no test is found has shown nothing
    return Outcome(python, layout, status, time.monotonic() - start, output)


# ---------------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.layouts", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="show the interpreters that are found, one path on each line, and end")
    parser.add_argument("--python", action="append", metavar="PATH", help="this interpreter instead of those that are found; may be repeated")
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS), help="this layout instead of all; may be repeated")
    parser.add_argument("-k", dest="select", action="append", default=[], metavar="PATTERN", help="as unittest's")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    arguments = parse(argv)
    found = [python for path in arguments.python if (python := _try(path))] if arguments.python else pythons()
    if arguments.list:
        print("\n".join(python.path for python in found))
        return 0
    if not found:
        print("no CPython of 3.10 or later among those that were named", file=sys.stderr)
        return 1
    failed = 0
    # One after another: tests use what a machine has once, such as its huge pages.
    for python, layout in product(found, arguments.layout or LAYOUTS):
        outcome = run(python, layout, arguments.select)
        failed += outcome.status != 0
        if outcome.status:
            print(outcome.output.rstrip())
        print(f"{python.version:10}{layout:10}{outcome.closing}  ({outcome.seconds:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
