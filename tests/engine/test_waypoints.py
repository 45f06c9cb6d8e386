"""Waypoints against float64, against autograd and against an even share of the residual."""

import math
from dataclasses import replace

import pytest
import torch
from rose_engine import waypoints as module
from rose_engine.architecture import decoder_of
from rose_engine.bystanders import bystander_rows
from rose_engine.edits import group_by_subject
from rose_engine.forward import run_tree, tree_on, whole_tree
from rose_engine.keys import every_key
from rose_engine.optimize import subject_rows
from rose_engine.precondition import preconditioner
from rose_engine.recipe import ROSE
from rose_engine.waypoints import course, waypoints
from rose_engine.write import write_layers

from tests.conftest import IMO, MARTEAU

LAYERS = (1, 2, 4)
RECIPE = replace(ROSE, layers=LAYERS, ridge=0.3, rewordings=0, bystanders=9)


def setting(make_model, tokenizer, kind="llama", **extra):
    """A model, the rows of a subject, one column each, and what is protected beside them."""
    decoder = decoder_of(make_model(seed=int(torch.randint(1000, ())), initializer_range=0.2, kind=kind, **extra))
    rows = subject_rows(decoder, tokenizer, group_by_subject(IMO)[0], RECIPE).facts
    rows = list({row.tokens[: row.last + 1]: row for row in rows}.values())
    tree = tree_on([row.tokens[: row.last + 1] for row in rows], "cpu")
    start = preconditioner(decoder.weight(1).shape[1], RECIPE.ridge)
    with torch.no_grad():
        held = [start.beside(keys) for keys in every_key(decoder, bystander_rows(IMO, tokenizer, 9), LAYERS)]
        hidden = run_tree(decoder, tree, range(LAYERS[0]), whole_tree(tree))
    return decoder, rows, course(decoder, rows, tree, hidden, LAYERS), held


def cost_of(held, count, keys, residuals):
    """sum over layers of tr(R (D + K^T C^-1 K)^-1 R^T), D = diag(1 / count), in float64."""
    total = 0.0
    for one, K, R in zip(held, keys, residuals, strict=True):
        identity = torch.eye(K.shape[1], dtype=torch.float64)
        inverse = torch.stack([one.apply(column[:, None].float())[:, 0] for column in identity], 1).double() / one.ridge
        G = K @ inverse @ K.T
        D = torch.diag(1 / count)
        total = total + (R * torch.linalg.solve(D + G, R)).sum()
    return total


def test_costs_and_gradients_are_those_of_autograd(make_model, tokenizer):
    _, rows, _, held = setting(make_model, tokenizer)
    count = torch.randint(1, 4, (len(rows),)).double()
    keys = [torch.randn(len(rows), 64, dtype=torch.float64).requires_grad_() for _ in LAYERS]
    residuals = [torch.randn(len(rows), 32, dtype=torch.float64).requires_grad_() for _ in LAYERS]
    wanted = cost_of(held, count, keys, residuals)
    wanted.backward()
    price, total = module.prices(held, count, keys[0].detach().float()), 0.0
    for place in range(3):
        cost, in_keys, in_residuals = price(place, keys[place].detach(), residuals[place].detach())
        total = total + cost
        torch.testing.assert_close(in_keys, keys[place].grad, rtol=1e-3, atol=1e-5 * float(keys[place].grad.abs().max()))
        torch.testing.assert_close(in_residuals, residuals[place].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, wanted.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_gradient_is_that_of_a_small_step(make_model, tokenizer, family):
    """The layers' part of the gradient, by central differences along random directions."""
    _, rows, along, held = setting(make_model, tokenizer, kind=family)
    count, z = torch.ones(len(rows)), torch.randn(len(rows), 32)
    suffixes = module.pack_suffixes(along.rows, along.tree.path, range(len(rows)))
    price = module.prices(held, count, along.keys[suffixes.node].float())
    m = torch.randn(2, 32) * 0.3
    run = module._library_run
    grad = run(along, suffixes, z, price, m).grad
    for _ in range(3):
        u = torch.randn_like(m)
        up, down = (math.log(run(along, suffixes, z, price, m + sign * 1e-2 * u).cost) for sign in (1, -1))
        slope = float((grad * u).sum())
        assert (up - down) / 2e-2 == pytest.approx(slope, rel=0.05, abs=0.02 * float(grad.norm() * u.norm()))


def test_written_out_layers_and_the_library_agree(make_model, tokenizer):
    _, rows, along, held = setting(make_model, tokenizer, head_dim=32)
    if along.blocks is None:
        pytest.skip("csrc does not serve here")
    count, z = torch.ones(len(rows)), torch.randn(len(rows), 32)
    suffixes = module.pack_suffixes(along.rows, along.tree.path, range(len(rows)))
    price = module.prices(held, count, along.keys[suffixes.node].float())
    m = torch.randn(2, 32) * 0.3
    one, other = (run(along, suffixes, z, price, m) for run in (module._written_run, module._library_run))
    assert one.cost == pytest.approx(other.cost, rel=1e-4)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(one.grad.abs().max()))
    torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-4, atol=1e-4)
    for a, b in zip(one.keys, other.keys, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_waypoints_cost_less_than_even_shares_and_end_in_the_value(make_model, tokenizer):
    _, rows, along, held = setting(make_model, tokenizer)
    count, delta = torch.randint(1, 4, (len(rows),)).float(), torch.randn(32)
    reached = torch.randn(len(rows), 32)
    find = lambda n: waypoints(along, range(len(rows)), count, reached + delta, delta, held, n)  # noqa: E731
    begun, found = find(1), find(30)
    suffixes = module.pack_suffixes(along.rows, along.tree.path, range(len(rows)))
    price = module.prices(held, count, along.keys[suffixes.node].float())
    even = module._library_run(along, suffixes, reached + delta, price, (delta / 3).repeat(2, 1))
    assert found.cost < 0.9 * min(begun.cost, even.cost)
    torch.testing.assert_close(found.hidden[-1], reached + delta)
    assert torch.equal(find(30).hidden, found.hidden)  # the same bits


@pytest.mark.parametrize("subjects", [1, 2])
def test_a_write_along_waypoints_reaches_the_values(make_model, tokenizer, subjects):
    """Every row's hidden state after L comes to z nearly as it does with even shares, and texts about others move less."""
    edits = (IMO, (*IMO, *MARTEAU))[subjects - 1]
    left, moved = {}, {}
    for evaluations in (0, 40):
        decoder = decoder_of(make_model(seed=7, initializer_range=0.2, layers=6))
        recipe = replace(RECIPE, waypoints=evaluations)
        plans = [subject_rows(decoder, tokenizer, s, recipe) for s in group_by_subject(edits)]
        rows = [row for plan in plans for row in plan.facts]
        owner = [s for s, plan in enumerate(plans) for _ in plan.facts]
        tree = tree_on([row.tokens[: row.last + 1] for row in rows], "cpu")
        last = torch.tensor([path[-1] for path in tree.path])
        others = bystander_rows(edits, tokenizer, 40)
        protected, judged = others[:20], tree_on([row.tokens for row in others[20:]], "cpu")
        with torch.no_grad():
            after = lambda tree: run_tree(decoder, tree, range(LAYERS[-1] + 1), whole_tree(tree))  # noqa: B023, E731
            wanted, before = after(tree)[last], after(judged)
            delta = torch.stack([torch.ones(32), torch.arange(32) / 16 - 1])[:subjects]
            held = lambda name: preconditioner(64, recipe.ridge)  # noqa: B023, E731
            write_layers(decoder, rows, owner, wanted, delta, [0.1] * subjects, recipe, held, protected)
            z = wanted + delta[torch.tensor(owner)]
            left[evaluations] = float((after(tree)[last] - z).norm() / delta[torch.tensor(owner)].norm())
            moved[evaluations] = float((after(judged) - before).norm())
    assert left[40] < left[0] + 0.1
    assert moved[40] < moved[0]


def test_a_value_that_is_not_learnt_is_written_in_even_shares(make_model, tokenizer):
    """Alone the same bits as without waypoints; beside a learnt one as much of it is there after each layer as beside another, nearly."""
    delta = torch.randn(2, 32)
    plans = [subject_rows(decoder_of(make_model()), tokenizer, s, RECIPE) for s in group_by_subject((*IMO, *MARTEAU))]

    def written(loss, evaluations, plans):
        """The weights and, for each subject, how much of its value stands after each edited layer."""
        decoder = decoder_of(make_model(seed=7, initializer_range=0.2, layers=6))
        rows = [row for plan in plans for row in plan.facts]
        owner = torch.tensor([s for s, plan in enumerate(plans) for _ in plan.facts])
        tree = tree_on([row.tokens[: row.last + 1] for row in rows], "cpu")
        last = torch.tensor([path[-1] for path in tree.path])
        with torch.no_grad():
            after = lambda: torch.stack([run_tree(decoder, tree, range(n + 1), whole_tree(tree))[last] for n in LAYERS])  # noqa: E731
            before = after()
            recipe, held = replace(RECIPE, waypoints=evaluations, ridge=1e-3), lambda name: preconditioner(64, 1e-3)
            write_layers(decoder, rows, owner.tolist(), before[-1], delta[: len(plans)], loss, recipe, held)
            along = ((after() - before) * delta[owner]).sum(-1) / (delta[owner] ** 2).sum(-1)
        weights = [decoder.weight(layer).clone() for layer in LAYERS]
        return weights, torch.stack([along[:, owner == s].mean(1) for s in range(len(plans))])

    alone = [written(loss, n, plans[:1])[0] for loss, n in (([1.1], 20), ([float("nan")], 20), ([1.1], 0), ([0.9], 20))]
    assert [all(map(torch.equal, alone[0], weights)) for weights in alone[1:]] == [True, True, False]
    _, shares = written([1.1, 1.1], 20, plans)
    (_, first), (_, second) = written([0.9, 1.1], 20, plans), written([1.1, 0.9], 20, plans)
    torch.testing.assert_close(torch.stack([second[0], first[1]]), shares, rtol=0, atol=0.05)
    assert max(first[0, 0], second[1, 0]) < 0.25 < 0.3 < shares[:, 0].min()


def test_a_cost_that_is_not_finite_is_an_error(make_model, tokenizer):
    _, rows, along, held = setting(make_model, tokenizer)
    z = torch.full((len(rows), 32), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        waypoints(along, range(len(rows)), torch.ones(len(rows)), z, torch.ones(32), held, 5)


def test_a_step_to_where_the_cost_is_not_finite_is_stepped_back_from(make_model, tokenizer, monkeypatch):
    """Beyond a length the cost is infinite, as where a narrow dtype overflows; what is found is within, and better than the start."""
    _, rows, along, held = setting(make_model, tokenizer)
    count, delta, plain, seen = torch.ones(len(rows)), torch.randn(32), module._library_run, []

    def walled(*args):
        passed, length = plain(*args), float(args[-1].norm())
        seen.append(length)
        return passed if length < 0.3 * float(delta.norm()) else replace(passed, cost=float("inf"), grad=passed.grad * float("nan"))

    monkeypatch.setattr(module, "_library_run", walled)
    along = replace(along, blocks=None)
    z = torch.randn(len(rows), 32) + delta
    begun, found = (waypoints(along, range(len(rows)), count, z, delta, held, n) for n in (1, 30))
    assert max(seen) > 0.3 * float(delta.norm()), "nothing was tried beyond the wall"
    assert sum(length < 0.3 * float(delta.norm()) for length in seen) > 15
    assert found.cost < 0.9 * begun.cost


def test_in_bfloat16_the_waypoints_are_not_rounded(make_model, tokenizer):
    """By the library's layers, as on a GPU: they end in z itself, and the first row's step is every row's."""
    decoder, rows, along, held = setting(make_model, tokenizer)
    decoder.model.bfloat16()
    with torch.no_grad():
        tree = tree_on([row.tokens[: row.last + 1] for row in rows], "cpu")
        along = course(decoder, rows, tree, run_tree(decoder, tree, range(LAYERS[0]), whole_tree(tree)), LAYERS)
    along = replace(along, blocks=None)
    delta = torch.randn(32)
    z = torch.randn(len(rows), 32) + delta
    found = waypoints(along, range(len(rows)), torch.ones(len(rows)), z, delta, held, 5)
    torch.testing.assert_close(found.hidden[-1], z, rtol=0, atol=1e-5)
    last = torch.tensor([path[-1] for path in tree.path])
    steps = found.hidden[0] - along.hidden[last].float()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=0, atol=1e-5)


def test_waypoints_are_of_rows_and_subjects():
    for other in ({"columns": "mean"}, {"grouping": "fact"}):
        with pytest.raises(ValueError, match="waypoints=0"):
            replace(ROSE, **other)
        replace(ROSE, waypoints=0, **other)
