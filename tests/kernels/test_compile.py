"""Every kernel compiles for sm_80 and sm_90 without a GPU, spills nothing, and fits the chip."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from rose_kernels import native
from rose_kernels.backend import HAVE_TRITON

REGISTERS = 255  # a thread's, on both chips
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes a program may have (CUDA programming guide, compute capabilities)


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed on this machine")
def test_kernels_compile_without_spills(tmp_path, capsys):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_all", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{'kernel':26s} {'arch':>6s} {'registers':>9s} {'shared':>7s} {'local':>6s} {'spills':>6s}")
        for row in rows:
            print(f"{row['kernel']:26s} sm_{row['arch']:<3d} {row['registers']:9d} {row['shared']:7d} {row['local']:6d} {row['spills']:6d}")
    assert {row["arch"] for row in rows} == {80, 90} and len({row["kernel"] for row in rows}) == 11
    for row in rows:
        assert row["spills"] == row["local"] == 0, row
        assert row["registers"] <= REGISTERS and row["shared"] <= SHARED[row["arch"]], row


CUDA_FILES = [file for file in native.sources() if file.suffix == ".cu"]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed on this machine")
@pytest.mark.parametrize("source", CUDA_FILES, ids=lambda file: file.name)
def test_cuda_compiles_without_spills(source, tmp_path, capsys):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    no = [
        f"-D__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    ]  # as torch does
    command = ["nvcc", "-std=c++20", "-O3", *no, *targets, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    with capsys.disabled():
        print(f"\n{'csrc kernel':60s} {'arch':>7s} {'registers':>9s} {'stack':>6s} {'spills':>6s}")
        for name, arch, stack, stores, loads, registers in kernels:
            print(f"{name[:60]:60s} sm_{arch:<4s} {registers:>9s} {stack:>6s} {int(stores) + int(loads):6d}")
    assert len(kernels) == 8  # the fused factor, and the write in three dtypes, on two chips
    assert all((stack, stores, loads) == ("0", "0", "0") for _, _, stack, stores, loads, _ in kernels), kernels
