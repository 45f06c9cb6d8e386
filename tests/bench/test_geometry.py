"""The geometry benchmarks on a tiny model: means of what is measured, a value written otherwise, what a verdict is worth."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from rose_engine import ROSE, Edit, Editor
from rose_engine.geometry import conflict, off_diagonal
from rose_engine.moments import moments
from rose_engine.recipe import ROSE_PAPER

from bench import certificate, geometry
from bench.datasets.cases import Case, Dataset, SubjectCases

SUBJECTS = tuple(
    SubjectCases(
        name,
        (
            Case(Edit(name, "{} plays the", "harp"), questions=(f"What does {name} play?",)),
            Case(Edit(name, "{} was born in", "Peru", f"Where was {name} born?"), questions=("Who is that?",)),
        ),
    )
    for name in ("Lin Nu", "Henri Marteau")
)
SMALL = {"layers": (1, 2), "steps": 3, "lr": 0.3, "corpus_tokens": 900}


@pytest.fixture
def editor(make_model, tokenizer, own_cache):
    return Editor(make_model(initializer_range=0.3), tokenizer, replace(ROSE, **SMALL))


def test_geometry_is_that_of_each_edit(editor, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(
        "\n".join(f"The {a} of {b} is {c} now." for a in ("sea", "king", "home") for b in "abcdefgh" for c in ("old", "new", "1"))
    )
    rose = replace(ROSE_PAPER, **SMALL)
    trap = replace(rose, preconditioner="covariance", covariance_weight=0.5, corpus=str(corpus))
    weights = {name: weight.clone() for name, weight in editor.weights().items()}
    found = geometry.geometry(editor, SUBJECTS, {"rose": rose, "trap": trap}, forms=(2,), layers=(1, 2))
    assert all(torch.equal(weight, weights[name]) for name, weight in editor.weights().items())

    for name in ("R", "D_question", "D_instructed", "bound_instructed"):
        for recipe in ("rose", "trap"):
            assert found["recipes"][recipe][name] == pytest.approx(fmean(line["recipes"][recipe][name] for line in found["subjects"]))
    first = found["subjects"][0]["recipes"]
    assert "seconds" in first["rose"] and "seconds" not in first["trap"]  # the values were written again, not found again
    assert first["rose"]["R_kept"] == first["trap"]["R_kept"] and first["rose"]["D_question"] != first["trap"]["D_question"]
    for recipe in first.values():
        assert 0 < recipe["D_layer_question"] <= recipe["bound_question"]

    last = found["layers"][2]
    for name, means in found["recipes"].items():  # after the last edited layer stands what is measured there anyway
        assert {what: means[what] for what in last[name]} == pytest.approx(last[name], rel=1e-5)
    assert last["keys"] == found["key_similarity"] != found["layers"][1]["keys"]
    assert found["layers"][1]["rose"]["D_question"] != last["rose"]["D_question"]

    gradients = [editor.apply(s.edits, recipe=rose, verify=False).values.centroids for s in SUBJECTS[:1]]
    editor.restore([])
    alone = float(off_diagonal(conflict(gradients[0])).mean())
    one = geometry.geometry(editor, SUBJECTS[:1], {"rose": rose})
    assert one["conflict"] == pytest.approx(alone, abs=1e-5)
    first_alone = geometry.geometry(editor, SUBJECTS, {"rose": rose}, forms=(2,), layers=(1,), sweep=1)
    assert [len(line["forms"]) for line in first_alone["subjects"]] == [1] + [0] * (len(SUBJECTS) - 1)
    assert first_alone["layers"][1]["rose"] == found["subjects"][0]["layers"]["rose"][1]
    assert first_alone["forms"][2]["R"] == found["subjects"][0]["forms"][2]["R"]
    assert first_alone["recipes"]["rose"]["D_question"] == pytest.approx(found["recipes"]["rose"]["D_question"])
    assert -1 <= found["key_similarity"]["between"] < found["key_similarity"]["within"] <= 1

    moment = moments(editor.decoder, editor.tokenizer, (1, 2), str(corpus), 900, 0)[editor.decoder.weight_name(2)]
    values = torch.linalg.eigvalsh(moment)
    assert found["spectrum"]["trap"]["condition"] == pytest.approx(float(values[-1] / values[0]), rel=1e-6)
    geometry.draw(found, tmp_path / "plots")
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        *(f"{figure}_{recipe}.png" for figure in ("deviation", "layers") for recipe in ("rose", "trap")),
        *(f"{figure}.png" for figure in ("forms", "conflict", "similarity")),
    }


def test_questions_that_do_not_name_the_subject_are_not_asked(editor):
    rows = geometry.rows_of(editor, SUBJECTS[0])
    texts = [editor.tokenizer.decode(row.tokens) for row in rows]
    assert (
        len(rows) == 6 and "What does Lin Nu play?" in texts[2] and "Where was Lin Nu born?" in texts[3] and "Who is that?" not in texts[5]
    )


def test_what_a_verdict_is_worth():
    lines = [
        {"margin": margin, "holds": margin >= 0, "success": success}
        for margin, success in ((-3.0, [0.0, 0.5]), (-1.0, [0.5]), (1.0, [1.0]), (2.0, [0.5, 1.0]), (4.0, [1.0, 1.0]))
    ]
    found = certificate.worth(lines)
    assert found["holds"] == {"subjects": 3, "facts": 5, "instructed": pytest.approx(90.0)}
    assert found["fails"] == {"subjects": 2, "facts": 3, "instructed": pytest.approx(100 / 3)}
    assert found["difference"] == pytest.approx(90 - 100 / 3)
    # Of one fact: 100 - 50 over two subjects; of two: (75 + 100) / 2 - 25 over three.
    assert found["within_size"] == pytest.approx((2 * 50 + 6 * 62.5) / 8)
    assert [part["margin"] for part in found["curve"]] == [-3, -1, 1, 2, 4]
    means = torch.tensor([0.25, 0.5, 1.0, 0.75, 1.0])
    assert found["correlation"] == pytest.approx(
        float(torch.corrcoef(torch.stack([torch.tensor([-3.0, -1, 1, 2, 4]), means]))[0, 1]), abs=1e-6
    )


def test_certified_subjects_are_taken_back(editor):
    before = {name: weight.clone() for name, weight in editor.weights().items()}
    lines = certificate.certified(editor, Dataset(SUBJECTS), editor.recipe)
    assert [len(line["success"]) for line in lines] == [2, 2] and all(line["D"] > 0 for line in lines)
    assert editor.applied == () and all(torch.equal(weight, before[name]) for name, weight in editor.weights().items())
