"""The directory for what can be made again: compiled kernels, the embedded model's copy."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """`ROSE_CACHE`, or the folder `rose` in the platform's user cache."""
    if os.environ.get("ROSE_CACHE"):
        return Path(os.environ["ROSE_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/rose"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "rose"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rose"
