"""The runner: its table, its results after a kill, its checks; and the reports, in a real browser where there is one."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rose_engine import ROSE, Editor

import bench.report
import bench.run
from bench.methods import known, methods_of
from bench.metrics import token_f1
from bench.quality import METRICS
from bench.suites import SUITES, by_count, summary
from bench.tables import read_lines, read_results
from tests.bench.test_datasets import conversation
from tests.bench.test_quality import FILE, RECORD

NAMES = ("Lin Nu", "Ada Brandt", "Omar Haddad", "Kofi Mensah")
RECIPES = "vanilla,rose[forms=2;steps=2;layers=1-2],grace"
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@pytest.fixture
def folder(make_model, tokenizer, tmp_path):
    """A tiny model, data of four subjects, a conversation."""
    make_model(initializer_range=0.2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [json.loads(json.dumps(RECORD).replace("Lin Nu", name)) for name in NAMES]
    (tmp_path / "data.json").write_text(json.dumps({**FILE, "records": records}))
    (tmp_path / "talk").mkdir()
    (tmp_path / "talk" / "1.json").write_text(json.dumps(conversation()))
    return tmp_path


QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")


def arguments(folder, out, suite="instructed", data="data.json", recipes=RECIPES, **extra):
    options = {
        "suite": suite,
        "model": folder / "model",
        "data": folder / data,
        "recipes": recipes,
        "dtype": "float32",
        "out": folder / out,
    }
    return [str(x) for name, value in (options | extra).items() for x in (f"--{name}", value)]


def run(*args, **extra):
    assert bench.run.main(arguments(*args, **extra)) == 0
    return json.loads((args[0] / args[1] / "summary.json").read_text())


def measured(lines):
    """Lines without what differs from run to run."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_mb", "wall_s")} for line in lines]


@pytest.mark.parametrize("suite", ["instructed", "sequential"])
def test_a_killed_run_ends_like_another(folder, suite):
    """SIGKILL after some lines, in the middle of the next; the last line cut by hand; then the same command again."""
    seeds = {"seeds": 2} if suite == "instructed" else {}
    whole = run(folder, "whole", suite, **seeds)
    lines = folder / "killed" / "results.jsonl"
    for enough in (1, 4) if suite == "instructed" else (1,):
        command = [sys.executable, "-m", "bench.run", *arguments(folder, "killed", suite, **seeds)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(read_lines_of(lines)) < enough:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if lines.exists():
            with open(lines, "a") as f:
                f.write('{"recipe": "ro')
    assert run(folder, "killed", suite, **seeds) == whole
    assert (folder / "killed" / "summary.json").read_text() == (folder / "whole" / "summary.json").read_text()
    key = lambda line: [str(line.get(field)) for field in ("recipe", "seed", "subject", "count")]  # noqa: E731
    ours, theirs = (sorted(measured(read_lines(folder / name / "results.jsonl")), key=key) for name in ("killed", "whole"))
    assert ours == theirs


@pytest.fixture
def one_thread():
    """As many as each process that torchrun starts: another number takes sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_several_processes_make_one_table(folder, one_thread):
    """Two ranks: the table of one; and what killed ranks have left is gone on with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bench.run"]
    process = subprocess.Popen(
        [*command, *arguments(folder, "ranks", subjects=2)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    assert said.count("vanilla") == 1 and "6/6" not in errors and errors.count("3/3") == 2
    assert not list((folder / "ranks").glob("results.rank*")) and len(read_lines(folder / "ranks" / "results.jsonl")) == 6
    alone = run(folder, "alone", subjects=2)
    assert json.loads((folder / "ranks" / "summary.json").read_text()) == alone
    lines = read_lines(folder / "ranks" / "results.jsonl")
    for rank in range(2):  # as if both had been killed, one in the middle of a line
        text = "".join(json.dumps(line) + "\n" for line in lines[rank::2])
        (folder / "ranks" / f"results.rank{rank}.jsonl").write_text(text if rank else text + '{"recipe": "ro')
    (folder / "ranks" / "results.jsonl").unlink()
    assert run(folder, "ranks", subjects=2) == alone
    assert len(read_lines(folder / "ranks" / "results.jsonl")) == 6


def test_a_folder_of_results_is_one_run_s_at_a_time(folder):
    """Another process holds it: the run ends at once, names the other and writes nothing; and goes on when it has gone."""
    (folder / "out").mkdir()
    hold = "import sys; from rose_engine.files import locked\nwith locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(folder / "out" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match=f"process {other.pid} since .* is writing its results there"):
            bench.run.main(arguments(folder, "out", recipes="vanilla", subjects=1))
        assert [path.name for path in (folder / "out").iterdir()] == ["lock"]
        other.stdin.close()
    assert "vanilla" in run(folder, "out", recipes="vanilla", subjects=1)
    with pytest.raises(SystemExit, match="cannot be written to"):
        bench.run.main(arguments(folder, "data.json", recipes="vanilla"))


def read_lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def test_the_table_and_what_it_was_made_on(folder):
    table = run(folder, "out", subjects=3)
    assert list(table) == RECIPES.split(",") and set(METRICS) | {"overall", "perplexity", "kl_neutral"} <= set(table["vanilla"])
    assert table["vanilla"]["locality"] == [100.0, 0.0] and table["vanilla"]["kl_neutral"][0] == pytest.approx(0, abs=1e-6)
    about = json.loads((folder / "out" / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__ and about["hardware"]["cores"] >= 1
    assert about["recipes"][RECIPES.split(",")[1]]["layers"] == [1, 2] and len(about["model"]["sha256"]) == 64
    with pytest.raises(SystemExit, match="another run: `data`"):
        run(folder, "out", subjects=2)
    lines = read_lines(folder / "out" / "results.jsonl")
    assert len(lines) == 9 and all(line["wall_s"] > 0 for line in lines)
    rose = [line for line in lines if line["recipe"].startswith("rose")]
    assert all(line["seconds"] > 0 for line in rose) and all(line["answers"] for line in rose)


def test_locomo_asks_what_was_said(folder):
    table = run(folder, "out", "locomo", "talk", recipes="vanilla,rose[forms=2;steps=2;layers=1-2]")
    assert {"temporal", "single_hop", "overall"} <= set(table["vanilla"])
    coverage = json.loads((folder / "out" / "run.json").read_text())["data"]["coverage"]
    assert coverage["covered"] == 3 and coverage["eligible"] == 6
    [line, _] = read_lines(folder / "out" / "results.jsonl")
    f1 = {question: token_f1(said, wanted) for question, wanted, said in line["answers"]}
    assert line["values"]["overall"] == pytest.approx(list(f1.values()), abs=1e-6)


def test_a_subject_that_fails_is_told_and_the_others_go_on(folder, tokenizer):
    data = json.loads((folder / "data.json").read_text())
    text = json.dumps(data["records"][1]).replace("Islam", f"Is{tokenizer.eos_token}lam", 1)  # a special token cannot be edited
    data["records"][1] = json.loads(text)
    (folder / "data.json").write_text(json.dumps(data))
    table = run(folder, "out", subjects=2, recipes="vanilla,rose[forms=2;steps=2;layers=1-2]")
    assert 0 <= table["rose[forms=2;steps=2;layers=1-2]"]["locality"][0] <= 100
    lines = read_lines(folder / "out" / "results.jsonl")
    assert [("failed" in line, line["subject"]) for line in lines if line["recipe"] != "vanilla"] == [(False, NAMES[0]), (True, NAMES[1])]
    assert "special token" in lines[-1]["failed"] and "1 results failed" in read_results(folder / "out").told()


def test_token_f1():
    assert token_f1("The 7th of May, 2023.", "7th of may 2023") == 1.0
    assert token_f1("It was in May 2023", "7 May 2023") == pytest.approx(2 * 2 / (5 + 3))
    assert token_f1("", "x") == token_f1("a", "an") == 0.0


def test_summaries_are_means_over_subjects_then_seeds():
    line = lambda subject, seed, a, b: {"recipe": "r", "seed": seed, "subject": subject, "values": {"instructed": a, "locality": b}}  # noqa: E731
    lines = [line("x", 0, [1, 0, 0, 1], [1]), line("y", 0, [1], []), line("x", 1, [1], [0]), line("y", 1, [0], [1])]
    table = summary(SUITES["instructed"], lines, ["r"], 2)
    assert table["r"]["instructed"] == [62.5, pytest.approx(17.678)] and table["r"]["locality"] == [75.0, pytest.approx(35.355)]
    assert by_count([{"count": 5, "values": {"locality": [0.5, 1.0]}}]) == {"locality_5": 0.75}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("rosy", "unknown recipe 'rosy'"),
        ("rose[forms]", "no setting"),
        ("rose[color=red]", "no setting"),
        ("rose[steps=0]", "steps must be positive"),
        ("rose[steps=many]", "invalid literal"),
        ("grace[steps=2]", "recipe of the engine"),
    ],
)
def test_recipes_that_are_none_are_named(make_model, tokenizer, names, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        methods_of(names, Editor(make_model(), tokenizer, ROSE))


def test_another_seed_is_another_result_where_something_is_drawn(make_model, tokenizer):
    editor = Editor(make_model(), tokenizer, ROSE)
    methods = methods_of("vanilla,rose[noise=0],rose[noise=0.1],rose[noise=0;fisher=3],memit,wise", editor)
    assert [method.seeded for method in methods.values()] == [False, False, True, True, True, True]


def test_methods_edit_the_layers_of_the_preset(make_model, tokenizer):
    """All of them; and what is published has neither bystanders nor rewordings."""
    editor = Editor(make_model(), tokenizer, replace(ROSE, layers=(1, 2, 4)))
    recipes = {name: method.recipe for name, method in known(editor).items() if method.recipe}
    assert recipes.pop("rome").layers == (2,) and {recipe.layers for recipe in recipes.values()} == {(1, 2, 4)}
    published = [recipes[name] for name in ("rose_paper", "memit", "memit_merge", "alphaedit")]
    assert not any(recipe.bystanders or recipe.rewordings for recipe in published) and recipes["rose"].bystanders


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """(the page's DOM after its scripts, the browser's log with the page's console)."""
    options = [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([BROWSER, *QUIET, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed on this machine")
def test_the_report_in_a_browser(folder):
    """All tables, plots and cases are there, the page needs nothing else, and says nothing on the console; a spoilt one is noticed."""
    run(folder, "a", subjects=2)
    run(folder, "b", "sequential", recipes="vanilla,rose[forms=2;steps=2;layers=1-2]")
    out = folder / "report"
    assert bench.report.main([str(folder / "a"), str(folder / "b"), "--to", str(out)]) == 0
    shutil.copy(out / "report.html", folder / "alone.html")
    shown, log = browse(folder / "alone.html", folder / "profile")
    assert "CONSOLE" not in log
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) >= 5 and shown.count("<img ") == len(pictures) and shown.count("data:image/png") == len(pictures)
    assert shown.count("<table>") == 2 and shown.count('class="case"') == 2 and "before (unedited)" in shown
    text = (out / "report.md").read_text()
    assert f"| {RECIPES.split(',')[1]} |" in text and all(f"({picture.name})" in text for picture in pictures)
    broken = (folder / "alone.html").read_text().replace("show();\n</script>", "nothing();\n</script>")
    (folder / "broken.html").write_text(broken)
    assert "CONSOLE" in browse(folder / "broken.html", folder / "profile")[1]


def test_a_report_of_nothing_says_so(tmp_path):
    with pytest.raises(SystemExit, match="holds no finished run"):
        bench.report.main([str(tmp_path)])
