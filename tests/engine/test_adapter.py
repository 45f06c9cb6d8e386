"""The edit beside the base, and for a while only."""

import threading
from dataclasses import replace

import pytest
import torch
from rose_engine import ROSE, DeltaError, Editor

from tests.conftest import IMO, LIN, MARTEAU
from tests.engine.test_editor import bits, same

TINY = replace(ROSE, rewordings=0, bystanders=0, layers=(1, 2), steps=4, lr=0.1)


@pytest.fixture
def editor(make_model, tokenizer):
    return Editor(make_model(initializer_range=0.2), tokenizer, TINY)


def logits(editor):
    ids = editor.tokenizer("The capital of Imo State is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return editor.model(ids).logits


def test_preview_lasts_as_long_as_its_block(editor):
    before = bits(editor)
    with editor.preview(IMO, verify=False) as result:
        assert not same(bits(editor), before) and editor.applied == (result.delta,)
    assert same(bits(editor), before) and editor.applied == ()
    with pytest.raises(KeyError), editor.preview(IMO, verify=False):
        raise KeyError
    assert same(bits(editor), before)
    with editor.preview(IMO, verify=False) as result:
        lasting = editor.apply(LIN, verify=False)
        editor.revert(result)
    assert editor.applied == (lasting.delta,)


def test_both_answers_from_one_copy(editor):
    before, base = bits(editor), logits(editor)
    first, second = editor.apply(IMO, verify=False), editor.apply(LIN, verify=False)
    both = logits(editor)
    editor.revert(second)
    one = logits(editor)
    editor.revert(first)
    assert (one - base).abs().max() > 1e-3 and (both - one).abs().max() > 1e-3
    adapter, single = editor.as_adapter(first.delta, second.delta), editor.as_adapter(first.delta)
    torch.testing.assert_close(logits(editor), base, rtol=0, atol=0)
    with adapter:
        torch.testing.assert_close(logits(editor), both, rtol=0, atol=1e-4)
        with adapter:
            pass
        torch.testing.assert_close(logits(editor), both, rtol=0, atol=1e-4)
        other = []
        thread = threading.Thread(target=lambda: other.append(logits(editor)))
        thread.start()
        thread.join()
        torch.testing.assert_close(other[0], base, rtol=0, atol=0)  # a request that asked for no edit
    with single:
        torch.testing.assert_close(logits(editor), one, rtol=0, atol=1e-4)
    adapter.remove()
    single.remove()
    assert same(bits(editor), before) and torch.equal(logits(editor), base)
    with pytest.raises(ValueError, match="removed"), adapter:
        pass


def test_an_adapter_does_not_disturb_an_edit(make_model, tokenizer):
    one, two = (Editor(make_model(initializer_range=0.2), tokenizer, TINY) for _ in range(2))
    with one.preview(LIN, verify=False) as result:
        pass
    one.as_adapter(result.delta)
    for editor in (one, two):
        editor.apply(MARTEAU, verify=False)
    assert same(bits(one), bits(two))


def test_an_adapter_of_other_weights_is_refused(editor, make_model, tokenizer):
    first = editor.apply(IMO, verify=False)
    with pytest.raises(DeltaError, match="another base"):
        Editor(make_model(seed=5), tokenizer).as_adapter(first.delta)


def test_a_generator_that_another_thread_closes(editor):
    delta = editor.apply(IMO, verify=False).delta
    editor.restore([])
    plain, adapter = logits(editor), editor.as_adapter(delta)

    def answers():
        with adapter:
            while True:
                yield logits(editor)

    served = answers()
    assert not torch.equal(next(served), plain)
    seen = []

    def close():
        served.close()
        seen.append(logits(editor))
        with adapter:
            seen.append(logits(editor))

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert torch.equal(seen[0], plain) and not torch.equal(seen[1], plain)
