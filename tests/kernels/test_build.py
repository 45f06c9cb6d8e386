"""The build of csrc: named by what goes into it, made once, and never in the way of plain PyTorch."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from rose_kernels import native

ROOT = Path(__file__).parents[2]
NEEDS_COMPILER = pytest.mark.skipif(not native.served(), reason="csrc cannot be built on this machine")
SERVES = "import rose_kernels.backend as b, torch; print(b.backends()['rank_update_']['cpu'])"


def start(cache, code=SERVES, **environment):
    env = {k: v for k, v in os.environ.items() if k != "ROSE_BACKEND"} | {"ROSE_CACHE": str(cache), "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


def compiler(path, script):
    """A compiler of a shell script's making; its path."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_name_follows_sources_and_torch(tmp_path, monkeypatch):
    copies = [Path(shutil.copy(file, tmp_path)) for file in native.sources()]
    name = native.library_name(native.with_cuda())
    monkeypatch.setattr(native, "sources", lambda: copies)
    assert native.library_name(native.with_cuda()) == name
    copies[0].write_text(copies[0].read_text() + "\n")
    changed = native.library_name(native.with_cuda())
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len({name, changed, native.library_name(native.with_cuda())}) == 3


@NEEDS_COMPILER
def test_two_processes_build_once(tmp_path):
    quick = compiler(tmp_path / "quick-c++", 'exec c++ "$@" -O0')  # a quarter of the time: who builds is asked, not how well
    begin = partial(start, tmp_path, f"import logging; logging.basicConfig(level=logging.INFO)\n{SERVES}", CXX=quick)
    both = [finish(process) for process in [begin(), begin()]]
    assert [out for out, _ in both] == ["csrc", "csrc"]
    assert sum("building the native kernels" in err for _, err in both) == 1
    assert sorted(file.suffix for file in (tmp_path / "native").iterdir()) == [".lock", ".so"]
    began = (tmp_path / "native" / native.library_name(native.with_cuda())).stat().st_mtime_ns
    out, err = finish(begin())
    assert out == "csrc" and "building" not in err
    assert (tmp_path / "native" / native.library_name(native.with_cuda())).stat().st_mtime_ns == began


def test_without_a_compiler_plain_torch_serves(tmp_path):
    out, err = finish(start(tmp_path, CXX="no-such-compiler"))
    assert out == "reference"
    assert err.count("RuntimeWarning") == 1 and "there is no no-such-compiler" in err


@NEEDS_COMPILER
def test_a_failed_build_warns_once_and_names_its_log(tmp_path):
    picky = compiler(tmp_path / "picky-c++", """case "$*" in *-c*) echo 'strange dialect'; exit 1;; esac\nexec c++ "$@\"""")
    out, err = finish(start(tmp_path, CXX=picky))  # it tells its version, and compiles nothing
    log = (tmp_path / "native" / native.library_name(native.with_cuda())).with_suffix(".log")
    assert out == "reference" and err.count("RuntimeWarning") == 1 and str(log) in err
    assert "strange dialect" in log.read_text()
    out, err = finish(start(tmp_path))
    assert out == "reference" and "an earlier build failed" in err and str(log) in err


def test_a_backend_that_was_asked_for_and_is_missing_is_an_error(tmp_path):
    code = "import torch, rose_kernels as r; r.add_low_rank_([torch.zeros(2, 2)], [torch.zeros(2, 1)], [torch.zeros(1, 2)])"
    process = start(tmp_path, code, CXX="no-such-compiler", ROSE_BACKEND="csrc")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "BackendError: ROSE_BACKEND is csrc, which is not built for cpu here" in err
