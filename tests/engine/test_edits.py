"""Reading edits: what is accepted, what is refused, and where the message points."""

import csv
import io
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rose_engine import Edit, EditError, read_edits
from rose_engine.edits import check_consistent, group_by_subject, subject_in

GOOD = {"subject": "Imo State", "prompt": "The capital of {} is", "target": "Metz"}
# Text that is not blank; surrogates cannot be written as UTF-8.
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def write(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8"))
    return path


@given(subject=words, before=words, after=words, target=words)
def test_any_text_survives_every_format(tmp_path_factory, subject, before, after, target):
    before, after = before.replace("{}", ""), after.replace("{}", "")
    record = {"subject": subject, "prompt": before + "{}" + after, "target": target}
    if record["prompt"].count("{}") != 1:
        return
    folder = tmp_path_factory.mktemp("formats")
    table = io.StringIO(newline="")
    csv.writer(table).writerows([list(record), list(record.values())])
    for name, text in (("e.jsonl", json.dumps(record) + "\n"), ("e.json", json.dumps([record])), ("e.csv", table.getvalue())):
        assert [e.as_dict() for e in read_edits(write(folder, name, text))] == [record]


def test_rewordings_survive_every_format(tmp_path):
    record = {**GOOD, "rewordings": ["The seat of {} is", 'One says "{}", one means']}
    table = io.StringIO(newline="")
    csv.writer(table).writerows([list(record), [*GOOD.values(), "\n".join(record["rewordings"]) + "\n"], [*GOOD.values(), ""]])
    assert [e.as_dict() for e in read_edits(write(tmp_path, "e.csv", table.getvalue()))] == [record, GOOD]
    for name, text in (("e.jsonl", json.dumps(record)), ("e.json", json.dumps([record]))):
        (edit,) = read_edits(write(tmp_path, name, text))
        assert edit.as_dict() == record and edit.rewordings == tuple(record["rewordings"])
    assert read_edits(write(tmp_path, "f.jsonl", json.dumps({**GOOD, "rewordings": None})))[0] == Edit(**GOOD)


def test_a_fact_given_twice_is_one_with_the_rewordings_of_both():
    one, two = (
        Edit(**GOOD, rewordings=texts) for texts in (["The seat of {} is", "{} is led from"], [" {} is led from ", "In {} they meet in"])
    )
    (subject,) = group_by_subject([one, two])
    assert [edit.rewordings for edit in subject.edits] == [("The seat of {} is", "{} is led from", "In {} they meet in")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "given list"),
        (json.dumps({**GOOD, "target": None}), "`target` is missing"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "subject"}), "`subject` is missing"),
        (json.dumps({**GOOD, "target": "  "}), "`target` is empty"),
        (json.dumps({**GOOD, "target": 48}), "must be a string"),
        (json.dumps({**GOOD, "prompt": "The capital is"}), "exactly once"),
        (json.dumps({**GOOD, "prompt": "{} and {} are"}), "exactly once"),
        (json.dumps({**GOOD, "targte": "x"}), "unknown field `targte`"),
        (json.dumps({**GOOD, "question": "What is its capital?"}), "must name the subject"),
        ('{"subject": "a", "subject": "b", "prompt": "{} is", "target": "c"}', "given twice"),
        (json.dumps({**GOOD, "target": "Kyiv"}), "two targets"),
        (json.dumps({**GOOD, "subject": "Imo State ", "target": "Kyiv"}), "two targets"),
        (json.dumps({**GOOD, "prompt": "{} is led from", "target": "Kyiv", "rewordings": [GOOD["prompt"]]}), "two targets"),
        (json.dumps({**GOOD, "rewordings": "The seat of {} is"}), "`rewordings` must be a list of strings, given str"),
        (json.dumps({**GOOD, "rewordings": ["The seat of {} is", 7]}), r"`rewording 2` must be a string"),
        (json.dumps({**GOOD, "rewordings": ["The seat is"]}), r"`rewording 1` must hold \{\} exactly once"),
        (json.dumps({**GOOD, "rewordings": ["The seat of {} is", " The seat of {} is"]}), r"`rewording 2` says again"),
        (json.dumps({**GOOD, "rewordings": [GOOD["prompt"]]}), r"`rewording 1` says again"),
        (json.dumps({**GOOD, "target": "\ud83d"}), "half a character at position 0"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path, "edits.jsonl", json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(EditError, match=message) as error:
        read_edits(path)
    assert str(error.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("e.csv", "subject,prompt,target\na,{} is,b\nc,{} is\n", "e.csv:3: has 2 cells"),
        ("e.csv", "subject,prompt,aim\n", "e.csv:1: column `aim`"),
        ("e.csv", 'subject,prompt,target\n"a\nb",{} is,c\n,{} is,d\n', "e.csv:4: `subject` is empty"),
        ("e.json", '[{"subject": "a"},\n}]', "e.json:2: is not JSON"),
        ("e.json", "{}", "not a list"),
        ("e.jsonl", "\n", "holds no edits"),
        ("e.txt", "", "cannot tell the format"),
    ],
)
def test_errors_of_other_formats(tmp_path, name, text, message):
    with pytest.raises(EditError, match=message):
        read_edits(write(tmp_path, name, text))


def test_not_utf8(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(b'{"subject": "\xff"}')
    with pytest.raises(EditError, match="not UTF-8"):
        read_edits(path)


def test_standard_input(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(json.dumps(GOOD).encode())

    monkeypatch.setattr("sys.stdin", Stdin)
    assert read_edits("-")[0].source == "<stdin>:1"


def test_grouping_keeps_order_and_drops_repetitions():
    a1, a2, b = Edit("a", "{} is", "x"), Edit("a", "{} has", "y"), Edit("b", "{} is", "x")
    groups = group_by_subject([a1, b, a2, Edit(" a", "{} is", "x ", id="again")])
    assert [(g.name, g.edits) for g in groups] == [("a", (a1, a2)), ("b", (b,))]
    with pytest.raises(EditError, match="two targets"):
        check_consistent([a1, Edit("a", "{} is", "z")])


def test_json_errors_name_the_line(tmp_path):
    good = '{"subject": "a", "prompt": "{} is", "target": "x\\n,]"}'
    path = tmp_path / "e.json"
    for bad, message in [
        ('{"subject": "a", "prompt": "{} is"}', "`target` is missing"),
        ('{"subject": "a",\n "prompt": "is", "target": "c"}', "exactly once"),
        ('{"subject": "a", "subject": "b", "prompt": "{} is", "target": "c"}', "given twice"),
        ("7", "given int"),
    ]:
        path.write_text(f"\n[\n{good},\n\n  {bad}\n, {good}]\n")
        with pytest.raises(EditError, match=f"e.json:5: .*{message}"):
            read_edits(path)
    path.write_text(f"[{good},\n{good}]")
    assert [edit.source for edit in read_edits(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        ("Was {} made at Google?", "Go", "{}"),
        ("Is Java older than JavaScript?", "Java", "Java"),
        ("Is JavaScript older than Java?", "Java", "Java?"),
        ("Who made the iPhone 1, not the iPhone 11?", "iPhone 1", "iPhone 1,"),
        ("李白是谁?", "李白", "李白是"),
        ("Whose is Lin Nu's hat?", "Lin Nu", "Lin Nu's"),
        ("Where is a{}b?", "a{}b", "a{}b?"),
        ("Where is {}?", "a{}b", "{}?"),
        ("Were iPhones there before MyiPhone?", "iPhone", "iPhones"),
        ("Is Jose\u0301 not Jose de Lima?", "Jose", "Jose de"),
        ("Is Jose de Lima not Jose\u0301?", "Jose", "Jose de"),
        ("Was ist Angela Merkels Beruf?", "Angela Merkel", "Angela Merkels"),
        ("Whose is MyiPhone?", "iPhone", "iPhone?"),
        ("a" * 7, "a" * 3, "aaa"),
        ("", "Go", None),
    ],
)
def test_where_a_text_says_its_subject(text, subject, found):
    place = subject_in(text, subject)
    assert (
        place is None
        if found is None
        else text[place[0] :].startswith(found) and place[1] - place[0] == len("{}" if found.startswith("{}") else subject)
    )


def test_lines_of_a_json_list_are_counted_on(tmp_path):
    """Each record's line, however the file is laid out."""
    records = [{**GOOD, "subject": f"S{i}"} for i in range(50)]
    texts = [json.dumps(record, indent=random.choice([None, 1])) for record in records]
    text, lines = "\n[", []
    for one in texts:
        text += random.choice(["", " ", "\n", "\n\n "])
        lines.append(text.count("\n") + 1)
        text += one + random.choice([",", " ,\n"])
    path = tmp_path / "e.json"
    path.write_text(text.rstrip(" ,\n") + "\n]")
    assert [edit.source for edit in read_edits(path)] == [f"{path}:{line}" for line in lines]
