"""Sequential edits: what was written before stays, and a subject that is edited again keeps its facts."""

import random
from dataclasses import replace

import pytest
import torch
from rose_engine import ROSE, Delta, Edit, Editor
from rose_engine.memory import Memory, facts_in, with_earlier
from rose_engine.precondition import preconditioner

from tests.conftest import IMO, LIN, MARTEAU
from tests.engine.test_editor import bits, same

RECIPE = replace(ROSE, rewordings=0, bystanders=0, forms=2, steps=1, lr=0.05, layers=(1, 2), ridge=0.5)


@pytest.fixture
def editor(make_model, tokenizer):
    return Editor(make_model(initializer_range=0.2), tokenizer, RECIPE)


def test_many_writes_are_one(editor):
    """200 edits in random order and batches: the weights' change is the one solve of all keys K and residuals R,
    R (ridge I + K^T K)^-1 K^T, in float64; R is what each write wanted on top of what its keys were given by then."""
    edits = [Edit(f"Person {i} {random.randrange(1000)}", "{} likes", random.choice(("tea", "jazz", "Rome"))) for i in range(200)]
    random.shuffle(edits)
    while edits:
        batch, edits = edits[: (n := random.randint(1, 40))], edits[n:]
        editor.apply(batch, verify=False)
    base = editor._base.tensors
    for name, weight in editor.weights((1, 2)).items():
        K = torch.cat([delta.keys[name].double() for delta in editor.applied], 1)
        change, R = torch.zeros(weight.shape, dtype=torch.float64), []
        for delta in editor.applied:
            U, V = (x.double() for x in delta.factors[name])
            R.append(U + change @ delta.keys[name].double())
            change += U @ V
        system = K.T @ K + RECIPE.ridge * torch.eye(K.shape[1], dtype=torch.float64)
        whole = torch.cat(R, 1) @ torch.linalg.solve(system, K.T)
        assert (change - whole).norm() <= 1e-4 * whole.norm()
        assert (weight.double() - base[name].double() - whole).norm() <= 1e-4 * whole.norm()


def test_earlier_edits_are_left_where_they_are(make_model, tokenizer):
    """How far a second write moves what the first one's keys are given, solved jointly and not."""
    moved = {}
    for sequential in ("joint", "plain"):
        editor = Editor(make_model(initializer_range=0.2), tokenizer, replace(RECIPE, sequential=sequential, ridge=0.05))
        first = editor.apply(LIN, verify=False).delta
        second = editor.apply(MARTEAU, verify=False).delta
        moved[sequential] = sum(float((U @ (V @ first.keys[name])).norm()) for name, (U, V) in second.factors.items())
    assert moved["joint"] < 0.5 * moved["plain"]


def test_a_subject_edited_again_keeps_its_facts(editor):
    first = editor.apply(LIN, verify=False)
    other = editor.apply(IMO, verify=False)
    lives, religion = Edit("Lin Nu", "{} lives in", "Metz"), Edit(" Lin Nu", "{} follows the religion of ", "Islam")
    again = editor.apply([lives, religion])
    assert [fact.target for fact in again.report.facts] == ["Metz", "Islam"]
    assert [e["target"] for e in again.delta.metadata["edits"]] == ["Metz", "Islam"]
    assert with_earlier(facts_in([first.delta, other.delta]), [lives, religion]) == [religion, LIN[1], lives]
    rows = len(again.delta.columns)
    alone = Editor(editor.model, editor.tokenizer, replace(RECIPE, sequential="plain")).apply([lives, religion], verify=False)
    assert rows > len(alone.delta.columns)  # the city where she worked is there once more
    # Its first columns no longer hold the subject; another subject's stay.
    name = next(iter(again.delta.factors))
    start = preconditioner(64, 1.0)
    held = Memory().joined(name, start, editor.applied, ())
    torch.testing.assert_close(held.keys, torch.cat([other.delta.keys[name], again.delta.keys[name]], 1), rtol=0, atol=0)
    held = Memory().joined(name, start, editor.applied, {"Lin Nu"})
    torch.testing.assert_close(held.keys, other.delta.keys[name], rtol=0, atol=0)
    every = torch.cat([delta.keys[name] for delta in editor.applied], 1)  # AlphaEdit's
    torch.testing.assert_close(Memory().joined(name, start, editor.applied).keys, every, rtol=0, atol=0)


def test_two_questions_of_one_fact_are_both_asked(editor):
    asked = [Edit("Lin Nu", "{} lives in", "Metz", question) for question in ("Where does {} live?", "Which town is {}'s home?")]
    assert with_earlier([], asked) == asked
    first = editor.apply(asked, verify=False).delta
    more = Edit("Lin Nu", "{} speaks", "Basque")
    assert with_earlier(facts_in([first]), [more]) == [*asked, more] == with_earlier(facts_in([first, first]), [more])
    assert with_earlier(facts_in([first]), [Edit("Lin Nu", "{} lives in", "Rome")]) == [Edit("Lin Nu", "{} lives in", "Rome")]


def test_rewordings_join_their_fact_and_tell_which_one_is_replaced(editor):
    town = Edit("Lin Nu", "{} lives in", "Metz", rewordings=["The home of {} is in"])
    first = editor.apply([town, Edit("Lin Nu", "{} speaks", "Basque")], verify=False).delta
    known = facts_in([first])
    (again, _) = with_earlier(known, [Edit("Lin Nu", "{} lives in", "Metz", rewordings=["{} has a house in"])])
    assert again.rewordings == ("{} has a house in", "The home of {} is in")
    moved = Edit("Lin Nu", "The home of {} is in", "Rome")  # says by its prompt what the other said by a rewording
    assert with_earlier(known, [moved]) == [moved, known[1]]
    named = Edit("Lin Nu", "{} uses the tongue", "Welsh", rewordings=["{} speaks"])  # and the other way round
    assert with_earlier(known, [named]) == [town, named]


def test_a_restarted_editor_goes_on_with_the_same_bits(make_model, tokenizer, tmp_path):
    """After reverts, a subject edited twice and a reload, the next write is the one that the first process makes."""
    one, two = (Editor(make_model(initializer_range=0.2), tokenizer, RECIPE) for _ in range(2))
    results = [one.apply(edits, verify=False) for edits in (LIN, IMO, MARTEAU, [Edit("Imo State", "{} exports", "tea")])]
    one.revert(results[2])
    for i, delta in enumerate(one.applied):
        delta.save(tmp_path / str(i))
    two.restore([Delta.load(tmp_path / str(i)) for i in range(3)])
    assert same(bits(one), bits(two))
    for editor in (one, two):
        editor.apply([Edit("Lin Nu", "{} lives in", "Metz"), *MARTEAU], verify=False)
    assert same(bits(one), bits(two))
