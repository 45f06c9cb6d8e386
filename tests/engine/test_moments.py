"""Second moments and sampled texts, on tiny models, against keys read one text at a time."""

from dataclasses import replace

import pytest
import torch
from rose_engine import ROSE, Editor
from rose_engine.architecture import decoder_of
from rose_engine.moments import moments, second_moments, texts_of, tokenized
from rose_engine.recipe import ALPHAEDIT, MEMIT, MEMIT_MERGE, ROME
from rose_engine.sample import TEXT_TOKENS, sample_prefixes, sample_texts

from tests.conftest import IMO, LIN
from tests.engine.test_editor import bits, same

LAYERS = (1, 2)


@pytest.fixture
def cache(own_cache):
    return own_cache / "moments"


def test_moments_are_means_over_all_tokens(make_model, tokenizer):
    """Texts that begin alike, more than are run at one time."""
    model = make_model(initializer_range=0.2)
    texts = [tokenizer(f"The river {'ran and ran ' * (i % 40)} to {i}")["input_ids"] for i in range(60)]
    keys = {layer: [] for layer in LAYERS}
    for layer in LAYERS:
        hook = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda m, a, layer=layer: keys[layer].append(a[0][0]))
        with torch.no_grad():
            for text in texts:
                model(torch.tensor([text]))
        hook.remove()
    found = second_moments(decoder_of(model), texts, LAYERS)
    for layer in LAYERS:
        k = torch.cat(keys[layer]).double()
        moment = found[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert (moment - k.T @ k / len(k)).norm() <= 1e-5 * moment.norm()
    with pytest.raises(ValueError, match="no text"):
        second_moments(decoder_of(model), [], LAYERS)


def test_a_corpus_file_is_read_to_its_budget(tmp_path, tokenizer):
    (tmp_path / "c.txt").write_text("One line.\n\n" + "word " * 300 + "\nThe last line.\n")
    read = list(tokenized(tokenizer, texts_of(str(tmp_path / "c.txt")), 262))
    assert tokenizer.decode(read[0]).strip() == "One line." and len(read[1]) == 256 and sum(map(len, read)) == 262
    with pytest.raises(FileNotFoundError):
        next(texts_of(str(tmp_path / "none.txt")))


def test_samples_repeat_with_their_seed(make_model, tokenizer):
    model = make_model(initializer_range=0.2)
    state = torch.random.get_rng_state()
    one, again, other = (sample_texts(model, tokenizer, 900, seed) for seed in (1, 1, 2))
    assert one == again != other and sum(map(len, one)) >= 900 and max(map(len, one)) <= TEXT_TOKENS + 2
    assert len({tuple(text) for text in one}) == len(one)
    prefixes = sample_prefixes(model, tokenizer, 3)
    assert prefixes == sample_prefixes(model, tokenizer, 3) and len(prefixes) == 5 and all(p.endswith(". ") for p in prefixes)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's numbers change


def test_moments_are_kept_by_base_and_corpus(make_model, tokenizer, tmp_path, cache):
    editor = Editor(make_model(initializer_range=0.2), tokenizer, replace(ROSE, layers=LAYERS, steps=1))
    (tmp_path / "c.txt").write_text("It rains. " * 50)
    ask = lambda *about, layers=LAYERS: moments(editor.decoder, tokenizer, layers, *about)  # noqa: E731
    first = ask(str(tmp_path / "c.txt"), 100, 0)
    kept = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = ask(str(tmp_path / "c.txt"), 100, 5)  # the seed is the sampled text's alone
    assert ask(str(tmp_path / "c.txt"), 100, 0, layers=(2,)).keys() < first.keys()
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == kept and all(
        torch.equal(first[name], again[name]) for name in first
    )
    (tmp_path / "c.txt").write_text("It snows. " * 50)
    assert not torch.equal(next(iter(ask(str(tmp_path / "c.txt"), 100, 0).values())), next(iter(first.values())))
    assert len(list(cache.iterdir())) == 4
    editor.apply(LIN, verify=False)
    ask(str(tmp_path / "c.txt"), 100, 0)  # another model
    assert len(list(cache.iterdir())) == 6


@pytest.mark.parametrize("recipe", [MEMIT, MEMIT_MERGE, ALPHAEDIT, ROME], ids=lambda recipe: recipe.name)
def test_published_methods_are_recipes(make_model, tokenizer, cache, recipe):
    """They edit, are taken back bit for bit, and a second edit sees the second moments of the unedited model."""
    model = make_model(initializer_range=0.2)
    layers = (1, 2) if len(recipe.layers) > 1 else (2,)
    recipe = replace(recipe, layers=layers, steps=4, corpus_tokens=600, null_threshold=1.0, covariance_weight=0.1)
    editor = Editor(model, tokenizer, recipe)
    before = bits(editor)
    first = editor.apply(LIN[:1], verify=False)
    assert len(first.delta.columns) == 1 and not same(before, bits(editor))
    assert len(first.delta.metadata["recipe"]["prefixes"]) == 5
    fresh = Editor(make_model(initializer_range=0.2), tokenizer, recipe)
    second, alone = editor.apply(IMO, verify=False), fresh.apply(IMO, verify=False)
    assert len(second.delta.columns) == (3 if recipe.grouping == "fact" else 1) and second.loss != alone.loss
    assert len(list(cache.iterdir())) == len(layers)
    editor.revert(first)
    editor.revert(second)
    assert same(before, bits(editor))
    with pytest.raises(ValueError, match="preconditioner must be"):
        replace(ROSE, preconditioner="none")
