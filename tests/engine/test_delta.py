"""Delta files: what is written is read back, and nothing else is accepted."""

import json

import pytest
import torch
from rose_engine import Delta, DeltaError
from rose_engine.delta import _checksum, fingerprint
from safetensors.torch import load_file, save_file

NAME = "model.layers.4.mlp.down_proj.weight"


def make(n: int = 3) -> Delta:
    weight = torch.randn(6, 10)
    factors = {NAME: (torch.randn(6, n), torch.randn(n, 10))}
    facts = {"edits": [{"subject": "{🙂}\n", "prompt": "{} likes", "target": "tea"}], "subjects": ["{🙂}\n", "b"], "columns": [0, 1, 0, 0]}
    metadata = {"format": 1, "base": fingerprint({NAME: weight}), "parent": None, "below": 0, **facts}
    return Delta(factors, metadata, {NAME: torch.randn(10, 4)})


def test_round_trip(tmp_path):
    delta = make()
    delta.save(tmp_path / "new" / "d.safetensors")
    read = Delta.load(tmp_path / "new" / "d.safetensors")
    assert read.metadata == delta.metadata and read.nbytes == delta.nbytes == 4 * (3 * 16 + 10 * 4)
    assert all(torch.equal(a, b) for a, b in zip(read.factors[NAME], delta.factors[NAME], strict=True))
    assert torch.equal(read.keys[NAME], delta.keys[NAME]) and read.columns == [0, 1, 0, 0]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["d.safetensors"]


def test_bfloat16_halves_the_file(tmp_path):
    delta = make()
    for dtype in (torch.float32, torch.bfloat16):
        delta.save(tmp_path / str(dtype), dtype)
    exact, rounded = (Delta.load(tmp_path / str(dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert exact.id == delta.id != rounded.id
    for a, b in zip(delta.factors[NAME], rounded.factors[NAME], strict=True):
        assert b.dtype == torch.float32 and torch.equal(b, a.bfloat16().float())
    tensors = [load_file(tmp_path / str(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert [sum(x.nbytes for x in t.values()) for t in tensors] == [delta.nbytes, delta.nbytes // 2]


def test_a_full_disk_leaves_the_old_file(tmp_path, small_disk):
    make().save(tmp_path / "d")
    before = (tmp_path / "d").read_bytes()
    with small_disk(4096), pytest.raises(OSError, match="cannot be written"):
        make(500).save(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_fingerprint_sees_a_single_bit():
    weight = torch.randn(5, 4).bfloat16()
    before = fingerprint({NAME: weight})
    assert before == fingerprint({NAME: weight.clone()}) and before[0]["dtype"] == "bfloat16" and before[0]["shape"] == [5, 4]
    weight.view(torch.int16)[3, 2] ^= 1
    assert before != fingerprint({NAME: weight})


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_files(tmp_path, cut):
    make().save(tmp_path / "d")
    data = (tmp_path / "d").read_bytes()
    (tmp_path / "d").write_bytes(data[:cut])
    with pytest.raises(DeltaError):
        Delta.load(tmp_path / "d")


def broken(change):
    delta = make()
    metadata = json.loads(json.dumps(dict(delta.metadata)))
    tensors = {f"{NAME}.U": delta.factors[NAME][0], f"{NAME}.V": delta.factors[NAME][1], f"{NAME}.K": delta.keys[NAME]}
    change(metadata, tensors)
    return tensors, metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update(format=2), "format 1"),
        (lambda m, t: m.pop("base"), "names no weights"),
        (lambda m, t: m.update(below=-1), "stands on"),
        (lambda m, t: m.update(parent="a"), "stands on"),
        (lambda m, t: m.update(below=2), "stands on"),
        (lambda m, t: m["base"][0].pop("sha256"), "incomplete"),
        (lambda m, t: m["base"][0].update(shape=[6]), "not that of a matrix"),
        (lambda m, t: m["base"].append(m["base"][0]), "twice"),
        (lambda m, t: m["base"][0].update(shape=[6, 11]), "do not make"),
        (lambda m, t: t.pop(f"{NAME}.U"), "are not U, V, K"),
        (lambda m, t: t.update(other=torch.zeros(1)), "are not U, V, K"),
        (lambda m, t: t.update({f"{NAME}.U": torch.randn(6, 2)}), "do not make"),
        (lambda m, t: t.update({f"{NAME}.U": torch.randn(6, 3).double()}), "not float32"),
        (lambda m, t: t[f"{NAME}.V"].fill_(float("nan")), "NaN or Inf"),
        (lambda m, t: t[f"{NAME}.K"].fill_(float("inf")), "NaN or Inf"),
        (lambda m, t: m.pop("edits"), "which edits"),
        (lambda m, t: m.update(edits=["a"]), "one of its edits is none"),
        (lambda m, t: m.update(edits=[{"subject": 5}]), "one of its edits is none"),
        (lambda m, t: m.update(recipe=[]), "which edits"),
        (lambda m, t: m["base"][0].update(more=1), "more than it should"),
        (lambda m, t: t.update({f"{NAME}.U": torch.tensor(1.0)}), "do not make"),
        (lambda m, t: m.pop("columns"), "are not U, V of"),
        (lambda m, t: m["columns"].append(0), "not \\[10, 5"),
        (lambda m, t: m["columns"].__setitem__(0, 2), "of no subject"),
        (lambda m, t: m["columns"].__setitem__(0, True), "of no subject"),
        (lambda m, t: m.update(subjects=[1, "b"]), "whose"),
    ],
)
def test_inconsistent_files(tmp_path, change, message):
    tensors, metadata = broken(change)
    text = json.dumps(metadata)
    save_file(tensors, tmp_path / "d", metadata={"rose": text, "sha256": _checksum(text, tensors)})
    with pytest.raises(DeltaError, match=message):
        Delta.load(tmp_path / "d")


def test_other_safetensors_files(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "d")
    with pytest.raises(DeltaError, match="not a delta"):
        Delta.load(tmp_path / "d")
    save_file({"x": torch.zeros(2)}, tmp_path / "d", metadata={"rose": "{"})
    with pytest.raises(DeltaError, match="not JSON"):
        Delta.load(tmp_path / "d")
    with pytest.raises(FileNotFoundError):
        Delta.load(tmp_path / "missing")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    delta = make()
    delta.save(tmp_path / "d")
    before = (tmp_path / "d").read_bytes()
    with pytest.raises(ValueError):
        Delta(delta.factors, {**delta.metadata, "report": float("nan")}).save(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
