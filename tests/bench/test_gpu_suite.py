"""The GPU suite runs where there is no GPU, through the interpreter, and finds a kernel that is wrong."""

import json
import os
import subprocess
import sys

import pytest

from rose_kernels.backend import HAVE_TRITON

SPOILT = "import bench.gpu_suite as g; right = g.row_gradients; g.row_gradients = lambda *a: right(*a) * 1.1; raise SystemExit(g.main([]))"


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed on this machine")
@pytest.mark.parametrize("command", [["-m", "bench.gpu_suite", "--out"], ["-c", SPOILT]])
def test_suite(tmp_path, command):
    out = [str(tmp_path / "gpu.json")] if command[-1] == "--out" else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command, *out], capture_output=True, text=True, env=environment, timeout=500)
    if out:
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "gpu.json").read_text())
        assert len(result["checks"]) >= 20 and all(c["ok"] for c in result["checks"])
        assert {r["kernel"] for r in result["kernels"]} >= {"inject_", "aggregate_step_", "target_nll both", "add_low_rank_"}
    else:
        assert done.returncode == 1 and "WRONG row_gradients" in done.stderr
