"""Files that are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of ``path`` once it is written, and is removed if that fails.

    What a process that was killed has left of the same file is removed first.
    """
    _remove_orphans(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    descriptor = _locked(temporary)
    try:
        yield temporary
        if not temporary.stat().st_size:
            raise ValueError(f"{path}: must be written to the path that whole_file gives, got nothing; write it there")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """Make a file, and hold a lock on it that goes with the process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(descriptor, fcntl.LOCK_EX)
        # Another process may have taken it for an orphan before it had the lock.
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _remove_orphans(path: Path) -> None:
    pattern = re.compile(rf"\.\d+\.{re.escape(path.name)}")
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        if not pattern.fullmatch(other.name):
            continue
        try:
            descriptor = os.open(other, os.O_RDWR)
        except OSError:
            continue
        # Who writes it holds the lock.
        if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            other.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Return whether there is a lock now; some file systems have none, and then nothing is ever an orphan."""
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        return False
    return True
