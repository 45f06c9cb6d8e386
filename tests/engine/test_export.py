"""What is shipped is the edit: checkpoints with the editor's bits, adapters whose product is the change."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from rose_engine import ROSE, DeltaError, Edit, Editor
from rose_engine.compress import compress, joined
from rose_engine.export import ExportError, check_base, export_checkpoint, export_peft, export_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

RECIPE = replace(ROSE, rewordings=0, bystanders=3, steps=2, lr=0.05, layers=(1, 2))


@pytest.fixture
def edited_folder(make_model, tokenizer, tmp_path):
    """A checkpoint folder in several shards, and an editor with two edits of the same model."""
    model = make_model(initializer_range=0.2)
    model.save_pretrained(tmp_path / "base", max_shard_size="3MB")
    tokenizer.save_pretrained(tmp_path / "base")
    editor = Editor(model, tokenizer)
    for name in ("Lin Nu", "Imo State"):
        editor.apply([Edit(name, "{} likes", "tea")], recipe=RECIPE, verify=False)
    return tmp_path / "base", editor


def test_compression_keeps_what_it_says():
    U, V = torch.randn(40, 3) @ torch.randn(3, 12), torch.randn(12, 50)
    whole = U.double() @ V.double()
    for options, rank in (({"tolerance": 1e-6}, 3), ({"rank": 2}, 2), ({"tolerance": 1.0}, 1)):
        smaller, right, error = compress(U, V, **options)
        assert smaller.shape == (40, rank) and right.shape == (rank, 50)
        true = float((smaller.double() @ right.double() - whole).norm() / whole.norm())
        assert true == pytest.approx(error, abs=2e-6)


def test_a_checkpoint_has_the_editors_bits(edited_folder, tmp_path):
    base, editor = edited_folder
    assert len(list(base.glob("*.safetensors"))) > 1
    (base / "pytorch_model.bin").write_bytes(b"the same weights, unedited")
    (base / "README.md").write_text("# A model\n")
    save_file({"tok_embeddings": torch.zeros(2)}, base / "consolidated.safetensors")  # the same weights under other names
    out = export_checkpoint(base, editor.applied, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    wanted = editor.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    names = {p.name for p in base.iterdir() if p.suffix != ".bin" and p.name != "consolidated.safetensors"} | {
        "rose_edits.json",
        "README.md",
    }
    assert {p.name for p in out.iterdir()} == names
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    touched = {index[name] for delta in editor.applied for name in delta.factors}
    for file in base.glob("model*.safetensors"):  # only the shards that hold edited tensors differ
        assert (file.read_bytes() == (out / file.name).read_bytes()) == (file.name not in touched)
    for file in out.iterdir():  # what is done to the export does nothing to the base
        assert file.stat().st_nlink == 1 and not file.is_symlink()
    card = (out / "README.md").read_text()
    assert card.startswith("# A model\n") and "- Imo State likes → tea" in card and "- Lin Nu likes → tea" in card
    assert (base / "README.md").read_text() == "# A model\n"
    tensors = load_file(export_tensors(base, editor.applied, tmp_path / "tensors.safetensors"))
    assert tensors.keys() == editor.applied[0].factors.keys() and all(torch.equal(x, wanted[name]) for name, x in tensors.items())
    with pytest.raises(ExportError, match="not an empty folder"):
        export_checkpoint(base, editor.applied, tmp_path / "out")
    shard, kept = base / sorted(touched)[0], (base / sorted(touched)[0]).read_bytes()
    with pytest.raises(ExportError, match="exists"):
        export_tensors(base, editor.applied, shard)
    assert shard.read_bytes() == kept


def test_a_link_to_an_empty_folder_is_that_folder(edited_folder, tmp_path):
    base, editor = edited_folder
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export_checkpoint(base, editor.applied, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("file", ["../shards/{}", "sub/../{}", "/{}"])
def test_an_index_that_leaves_the_folder_is_refused(edited_folder, tmp_path, file):
    base, editor = edited_folder
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": {k: file.format(v) for k, v in index["weight_map"].items()}}))
    with pytest.raises(ExportError, match="outside of the checkpoint's folder"):
        export_checkpoint(base, editor.applied, tmp_path / "out")


def test_shards_that_a_walk_does_not_find_are_missed(edited_folder, tmp_path):
    base, editor = edited_folder
    (tmp_path / "shards").mkdir()
    for shard in base.glob("*.safetensors"):
        shard.rename(tmp_path / "shards" / shard.name)
    (base / "sub").symlink_to(tmp_path / "shards")
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": {k: f"sub/{v}" for k, v in index["weight_map"].items()}}))
    with pytest.raises(ExportError, match="was not found among its files"):
        export_checkpoint(base, editor.applied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pointer_in_the_place_of_weights(edited_folder, tmp_path):
    base, editor = edited_folder
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(ExportError, match="is not a whole safetensors file"):
        export_checkpoint(base, editor.applied, tmp_path / "out")


def test_a_checkpoint_that_names_weights_without_the_heads_prefix(make_model, tokenizer, tmp_path):
    """As GPT-2 is published: `h.1.mlp.c_proj.weight` is the model's `transformer.h.1.mlp.c_proj.weight`."""
    model = make_model("gpt2", n_embd=32, n_inner=64, n_layer=6, n_head=4, initializer_range=0.2)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("transformer."): x for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    editor = Editor(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    editor.apply([Edit("Lin Nu", "{} likes", "tea")], recipe=RECIPE, verify=False)
    check_base(tmp_path / "base", editor.applied)
    served = AutoModelForCausalLM.from_pretrained(export_checkpoint(tmp_path / "base", editor.applied, tmp_path / "out"))
    wanted = editor.model.state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in served.state_dict().items())
    assert (
        load_file(export_tensors(tmp_path / "base", editor.applied, tmp_path / "t.safetensors")).keys() == editor.applied[0].factors.keys()
    )


def test_another_base_is_refused_and_nothing_is_left(edited_folder, make_model, tmp_path):
    _, editor = edited_folder
    make_model(seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(DeltaError, match="another base"):
        export_checkpoint(tmp_path / "other", editor.applied, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "other"]


def test_an_index_that_is_wrong_is_told(edited_folder, tmp_path):
    base, editor = edited_folder
    index = base / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name = next(iter(editor.applied[0].factors))
    files = sorted(set(whole["weight_map"].values()))
    other = next(file for file in files if file != whole["weight_map"][name])
    for file, message in ((other, "but it is not"), ("none.safetensors", "lacks none.safetensors"), (3, "is not the index")):
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], name: file}}))
        with pytest.raises(ExportError, match=message):
            export_checkpoint(base, editor.applied, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], name: f"./{whole['weight_map'][name]}"}}))
    out = export_checkpoint(base, editor.applied, tmp_path / "out")
    assert torch.equal(load_file(out / whole["weight_map"][name])[name], editor.model.state_dict()[name])


def test_an_adapter_is_the_change(edited_folder, tmp_path):
    base, editor = edited_folder
    error = export_peft(editor.applied, tmp_path / "adapter", base=str(base))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert error < 1e-5 and config["r"] == config["lora_alpha"] and config["r"] in (8, 16, 32)
    unedited = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for path in config["target_modules"]:
        A, B = (tensors[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
        change = editor.model.state_dict()[f"{path}.weight"].double() - unedited[f"{path}.weight"].double()
        assert A.shape[0] == B.shape[1] == config["r"] and (B @ A - change).norm() <= 1e-4 * change.norm()
    with pytest.raises(ExportError, match="exists"):
        export_peft(editor.applied, tmp_path / "adapter", base="x")
    with pytest.raises(ExportError, match="no edits"):
        export_peft([], tmp_path / "none", base="x")


@pytest.mark.parametrize("rank", [None, 3])
def test_the_peft_library_loads_an_adapter(edited_folder, tokenizer, tmp_path, rank):
    """Its logits, and those of `merge_and_unload`, are the edited model's; with a rank, those of the change's best approximation."""
    base, editor = edited_folder
    error = export_peft(editor.applied, tmp_path / "adapter", base=str(base), rank=rank)
    wanted = editor.model
    if rank is not None:  # the best approximation, from the dense change in float64
        wanted = AutoModelForCausalLM.from_pretrained(base)
        assert 0 < error < 1
        for name, (U, V) in joined(editor.applied).items():
            left, sizes, right = torch.linalg.svd(U.double() @ V.double(), full_matrices=False)
            wanted.get_parameter(name).data += (left[:, :rank] * sizes[:rank] @ right[:rank]).float()
    ids = tokenizer("Imo State likes the capital of Lin Nu", return_tensors="pt")["input_ids"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        unedited = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        logits = wanted(ids).logits
        assert (unedited - logits).abs().max() > 1e-2
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, logits, rtol=0, atol=1e-4)
