"""`csrc/` as operators: built on first use, kept in the cache directory, loaded as `torch.ops.rose_native`.

A build is named by a digest of its sources, the torch version and the platform, so that nothing stale is ever loaded; one made ahead
of time (`ROSE_BUILD_EXT=1 pip install --no-build-isolation .`) lies beside this file under the same name. Where there is no compiler, or a
build fails, one warning says so and names the log, and plain PyTorch serves.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from rose_kernels.cache import cache_dir

HERE = Path(__file__).parent
log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The native kernels cannot be built here; the message says why, and where the compiler's words are."""


def sources() -> list[Path]:
    """The C++ and CUDA files, headers included: in the package where it was installed, beside it in a source tree."""
    folder = HERE / "csrc"
    folder = folder if folder.is_dir() else HERE.parent / "csrc"
    return sorted(file for pattern in ("*.h", "*.cpp", "*.cu") for file in folder.glob(pattern))


def with_cuda() -> bool:
    """Whether the CUDA kernels are part of a build made here: torch has CUDA and the toolkit that it finds has nvcc."""
    if torch.version.cuda is None:
        return False
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists()


CPP_FLAGS = ["-O3", "-fopenmp"]
# Every chip that the kernels are checked for, and what later ones translate: a cache may be shared by machines with other GPUs, or none.
CUDA_FLAGS = ["-O3", *(f"-gencode=arch=compute_{a},code={kind}_{a}" for a, kind in (("80", "sm"), ("90", "sm"), ("90", "compute")))]


def library_name(cuda: bool) -> str:
    """The file name of the build that fits these sources, this torch and this platform, with or without the CUDA kernels."""
    digest = hashlib.sha256()
    parts = (torch.__version__, platform.system(), platform.machine(), torch.version.cuda if cuda else "", CPP_FLAGS, CUDA_FLAGS)
    digest.update(repr(parts).encode())
    for file in sources():
        digest.update(file.name.encode() + b"\n" + file.read_bytes())
    return f"rose_native-{digest.hexdigest()[:16]}.so"


def find() -> Path | None:
    """The library, built ahead of time or by an earlier process, or None. One with CUDA kernels comes first where torch has CUDA."""
    names = [library_name(cuda) for cuda in ((True, False) if torch.version.cuda and not with_cuda() else (with_cuda(),))]
    places = (HERE, cache_dir() / "native")
    return next((folder / name for name in names for folder in places if (folder / name).exists()), None)


def tool_path() -> str:
    """PATH, with this interpreter's environment first: its tools are found without its having been activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def compile_into(folder: Path) -> Path:
    """Compile the sources within `folder`; returns the library. RuntimeError with the compiler's words, OSError."""
    os.environ["PATH"] = tool_path()
    from torch.utils.cpp_extension import load

    cuda = with_cuda()
    units = [str(file) for file in sources() if file.suffix == ".cpp" or (cuda and file.suffix == ".cu")]
    flags = ["-O3", "-fopenmp"] + (["-DROSE_CUDA"] if cuda else [])
    load(
        "rose_native",
        units,
        extra_cflags=flags,
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
        with_cuda=cuda,
        is_python_module=False,
    )
    return folder / "rose_native.so"


def build() -> Path:
    """Build into the cache directory, once: a second process waits for the first and takes what it made. BuildError."""
    missing = [name for name in (os.environ.get("CXX", "c++"), "ninja") if not shutil.which(name, path=tool_path())]
    if missing:
        raise BuildError(f"there is no {' and no '.join(missing)}")
    target = cache_dir() / "native" / library_name(with_cuda())
    words = target.with_suffix(".log")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _held(target.with_suffix(".lock")):
        if target.exists():
            return target
        if words.exists():
            raise BuildError(f"an earlier build failed; its log is {words}, and without it the build is tried again")
        log.warning("building the native kernels, once (half a minute): %s", target)
        with tempfile.TemporaryDirectory(prefix=f".{target.stem}.", dir=target.parent) as folder:
            # In a process of its own: the tools' imports stay out of this one.
            command = [sys.executable, "-c", f"import sys, {__name__} as native; native.compile_into(native.Path(sys.argv[1]))", folder]
            paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
            if done.returncode < 0:  # killed: nothing is known of the sources
                raise BuildError(f"the compiler was ended by signal {-done.returncode}")
            if done.returncode:
                words.write_text(done.stdout + done.stderr)
                raise BuildError(f"the build failed; its log is {words}")
            os.replace(Path(folder, "rose_native.so"), target)
    return target


@cache
def served() -> frozenset[str]:
    """The device types that the native kernels serve here; builds and loads them on the first call, and warns where that fails."""
    try:
        torch.ops.load_library(find() or build())
    except (RuntimeError, OSError) as e:
        warnings.warn(f"the native kernels do not serve: {e}. Plain PyTorch does instead.", RuntimeWarning, stacklevel=2)
        return frozenset()
    return frozenset({"cpu", "cuda"} if hasattr(torch.ops.rose_native, "factor") else {"cpu"})


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the system takes back when the process ends, however it ends."""
    with open(path, "w") as file:
        if sys.platform == "win32":  # no native build there
            yield
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            yield
