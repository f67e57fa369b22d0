"""A small disk of a test's own, which can be filled."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs, or skip the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily: a process that a failed test has left behind may still have its files open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Take all the room that there is but so many bytes; the file to delete makes room again."""
    filler = disk / "filler"
    volume = os.statvfs(disk)
    with filler.open("ab") as file:
        os.posix_fallocate(file.fileno(), file.tell(), volume.f_bavail * volume.f_frsize - leave)
    return filler
