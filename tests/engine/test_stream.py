"""Streams of edits: batches, rejects, resumption; what is committed is what the weights hold."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rose_engine import ROSE, Edit, EditError, Editor, files, ledger, optimize
from rose_engine.stream import stream

RECIPE = replace(ROSE, rewordings=0, bystanders=3, steps=2, lr=0.05, layers=(1, 2))


@pytest.fixture
def editor(make_model, tokenizer):
    return Editor(make_model(initializer_range=0.2), tokenizer)


def line(subject, prompt="{} likes", target="tea", **more) -> str:
    return json.dumps({"subject": subject, "prompt": prompt, "target": target, **more}) + "\n"


LINES = [line(f"Person {i}", target=("tea", "milk", "water")[i % 3]) for i in range(12)]


def run(editor, path, lines, **options):
    return list(stream(editor, path, lines, recipe=RECIPE, batch_tokens=120, **options))


def notes(path):
    return [commit.note["streams"]["<stream>"] for commit in ledger.verify(path)]


def bits(editor):
    return torch.cat([weight.flatten() for weight in editor.weights().values()])


def test_a_stream_commits_every_edit_in_its_order(editor, tmp_path):
    steps = run(editor, tmp_path / "l", LINES)
    assert len(steps) > 2 and steps[-1].lines == 12
    subjects = [e["subject"] for d in ledger.deltas(tmp_path / "l") for e in d.metadata["edits"]]
    assert subjects == [f"Person {i}" for i in range(12)]
    live = bits(editor)
    editor.restore([])
    assert not torch.equal(bits(editor), live)
    editor.restore(ledger.deltas(tmp_path / "l"))
    assert torch.equal(bits(editor), live)
    assert run(editor, tmp_path / "l", LINES) == []  # nothing twice


def test_a_stream_that_was_left_goes_on(make_model, tokenizer, tmp_path):
    whole, parts = (Editor(make_model(initializer_range=0.2), tokenizer) for _ in range(2))
    run(whole, tmp_path / "whole", LINES)
    left = stream(parts, tmp_path / "parts", LINES, recipe=RECIPE, batch_tokens=120)
    next(left)
    left.close()
    restarted = Editor(make_model(initializer_range=0.2), tokenizer)
    run(restarted, tmp_path / "parts", iter(LINES))
    assert torch.equal(bits(restarted), bits(whole))
    assert notes(tmp_path / "parts") == notes(tmp_path / "whole")


def test_a_batch_does_not_wait_for_a_reader_that_pauses(editor, tmp_path):
    """Two lines, a pause, two more: with `max_wait` the first two are committed in the pause."""
    committed = threading.Event()
    waited = []

    def slowly():
        yield from LINES[:2]
        waited.append(committed.wait(timeout=120))
        yield from LINES[2:4]

    steps = []
    for step in stream(editor, tmp_path / "l", slowly(), recipe=RECIPE, batch_tokens=10**6, max_wait=0.3):
        steps.append(step.lines)
        committed.set()
    assert waited == [True] and steps[0] == 2 and steps[-1] == 4
    assert list(stream(editor, tmp_path / "l", iter(LINES[:4]), recipe=RECIPE, max_wait=0.3)) == []

    def broken():
        yield LINES[4]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        list(stream(editor, tmp_path / "m", broken(), recipe=RECIPE, max_wait=0.3))


BAD = ["{", line("Ada", "likes"), line("Ada", target=""), line("Ada", question="Who?"), line("Ada<|im_end|>"), line("Ada", extra=1)]


def test_bad_lines_are_rejected_with_a_reason(editor, tmp_path):
    lines = [BAD[0], LINES[0], "\n", *BAD[1:], LINES[1]]
    steps = run(editor, tmp_path / "l", lines, rejects=tmp_path / "rejects.jsonl")
    assert steps[-1].lines == len(lines) and sum(s.commit.edits for s in steps) == 2
    rejects = [json.loads(text) for text in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [r["line"] for r in rejects] == [1, 4, 5, 6, 7, 8] and all(f"<stream>:{r['line']}" in r["reason"] for r in rejects)
    assert [r["text"] for r in rejects] == [text.rstrip("\n") for text in BAD]
    run(editor, tmp_path / "l", lines, rejects=tmp_path / "rejects.jsonl")  # again: nothing is said twice
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 6


def test_another_stream_of_the_same_name_is_refused(editor, tmp_path):
    run(editor, tmp_path / "l", LINES[:4], name="-")
    before = bits(editor).clone()
    for lines in (LINES[4:], LINES[:3], [LINES[1], *LINES[1:]]):
        with pytest.raises(ledger.LedgerError, match="not those that the ledger's commits have consumed"):
            run(editor, tmp_path / "l", lines, name="-")
    assert torch.equal(bits(editor), before)
    assert run(editor, tmp_path / "l", LINES[:6], name="-")[-1].lines == 6  # the same, longer: it goes on
    assert run(editor, tmp_path / "l", LINES[4:], name="other")[-1].lines == 8


def test_streams_of_one_ledger_share_a_rejects_file(editor, tmp_path):
    options = {"rejects": tmp_path / "r.jsonl"}
    (tmp_path / "r.jsonl").write_text("there before\n")
    run(editor, tmp_path / "l", [BAD[0], LINES[0]], name="a", **options)
    run(editor, tmp_path / "l", [BAD[1], LINES[1]], name="b", **options)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 3


def test_strict_stops_after_what_came_before(editor, tmp_path):
    steps = stream(editor, tmp_path / "l", [LINES[0], BAD[0], LINES[1]], recipe=RECIPE, strict=True)
    assert next(steps).lines == 1
    with pytest.raises(EditError, match="<stream>:2"):
        next(steps)
    assert len(ledger.verify(tmp_path / "l")) == 1


def test_a_contradiction_is_a_later_edit(editor, tmp_path):
    steps = run(editor, tmp_path / "l", [line("Ada", target="tea"), line("Ada", target="milk")])
    assert [step.lines for step in steps] == [1, 2]


def test_a_subject_that_diverges_is_left_out_alone(editor, tmp_path, monkeypatch):
    """Two of four subjects of a batch get a loss that is not finite."""
    honest = optimize.suffix_step

    def step(batch, delta, subject):
        done = honest(batch, delta, subject)
        for b, r in enumerate(batch.suffixes.row.tolist()):
            if "Zanzibar" in editor.tokenizer.decode(batch.prepared.rows[r].tokens):
                done.loss[b] = torch.nan
        return done

    monkeypatch.setattr(optimize, "suffix_step", step)
    lines = [line(name) for name in ("Ada", "Port Zanzibar", "Kofi", "New Zanzibar")]
    (step,) = stream(editor, tmp_path / "l", lines, recipe=RECIPE, batch_tokens=10**6, rejects=tmp_path / "r.jsonl")
    assert [e["subject"] for e in step.result.delta.metadata["edits"]] == ["Ada", "Kofi"]
    rejects = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [r["line"] for r in rejects] == [2, 4] and all("not finite" in r["reason"] for r in rejects)


def test_edits_are_streamed_as_they_are(editor, tmp_path):
    edits = [Edit(f"Person {i}", "{} likes", "tëa") for i in range(3)]
    steps = list(editor.stream(tmp_path / "l", edits, recipe=RECIPE))
    assert [e for step in steps for e in step.result.delta.metadata["edits"]] == [edit.as_dict() for edit in edits]
    assert list(editor.stream(tmp_path / "l", edits, recipe=RECIPE)) == []


def test_facts_that_fail_are_taken_back_alone(editor, tmp_path, monkeypatch):
    """Two steps teach a random model nothing: every fact fails, and the weights stay those of the base."""
    base = bits(editor).clone()
    steps = run(editor, tmp_path / "l", LINES[:3], require_success=True, rejects=tmp_path / "r.jsonl")
    assert steps == [] and torch.equal(bits(editor), base)
    reasons = [json.loads(text)["reason"] for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(reasons) == 3 and all("taken back" in reason for reason in reasons)


def test_a_commit_that_fails_leaves_weights_and_ledger_as_they_were(editor, tmp_path, monkeypatch):
    run(editor, tmp_path / "l", LINES[:2])
    before = bits(editor).clone()

    def full(self, delta, note):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Writer, "apply", full)
        with pytest.raises(OSError, match="No space"):
            run(editor, tmp_path / "l", LINES)
    assert torch.equal(bits(editor), before) and len(ledger.verify(tmp_path / "l")) == 1
    run(editor, tmp_path / "l", LINES)
    assert notes(tmp_path / "l")[-1]["lines"] == 12


def test_two_streams_share_a_rejects_file(editor, tmp_path):
    """Each goes on without taking the other's lines away; a stream that is refused takes none either."""
    path = tmp_path / "l"
    said = lambda: [json.loads(text)["text"] for text in (path / "rejects.jsonl").read_text().splitlines()]  # noqa: E731
    first, second = [LINES[0], "bad one", LINES[1]], [LINES[2], "bad two", LINES[3]]
    run(editor, path, first, name="first")
    assert run(editor, path, second, name="second")[-1].rejected == 1
    run(editor, path, [*first, "bad three", LINES[4]], name="first")
    assert said() == ["bad one", "bad two", "bad three"]
    with pytest.raises(ledger.LedgerError, match="not those"):
        run(editor, path, ["else", *first], name="first")
    assert said() == ["bad one", "bad two", "bad three"]
    run(editor, path, [*second, "bad four"], name="second")  # no commit follows, and nothing that came later is taken away
    run(editor, path, [*first, "bad three", LINES[4]], name="first")
    ledger_commits = len(ledger.verify(path))
    with ledger.writing(path) as writer:
        writer.checkout(0)
    run(editor, path, [*first, "bad three", LINES[4]], name="first")  # read again, and not said again
    assert said() == ["bad one", "bad two", "bad three", "bad four"] and len(ledger.verify(path)) > ledger_commits + 1
    (path / "rejects.jsonl").rename(tmp_path / "outside")
    (path / "rejects.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError):
        run(editor, path, [*second, "bad five", LINES[5]], name="second")
    assert "five" not in (tmp_path / "outside").read_text()


def test_two_ledgers_share_a_rejects_file_that_was_there(editor, tmp_path):
    options = {"rejects": tmp_path / "r.jsonl"}
    (tmp_path / "r.jsonl").write_text('[1]\n{"line": 1}\nhalf a li')
    for name, some in (("a", LINES[:2]), ("b", LINES[2:4])):
        run(editor, tmp_path / name, [f"bad {name}", *some], name=name, **options)
    run(editor, tmp_path / "a", ["bad a", *LINES[:2], "bad too"], name="a", **options)
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert lines[:3] == ["[1]", '{"line": 1}', "half a li"]
    assert [(json.loads(x)["stream"], json.loads(x)["text"]) for x in lines[3:]] == [("a", "bad a"), ("b", "bad b"), ("a", "bad too")]


def test_rejects_may_go_nowhere_but_not_to_a_folder(editor, tmp_path):
    assert run(editor, tmp_path / "l", [BAD[0], LINES[0]], rejects="/dev/null")[-1].rejected == 1
    with pytest.raises(IsADirectoryError, match="the rejects go to a file"):
        run(editor, tmp_path / "m", LINES[:1], rejects=tmp_path)
    assert ledger.log(tmp_path / "m") == []


def test_how_lines_end_does_not_matter_to_what_was_consumed(editor, tmp_path):
    written = lambda text: io.StringIO(text, newline="")  # noqa: E731
    text = "".join(LINES[:2]).rstrip("\n")
    run(editor, tmp_path / "l", written(text), name="s")
    assert run(editor, tmp_path / "l", written(f"{text}\r\n{LINES[2]}"), name="s")[-1].lines == 3


def test_half_a_last_line_is_read_again_when_it_is_whole(editor, tmp_path):
    written = lambda text: io.StringIO(text, newline="")  # noqa: E731
    (step,) = run(editor, tmp_path / "l", written(LINES[0] + LINES[1][:20]), name="s")
    assert (step.lines, step.rejected) == (1, 1)
    (step,) = run(editor, tmp_path / "l", written("".join(LINES[:3])), name="s")[-1:]
    assert step.lines == 3
    edited = [e["subject"] for delta in ledger.deltas(tmp_path / "l") for e in delta.metadata["edits"]]
    assert len(edited) == len(set(edited)) == 3


@pytest.mark.parametrize("half", [LINES[1][:20], "  "])
def test_half_a_line_before_a_pause(editor, tmp_path, half):
    """A pause ends a batch and not the line."""

    def paused(*lines):
        yield from lines
        time.sleep(0.5)

    rest = LINES[1].removeprefix(half.strip())
    (step,) = run(editor, tmp_path / "l", paused(LINES[0], half), name="s", max_wait=0.1)
    assert step.lines == 1
    assert run(editor, tmp_path / "l", [LINES[0], half + rest], name="s")[-1].lines == 2
    assert run(editor, tmp_path / "whole", paused(*LINES[:2]), name="s", max_wait=0.1)[-1].lines == 2


def test_edits_that_cannot_be_used_are_consumed(editor, tmp_path):
    assert run(editor, tmp_path / "l", [Edit("Ada", "{} likes", "tea"), Edit("A " * 490, "{} likes", "tea")])[-1].lines == 2


def test_a_reject_that_does_not_fit_on_the_disk_is_no_commit(make_model, tokenizer, tmp_path):
    """In a process of its own, whose files may be of so many bytes."""
    make_model(initializer_range=0.2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "r.jsonl").write_text(" " * 5_000_000 + "\n")
    code = f"""
import resource, signal
from rose_engine import Editor
from tests.engine.test_stream import LINES, run
editor = Editor.from_pretrained({str(tmp_path / "model")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_031, 5_000_031))
run(editor, {str(tmp_path / "l")!r}, ["bad", LINES[0]], rejects={str(tmp_path / "r.jsonl")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert ledger.log(tmp_path / "l") == []


def test_what_is_interrupted_after_the_commit_stays(editor, tmp_path, monkeypatch):
    flush = files._flush_directory

    def interrupted(folder):
        flush(folder)
        if ledger.commit_file(tmp_path / "l", 2).exists():
            raise KeyboardInterrupt

    run(editor, tmp_path / "l", LINES[:1])
    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush_directory", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(editor, tmp_path / "l", LINES[:2])
    held = bits(editor).clone()
    assert len(ledger.verify(tmp_path / "l")) == 2 and len(editor.applied) == 2
    editor.restore(ledger.deltas(tmp_path / "l"))
    assert torch.equal(bits(editor), held)


def test_a_name_that_is_no_utf8_and_a_wait_of_nothing(editor, tmp_path):
    name = os.fsdecode(b"caf\xe9.jsonl")
    assert run(editor, tmp_path / "l", LINES[:2], name=name)[-1].lines == 2
    assert run(editor, tmp_path / "l", LINES[:2], name=name) == []
    with pytest.raises(ValueError, match="max_wait must be positive"):
        run(editor, tmp_path / "l", LINES[:2], max_wait=0)


@pytest.mark.parametrize("poison", ['{"subject": ' + "1" * 5000 + ', "prompt": "{} likes", "target": "tea"}', line("A " * 490)])
def test_a_line_that_cannot_be_used_is_no_poison(editor, tmp_path, poison):
    """A number of too many digits; a subject that fits the forms that edit, and not the one that verifies."""
    steps = list(stream(editor, tmp_path / "l", [LINES[0], poison, LINES[1]], recipe=replace(RECIPE, forms=2)))
    assert steps[-1].lines == 3 and steps[-1].rejected == 1 and sum(step.commit.edits for step in steps) == 2
