"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def _flush_directory(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
