"""The engine over Triton's kernels, in the interpreter, gives the reference's delta."""

import json
import os
import subprocess
import sys

import pytest

from rose_kernels.backend import HAVE_TRITON

EDIT = """
import sys
from dataclasses import replace
from rose_engine import Edit, Editor
editor = Editor.from_pretrained("smollm2")
recipe = replace(editor.recipe, forms=2, steps=2, layers=(7, 8))
editor.apply([Edit("Lin Nu", "{} follows the religion of", "Catholicism")], recipe=recipe, verify=False).delta.save(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed on this machine")
def test_embedded_model_in_the_interpreter(tmp_path):
    from rose_engine import Delta

    deltas = {}
    for backend in ("reference", "triton"):
        environment = {**os.environ, "TRITON_INTERPRET": "1", "ROSE_BACKEND": backend}
        path = tmp_path / backend
        subprocess.run([sys.executable, "-c", EDIT, str(path)], env=environment, check=True, timeout=1500)
        deltas[backend] = Delta.load(path)
    assert json.dumps(deltas["triton"].metadata["recipe"]) == json.dumps(deltas["reference"].metadata["recipe"])
    for name, (U, V) in deltas["reference"].factors.items():
        ours_U, ours_V = deltas["triton"].factors[name]
        assert float((ours_U @ ours_V - U @ V).norm() / (U @ V).norm()) < 1e-4
