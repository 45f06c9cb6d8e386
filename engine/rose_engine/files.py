"""Files that are either whole or not there, and files that one process holds at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is flushed to disk and takes the name, on any exception it is removed.

    The name is on disk too when the block ends, so that files that are written one after the other survive in that order.

    The target's directory is made if it is missing. OSError as the file system gives it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _flush_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_files(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Write files by name into a folder, each whole or not at all."""
    for name, content in contents.items():
        with replacing(Path(folder) / name) as temporary:
            temporary.write_bytes(content)


class Busy(RuntimeError):
    """Another process holds a lock; the message says which, and since when."""


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold a file as a lock, made if it is missing; the system frees it when the process ends, however it does.

    Busy, at once, where another process holds it; OSError where it cannot be opened as a plain file.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    with open(descriptor, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Busy(lock.read().strip() or "another process") from e
        lock.truncate()
        lock.write(f"process {os.getpid()} since {datetime.now(UTC).isoformat(timespec='seconds')}")
        lock.flush()
        yield


def _flush_directory(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
