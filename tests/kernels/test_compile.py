"""Every kernel compiles for sm_80 and sm_90 without a GPU, spills nothing, and fits the chip."""

import json
import os
import subprocess
import sys

import pytest

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
