"""Which implementation serves an operator on a device.

The weight write is served by `csrc` where it is built (`native`). For the rest, and without it, CUDA tensors are served by Triton and CPU
tensors by the plain PyTorch of `reference`. `ROSE_BACKEND` (`reference`, `triton` or `csrc`) overrides this; Triton on the CPU needs its
interpreter, `TRITON_INTERPRET=1` before the first import. Machines without Triton never import it.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext

import torch

from rose_kernels import native

HAVE_TRITON = importlib.util.find_spec("triton") is not None
NATIVE = ("rank_update_", "add_low_rank_")  # the operators that csrc has
OPERATORS = ("inject", "aggregate_step_", "target_nll", *NATIVE)
BACKENDS = ("reference", "triton", "csrc")

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


def serving(device: torch.device | str, operator: str) -> str:
    """The backend of an operator for tensors on a device. BackendError where `ROSE_BACKEND` asks for one that cannot serve them."""
    kind = torch.device(device).type
    wanted = os.environ.get("ROSE_BACKEND")
    if wanted and wanted not in BACKENDS:
        raise BackendError(f"ROSE_BACKEND is {wanted!r}; it may be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    if wanted == "triton" and not HAVE_TRITON:
        raise BackendError("ROSE_BACKEND is triton, which is not installed; install it with: pip install triton")
    if wanted == "triton" and kind == "cpu" and not interpreted():
        raise BackendError("ROSE_BACKEND is triton, which serves CPU tensors in its interpreter alone: set TRITON_INTERPRET=1")
    if wanted in ("reference", "triton"):
        return wanted
    if operator in NATIVE and kind in native.served():
        return "csrc"
    if operator in NATIVE and wanted == "csrc":
        raise BackendError(f"ROSE_BACKEND is csrc, which is not built for {kind} here: `rose env` says why")
    return "triton" if kind == "cuda" and HAVE_TRITON else "reference"


def on_device(x: torch.Tensor):
    """A context in which Triton launches on the device of `x`; it takes the current one otherwise."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def backends() -> dict[str, dict[str, str]]:
    """operator -> device type -> the backend that serves it, or why none does."""

    def serves(kind: str, operator: str) -> str:
        try:
            return serving(kind, operator)
        except BackendError as e:
            return f"none ({e})"

    return {operator: {kind: serves(kind, operator) for kind in ("cpu", "cuda")} for operator in OPERATORS}
