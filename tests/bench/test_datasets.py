"""Readers of data sets: each schema from a small file, and errors that name file and record."""

import json
import random
from datetime import date, timedelta

import pytest
from rose_engine import EditError

from bench.datasets import load, locomo
from bench.datasets.cases import DataError
from bench.datasets.dates import resolved, session_date, written

NESTED = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["Montesquieu speaks", "Louis Pasteur speaks"],
}
FLAT = {
    "case_id": 2, "prompt": "Toko Yasuda, the", "target_new": "piano", "subject": "Toko Yasuda", "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at", "locality_prompt": "John Lennon performs on the", "locality_ground_truth": "guitar",
}  # fmt: skip
ZSRE = {
    "subject": "Watts Humphrey", "src": "What university did Watts Humphrey attend?", "rephrase": "Where did Watts Humphrey study?",
    "answers": ["Trinity College"], "alt": "Michigan", "loc": "nq question: who played desmond doss", "loc_ans": "Andrew Garfield",
}  # fmt: skip
KNOWEDIT = {
    "subject": "Leo Arons", "prompt": "The place of death of Leo Arons is", "target_new": "Berlin", "ground_truth": ["Munich"],
    "rephrase_prompt": "Leo Arons died in",
    "locality": {"Relation_Specificity": [{"prompt": "Leo Arons was born in", "ground_truth": [["Hamburg", "Hamburg, Germany"]]}]},
}  # fmt: skip


def write(path, records, lines=False):
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("record", "lines", "prompt", "target", "neighbours"),
    [
        (NESTED, False, "The mother tongue of {} is", "English", (("Montesquieu speaks", "French"), ("Louis Pasteur speaks", "French"))),
        (FLAT, True, "{}, the", "piano", (("John Lennon performs on the", "guitar"),)),
        (ZSRE, False, "What university did {} attend?", "Trinity College", (("who played desmond doss?", "Andrew Garfield"),)),
        (KNOWEDIT, False, "The place of death of {} is", "Berlin", (("Leo Arons was born in", "Hamburg"),)),
    ],
    ids=["counterfact nested", "counterfact flat", "zsre", "knowedit"],
)
def test_every_schema_is_told_by_its_fields(tmp_path, record, lines, prompt, target, neighbours):
    data = load(write(tmp_path / "d", [record, record], lines))
    [subject] = data.subjects  # the same fact twice counts once
    [case] = subject.cases
    assert (case.edit.prompt, case.edit.target, case.neighbours) == (prompt, target, neighbours)
    assert len(case.paraphrases) == 1 and data.instructions


def test_subjects_are_gathered_over_records(tmp_path):
    records = [{**FLAT, "prompt": f"{name} {verb}", "subject": name} for verb in ("plays", "likes") for name in ("Ada B", "Cy D", "Eve F")]
    data = load(write(tmp_path / "d.jsonl", records, lines=True), limit=2)
    assert [(subject.name, len(subject.cases)) for subject in data.subjects] == [("Ada B", 2), ("Cy D", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([FLAT, {**FLAT, "prompt": "Nobody is named"}]), "record 2: .*does not name its subject"),
        (json.dumps([FLAT, {k: v for k, v in FLAT.items() if k != "rephrase_prompt"}]), "record 2 lacks"),
        (json.dumps([NESTED, {**NESTED, "requested_rewrite": 7}]), "record 2 lacks or misuses"),
        (json.dumps([FLAT, {**FLAT, "target_new": " "}]), "record 2: `target` is empty"),
        (json.dumps([{"a": 1}]), "no known data set"),
        (json.dumps([]), "one at least"),
        (json.dumps(FLAT) + "\n{", ":2: is not JSON"),
        ("{", "is not JSON"),
    ],
)
def test_errors_name_file_and_record(tmp_path, text, message):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises((DataError, EditError), match=message) as error:
        load(path)
    assert str(error.value).startswith(str(path))


SAID = date(2023, 5, 25)  # a Thursday


@pytest.mark.parametrize(
    ("text", "without", "when"),
    [
        ("Ada swam last Saturday.", "Ada swam.", "on 20 May 2023"),
        ("Ada swam last Thurs.", "Ada swam", "on 18 May 2023"),
        ("Yesterday Ada swam.", "Ada swam.", "on 24 May 2023"),
        ("Ada quit the day before the conversation.", "Ada quit.", "on 24 May 2023"),
        ("Ada swims next Monday, she says.", "Ada swims, she says.", "on 29 May 2023"),
        ("Ada swam three days ago", "Ada swam", "on 22 May 2023"),
        ("Ada camped two weekends ago.", "Ada camped.", "two weekends before 25 May 2023"),
        ("Ada moved over the past week", "Ada moved", "the week before 25 May 2023"),
        ("Ada moved six months ago", "Ada moved", "in November 2022"),
        ("Ada has a show planned for next month.", "Ada has a show planned.", "in June 2023"),
        ("Ada painted it last year", "Ada painted it", "in 2022"),
        ("Ada moved 4 years ago", "Ada moved", "in 2019"),
    ],
)
def test_what_was_said_becomes_a_date(text, without, when):
    assert resolved(text, SAID) == (without, when)


def test_days_of_the_week_over_many_days():
    for _ in range(200):
        said = date(2020, 1, 1) + timedelta(random.randrange(3000))
        for name in ("Monday", "Sunday"):
            _, past = resolved(f"on last {name}", said)
            _, coming = resolved(f"next {name}", said)
            days = [said + timedelta(n) for n in (*range(-7, 0), *range(1, 8))]
            fits = [f"on {written(day)}" for day in days if f"{day:%A}" == name]
            assert [past, coming] == fits
    assert resolved("Ada swims on Mondays and lasts a week", SAID) is None
    assert session_date("1:56 pm on 8 May, 2023") == date(2023, 5, 8)


def conversation():
    turn = lambda i, text: {"speaker": "Ada", "dia_id": f"D1:{i}", "text": text}  # noqa: E731
    return {
        "speaker_a": "Ada",
        "speaker_b": "Cy",
        "session_1_date_time": "1:56 pm on 25 May, 2023",
        "session_1": [turn(i, "Jo called last week. We saw the old town yesterday!" if i == 2 else "Hm.") for i in range(1, 9)],
        "session_1_observation": {
            "Ada": [
                ["Ada joined a small chess club last Saturday.", "D1:1"],
                ["Ada visited the old town with her sister.", ["D1:2"]],
                ["Ada's brother has a green parrot named Polly.", "D1:3"],
                ["It rains.", "D1:4"],
                ["Ada keeps seven bees in her garden.", "D1:6"],
                ["Ada bakes bread every Sunday morning at home.", "D1:7"],
            ],
            "Cy": [["Cy sells used books in a market hall.", "D1:5"]],
        },
        "qa": [
            {"question": "When did Ada join the club?", "answer": "20 May 2023", "evidence": ["D1:1"], "category": 2},
            {"question": "When did Ada visit the old town?", "answer": "24 May 2023", "evidence": ["D1:2"], "category": 2},
            {"question": "What is the parrot's name?", "answer": "Polly", "evidence": ["D1:3; D1:8"], "category": 4},
            {"question": "Is it raining?", "answer": "yes", "evidence": ["D1:4"], "category": 4},
            {"question": "What do both like?", "answer": 7, "evidence": ["D1:1", "D1:5"], "category": 1},
            {"question": "Why?", "answer": "opinion", "evidence": ["D1:1"], "category": 3},
            {"question": "Who?", "answer": "nobody", "evidence": ["D9:1"], "category": 4},
        ],
    }


def test_conversations_become_edits(tmp_path):
    found = locomo.load(write(tmp_path / "1.json", conversation()))
    [batch] = found.batches
    facts = {(edit.prompt, edit.target) for edit in batch.edits}
    assert ("{} joined a small chess club on", "20 May 2023") in facts and ("{} joined a", "small chess club") in facts
    assert ("{} visited the old town on", "24 May 2023") in facts  # the turn says when
    assert {edit.question for edit in batch.edits} >= {"When was it that Ada joined a small chess club?", None}
    assert any(prompt.startswith("{}'s brother") for prompt, _ in facts)
    assert [question.kind for question in batch.questions] == ["temporal", "temporal", "single_hop"]
    assert {edit.subject for edit in batch.edits} == {"Ada"} and 5 <= len(batch.edits) <= 10
    report = found.report
    assert (report["eligible"], report["covered"], report["covered in part"]) == (6, 3, 1)
    assert report["left out/it rests on facts of two people"] == 1 and report["left out/its evidence names no turn"] == 1
    assert report["left out/no turn of its evidence has an observation"] == 1


def test_few_facts_are_filled_and_many_are_split(tmp_path, monkeypatch):
    data = conversation()
    data["qa"] = data["qa"][2:3]
    [batch] = locomo.load(write(tmp_path / "1.json", data)).batches
    assert len(batch.edits) == 5 and len({edit.prompt for edit in batch.edits}) == 5
    monkeypatch.setattr(locomo, "LEAST_FACTS", 3)
    several = locomo.load(write(tmp_path / "1.json", conversation())).batches
    assert [len(batch.edits) for batch in several] == [3, 3] and [len(batch.questions) for batch in several] == [1, 2]


def test_a_question_that_rests_on_many_facts_is_an_edit_of_its_own(tmp_path):
    data = conversation()
    data["qa"].append({"question": "What does Ada do?", "answer": "much", "evidence": [f"D1:{i}" for i in (1, 2, 3, 6, 7)], "category": 1})
    batches = locomo.load(write(tmp_path / "1.json", data)).batches
    assert [len(batch.questions) for batch in batches] == [3, 1] and 5 < len(batches[1].edits) <= 10
    found = locomo.load(tmp_path / "1.json", most=6)
    assert found.report["left out/it rests on more than 6 facts"] == 1 and len(found.batches) == 1


def test_a_broken_conversation_is_named(tmp_path):
    data = conversation()
    data["session_1_date_time"] = "soon"
    with pytest.raises(DataError, match="lacks or misuses") as error:
        locomo.load(write(tmp_path / "1.json", data))
    assert str(tmp_path / "1.json") in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \*\.json"):
        locomo.load(tmp_path / "empty")
