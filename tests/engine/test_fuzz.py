"""Mutated files: each ends in the documented error or says exactly what it said before; weights stay as they are."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rose_engine import ROSE, Delta, DeltaError, EditError, Editor
from rose_engine.compress import combined
from rose_engine.delta import _checksum
from rose_engine.edits import group_by_subject, read_edits
from rose_engine.export import edited_facts
from rose_engine.optimize import subject_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import IMO, LIN

RECIPE = replace(ROSE, rewordings=0, bystanders=0, forms=2, layers=(1, 2), steps=1, lr=0.1)
KINDS = st.sampled_from(("flip", "write", "insert", "delete", "cut", "repeat"))
MUTATIONS = st.lists(st.tuples(KINDS, st.integers(0, 2**40), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)
EVERY = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))


def mutated(data: bytes, mutations) -> bytes:
    """Bytes flipped, overwritten, put in, taken out or said twice; half of the time in the first kilobyte, where the header is."""
    for kind, number, more in mutations:
        at = number // 2 % max(1, min(len(data), 1000) if number % 2 else len(data))
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (1 << more[0] % 8)]) + data[at + 1 :] if data else data
        elif kind == "write":
            data = data[:at] + more + data[at + len(more) :]
        elif kind == "insert":
            data = data[:at] + more + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + len(more) :]
        elif kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + data[at // 2 :]
    return data


@pytest.fixture
def editor(make_model, tokenizer):
    return Editor(make_model(initializer_range=0.2), tokenizer, RECIPE)


def test_mutated_delta_files(editor, tmp_path):
    editor.apply(LIN).delta.save(tmp_path / "whole")
    editor.restore([])
    delta = Delta.load(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    before = {name: weight.clone() for name, weight in editor.weights().items()}
    refused = []

    @EVERY
    @given(MUTATIONS)
    def check(mutations):
        (tmp_path / "d").write_bytes(mutated(whole, mutations))
        try:
            read = Delta.load(tmp_path / "d")
        except DeltaError as error:
            assert str(tmp_path / "d") in str(error)
            refused.append(error)
        else:
            assert read.id == delta.id and read.metadata == delta.metadata
            assert all(torch.equal(K, delta.keys[name]) for name, K in read.keys.items())

    check()
    assert len(refused) > 1000
    assert all(torch.equal(weight, before[name]) for name, weight in editor.weights().items())


def test_forged_metadata(editor, tmp_path):
    """Any value of the metadata exchanged for anything, with a checksum that fits: read, or refused as it should be."""
    editor.apply(LIN).delta.save(tmp_path / "whole")
    editor.restore([])
    tensors = load_file(tmp_path / "whole")
    with safe_open(str(tmp_path / "whole"), "pt") as f:
        whole = f.metadata()["rose"]
    values = (
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
    )
    values |= st.dictionaries(st.sampled_from(("name", "subject", "x")), st.integers(), max_size=2)
    read = []

    @EVERY
    @given(st.data())
    def check(data):
        metadata = json.loads(whole)
        place = metadata
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
                place = place[key]
                continue
            place[key] = data.draw(values)
            break
        text = json.dumps(metadata)
        save_file(tensors, tmp_path / "d", metadata={"rose": text, "sha256": _checksum(text, tensors)})
        try:
            delta = Delta.load(tmp_path / "d")
            editor._base.check(delta)
            combined([delta])
            edited_facts([delta])
            read.append(True)
        except DeltaError:
            read.append(False)

    check()
    assert 100 < sum(read) < len(read) - 100
    assert editor.applied == ()


def test_mutated_edit_files(editor, tmp_path):
    text = {
        "jsonl": "".join(f'{{"subject": "{e.subject}", "prompt": "{e.prompt}", "target": "{e.target}"}}\n' for e in (*IMO, *LIN)),
        "csv": "subject,prompt,target\n" + "".join(f'{e.subject},"{e.prompt}",{e.target}\n' for e in (*IMO, *LIN)),
    }
    text["json"] = "[" + ",\n".join(text["jsonl"].splitlines()) + "]"
    outcomes = []

    @EVERY
    @given(MUTATIONS, st.sampled_from(sorted(text)))
    def check(mutations, kind):
        file = tmp_path / f"e.{kind}"
        file.write_bytes(mutated(text[kind].encode(), mutations))
        try:
            edits = read_edits(file)
            for subject in group_by_subject(edits):
                subject_rows(editor.decoder, editor.tokenizer, subject, RECIPE)
        except EditError as error:
            assert str(error).startswith(str(file))
            outcomes.append(False)
        else:
            outcomes.append(True)

    check()
    assert 100 < sum(outcomes) < len(outcomes) - 100
