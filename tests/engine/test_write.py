"""The write against method.md section 2, with keys and residuals read from the model by hooks, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from rose_engine import Edit
from rose_engine.architecture import decoder_of
from rose_engine.bystanders import GENERAL_AMONG_SEVERAL, NAMES, NAMESAKES, WHOLE, bystander_rows
from rose_engine.certificate import OTHERS
from rose_engine.edits import group_by_subject
from rose_engine.optimize import subject_rows
from rose_engine.precondition import preconditioner
from rose_engine.recipe import ROSE
from rose_engine.statements import MORE, STATEMENTS
from rose_engine.write import all_or_nothing, write_layers

from tests.conftest import IMO, MARTEAU
from tests.engine.naive import run

LAYERS = (1, 2, 4)
ALIKE = (Edit("Lin Nu", "{} lives in", "Madrid"), Edit("Lin Nu", "{} speaks", "Basque"))


def keys_and_hidden(model, row, layer, last):
    """(input of down_proj at `layer`, hidden state after `last`) at the row's subject token, by hooks on the whole model."""
    seen = {}
    hooks = [
        model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(key=a[0][0, row.last])),
        model.model.layers[last].register_forward_hook(lambda m, a, out: seen.update(hidden=out[0, row.last])),
    ]
    with torch.no_grad():
        run(model, row)
    for hook in hooks:
        hook.remove()
    return seen["key"].double(), seen["hidden"].double()


def held_by(recipe):
    """The identity at every weight."""
    return lambda name: preconditioner(64, recipe.ridge)


def every_key(model, rows, layer):
    """K_p [d_in, m]: the keys at `layer` of every token of the rows, once for each distinct text that leads to a token."""
    keys = {}
    for row in rows:
        seen = []
        hook = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0][0]))
        with torch.no_grad():
            model(torch.tensor([row.tokens]))
        hook.remove()
        keys.update({row.tokens[: t + 1]: key.double() for t, key in enumerate(seen[0])})
    return torch.stack(list(keys.values()), 1)


@pytest.mark.parametrize("bystanders", [0, 5])
@pytest.mark.parametrize("columns", ["row", "mean"])
def test_write_equals_the_method(make_model, tokenizer, columns, bystanders):
    recipe = replace(ROSE, layers=LAYERS, columns=columns, ridge=0.3, waypoints=0)
    model = make_model(seed=7, initializer_range=0.2)
    plain = copy.deepcopy(model)
    decoder = decoder_of(model)
    subjects = [subject_rows(decoder, tokenizer, s, recipe) for s in group_by_subject((*IMO, *MARTEAU))]
    rows = [row for s in subjects for row in s.facts]
    owner = [i for i, s in enumerate(subjects) for _ in s.facts]
    delta = torch.randn(2, 32)
    wanted = torch.stack([keys_and_hidden(plain, row, LAYERS[0], LAYERS[-1])[1] for row in rows]).float()
    others = bystander_rows((*IMO, *MARTEAU), tokenizer, bystanders) if bystanders else []
    protect = {layer: every_key(plain, others, layer) for layer in LAYERS} if others else {}
    factors = write_layers(decoder, rows, owner, wanted, delta, [0.1, 0.1], recipe, held_by(recipe), others).factors

    z = wanted.double() + delta.double()[torch.tensor(owner)]
    for i, layer in enumerate(LAYERS):
        keys, hidden = zip(*(keys_and_hidden(plain, row, layer, LAYERS[-1]) for row in rows), strict=True)
        K, R = torch.stack(keys).T, ((z - torch.stack(hidden)) / (len(LAYERS) - i)).T
        if columns == "mean":
            groups = [[r for r, s in enumerate(owner) if s == wanted] for wanted in range(2)]
            K, R = torch.stack([K[:, g].mean(1) for g in groups], 1), R[:, [g[0] for g in groups]]
        C = 0.3 * torch.eye(len(K), dtype=torch.float64)
        if protect:
            C += protect[layer] @ protect[layer].T
        dW = R @ K.T @ torch.linalg.inv(C + K @ K.T)
        weight = plain.model.layers[layer].mlp.down_proj.weight
        before = weight.detach().clone()
        weight.data += dW.float()
        ours = model.model.layers[layer].mlp.down_proj.weight
        torch.testing.assert_close(ours - before, dW.float(), rtol=1e-3, atol=1e-4 * float(dW.abs().max()))
        U, V = factors[f"model.layers.{layer}.mlp.down_proj.weight"]
        torch.testing.assert_close((U @ V).double(), dW, rtol=1e-3, atol=1e-4 * float(dW.abs().max()))
        assert U.shape[1] <= len(rows)


def test_rows_that_begin_alike_are_one_column(make_model, tokenizer):
    recipe = replace(ROSE, layers=LAYERS)
    decoder = decoder_of(make_model())
    rows = subject_rows(decoder, tokenizer, group_by_subject(ALIKE)[0], recipe).facts
    distinct = len({row.tokens[: row.last + 1] for row in rows})
    assert distinct < len(rows)
    wanted, delta = torch.randn(len(rows), 32), torch.randn(1, 32)
    factors = write_layers(decoder, rows, [0] * len(rows), wanted, delta, [0.1], recipe, held_by(recipe)).factors
    assert {U.shape[1] for U, _ in factors.values()} == {distinct}


def test_protected_texts_move_less(make_model, tokenizer):
    """What a bystander's tokens feel of a write, with and without protection."""
    recipe = replace(ROSE, layers=LAYERS[:1], ridge=0.1)
    felt = {}
    for protected in (False, True):
        model = make_model(seed=7, initializer_range=0.2)
        decoder = decoder_of(model)
        rows = subject_rows(decoder, tokenizer, group_by_subject(IMO)[0], recipe).facts
        others = bystander_rows(IMO, tokenizer, 3)
        Kp = every_key(model, others, LAYERS[0])
        torch.manual_seed(1)
        arguments = (rows, [0] * len(rows), torch.randn(len(rows), 32), torch.randn(1, 32), [0.1], recipe, held_by(recipe))
        [(U, V)] = write_layers(decoder, *arguments, others if protected else ()).factors.values()
        felt[protected] = float((U.double() @ (V.double() @ Kp)).norm())
    assert felt[True] < 0.5 * felt[False]


def test_a_certificate_s_controls_are_no_bystanders():
    """What is protected cannot show how far subjects move that are not."""
    assert not [(a, b) for a in OTHERS for b in (*NAMES, *STATEMENTS, *MORE) if a in b or b in a]
    assert len(STATEMENTS) == ROSE.bystanders // 3 and len(MORE) <= round(ROSE.bystanders * GENERAL_AMONG_SEVERAL)
    assert len({*STATEMENTS, *MORE}) == len(STATEMENTS) + len(MORE)


def told(rows, tokenizer):
    assert all(len(row.tokens) == row.target for row in rows)
    return [tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows]


def test_bystanders_are_neither_edited_nor_written(tokenizer):
    edits = [
        Edit(f"{NAMES[0].upper()} II", "{} lives in", NAMES[1]),
        Edit("kraftwerk", "In {} they speak", "Swahili."),
        Edit("Halley", "{} lives in", "!"),
    ]
    texts = told(bystander_rows(edits, tokenizer, 288), tokenizer)
    assert len(texts) == len(set(texts))
    assert all(any(name in text for text in texts) for name in NAMES[2:])
    named = ("Kraftwerk", "Swahili", "Halley's Comet")
    assert all(any(name in text for text in STATEMENTS) for name in named)
    assert not any(name in text for text in texts for name in (*NAMES[:2], *named))
    assert sum(text in STATEMENTS for text in texts) == len(STATEMENTS) - len(named)


def test_where_several_subjects_stand_more_statements_are_kept(tokenizer):
    """In one write or beside an earlier edit of another subject; one that is edited again stands alone."""
    lin, again, ada = (
        Edit("Linnu", "{} lives in", "Metz"),
        Edit("Linnu", "{} plays the", "harp"),
        Edit("Ada Brandt", "{} plays the", "harp"),
    )

    def kept(edits, earlier=(), count=288):
        return [text for text in told(bystander_rows(edits, tokenizer, count, earlier), tokenizer) if text in MORE]

    assert kept([lin]) == kept([lin], [again]) == kept([lin, ada], count=0) == []
    assert kept([lin, ada]) == kept([lin], [ada]) == list(MORE)
    assert kept([lin, ada], count=24) == list(MORE[:20])
    name = "Bergamo"
    assert any(name in text for text in MORE) and not any(name in text for text in kept([lin, Edit(name, "{} lives in", "Metz")]))


def test_bystanders_stand_in_every_text(tokenizer):
    reworded = [Edit("Linnu", "{} lives in", "Metz", rewordings=["The home of {} is", "{} resides in"])]
    said = ("lives in", "The home of", "resides in")
    texts = told(bystander_rows(reworded, tokenizer, 18), tokenizer)
    asked = [next(part for part in said if part in text) for text in texts[:12]]
    assert len(texts) == 18 and all(asked.count(part) == 4 for part in said) and texts[12:] == list(STATEMENTS[:6])
    assert all(sum(name in text for text in texts[:12]) == 1 for name in NAMES[:12])  # other names for every text
    most = told(bystander_rows(reworded, tokenizer, 30 * len(NAMES)), tokenizer)
    assert len(most) == 3 * len(NAMES) + len(STATEMENTS)
    many = [Edit(f"s{i}", f"{{}} is {i} and", "x") for i in range(90)]
    texts = [text for text in told(bystander_rows(many, tokenizer, 96), tokenizer) if text not in MORE]
    assert len(texts) == 96 and all(any(f"is {i} and" in text for text in texts) for i in (0, 1, 88))
    assert not bystander_rows(many, tokenizer, 0)


@pytest.mark.parametrize("count", [30, 288])
def test_few_chats_go_on_to_the_answer(tokenizer, count):
    """In each half the rest end with the text; a model without a template has none."""
    edits = [Edit("Linnu", f"{{}} is {i} and", "x") for i in range(30)]
    chats = [tokenizer.decode(row.tokens) for row in bystander_rows(edits, tokenizer, count)]
    chats = [text for text in chats if "<|im_start|>" in text]
    whole = [text for text in chats if text.endswith("assistant\n")]
    assert len(chats) == {30: 10, 288: 3 * 35}[count] and len(whole) == {30: WHOLE // 2, 288: WHOLE}[count]
    assert all(text.endswith(" and") for text in chats if text not in whole)
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    assert not any("<|im_start|>" in tokenizer.decode(row.tokens) for row in bystander_rows(edits, plain, count))


def test_bystanders_stand_in_the_words_of_earlier_edits(tokenizer):
    earlier = [Edit("Ada Brandt", "{} lives in", NAMES[0]), Edit("Ada Brandt", "{} plays the", "Guinness")]
    edits = [Edit("Linnu", "{} lives in", "Metz")]
    found = {"{} plays the": ["The instrument of {} is"], "{} lives in": ["The home of {} is"]}
    texts = [text for text in told(bystander_rows(edits, tokenizer, 288, earlier, found), tokenizer) if text not in MORE]
    parts = ("lives in", "plays the", "The instrument of", "The home of")
    named = [text for text in texts if text not in STATEMENTS]
    # Of an earlier edit with the same prompt nothing; it is said already.
    assert [sum(part in text for text in named) for part in parts] == [len(NAMES) - 1] * 3 + [0]
    assert len(texts) == 3 * (len(NAMES) - 1) + len(STATEMENTS) - 1
    assert not any(name in text for text in texts for name in (NAMES[0], "Guinness"))


def test_namesakes_end_as_the_subject_does(tokenizer):
    """Of a subject of several words; none that an edited subject is named in, and none where there are no bystanders."""
    edits = [Edit("Oates Land", "{} lies in", "Asia"), Edit("the Smurfs", "{} air on", "radio"), Edit("Siemens Land", "{} is", "a town")]
    count = 48
    texts = [text for text in told(bystander_rows(edits, tokenizer, count), tokenizer) if text not in MORE]
    alike = [text for text in texts if " Land " in text]
    assert len(texts) == pytest.approx(count + len(alike), abs=3)
    assert sum(text.startswith("<|") or "\n" in text for text in alike) == len(alike) // 2  # in a chat
    assert all(("lies in" in text) != ("Land is" in text) for text in alike)
    assert 8 <= len(alike) <= 2 * NAMESAKES and not any("Siemens Land" in text or "Oates Land" in text for text in alike)
    assert not any("Smurfs" in text for text in texts)
    assert not bystander_rows(edits, tokenizer, 0)


def test_all_or_nothing():
    weight = torch.randn(4, 4)
    before = weight.clone()
    with pytest.raises(KeyboardInterrupt), all_or_nothing([weight]):
        weight.zero_()
        raise KeyboardInterrupt
    assert torch.equal(weight, before)
