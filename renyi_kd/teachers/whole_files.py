"""Files that are there whole or not at all, in a folder that processes and computers share."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from renyi_kd.teachers.checked_tensors import Memory

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
# Where locks are of no use: no file takes so many seconds to write.
_ABANDONED_AFTER = 3600
_ATTEMPTS = 10


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
            temporary.replace(path)
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
                    # Over NFS a lock takes the right to write.
                    with path.open("r+b") as file:
                        abandoned = _is_abandoned(file.fileno())
                    if abandoned:
                        path.unlink()


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:
        raise OSError(errno.ENOLCK, "Windows has no such locks") from None
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_abandoned(descriptor: int) -> bool:
    try:
        _lock(descriptor)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(descriptor).st_mtime > _ABANDONED_AFTER
