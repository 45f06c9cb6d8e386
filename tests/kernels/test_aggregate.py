"""aggregate_step_ against the definition in float64, on ragged trees, over several steps."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rose_kernels import aggregate_step_, reference

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
trees = st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=13), min_size=1, max_size=4)
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = {"lr": 0.5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.5, "clamp": 0.8}


def make(tree, d, seed, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    rows = [n for subject in tree for n in subject]
    subjects = len(tree)
    relation_offset = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()])
    subject_offset = torch.tensor([0, *torch.tensor([len(s) for s in tree]).cumsum(0).tolist()])
    state = [torch.zeros(subjects, d) for _ in range(3)] + [torch.zeros(subjects, dtype=torch.int32)]
    v0_norm, active = 1 + torch.rand(subjects, generator=g), torch.rand(subjects, generator=g) > 0.25
    grads = [torch.randn(sum(rows), d, generator=g).to(dtype) for _ in range(3)]
    extra = [torch.randn(subjects, d, generator=g) for _ in range(3)]
    move = lambda x: [y.to(device) for y in x]  # noqa: E731
    return move(grads), move(extra), move([relation_offset, subject_offset]), move(state), move([v0_norm, active])


@FEW
@given(
    trees,
    st.sampled_from([64, 100, 511, 1025, 3584]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_steps_on_ragged_trees(backend, device, tree, d, with_extra, dtype, seed):
    grads, extras, offsets, state, (v0_norm, active) = make(tree, d, seed, device, dtype)
    exact = [x.double() if x.is_floating_point() else x.clone() for x in state]
    for grad, extra in zip(grads, extras, strict=True):
        extra = extra if with_extra else None
        centroids = aggregate_step_(grad, *offsets, *state, v0_norm, active, extra, **OPTIONS)
        wide = None if extra is None else extra.double()
        wanted = reference.aggregate_step_(grad.double(), *offsets, *exact, v0_norm.double(), active, wide, **OPTIONS)
        torch.testing.assert_close(centroids.double(), wanted, rtol=1e-5, atol=1e-5)
    for ours, true in zip(state[:3], exact[:3], strict=True):
        # Adam divides by the root of a mean square: where a gradient is near zero its sign decides a whole step.
        assert float((ours.double() - true).norm()) <= 1e-3 * float(true.norm()) + 1e-6
    assert torch.equal(state[3], exact[3])


@FEW
@given(trees, st.integers(0, 2**31))
def test_every_element_is_written_and_bits_repeat(backend, device, tree, seed):
    """Centroids come from uninitialised memory: two runs over differently poisoned heaps must agree bit for bit."""
    results = []
    for poison in (float("nan"), 7.0):
        grads, extras, offsets, state, (v0_norm, active) = make(tree, 130, seed, device)
        torch.full((64, 130), poison, device=device)
        results.append([aggregate_step_(grads[0], *offsets, *state, v0_norm, active, extras[0], **OPTIONS), *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_largest_width_and_projection(backend, device):
    grads, extras, offsets, state, (v0_norm, active) = make([[8, 3]], 16384, 3, device)
    active.fill_(True)
    aggregate_step_(grads[0], *offsets, *state, v0_norm, active, extras[0], **OPTIONS)
    torch.testing.assert_close(state[0].norm(dim=-1), 0.8 * v0_norm, rtol=1e-5, atol=0)


def test_opcheck(backend, device):
    grads, extras, offsets, state, rest = make([[2, 3], [1]], 40, 5, device)
    torch.library.opcheck(aggregate_step_, (grads[0], *offsets, *state, *rest, extras[0]))


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("relation_offset", 1, lambda x: x + 1),
        ("subject_offset", 2, lambda x: x.flip(0)),
        ("delta", 3, lambda x: x[:, :5].contiguous()),
        ("exp_avg_sq", 5, lambda x: x.double()),
        ("step", 6, lambda x: x.long()),
        ("active", 8, lambda x: x.int()),
        ("extra_grad", 9, lambda x: x[:1]),
    ],
)
def test_bad_arguments_are_named(monkeypatch, device, name, place, change):
    monkeypatch.setenv("ROSE_BACKEND", "triton")
    grads, extras, offsets, state, rest = make([[2, 3], [1]], 40, 5, device)
    arguments = [grads[0], *offsets, *state, *rest, extras[0]]
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=f"^{name} must"):
        aggregate_step_(*arguments)
