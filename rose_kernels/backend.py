"""Which implementation serves an operator on a device.

CUDA tensors are served by Triton, CPU tensors by the plain PyTorch of `reference`. `ROSE_BACKEND` (`reference` or `triton`) overrides both;
Triton on the CPU needs its interpreter, `TRITON_INTERPRET=1` before the first import. Machines without Triton never import it.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext

import torch

HAVE_TRITON = importlib.util.find_spec("triton") is not None
OPERATORS = ("inject", "aggregate_step_", "target_nll", "rank_update_")
BACKENDS = ("reference", "triton")

if HAVE_TRITON:
    import triton
    import triton.language as tl

    jit = triton.jit
else:  # the kernels stay plain functions, which nothing calls
    triton = tl = None

    def jit(function):
        return function


class BackendError(RuntimeError):
    """The backend asked for cannot serve here; the message says what would make it."""


def interpreted() -> bool:
    """Whether Triton runs its interpreter, which takes CPU tensors."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def serving(device: torch.device | str) -> str:
    """The backend for tensors on a device. BackendError where `ROSE_BACKEND` asks for one that cannot serve them."""
    kind = torch.device(device).type
    wanted = os.environ.get("ROSE_BACKEND")
    if wanted and wanted not in BACKENDS:
        raise BackendError(f"ROSE_BACKEND is {wanted!r}; it may be {' or '.join(BACKENDS)}")
    if wanted == "triton" and not HAVE_TRITON:
        raise BackendError("ROSE_BACKEND is triton, which is not installed; install it with: pip install triton")
    if wanted == "triton" and kind == "cpu" and not interpreted():
        raise BackendError("ROSE_BACKEND is triton, which serves CPU tensors in its interpreter alone: set TRITON_INTERPRET=1")
    return wanted or ("triton" if kind == "cuda" and HAVE_TRITON else "reference")


def on_device(x: torch.Tensor):
    """A context in which Triton launches on the device of `x`; it takes the current one otherwise."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def backends() -> dict[str, dict[str, str]]:
    """operator -> device type -> the backend that serves it, or why none does."""
    served = {}
    for kind in ("cpu", "cuda"):
        try:
            served[kind] = serving(kind)
        except BackendError as e:
            served[kind] = f"none ({e})"
    return {operator: dict(served) for operator in OPERATORS}
