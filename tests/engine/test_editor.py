"""The editor: apply, verify, save, load and revert, on tiny models and on the embedded one."""

import math
from dataclasses import replace

import pytest
import rose_engine.editor as editor_module
import torch
from rose_engine import ROSE, Delta, DeltaError, Edit, EditError, Editor, write
from rose_engine.delta import edit_of
from rose_engine.waypoints import AMONG_SEVERAL

from tests.conftest import IMO, LIN, MARTEAU

TINY = replace(ROSE, rewordings=0, bystanders=0, layers=(1, 2), steps=4, lr=0.1)


@pytest.fixture
def editor(make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(write, "LEARNT", math.inf)  # a random model learns nothing; its values are written by waypoints all the same
    return Editor(make_model(initializer_range=0.2), tokenizer, TINY)


def bits(editor) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in editor.model.named_parameters()}


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_apply_changes_the_edited_weights_alone(editor):
    before = bits(editor)
    result = editor.apply(IMO)
    changed = [name for name, weight in bits(editor).items() if not torch.equal(weight, before[name])]
    assert sorted(changed) == sorted(result.delta.factors) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)]
    for name, (U, V) in result.delta.factors.items():
        torch.testing.assert_close(bits(editor)[name] - before[name], U @ V, rtol=1e-3, atol=1e-5)
    assert len(result.report.facts) == 3 and set(result.seconds) == {"prepare", "optimise", "write", "verify"}
    assert result.report.facts[0].prompt_after.probability > result.report.facts[0].prompt_before.probability


def test_rewordings_are_edited_and_kept(make_model, tokenizer, tmp_path):
    other = "Those who ask for {} are told"
    chance = {}
    for rewordings in ((), (other,)):
        editor = Editor(make_model(initializer_range=0.2), tokenizer, replace(TINY, steps=100, lr=0.5, waypoints=0))
        result = editor.apply([replace(LIN[0], rewordings=rewordings), *LIN[1:]], verify=False)
        chance[rewordings] = editor.verify([replace(LIN[0], prompt=other)])[0]["prompt"]["probability"]
        result.delta.save(tmp_path / "d.safetensors")
        assert edit_of(Delta.load(tmp_path / "d.safetensors").metadata["edits"][0], "d").rewordings == rewordings
    assert chance[other,] > 1.5 * chance[()]


def test_revert_in_any_order_gives_back_bits(editor):
    base = bits(editor)
    first = editor.apply(IMO, verify=False)
    after_first = bits(editor)
    second = editor.apply(LIN, verify=False)
    third = editor.apply(MARTEAU, recipe=replace(TINY, layers=(1, 3)), verify=False)
    assert editor.applied == (first.delta, second.delta, third.delta)
    editor.revert(second)
    editor.revert(third)
    assert same(bits(editor), after_first)
    editor.revert(first)
    assert same(bits(editor), base) and editor.applied == ()
    with pytest.raises(ValueError, match="not in the weights"):
        editor.revert(first)


def test_waypoints_beside_others_are_looked_for_longer(editor, monkeypatch):
    """Of several subjects in one write, and of one beside another in the weights; not of one that is edited again."""
    asked, find = [], write.waypoints
    monkeypatch.setattr(write, "waypoints", lambda *given: (asked.append(given[-1]), find(*given))[1])
    n, many = TINY.waypoints, AMONG_SEVERAL * TINY.waypoints
    for edits, expected in ((IMO[:1], [n]), (IMO[1:], [n]), (LIN, [many]), (IMO, [many])):
        editor.apply(edits, verify=False)
        assert asked == expected
        asked.clear()
    editor.restore([])
    editor.apply((*IMO, *LIN), verify=False)
    assert asked == [many, many]


def test_same_edit_same_bits(make_model, tokenizer):
    one, two = (Editor(make_model(initializer_range=0.2), tokenizer, TINY) for _ in range(2))
    one.apply(IMO)
    two.apply(IMO)
    assert same(bits(one), bits(two))


def test_a_saved_delta_makes_the_same_bits(make_model, tokenizer, tmp_path):
    one, two = (Editor(make_model(initializer_range=0.2), tokenizer, TINY) for _ in range(2))
    one.apply((*IMO, *LIN)).delta.save(tmp_path / "d.safetensors")
    base = bits(two)
    delta = Delta.load(tmp_path / "d.safetensors")
    two.load(delta)
    assert same(bits(one), bits(two))
    two.revert(delta)
    assert same(bits(two), base)


def test_a_delta_on_top_of_others_wants_them(make_model, tokenizer):
    one, two = (Editor(make_model(initializer_range=0.2), tokenizer, TINY) for _ in range(2))
    first, second = (one.apply(edits, verify=False).delta for edits in (IMO, LIN))
    before = bits(two)
    with pytest.raises(DeltaError, match="on top of 1 other"):
        two.load(second)
    assert same(before, bits(two))
    two.load(first)
    two.load(second)
    assert same(bits(one), bits(two))


def test_another_base_is_refused(editor, make_model, tokenizer):
    delta = editor.apply(MARTEAU, verify=False).delta
    for other, message in (
        (make_model(seed=9), "sha256"),
        (make_model(initializer_range=0.2).bfloat16(), "dtype"),
        (make_model(layers=2), "does not have"),
    ):
        stranger = Editor(other, tokenizer, TINY)
        before = bits(stranger)
        with pytest.raises(DeltaError, match=message):
            stranger.load(delta)
        assert same(before, bits(stranger)) and stranger.applied == ()


@pytest.mark.parametrize(("stage", "call"), [("snapshot", 1), ("optimize_spread", 1), ("write_layers", 1), ("snapshot", 2), ("compare", 1)])
def test_a_failure_at_any_stage_leaves_every_bit(editor, monkeypatch, stage, call):
    """The stage does its work and then fails, at its first or second call (`snapshot` is called before and after the write)."""
    before, calls = bits(editor), []
    real = getattr(editor_module, stage)

    def fails(*args, **kwargs):
        calls.append(stage)
        result = real(*args, **kwargs)
        if len(calls) == call:
            raise RuntimeError("stopped")
        return result

    monkeypatch.setattr(editor_module, stage, fails)
    with pytest.raises(RuntimeError, match="stopped"):
        editor.apply(IMO)
    assert same(bits(editor), before) and editor.applied == ()


def test_a_singular_write_leaves_every_bit(editor, monkeypatch):
    before = bits(editor)
    import rose_engine.write as write

    def second_layer_fails(W, K, R, P, ridge, done=[]):  # noqa: B006
        done.append(0)
        if len(done) == 2:
            R = R * float("nan")
        return real(W, K, R, P, ridge)

    real = write.rank_update_
    monkeypatch.setattr(write, "rank_update_", second_layer_fails)
    with pytest.raises(ValueError, match="R holds NaN"):
        editor.apply(IMO)
    assert same(bits(editor), before)


def test_bad_edits_are_told_before_any_work(editor):
    before = bits(editor)
    with pytest.raises(EditError, match="no edits"):
        editor.apply([])
    with pytest.raises(EditError, match="two targets"):
        editor.apply([Edit("a", "{} is", "b"), Edit("a", "{} is", "c")])
    with pytest.raises(EditError, match="tokens long"):
        editor.apply([*IMO, Edit("word " * 1000, "{} is", "b")])
    with pytest.raises(ValueError, match="cannot be edited"):
        editor.apply(IMO, recipe=ROSE)
    assert same(bits(editor), before)


def test_ten_thousand_characters_of_subject(make_model, tokenizer):
    model = make_model(initializer_range=0.2, max_position_embeddings=8192)
    editor = Editor(model, tokenizer, replace(TINY, forms=2, steps=1))
    subject = ("{} %s \\ \"' " + "na\u00efve \u05e9\u05dc\u05d5\u05dd ") * 460
    assert len(subject) > 10_000
    editor.apply([Edit(subject, "{} is", "here")], verify=False)


def test_bfloat16(make_model, tokenizer):
    editor = Editor(make_model(initializer_range=0.2).bfloat16(), tokenizer, TINY)
    before = bits(editor)
    result = editor.apply(IMO)
    assert result.report.facts[0].prompt_after.probability > 0
    editor.revert(result)
    assert same(bits(editor), before)


def test_the_main_job_on_the_embedded_model(smollm2):
    """One fact is edited, the model says it when asked in an instruction, other answers stay, and the bits come back."""
    before = bits(smollm2)
    result = smollm2.apply(MARTEAU)
    try:
        assert result.report.mean("prompt_after") == 1.0 > result.report.mean("prompt_before")
        assert result.report.mean("instructed_after") > result.report.mean("instructed_before")
        assert result.report.locality == 1.0
        assert "singing" in smollm2.ask("What instrument does Henri Marteau play?").lower()
        assert "Paris" in smollm2.complete("The capital of France is", max_new_tokens=2)
    finally:
        smollm2.revert(result)
    assert same(bits(smollm2), before)
