"""A file system device without files, but with state that migrates: `python3 -m interop.stateful_fs --state FILE …` for test_migration.

What is saved is the file's content; what is loaded replaces it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import BinaryIO

from vhost_user import VhostUserBackendMut, run_device


class StatefulFs(VhostUserBackendMut):
    """Queues that no driver uses."""

    num_queues = 2

    def __init__(self, file: Path) -> None:
        self.file = file

    def save_state(self, file: BinaryIO) -> None:
        file.write(self.file.read_bytes())

    def load_state(self, file: BinaryIO) -> None:
        self.file.write_bytes(file.read())


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", type=Path, required=True, metavar="FILE", help="where the state is")


if __name__ == "__main__":
    sys.exit(run_device("fs", lambda options: StatefulFs(options.state), _options))
