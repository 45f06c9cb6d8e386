"""Kernels run natively where there is a GPU and in Triton's interpreter elsewhere; the tests are the same."""

import pytest
import torch

from rose_kernels.backend import HAVE_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    """Run the operators through one backend."""
    if request.param == "triton" and not HAVE_TRITON:
        pytest.skip("Triton is not installed on this machine")
    monkeypatch.setenv("ROSE_BACKEND", request.param)
    return request.param


@pytest.fixture
def device():
    return DEVICE
