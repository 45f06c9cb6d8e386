"""The definitions themselves, against direct float64 formulas and autograd."""

import pytest
import torch

from rose_kernels.reference import add_low_rank_, aggregate_step_, inject, inject_backward, rank_gram, rank_solve, rank_update_, target_nll


@pytest.fixture(autouse=True)
def fresh_seed(request):
    torch.manual_seed(abs(hash(request.node.name)) % 2**31)


def test_inject_adds_at_its_tokens_alone():
    hidden, delta = torch.randn(9, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    token, subject = torch.tensor([7, 0, 3]), torch.tensor([1, 0, 1])
    out = inject(hidden, delta, token, subject)
    for n in range(9):
        wanted = hidden[n] + sum(delta[s] for t, s in zip(token, subject, strict=True) if t == n)
        torch.testing.assert_close(out[n], wanted, rtol=0, atol=0)
    grad = torch.randn_like(hidden)
    assert torch.equal(inject_backward(grad, token), grad[token])


def test_inject_rounds_once():
    hidden, delta = torch.randn(4, 64).bfloat16(), torch.randn(1, 64)
    out = inject(hidden, delta, torch.tensor([2]), torch.tensor([0]))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[2], (hidden[2].float() + delta[0]).bfloat16())


def test_aggregate_step_is_adam_on_the_tree():
    """Against torch.optim.Adam fed with the tree's gradient, written out with loops, over several steps."""
    rows, relations = [3, 1, 4, 2], [1, 3]
    relation_offset, subject_offset = torch.tensor([0, 3, 4, 8, 10]), torch.tensor([0, 1, 4])
    d, lr, weight_decay, clamp = 6, 0.5, 0.5, 0.9
    f64 = {"dtype": torch.float64}
    delta, m, v = (torch.zeros(2, d, **f64) for _ in range(3))
    step, v0_norm, active = torch.zeros(2, dtype=torch.int32), torch.tensor([1.5, 2.5], **f64), torch.tensor([True, True])
    ours = [torch.zeros(d, **f64, requires_grad=True) for _ in range(2)]
    adam = [torch.optim.Adam([x], lr=lr) for x in ours]
    for _ in range(5):
        grad, extra = torch.randn(sum(rows), d, **f64), torch.randn(2, d, **f64)
        centroids = aggregate_step_(
            grad, relation_offset, subject_offset, delta, m, v, step, v0_norm, active, extra, lr=lr, weight_decay=weight_decay, clamp=clamp
        )
        first = relation = 0
        for s, count in enumerate(relations):
            root = torch.zeros(d, **f64)
            for _ in range(count):
                leaf = sum(grad[first + i] for i in range(rows[relation])) / rows[relation]
                torch.testing.assert_close(centroids[relation], leaf)
                root += leaf / count
                first, relation = first + rows[relation], relation + 1
            penalty = (weight_decay * ours[s].norm() / v0_norm[s] ** 2) if ours[s].detach().norm() > 0 else 0 * ours[s].sum()
            ours[s].grad = torch.autograd.grad(penalty, ours[s])[0] + root + extra[s]
            adam[s].step()
            with torch.no_grad():
                if ours[s].norm() > clamp * v0_norm[s]:
                    ours[s] *= clamp * v0_norm[s] / ours[s].norm()
        torch.testing.assert_close(delta, torch.stack([x.detach() for x in ours]))
    assert step.tolist() == [5, 5]


def test_inactive_subjects_keep_every_bit():
    offsets = torch.tensor([0, 2, 4])
    state = [torch.randn(2, 7) for _ in range(3)]
    before = [x.clone() for x in state]
    step, active = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([False, True])
    centroids = aggregate_step_(
        torch.randn(4, 7), offsets, torch.tensor([0, 1, 2]), *state[:1], state[1], state[2].abs_(), step, torch.ones(2), active
    )
    for x, y in zip(state[:2], before[:2], strict=True):
        assert torch.equal(x[0], y[0]) and not torch.equal(x[1], y[1])
    assert step.tolist() == [3, 5] and torch.equal(centroids[0], torch.zeros(7))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_target_nll(softcap):
    hidden, head = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(11, 8, dtype=torch.float64)
    target = torch.randint(11, (5,))
    nll = target_nll(hidden, head, target, softcap)
    for t in range(5):
        logits = head @ hidden[t]
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        torch.testing.assert_close(nll[t], torch.logsumexp(logits, 0) - logits[target[t]])
    assert torch.autograd.gradcheck(lambda h: target_nll(h, head, target, softcap), hidden)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_rank_update_is_the_dense_update(n):
    """Against R K^T (ridge I + K K^T)^-1 with the d_in x d_in inverse in float64, keys repeated so that K^T K is singular."""
    d_out, d_in, ridge = 12, 30, 0.7
    K, R, W = torch.randn(d_in, n), torch.randn(d_out, n), torch.randn(d_out, d_in)
    K[:, n // 2] = K[:, 0]
    k, r = K.double(), R.double()
    wanted = W.double() + r @ k.T @ torch.linalg.inv(ridge * torch.eye(d_in, dtype=torch.float64) + k @ k.T)
    changed = W.clone()
    U, V = rank_update_(changed, K, R, ridge=ridge)
    torch.testing.assert_close(changed.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(changed, add_low_rank_(W.clone(), U, V))


def test_rank_solve_with_a_preconditioner():
    d_in, n = 16, 5
    A = torch.randn(d_in, d_in, dtype=torch.float64)
    C = A @ A.T + torch.eye(d_in, dtype=torch.float64)
    K = torch.randn(d_in, n, dtype=torch.float64)
    P = torch.linalg.solve(C, K)
    V = rank_solve(rank_gram(K, P), P)
    torch.testing.assert_close(V, K.T @ torch.linalg.inv(C + K @ K.T))
