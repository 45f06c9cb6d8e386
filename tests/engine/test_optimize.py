"""The optimised values against a plain loop: full forward, torch.optim.Adam, the tree written out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rose_engine.architecture import decoder_of
from rose_engine.edits import Edit, group_by_subject
from rose_engine.fisher import Coordinates
from rose_engine.optimize import Diverged, optimize_values, subject_rows
from rose_engine.recipe import ROSE

from tests.conftest import IMO, LIN, MARTEAU
from tests.engine.naive import naive_row, run, unedited_prediction

RECIPE = replace(ROSE, rewordings=0, bystanders=0, layers=(1, 2), steps=6, lr=0.05, stop_loss=0.0)


@pytest.fixture
def setting(make_model, tokenizer):
    model = make_model(seed=5, initializer_range=0.1)
    decoder = decoder_of(model.requires_grad_(False))
    first, *rest = MARTEAU  # a relation with more rows than the others
    edits = (*IMO, replace(first, rewordings=("{} makes music by", "What one hears of {} is")), *rest, *LIN)
    return model, decoder, [subject_rows(decoder, tokenizer, s, RECIPE) for s in group_by_subject(edits)]


def hidden_at_subject(model, row, layer):
    kept = []
    hook = model.model.layers[layer].register_forward_hook(lambda m, a, out: kept.append(out[0, row.last].clone()))
    with torch.no_grad():
        run(model, row)
    hook.remove()
    return kept[0]


def some_coordinates(d: int, seed: int = 3):
    """A symmetric T [d, d] that is far from the identity."""
    x = torch.randn(d, 2 * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / (2 * d)


@pytest.mark.parametrize(("noise", "turned", "clamp"), [(0.3, False, 4.0), (0.3, True, 4.0), (0.0, True, 0.1)])
def test_values_equal_a_plain_loop(setting, noise, turned, clamp):
    model, decoder, subjects = setting
    recipe = replace(RECIPE, noise=noise, seed=7, clamp=clamp)
    T = some_coordinates(32) if turned else torch.eye(32, dtype=torch.float64)
    longest = float(torch.linalg.eigvalsh(T)[-1])
    values = optimize_values(decoder, subjects, recipe, coordinates=Coordinates(T, longest) if turned else None)
    T = T.float()
    for s, subject in enumerate(subjects):
        generator, d = torch.Generator().manual_seed(7), values.delta.shape[1]
        v0 = hidden_at_subject(model, subject.relations[0][0], 2)
        torch.testing.assert_close(values.v0[s], v0, rtol=1e-4, atol=1e-5)
        u, delta = torch.zeros_like(v0, requires_grad=True), torch.zeros_like(v0)
        adam = torch.optim.Adam([u], lr=RECIPE.lr)
        reference = unedited_prediction(model, subject.neutral)
        for step in range(RECIPE.steps):
            drawn = noise * delta.norm() * F.normalize(torch.randn(len(subject.facts), d, generator=generator), dim=-1)
            given = iter(delta + drawn)
            centroids = [torch.stack([naive_row(model, row, 2, next(given))[1] for row in rel]).mean(0) for rel in subject.relations]
            if step == 0:
                first = sum(len(x.relations) for x in subjects[:s])
                ours = values.centroids[first : first + len(centroids)]
                torch.testing.assert_close(ours, torch.stack(centroids), rtol=1e-3, atol=1e-5)
            kl = naive_row(model, subject.neutral, 2, delta, reference)[1]
            norm = u.detach().norm()
            decay = RECIPE.weight_decay * u.detach() / (norm * v0.norm() ** 2) if norm > 0 else 0.0
            u.grad = T @ (torch.stack(centroids).mean(0) + RECIPE.kl * kl) + decay
            adam.step()
            with torch.no_grad():
                limit = clamp * v0.norm() / longest
                u *= (limit / u.norm()).clamp(max=1.0)
                delta = T @ u
        assert delta.norm() <= clamp * v0.norm() * (1 + 1e-5)
        torch.testing.assert_close(values.delta[s], delta, rtol=2e-3, atol=2e-4)


def test_a_rewording_is_a_row_as_its_prompt_would_be(setting, tokenizer):
    _, decoder, subjects = setting
    (first, *others) = subjects[1].relations
    assert [len(relation) for relation in (first, *others)] == [RECIPE.forms + 2] + [RECIPE.forms] * len(others)
    told = Edit(MARTEAU[0].subject, "What one hears of {} is", MARTEAU[0].target, MARTEAU[0].question)
    (alone,) = subject_rows(decoder, tokenizer, group_by_subject([told])[0], RECIPE).relations
    assert first[-1] == alone[0]  # the statement


@pytest.mark.parametrize("budgets", [(1, 1), (10**6, 17), (60, 10**6)])
def test_splitting_changes_nothing(setting, budgets):
    _, decoder, subjects = setting
    whole = optimize_values(decoder, subjects, RECIPE, batch_tokens=10**6, step_tokens=10**6)
    split = optimize_values(decoder, subjects, RECIPE, batch_tokens=budgets[0], step_tokens=budgets[1])
    for name in ("delta", "v0", "wanted", "loss", "centroids"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_same_bits_twice(setting, noise):
    _, decoder, subjects = setting
    once, again = (optimize_values(decoder, subjects, replace(RECIPE, noise=noise)) for _ in range(2))
    assert torch.equal(once.delta, again.delta) and torch.equal(once.loss, again.loss)


def test_noise_is_a_subjects_own(setting):
    """Its draws depend on neither the subjects beside it nor how its rows are split; another seed draws others."""
    _, decoder, subjects = setting
    recipe = replace(RECIPE, noise=0.3)
    together = optimize_values(decoder, subjects, recipe, step_tokens=17)
    for s, subject in enumerate(subjects):
        alone = optimize_values(decoder, [subject], recipe)
        torch.testing.assert_close(together.delta[s], alone.delta[0], rtol=2e-3, atol=2e-4)
    other = optimize_values(decoder, subjects, replace(recipe, seed=1))
    assert (other.delta - together.delta).norm() > 0.01 * together.delta.norm()


def test_a_subject_that_has_converged_leaves(setting):
    """With a threshold between the subjects' losses, some stop at the step at which they pass it; the others go on as before."""
    _, decoder, subjects = setting
    recipe = replace(RECIPE, steps=12)
    trace: list[float] = []
    alone = [optimize_values(decoder, [s], recipe, lambda *a: trace.append(a[-1])) for s in subjects]
    losses = torch.tensor(trace).reshape(3, 12)
    threshold = float(losses[:, 6:].min(1).values.sort().values[1])
    together = optimize_values(decoder, subjects, replace(recipe, stop_loss=threshold + 1e-6))
    for s in range(3):
        below = (losses[s] < threshold + 1e-6).nonzero().flatten().tolist()
        assert abs(int(together.steps[s]) - (below[0] if below else 12)) <= 0
        if not below:
            torch.testing.assert_close(together.delta[s], alone[s].delta[0], rtol=2e-3, atol=2e-4)


def test_divergence_is_an_error(setting):
    _, decoder, subjects = setting
    with pytest.raises(Diverged, match="not finite"):
        optimize_values(decoder, subjects, replace(RECIPE, lr=float("inf")))
