"""target_nll and its gradient against the definition in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rose_kernels import reference, target_nll
from rose_kernels.target_nll import target_nll_lse

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make(T, V, d, dtype, seed, device):
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(T, d, generator=g).to(dtype), (3 * torch.randn(V, d, generator=g) / d**0.5).to(dtype)
    return hidden.to(device).requires_grad_(), head.to(device), torch.randint(V, (T,), generator=g).to(device)


def check(hidden, head, target, softcap):
    weight = torch.rand(len(hidden), device=hidden.device)
    nll = target_nll(hidden, head, target, softcap)
    (grad,) = torch.autograd.grad((nll * weight).sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    wanted = reference.target_nll(exact, head.double(), target, softcap)
    (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), exact)
    assert nll.dtype == torch.float32 and grad.dtype == hidden.dtype
    bound = TOLERANCE[hidden.dtype]
    torch.testing.assert_close(nll.double(), wanted, rtol=bound, atol=bound)
    assert float((grad.double() - wanted_grad).norm()) <= bound * float(wanted_grad.norm())


@FEW
@given(
    T=st.integers(1, 70),
    V=st.integers(1, 400),
    d=st.sampled_from([1, 16, 63, 64, 100]),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradient(backend, device, T, V, d, dtype, softcap, seed):
    check(*make(T, V, d, dtype, seed, device), softcap)


@pytest.mark.parametrize("V", [40_000])
def test_several_stretches_and_chunks(backend, device, V):
    """A vocabulary longer than a stretch and a chunk, with targets at their borders."""
    hidden, head, _ = make(5, V, 16, torch.float32, 1, device)
    check(hidden, head, torch.tensor([0, 255, 16383, 16384, V - 1], device=device), None)


def test_extreme_logits(backend, device):
    hidden, head, target = make(4, 300, 64, torch.float32, 2, device)
    with torch.no_grad():
        head *= 200
    check(hidden, head, target, None)


def test_many_rows(backend, device):
    check(*make(4096, 33, 16, torch.float32, 3, device), None)


def test_no_rows(backend, device):
    hidden, head, target = make(0, 10, 16, torch.float32, 0, device)
    nll = target_nll(hidden, head, target)
    assert nll.shape == (0,) and torch.autograd.grad(nll.sum(), hidden)[0].shape == (0, 16)


def test_opcheck(backend, device):
    torch.library.opcheck(target_nll_lse, make(4, 50, 16, torch.float32, 4, device))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("head", lambda a: a.update(head=a["head"].double()), ValueError),
        ("head", lambda a: a.update(head=a["head"][:, 1:]), ValueError),
        ("hidden", lambda a: a.update(hidden=a["hidden"].detach().T), ValueError),
        ("target", lambda a: a["target"].fill_(50), IndexError),
        ("target", lambda a: a.update(target=a["target"][:1]), ValueError),
        ("softcap", lambda a: a.update(softcap=-1.0), ValueError),
    ],
)
def test_bad_arguments_are_named(monkeypatch, device, name, change, error):
    if error is IndexError and device == "cuda":
        pytest.skip("on a GPU indices are checked on the device, with ROSE_CHECK=1")
    monkeypatch.setenv("ROSE_BACKEND", "triton")
    arguments = dict(zip(("hidden", "head", "target"), make(4, 50, 16, torch.float32, 4, device), strict=True))
    change(arguments)
    with pytest.raises(error, match=f"^{name} must"):
        target_nll(**arguments)
