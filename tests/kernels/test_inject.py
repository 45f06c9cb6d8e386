"""inject, inject_ and their gradients against the definition in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rose_kernels import inject, inject_, reference, row_gradients
from tests.kernels.conftest import rounding

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def layouts(draw):
    """(N, d, S, dtype, index dtype, seed, rows)"""
    tokens = draw(st.integers(1, 60))
    return (
        tokens,
        draw(st.sampled_from([1, 3, 64, 576, 1000, 1025, 2100])),
        draw(st.integers(1, 6)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([torch.int32, torch.int64])),
        draw(st.integers(0, 2**31)),
        draw(st.integers(0, tokens)),
    )


def make(layout, device):
    tokens, d, subjects, dtype, index, seed, rows = layout
    g = torch.Generator().manual_seed(seed)
    token = torch.randperm(tokens, generator=g)[:rows].to(index)
    subject = torch.randint(subjects, (rows,), generator=g).to(index)
    hidden = torch.randn(tokens, d, generator=g).to(dtype)
    return tuple(x.to(device) for x in (hidden, torch.randn(subjects, d, generator=g), token, subject))


@FEW
@given(layouts())
def test_forward_both_ways(backend, device, layout):
    hidden, delta, token, subject = make(layout, device)
    before = hidden.clone()
    wanted = reference.inject(hidden.double(), delta.double(), token.long(), subject.long())
    out = inject(hidden, delta, token, subject)
    assert torch.equal(hidden, before) and out.dtype == hidden.dtype
    assert ((out.double() - wanted).abs() <= rounding(hidden.dtype, backend) * wanted.abs() * (1 + 1e-3) + 1e-6).all()
    inject_(hidden, delta, token, subject)
    assert torch.equal(hidden, out)


@FEW
@given(layouts())
def test_backward(backend, device, layout):
    hidden, delta, token, subject = make(layout, device)
    hidden.requires_grad_()
    delta.requires_grad_()
    grad = torch.randn_like(hidden)
    to_hidden, to_delta = torch.autograd.grad(inject(hidden, delta, token, subject), (hidden, delta), grad)
    assert torch.equal(to_hidden, grad)
    wanted = torch.zeros_like(delta, dtype=torch.float64).index_add(0, subject.long(), grad.double()[token.long()])
    torch.testing.assert_close(to_delta.double(), wanted, rtol=1e-5, atol=1e-5)
    rows = row_gradients(grad, token)
    assert rows.dtype == torch.float32 and torch.equal(rows, grad[token.long()].float())


def test_opcheck(backend, device):
    hidden, delta, token, subject = make((9, 70, 3, torch.float32, torch.int64, 1, 5), device)
    torch.library.opcheck(inject, (hidden.requires_grad_(), delta.requires_grad_(), token, subject))
    torch.library.opcheck(inject_, (hidden.detach(), delta.detach(), token, subject))
    torch.library.opcheck(row_gradients, (hidden.detach(), token))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("delta", lambda a: a.update(delta=a["delta"][:, :5].contiguous()), ValueError),
        ("delta", lambda a: a.update(delta=a["delta"].half()), ValueError),
        ("hidden", lambda a: a.update(hidden=a["hidden"].T), ValueError),
        ("hidden", lambda a: a.update(hidden=a["hidden"].double()), ValueError),
        ("token", lambda a: a["token"].fill_(9), IndexError),
        ("subject", lambda a: a["subject"].fill_(-1), IndexError),
        ("subject", lambda a: a.update(subject=a["subject"][:2]), ValueError),
        ("token", lambda a: a.update(token=a["token"].float()), ValueError),
    ],
)
def test_bad_arguments_are_named(monkeypatch, device, name, change, error):
    if error is IndexError and device == "cuda":
        pytest.skip("on a GPU indices are checked on the device, with ROSE_CHECK=1")
    monkeypatch.setenv("ROSE_BACKEND", "triton")
    arguments = dict(zip(("hidden", "delta", "token", "subject"), make((9, 70, 3, torch.float32, torch.int64, 1, 5), device), strict=True))
    change(arguments)
    with pytest.raises(error, match=f"^{name} must"):
        inject(**arguments)
