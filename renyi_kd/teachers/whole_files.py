"""Files that are there whole or not at all, in a folder that processes and computers share."""

from __future__ import annotations

import errno
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from renyi_kd.teachers.checked_tensors import Memory

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
# Where locks are of no use: no file takes so many seconds to write.
_ABANDONED_AFTER = 3600
_ATTEMPTS = 10
# Seconds, in all longer than a reader or a scanner has a file open.
_PAUSES = (0.01, 0.03, 0.1, 0.3, 1.0)


def write_whole(path: Path, parts: Sequence[Memory]) -> None:
    """Put a file in place of what was there; a link is replaced, not followed.

    Meanwhile its parts lie under a name of their own, beside it, with a lock that ends with the process. There is no
    fsync, which takes long: what is lost with the power must be found by the reader.

    Raises:
        OSError: the folder takes no such file. What was there stays, and nothing is left behind.

    """
    for _ in range(_ATTEMPTS):
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
        file = temporary.open("xb")
        try:
            with file:
                # Where it cannot be locked, it may be removed after an hour.
                with suppress(OSError):
                    _lock(file.fileno())
                file.writelines(parts)
            # Closed before: on NFS a full disk may be an error of that alone.
            _replace(temporary, path)
            return
        except FileNotFoundError:
            # Removed by a process that started before it was locked, or on a computer that does not see the lock.
            continue
        finally:
            with suppress(OSError):
                temporary.unlink()
    raise FileNotFoundError(errno.ENOENT, f"its temporary files were removed {_ATTEMPTS} times")


def remove_abandoned(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote, and no file that another one is writing.

    A process tells by its lock that it is writing. If it does so unseen, it loses its file and writes another. What
    cannot be removed stays, as in a folder that is read only: it does no harm.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
                with suppress(OSError):
                    if _is_abandoned(path):
                        path.unlink()


def _on_windows() -> bool:
    """Return whether there are no locks, and no file can be replaced that is open."""
    return find_spec("fcntl") is None


def _replace(temporary: Path, path: Path) -> None:
    for pause in _PAUSES if _on_windows() else ():
        with suppress(PermissionError):
            temporary.replace(path)
            return
        time.sleep(pause)
    temporary.replace(path)


def _lock(descriptor: int) -> None:
    if _on_windows():
        raise OSError(errno.ENOLCK, "Windows has no such locks")
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_abandoned(path: Path) -> bool:
    # There the process that writes a file could not name it as long as it is open here.
    if not _on_windows():
        # Over NFS a lock takes the right to write.
        with path.open("r+b") as file:
            try:
                _lock(file.fileno())
                return True
            except BlockingIOError:
                return False
            except OSError:
                # The file system has no locks.
                pass
    return time.time() - path.stat().st_mtime > _ABANDONED_AFTER
