"""Kernels run natively where there is a GPU and in Triton's interpreter elsewhere; the tests are the same."""

import pytest
import torch

from rose_kernels import native
from rose_kernels.backend import HAVE_TRITON, interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    """Run the operators through one backend."""
    if request.param == "triton" and not HAVE_TRITON:
        pytest.skip("Triton is not installed on this machine")
    monkeypatch.setenv("ROSE_BACKEND", request.param)
    return request.param


@pytest.fixture(params=["reference", "triton", "csrc"])
def writer(request, monkeypatch):
    """Run the weight write through one backend."""
    if request.param == "triton" and not HAVE_TRITON:
        pytest.skip("Triton is not installed on this machine")
    if request.param == "csrc" and DEVICE not in native.served():
        pytest.skip("csrc cannot be built on this machine")
    monkeypatch.setenv("ROSE_BACKEND", request.param)
    return request.param


@pytest.fixture
def csrc(monkeypatch):
    """Run the weight write through csrc, on the CPU."""
    if not native.served():
        pytest.skip("csrc cannot be built on this machine")
    monkeypatch.setenv("ROSE_BACKEND", "csrc")


def rounding(dtype: torch.dtype, backend: str) -> float:
    """The largest relative error of one rounding: half a unit in the last place, a whole one in Triton's interpreter, which
    cuts bfloat16 off instead of rounding it."""
    return torch.finfo(dtype).eps * (1.0 if backend == "triton" and interpreted() and dtype == torch.bfloat16 else 0.5)


@pytest.fixture
def device():
    return DEVICE
