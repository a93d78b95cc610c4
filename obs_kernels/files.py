# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obs_kernels.errors import WorkFolderLockedError


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` to ``path`` through a temporary file beside it."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write ``data`` to ``path`` through a temporary file beside it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its name when the block ends well.

    An existing one is replaced then.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    os.chmod(work, 0o755)
    try:
        yield work
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old.")) / target.name
            os.replace(target, old)
        try:
            os.replace(work, target)
        except BaseException:
            if old is not None:
                os.replace(old, target)
                old.parent.rmdir()
            raise
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def hold_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """``path`` for this process alone; made if it is missing. The hold ends with the process, however that ends.

    Raises:
        WorkFolderLockedError: another process holds it; the text has its pid.
    """
    from filelock import FileLock, Timeout

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / ".lock.pid"  # a file of its own: whoever tries the lock empties the lock's own file
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        pid = owner.read_text().strip() if owner.is_file() else "unknown"
        raise WorkFolderLockedError(
            f"work_dir {folder} is in use by process {pid}; wait for it, or pass another folder"
        ) from None
    try:
        write_text(owner, f"{os.getpid()}\n")
        yield folder
        owner.unlink(missing_ok=True)
    finally:
        lock.release()
