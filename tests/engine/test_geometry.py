"""Radius, deviation and bounds against plain loops and float64; the certificate on tiny models and on the embedded one."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rose_engine import ROSE, Delta, DeltaError, Edit, Editor, geometry, ledger
from rose_engine import certificate as certificates
from rose_engine.architecture import decoder_of
from rose_engine.compress import combined
from rose_engine.forms import STATEMENT, row_of

from tests.conftest import IMO, LIN, MARTEAU
from tests.engine.naive import in_float64, run
from tests.engine.test_cli import rose

TINY = replace(ROSE, rewordings=0, bystanders=0, layers=(1, 2), steps=4, lr=0.1)
KNOWN = (
    Edit("France", "The capital of {} is", "Paris"),
    Edit("France", "The currency that is used in {} is the", "euro"),
    Edit("France", "The Eiffel Tower is a famous sight in {}, in the city of", "Paris"),
    Edit("France", "The people of {} speak", "French"),
)


@torch.no_grad()
def plain_radius(model, rows, layer, delta, step, steps, probability, draws=10, success=0.9, seed=0):
    """R of one subject and of each fact alone by whole forward passes: one for each magnitude, draw and fact."""
    directions = F.normalize(torch.randn(draws, len(delta), generator=torch.Generator().manual_seed(seed)), dim=1)

    def told(row, vector):
        def add(module, args, output):
            place = F.one_hot(torch.tensor(row.last), output.shape[1]).to(output)
            return output + place[None, :, None] * vector.to(output)

        hook = model.model.layers[layer].register_forward_hook(add)
        scores = run(model, row).log_softmax(-1)
        hook.remove()
        places = torch.arange(row.target, len(row.tokens))
        return scores[places - 1, torch.tensor(row.tokens)[places]].sum().exp().item()

    passed, alone = [], [[] for _ in rows]
    for i in range(steps + 1):
        kept = torch.tensor([[told(row, delta + i * step * u) >= probability for u in directions] for row in rows])
        passed.append(kept.all(0).double().mean() > success)
        for fact, share in zip(alone, kept.double().mean(1), strict=True):
            fact.append(share > success)
    until = lambda found: max(0, found.index(False) - 1 if False in found else steps) * step  # noqa: E731
    return until([bool(p) for p in passed]), [until([bool(p) for p in fact]) for fact in alone]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_radius_is_that_of_a_plain_loop(make_model, tokenizer, kind):
    model = make_model(kind, initializer_range=0.3)
    decoder, subjects = decoder_of(model), (IMO, LIN)
    rows = [[row_of(edit, STATEMENT, tokenizer) for edit in edits] for edits in subjects]
    delta = torch.randn(2, 32, generator=torch.Generator().manual_seed(3)) * 0.1
    owner = [s for s, some in enumerate(rows) for _ in some]
    flat = [row for some in rows for row in some]
    start = geometry.tolerance_radius(decoder, flat, owner, delta, torch.ones(2), layer=2, steps=0, probability=0.0)
    threshold = 0.8 * float(start.probability.min())
    step = torch.tensor([0.4, 0.7])
    options = {"steps": 12, "probability": threshold, "draws": 4, "success": 0.7}
    found = geometry.tolerance_radius(decoder, flat, owner, delta, step, layer=2, **options)
    assert len(set(found.facts.tolist())) > 1  # the threshold is neither met everywhere nor nowhere
    for s, some in enumerate(rows):
        whole, alone = plain_radius(model, some, 2, delta[s], float(step[s]), **options)
        assert found.subjects[s].item() == pytest.approx(whole)
        assert found.facts[[i for i, o in enumerate(owner) if o == s]].tolist() == pytest.approx(alone)


def test_radius_of_four_facts_of_the_embedded_model(smollm2):
    rows = [row_of(edit, STATEMENT, smollm2.tokenizer) for edit in KNOWN]
    none, step = torch.zeros(1, 576), torch.tensor([24.0])
    options = {"steps": 5, "probability": 0.05, "draws": 2, "success": 0.5}
    found = geometry.tolerance_radius(smollm2.decoder, rows, [0] * 4, none, step, layer=8, **options)
    whole, alone = plain_radius(smollm2.model, rows, 8, none[0], 24.0, **options)
    assert found.subjects.tolist() == [whole] and found.facts.tolist() == alone
    assert max(alone) > 0


def test_one_subject_a_row():
    with pytest.raises(ValueError, match="one subject a row"):
        geometry.tolerance_radius(None, [1, 2], [0], torch.zeros(1, 4), torch.ones(1), layer=0)


def keys_in_float64(model, tokenizer, edits, layer, form):
    """The inputs of the edited projection at the subjects' tokens, by whole forward passes in float64."""
    found = []
    hook = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    rows = [row_of(edit, form, tokenizer) for edit in edits]
    for row in rows:
        with torch.no_grad():
            model(input_ids=torch.tensor([row.tokens]))
    hook.remove()
    return torch.stack([k[row.last] for k, row in zip(found, rows, strict=True)])


@pytest.mark.parametrize("recipe", [TINY, replace(TINY, ridge=7.0, columns="mean", waypoints=0)])
def test_deviation_and_bounds_are_those_of_float64(make_model, tokenizer, recipe):
    editor = Editor(make_model(initializer_range=0.3), tokenizer, recipe)
    base = in_float64(editor.model)
    result = editor.apply((*IMO, *LIN), verify=False)
    edited = in_float64(editor.model)
    _, question, _ = certificates.wordings(tokenizer)
    edits = (*IMO, *LIN)
    for layer in recipe.layers:
        name = editor.decoder.weight_name(layer)
        dW = edited.state_dict()[name] - base.state_dict()[name]
        k, other = (keys_in_float64(edited, tokenizer, edits, layer, form) for form in (STATEMENT, question))
        rows = [row_of(edit, form, tokenizer) for form in (STATEMENT, question) for edit in edits]
        read = geometry.read_state(editor.decoder, rows, recipe.layers).keys[layer]
        D = geometry.deviation(result.delta.factors[name], read[: len(edits)], read[len(edits) :])
        torch.testing.assert_close(D.double(), ((k - other) @ dW.T).norm(dim=-1), rtol=2e-3, atol=1e-5)

        K, R = result.delta.keys[name].double(), result.delta.factors[name][0].double()
        C = recipe.ridge * torch.eye(len(K), dtype=torch.float64)
        direct = (R @ K.T @ torch.linalg.inv(C + K @ K.T) @ (k - other).T).norm(dim=0)
        torch.testing.assert_close(D.double(), direct, rtol=2e-3, atol=1e-5)
        first = geometry.first_order(K, R, k - other, lambda x: x / recipe.ridge)
        torch.testing.assert_close(first, (R @ K.T @ torch.linalg.inv(C) @ (k - other).T).norm(dim=0))
        bound = geometry.deviation_bound(K, R, k - other, recipe.ridge)
        torch.testing.assert_close(bound, torch.linalg.matrix_norm(R @ K.T, 2) * (k - other).norm(dim=-1) / recipe.ridge)
        assert (direct <= bound).all()


def test_bounds_with_a_covariance():
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    K, R, difference, A = draw(20, 3), draw(12, 3), draw(4, 20), draw(20, 40)
    C = A @ A.T / 40 + 0.01 * torch.eye(20, dtype=torch.float64)
    least = float(torch.linalg.eigvalsh(C)[0])
    exact = (R @ K.T @ torch.linalg.inv(C + K @ K.T) @ difference.T).norm(dim=0)
    assert (exact <= geometry.deviation_bound(K, R, difference, least)).all()
    first = geometry.first_order(K, R, difference, lambda x: torch.linalg.solve(C, x))
    torch.testing.assert_close(first, (R @ K.T @ torch.linalg.inv(C) @ difference.T).norm(dim=0))
    whitened = difference - difference @ torch.linalg.solve(C, K) @ torch.linalg.inv(K.T @ torch.linalg.solve(C, K)) @ K.T
    exact = (R @ K.T @ torch.linalg.inv(C + K @ K.T) @ whitened.T).norm(dim=0)  # where eq. 16's premise holds, so does eq. 16
    torch.testing.assert_close(exact, geometry.first_order(K, R, whitened, lambda x: torch.linalg.solve(C, x)), atol=1e-9, rtol=1e-6)


def test_conflict_and_similarity():
    g = torch.randn(4, 30, generator=torch.Generator().manual_seed(6))
    for i in range(4):
        for j in range(4):
            cosine = F.cosine_similarity(g[i].double(), g[j].double(), dim=0)
            assert geometry.similarity(g)[i, j].item() == pytest.approx(cosine.item(), abs=1e-6)
            assert geometry.conflict(g)[i, j].item() == pytest.approx(1 - abs(cosine.item()), abs=1e-6)
    off = geometry.off_diagonal(torch.arange(9).view(3, 3))
    assert off.tolist() == [[1, 2], [3, 5], [6, 7]]


def test_certificate_says_what_a_plain_reading_finds(make_model, tokenizer, tmp_path):
    editor = Editor(make_model(initializer_range=0.3), tokenizer, TINY)
    base = in_float64(editor.model)
    editor.apply(MARTEAU, verify=False)
    result = editor.apply((*IMO, *LIN), certify=True, others=["Otto Hahn", "Lin Nu"])
    edited = in_float64(editor.model)
    assert [s.subject for s in result.certificate.subjects] == ["Imo State", "Lin Nu"]

    def moved(row, before):
        with torch.no_grad():
            h = [m(input_ids=torch.tensor([row.tokens]), output_hidden_states=True).hidden_states[3][0, row.last] for m in (before, edited)]
        return h[1] - h[0]

    imo = result.certificate.subjects[0]
    statement, question, instructed = certificates.wordings(tokenizer)
    for form, name in ((question, "question"), (instructed, "instructed")):
        D = [(moved(row_of(e, form, tokenizer), base) - moved(row_of(e, statement, tokenizer), base)).norm() for e in IMO]
        assert [fact.deviation[name] for fact in imo.facts] == pytest.approx([float(d) for d in D], rel=2e-3)
        assert imo.deviation[name] == pytest.approx(float(sum(D) / len(D)), rel=2e-3)
    assert imo.radius == 0 and not imo.holds and imo.margin["instructed"] == -imo.deviation["instructed"]
    assert {name for name, _ in imo.neighbours} == {"Lin Nu", "Henri Marteau"}
    assert [len(row) for row in imo.conflict] == [3, 3, 3]

    [other] = result.certificate.others  # a subject that is edited is not among those that must not change
    prompts = [replace(e, subject="Otto Hahn", question=None) for e in (*IMO, *LIN)][: certificates.PROMPTS]
    shift = sum(float(moved(row_of(e, statement, tokenizer), base).norm()) for e in prompts) / len(prompts)
    scale = sum(float(moved(row_of(e, statement, tokenizer), base).norm()) for e in (*IMO, *LIN)) / 5
    assert other.subject == "Otto Hahn" and other.shift == pytest.approx(shift / scale, rel=5e-3)

    result.delta.save(tmp_path / "d.safetensors")
    assert Delta.load(tmp_path / "d.safetensors").metadata["certificate"] == json.loads(json.dumps(result.certificate.as_dict()))
    before = {name: weight.clone() for name, weight in editor.weights().items()}
    whole = editor.diagnose(editor.applied)
    assert [s.subject for s in whole.subjects] == ["Henri Marteau", "Imo State", "Lin Nu"]
    D = [moved(row_of(e, question, tokenizer), base) - moved(row_of(e, statement, tokenizer), base) for e in IMO]
    assert [f.deviation["question"] for f in whole.subjects[1].facts] == pytest.approx([float(d.norm()) for d in D], rel=2e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in editor.weights().items())
    with pytest.raises(DeltaError, match="no edits"):
        editor.diagnose([])


def test_a_subject_that_is_edited_again_is_certified_with_all_its_facts(make_model, tokenizer):
    editor = Editor(make_model(initializer_range=0.3), tokenizer, TINY)
    editor.apply(IMO[:2], verify=False)
    again = editor.apply(IMO[2:], verify=False, certify=True)
    [subject] = again.certificate.subjects
    assert [fact.prompt for fact in subject.facts] == [edit.prompt for edit in IMO] and len(subject.conflict) == 3
    [whole] = editor.diagnose(editor.applied).subjects
    for fact, other in zip(subject.facts, whole.facts, strict=True):
        assert fact.deviation == pytest.approx(other.deviation, rel=1e-3) and fact.probability == pytest.approx(other.probability, rel=1e-3)
    later = editor.applied[1:]
    editor.revert(editor.applied[0])  # what is left was made on top of it, and can be diagnosed as it stands
    assert [fact.prompt for fact in editor.diagnose(later).subjects[0].facts] == [IMO[2].prompt]
    small, _ = combined(later)
    assert small.metadata["certificate"] is None


def test_what_moves_nothing_is_certified_too(make_model, tokenizer, tmp_path):
    """A fact that the model knows well enough at the first step, in bfloat16: its value is zero, and so is all that is written."""
    editor = Editor(make_model(initializer_range=0.2).bfloat16(), tokenizer, replace(TINY, stop_loss=1e9))
    result = editor.apply(LIN, certify=True, others=["Otto Hahn"])
    assert all((U == 0).all() for U, _ in result.delta.factors.values())
    assert [other.shift for other in result.certificate.others] == [0.0]
    result.delta.save(tmp_path / "d.safetensors")
    assert Delta.load(tmp_path / "d.safetensors").metadata["certificate"]["others"][0]["shift"] == 0.0


def test_near_subjects_are_told(make_model, tokenizer):
    editor = Editor(make_model(initializer_range=0.3), tokenizer, TINY)
    phones = [Edit(f"iPhone {n}", "{} was released by", "Tesla") for n in (11, 16)]
    result = editor.apply((*phones, *MARTEAU), certify=True, verify=False)
    first = result.certificate.subjects[0]
    K, columns = result.delta.keys["model.layers.2.mlp.down_proj.weight"].double().T, torch.tensor(result.delta.columns)
    means = [F.normalize(F.normalize(K[columns == s]).sum(0), dim=0) for s in range(3)]
    for name, cosine in first.neighbours:
        assert cosine == pytest.approx(float(means[0] @ means[["iPhone 11", "iPhone 16", "Henri Marteau"].index(name)]), abs=1e-5)
    assert replace(first, neighbours=(("iPhone 16", 0.5), ("Lin Nu", 0.29))).near == ["iPhone 16"]


def test_a_failed_certificate_leaves_the_weights(make_model, tokenizer, monkeypatch):
    editor = Editor(make_model(initializer_range=0.3), tokenizer, TINY)
    before = {name: weight.clone() for name, weight in editor.weights().items()}

    def fail(*args, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(certificates, "tolerance_radius", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        editor.apply(IMO, certify=True)
    assert editor.applied == () and all(torch.equal(weight, before[name]) for name, weight in editor.weights().items())


def test_mean_columns_and_grouping_by_fact_are_certified(make_model, tokenizer):
    editor = Editor(make_model(initializer_range=0.3), tokenizer, replace(TINY, grouping="fact", columns="mean", waypoints=0))
    certificate = editor.apply((*IMO, *LIN), certify=True, verify=False).certificate
    assert [len(s.facts) for s in certificate.subjects] == [3, 2]


def test_a_stream_commits_what_is_certified(smollm2, tmp_path):
    good = Edit("Henri Marteau", "{} plays the instrument", "singing", "What instrument does Henri Marteau play?")
    odd = [Edit("Imo State", f"{{}} has the {word} code", target) for word, target in (("red", "Zqx 81"), ("blue", "Vhk 17"))]
    quick = replace(smollm2.recipe, bystanders=0, steps=20, forms=4)
    try:
        steps = list(smollm2.stream(tmp_path / "ledger", [good, *odd], recipe=quick, require_certificate=True))
        [delta] = ledger.deltas(tmp_path / "ledger")
        [subject] = delta.metadata["certificate"]["subjects"]
        assert subject["subject"] == "Henri Marteau" and subject["holds"] and subject["radius"] >= subject["deviation"]["instructed"]
        refused = [json.loads(line) for line in (tmp_path / "ledger" / "rejects.jsonl").read_text().splitlines()]
        assert [r["line"] for r in refused] == [2, 3] and all("below its deviation" in r["reason"] for r in refused)
        assert {fact.subject for fact in steps[-1].failed} == {"Imo State"}
    finally:
        smollm2.restore([])


def test_diagnose_on_the_command_line(make_model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    model = make_model(layers=10, initializer_range=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Editor(model, tokenizer, replace(ROSE, steps=2)).apply((*IMO, *LIN), verify=False).delta.save(tmp_path / "d.safetensors")
    (tmp_path / "others.txt").write_text("Otto Hahn\n\nPeru\n")
    options = ("--model", folder, "--others", tmp_path / "others.txt")
    done = rose("diagnose", tmp_path / "d.safetensors", *options, "--json", "--plot", tmp_path / "plots")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [s["subject"] for s in found["subjects"]] == ["Imo State", "Lin Nu"] and [o["subject"] for o in found["others"]] == [
        "Otto Hahn",
        "Peru",
    ]
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    assert names == {"certificate.html", "deviation.png", "layers.png", "conflict_1.png", "conflict_2.png", "similarity.png"}
    assert (tmp_path / "plots" / "certificate.html").read_text().count("data:image/png") == 5
    missing = rose("diagnose", tmp_path / "d.safetensors", "--model", folder, "--others", tmp_path / "none.txt")
    assert missing.returncode == 2 and "none.txt: cannot be read" in missing.stderr


def test_values_are_written_again(make_model, tokenizer):
    """With a recipe that differs in the write alone: the same bits as optimising anew."""
    one, two = (Editor(make_model(initializer_range=0.3), tokenizer, TINY) for _ in range(2))
    heavy = replace(TINY, ridge=5.0)
    with one.preview(IMO, verify=False) as first:
        values = first.values
    one.apply(IMO, recipe=heavy, values=values, verify=False)
    two.apply(IMO, recipe=heavy, verify=False)
    assert all(torch.equal(weight, two.weights()[name]) for name, weight in one.weights().items())
    with pytest.raises(ValueError, match="the values are of 1 subjects and 24 rows, not 2 and 16"):
        one.apply((*MARTEAU, *LIN[:1]), values=values, verify=False)
