"""The engine on a GPU that is none (`pretend_gpu`): nothing mixes devices, edits are those of the CPU, the host waits when it looks.

In bfloat16 edits differ by what two orders of its sums do: packed attention in the place of frames is as far from the CPU (9.6% for 9.2% of
the change in GPT-2, 6.1% for 5.6% in Gemma 3). That frames compute what packed suffixes do is `test_captured`'s, in float32.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("pretend") / "gpu.so"
    headers = Path(torch.__file__).parent / "include"
    command = [COMPILER, "-std=c++20", "-O0", "-fPIC", "-shared", f"-I{headers}", str(HERE / "pretend_gpu.cpp"), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


slow = pytest.mark.slow


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")
@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [
        ("qwen2", "bfloat16", 0.05),
        pytest.param("gemma3_text", "bfloat16", 0.1, marks=slow),
        pytest.param("gpt2", "bfloat16", 0.15, marks=slow),
        pytest.param("llama", "float32", 1e-4, marks=slow),
    ],
)
def test_the_engine_on_a_device_of_its_own(library, kind, dtype, bound):
    command = [sys.executable, "-m", "tests.engine.pretend_gpu", str(library), kind, dtype]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "engine")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["differs"] < bound
    assert found["restored"] and found["adapter says what the weights say"] and found["streamed"] == [1]
    if dtype == "bfloat16":
        assert found["captures"] and found["replays"] >= 10 * found["captures"] and found["waits in a step"] == {}
        looks = [found[f"waits in {steps} steps"] for steps in (8, 16, 24)]
        assert looks[2] - looks[1] == looks[1] - looks[0] <= 3
