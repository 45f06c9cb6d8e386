"""The ledger: a chain of commits that only grows, undo in any order, and a clear error for every way in which it can be broken."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from rose_engine import ROSE, Edit, Editor, ledger
from rose_engine.delta import DeltaError
from rose_engine.ledger import LedgerError, writing

from tests.engine.test_editor import same

RECIPE = replace(ROSE, rewordings=0, bystanders=3, steps=2, lr=0.05, layers=(1, 2))
PLACE = {"lines": 7, "sha256": "0"}
NAMES = ("Ada", "Omar", "Kofi", "Lin Nu", "Imo State", "Tomas Vega")


@pytest.fixture
def editor(make_model, tokenizer):
    return Editor(make_model(initializer_range=0.2), tokenizer)


def bits(editor):
    return {name: weight.clone() for name, weight in editor.weights().items()}


def fill(editor, path, count):
    """Commits as many edits; returns the weights after each number of them."""
    states = [bits(editor)]
    with writing(path) as writer:
        for i in range(count):
            name = f"{NAMES[i % len(NAMES)]} {i}"
            writer.apply(editor.apply([Edit(name, "{} likes", "tea")], recipe=RECIPE, verify=False).delta, {"i": i})
            states.append(bits(editor))
    return states


def test_replaying_gives_the_same_bits(editor, tmp_path):
    states = fill(editor, tmp_path / "l", 4)
    commits = ledger.verify(tmp_path / "l")
    assert [c.number for c in commits] == [1, 2, 3, 4] and [c.note["i"] for c in commits] == [0, 1, 2, 3]
    for at in (0, 2, 4, 1, None):
        editor.restore(ledger.deltas(tmp_path / "l", at))
        assert same(bits(editor), states[4 if at is None else at])


def test_revert_in_any_order_ends_at_the_base(editor, tmp_path):
    states = fill(editor, tmp_path / "l", 20)
    order = random.Random(7).sample(range(1, 21), 20)
    for i, number in enumerate(order):
        with writing(tmp_path / "l") as writer:  # opened anew each time, as after a restart
            writer.revert(number)
        if i in (0, 9, 19):
            assert ledger.active(tmp_path / "l") == sorted(set(range(1, 21)) - set(order[: i + 1]))
            editor.restore(ledger.deltas(tmp_path / "l"))
    assert same(bits(editor), states[0])
    assert len(ledger.log(tmp_path / "l")) == 40
    with writing(tmp_path / "l") as writer, pytest.raises(LedgerError, match="is not in the weights"):
        writer.revert(3)
    editor.restore(ledger.deltas(tmp_path / "l", 20))
    assert same(bits(editor), states[20])


def test_checkout_takes_up_an_earlier_state(editor, tmp_path):
    """After any history: reverts, other checkouts, new edits; and what follows stands on it."""
    path = tmp_path / "l"
    states = fill(editor, path, 4)
    wanted = {n: ledger.active(path, n) for n in range(5)}
    with writing(path) as writer:
        writer.revert(2)
        for number in (4, 1, 0, 3):
            commit = writer.checkout(number)
            assert ledger.active(path) == wanted[number]
            editor.restore(ledger.deltas(path))
            assert same(bits(editor), states[number])
        writer.revert(3)
        assert ledger.active(path) == [1, 2] and ledger.active(path, commit.number) == [1, 2, 3]
        editor.restore(ledger.deltas(path))
        added = writer.apply(editor.apply([Edit("Ingrid", "{} likes", "tea")], recipe=RECIPE, verify=False).delta).number
        assert ledger.active(path) == [1, 2, added]
        with pytest.raises(LedgerError, match="has no commit 99"):
            writer.checkout(99)
    assert len(ledger.verify(path)) == 11
    file = ledger.commit_file(path, 9)  # the checkout of commit 3
    file.write_text(file.read_text().replace('"refers_to": 3', '"refers_to": 9'))
    with pytest.raises(LedgerError, match="not before it"):
        ledger.log(path)


def test_many_checkouts_are_read_at_once(editor, tmp_path):
    """Each goes back to the one before it: a reader that followed them one by one would never come to an end."""
    path = tmp_path / "l"
    fill(editor, path, 1)
    with writing(path) as writer:
        for number in range(1, 60):
            writer.checkout(number)
    assert ledger.active(path) == [1] and len(ledger.verify(path)) == 60


@pytest.mark.parametrize(
    "streams",
    [{"s": []}, {"s": {}}, {"s": {"lines": "5", "sha256": ""}}, {"s": {"lines": -1, "sha256": ""}}, {"s": {"lines": 1, "sha256": None}}],
)
def test_notes_that_are_none_are_refused(editor, tmp_path, streams):
    fill(editor, tmp_path / "l", 1)
    file = ledger.commit_file(tmp_path / "l", 1)
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": {"streams": streams}}))
    with pytest.raises(LedgerError, match="is not commit 1"):
        ledger.log(tmp_path / "l")


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_a_pipe_is_not_waited_for(editor, tmp_path):
    fill(editor, tmp_path / "l", 1)
    os.mkfifo(ledger.commit_file(tmp_path / "l", 2))
    with pytest.raises(LedgerError, match="not a plain file"):
        ledger.log(tmp_path / "l")


def test_compaction_keeps_the_change_and_what_is_known_of_it(editor, tmp_path):
    path = tmp_path / "l"
    fill(editor, path, 5)
    with writing(path) as writer:
        writer.revert(2)
        again = editor.apply([Edit("Ada 0", "{} sings", "well")], recipe=replace(RECIPE, layers=(2, 3)), verify=False).delta
        writer.apply(again, {"streams": {"s": PLACE}})
    editor.restore(ledger.deltas(path))
    exact = bits(editor)
    commit = ledger.compact(path, tmp_path / "small", 1e-5)
    (delta,) = ledger.deltas(tmp_path / "small")
    assert commit.edits == 5 and commit.note["streams"] == {"s": PLACE} and commit.note["compacted"]["error"] <= 1e-5
    assert delta.nbytes < sum(d.nbytes for d in ledger.deltas(path))
    assert sorted(delta.subjects) == sorted(["Ada 0", *(f"{NAMES[i]} {i}" for i in (2, 3, 4))])
    assert len(delta.columns) == delta.keys["model.layers.1.mlp.down_proj.weight"].shape[1]
    base = editor._base.tensors
    editor.restore([delta])
    for name, weight in editor.weights((1, 2, 3)).items():
        change = exact[name].double() - base[name].double()
        assert change.norm() > 0 and (weight.double() - exact[name].double()).norm() <= 1e-4 * change.norm()
    editor.apply([Edit("Omar", "{} likes", "tea")], recipe=RECIPE, verify=False)  # on top of it
    with pytest.raises(LedgerError, match="is a ledger already"):
        ledger.compact(path, tmp_path / "small")


def test_restore_refuses_another_base(editor, tmp_path, make_model, tokenizer):
    fill(editor, tmp_path / "l", 1)
    other = Editor(make_model(seed=9), tokenizer)
    before = bits(other)
    with pytest.raises(DeltaError, match="another base"):
        other.restore(ledger.deltas(tmp_path / "l"))
    assert same(bits(other), before)


HOLD = """
import sys, time
from rose_engine.ledger import writing
with writing(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_at_a_time_and_a_dead_one_holds_nothing(editor, tmp_path):
    fill(editor, tmp_path / "l", 1)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "l")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LedgerError, match=f"process {holder.pid} since"), writing(tmp_path / "l"):
            pass
        assert len(ledger.verify(tmp_path / "l")) == 1  # readers are not kept waiting
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with writing(tmp_path / "l") as writer:
        writer.revert(1)


def drop(path):
    ledger.commit_file(path, 2).unlink()


def drop_last(path):
    ledger.commit_file(path, 3).unlink()


def exchange(path):
    a, b = ledger.commit_file(path, 1), ledger.commit_file(path, 2)
    one, two = json.loads(a.read_text()), json.loads(b.read_text())
    a.write_text(json.dumps({**two, "number": 1}))
    b.write_text(json.dumps({**one, "number": 2}))


def flip(path):
    file = ledger.delta_file(path, 2)
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def truncate(path):
    file = ledger.delta_file(path, 3)
    file.write_bytes(file.read_bytes()[:-9])


def swap_deltas(path):
    shutil.copy(ledger.delta_file(path, 1), ledger.delta_file(path, 2))


def lose_a_delta(path):
    ledger.delta_file(path, 1).unlink()


def garble(path):
    ledger.commit_file(path, 2).write_text("{")


def garble_head(path):
    (path / "HEAD").write_text("three")


def rewind_head(path):
    (path / "HEAD").write_text("1 " + "0" * 64)


def link_out(path):
    outside = path.parent / "outside.json"
    ledger.commit_file(path, 2).rename(outside)
    ledger.commit_file(path, 2).symlink_to(outside)


DAMAGES = (drop, drop_last, exchange, flip, truncate, swap_deltas, lose_a_delta, garble, garble_head, rewind_head, link_out)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(editor, tmp_path, damage):
    path = tmp_path / "l"
    fill(editor, path, 3)
    before = bits(editor)
    damage(path)
    with pytest.raises((LedgerError, DeltaError), match=str(path)):
        ledger.verify(path)
    with pytest.raises((LedgerError, DeltaError)):
        editor.restore(ledger.deltas(path))
    assert same(bits(editor), before)


def test_what_a_killed_commit_leaves_behind(editor, tmp_path):
    """Killed before the commit took its name: a stray delta. Killed after it: HEAD one behind. Both are taken in stride."""
    path = tmp_path / "l"
    fill(editor, path, 2)
    head = (path / "HEAD").read_bytes()
    ledger.delta_file(path, 3).write_bytes(b"half a file")
    assert len(ledger.verify(path)) == 2
    with writing(path) as writer:
        writer.revert(1)
        writer.apply(editor.apply([Edit("Ingrid", "{} likes", "tea")], recipe=RECIPE, verify=False).delta)
    (path / "HEAD").write_bytes(f"3 {'0' * 64}".encode())
    with pytest.raises(LedgerError, match="HEAD names"):
        ledger.log(path)
    (path / "HEAD").write_bytes(head)
    with pytest.raises(LedgerError, match="HEAD: is at commit 2"):  # a writer lets it fall one behind at most
        ledger.log(path)
    shutil.rmtree(path)
    fill(editor, path, 1)
    (path / "HEAD").unlink()
    assert len(ledger.verify(path)) == 1


def test_a_full_disk_leaves_the_ledger_as_it_was(editor, tmp_path, small_disk):
    path = tmp_path / "l"
    fill(editor, path, 1)
    delta = editor.apply([Edit("Ingrid", "{} likes", "tea")], recipe=RECIPE, verify=False).delta
    files = sorted(os.listdir(path))
    with writing(path) as writer:
        with small_disk(4096), pytest.raises(OSError, match="cannot be written"):
            writer.apply(delta)
        assert sorted(os.listdir(path)) == files and len(ledger.verify(path)) == 1
        writer.apply(delta)
    assert len(ledger.verify(path)) == 2


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(editor, tmp_path):
    path = tmp_path / "l"
    fill(editor, path, 1)
    path.chmod(0o500)
    try:
        assert len(ledger.verify(path)) == 1
        with pytest.raises((LedgerError, OSError)), writing(path) as writer:
            writer.revert(1)
    finally:
        path.chmod(0o700)
    assert len(ledger.verify(path)) == 1


def test_a_lock_that_links_out_is_not_followed(editor, tmp_path):
    path = tmp_path / "l"
    fill(editor, path, 1)
    (tmp_path / "outside").write_text("of somebody else")
    (path / "LOCK").unlink()
    (path / "LOCK").symlink_to(tmp_path / "outside")
    with pytest.raises(LedgerError, match="LOCK: cannot be locked as a plain file"), writing(path):
        pass
    assert (tmp_path / "outside").read_text() == "of somebody else"


def test_head_is_brought_along_whatever_kept_it_back(editor, tmp_path, monkeypatch):
    """HEAD cannot be written once, twice in a row, and by a writer that is then gone: commits stand, and nothing is refused."""
    path = tmp_path / "l"
    fill(editor, path, 1)
    with writing(path) as writer:
        for attempt in range(2):
            delta = editor.apply([Edit(f"Ingrid {attempt}", "{} likes", "tea")], recipe=RECIPE, verify=False).delta
            number = writer.apply(delta).number
            (path / "HEAD").write_text(f"{number - 1} {ledger._read(path, number - 1)[1]}\n")  # as if killed before HEAD
            assert len(ledger.verify(path)) == number
    (path / ".HEAD.123.tmp").write_text("half")
    with writing(path):
        assert (path / "HEAD").read_text().startswith("3 ") and not list(path.glob(".*.tmp"))
    full = lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    with writing(path) as writer:
        monkeypatch.setattr(ledger.Writer, "_write_head", full)
        assert writer.revert(2).number == 4
    assert len(ledger.verify(path)) == 4


def test_an_empty_ledger(tmp_path):
    assert ledger.log(tmp_path / "none") == [] and ledger.deltas(tmp_path / "none") == []
    with pytest.raises(LedgerError, match="has no commit 1"):
        ledger.active(tmp_path / "none", 1)


def test_what_stands_after_any_history():
    """Against the definition, a list of every state; streams too."""
    for seed in range(30):
        draw, commits, states, places = random.Random(seed), [], [[]], [{}]
        for number in range(1, 60):
            kind = draw.choice(["apply", "apply", "revert", "checkout"])
            kind = "apply" if kind == "revert" and not states[-1] else kind
            refers_to = {"apply": None, "revert": draw.choice(states[-1] or [0]), "checkout": draw.randrange(number)}[kind]
            note = {"streams": {draw.choice("ab"): {"lines": number}}} if kind == "apply" else {}
            commits.append(ledger.Commit(number, kind, None, None, refers_to, 1, "", note))
            after = {"apply": [*states[-1], number], "revert": [n for n in states[-1] if n != refers_to]}
            states.append(after[kind] if kind in after else states[refers_to])
            places.append(places[refers_to] if kind == "checkout" else places[-1] | note.get("streams", {}))
            assert ledger.standing(commits) == states[-1] and ledger.streams(commits) == places[-1]
