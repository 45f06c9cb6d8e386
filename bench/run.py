"""Rerun the paper's experiments: every method on every subject, one line a result, resumable.

    python -m bench.run --suite instructed --data same_subject_dev.json --recipes vanilla,memit_merge,rose --subjects 30 --out OUT

Suites: `instructed` and `declarative` edit each subject alone (the paper's Table 1, Fig. 16); `ablation`, `templates` and `layers` are the
first with other recipes (Figs. 6, 19, 12); `sequential` edits subject after subject (Fig. 20); `locomo` edits what people said in
conversations (Table 2). Metrics are those of `bench.quality`, in percent, and perplexity, kl_neutral, fluency (`bench.ability`).

OUT/results.jsonl gets a line as soon as a result is there; run again with the same arguments and what is there is not done again.
Under `torchrun --nproc-per-node N` the subjects are spread over N processes, each with the model (`bench.ranks`).
OUT/run.json says what was run on what; OUT/summary.json is {recipe: {metric: [mean, standard deviation over seeds]}}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rose_engine import Editor
from rose_engine.dtype import dtype_of
from rose_engine.editor import versions
from rose_engine.edits import EditError
from rose_engine.files import replacing
from rose_engine.moments import model_fingerprint
from rose_engine.optimize import Diverged

from bench import ranks, suites
from bench.datasets import load, locomo
from bench.datasets.cases import DataError
from bench.methods import Method, methods_of
from bench.quality import METRICS
from bench.subjects import note
from bench.suites import SUITES, Job
from bench.tables import read_lines


def positive(text: str) -> int:
    """A number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a result and have it on disk."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def hardware(device: str) -> dict[str, Any]:
    """What the run runs on."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "ranks": ranks.place()[1],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        found["cpu"] = next((line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")), "")
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of the *.json of a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def described(args: argparse.Namespace, editor: Editor, methods: dict[str, Method]) -> dict[str, Any]:
    """What decides a run's results, and what it runs on. SystemExit where the data cannot be read."""
    try:
        coverage = {"coverage": locomo.load(args.data).report} if args.suite == "locomo" else load(args.data, 1) and {}
    except (OSError, DataError, EditError) as e:
        raise SystemExit(f"the data cannot be used: {e}") from e
    return {
        "suite": args.suite,
        "data": {"file": Path(args.data).name, "sha256": digest_of(Path(args.data)), "subjects": args.subjects} | coverage,
        "seeds": args.seeds,
        "recipes": {name: method.recipe.as_dict() if method.recipe else None for name, method in methods.items()},
        "metrics": list(METRICS),
        "model": {"name": args.model, "dtype": str(editor.model.dtype).removeprefix("torch."), "sha256": model_fingerprint(editor.model)},
        "device": args.device,
        "hardware": hardware(args.device),
        "versions": versions() | {"python": platform.python_version()},
    }


def check_same(path: Path, now: dict[str, Any]) -> None:
    """Write run.json, or see that a run which is gone on with is the same. SystemExit names what is not."""
    now = json.loads(json.dumps(now))
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(now, indent=1) + "\n")
        return
    had = json.loads(path.read_text())
    different = next((field for field in now if field != "hardware" and had.get(field) != now[field]), None)
    if different is not None:
        was, is_now = _short(had.get(different)), _short(now[different])
        raise SystemExit(f"{path.parent} holds the results of another run: `{different}` was {was}, is {is_now}; choose another --out")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def execute(job: Job, suite: suites.Suite, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure every cell that has no line yet, on all ranks; returns on rank 0 all lines in the suite's order, elsewhere none.

    The weights are checked after every cell.
    """
    key_of = lambda key: json.dumps(key, sort_keys=True)  # noqa: E731
    cells = list(suite.cells(job))
    if len({key_of(cell.key) for cell in cells}) != len(cells):
        raise SystemExit("two results would have one name; see that no subject is there twice")
    fields = {name for cell in cells for name in cell.key}
    known = lambda: {key_of({name: line[name] for name in fields}): line for line in read_lines(job.out / ranks.RESULTS)}  # noqa: E731
    done = known()
    ranks.wait()  # for the others to have read it
    missing = ranks.share([cell for cell in cells if key_of(cell.key) not in done])
    layers = sorted({layer for method in job.methods.values() if method.recipe for layer in method.recipe.layers})
    base = {name: weight.clone() for name, weight in job.editor.weights(layers).items()}
    took: dict[str, list[float]] = {}
    for number, cell in enumerate(missing):
        began = time.perf_counter()
        try:
            line = {**cell.key, **cell.run()}
        except (ValueError, Diverged, torch.OutOfMemoryError) as e:  # an edit that cannot be made: told, and the others go on
            line = {**cell.key, "values": {}, "failed": f"{type(e).__name__}: {e}"}
        line["wall_s"] = round(time.perf_counter() - began, 3)
        if any(not torch.equal(weight, base[name]) for name, weight in job.editor.weights(layers).items()):
            raise RuntimeError(f"the weights are not the unedited ones after {cell.key}")
        append_line(ranks.own_file(job.out), line)
        took.setdefault(cell.key["recipe"], []).append(line["wall_s"])
        what = " ".join(str(part) for part in cell.key.values())
        how = f"failed, {line['failed']}" if "failed" in line else f"{line['wall_s']:.1f} s"
        note(f"{number + 1}/{len(missing)} {what}: {how}; {_left(missing[number + 1 :], took)} left")
    ranks.wait()
    if ranks.place()[0]:
        return []
    ranks.merge(job.out)
    done = known()
    return [done[key_of(cell.key)] for cell in cells]


def _left(cells: Sequence[suites.Cell], took: dict[str, list[float]]) -> str:
    """The time that cells will take by what those of the same recipe took."""
    every = [seconds for some in took.values() for seconds in some]
    mean = {recipe: sum(some) / len(some) for recipe, some in took.items()}
    seconds = sum(mean.get(cell.key["recipe"], sum(every) / len(every)) for cell in cells)
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def text_of(table: dict[str, dict[str, list[float]]]) -> str:
    """The summary as lines of text."""
    metrics = list(dict.fromkeys(metric for row in table.values() for metric in row))
    lines = [" " * 24 + "".join(f"{metric[-20:]:>21s}" for metric in metrics)]
    for name, row in table.items():
        cells = (row.get(metric) for metric in metrics)
        lines.append(f"{name:24s}" + "".join(f"{'' if c is None else f'{c[0]:.2f} ({c[1]:.2f})':>21s}" for c in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--data", required=True, help="a file that `bench.datasets` reads; for locomo the folder of conversations")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results; made, or gone on with")
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument("--recipes", default=None, help="methods by name (`bench.methods`), separated by commas; default: the paper's")
    parser.add_argument(
        "--subjects", type=int, default=None, help="how many subjects, or groups of facts of locomo, from the start; default: all"
    )
    seeds = "seeds 0, 1, ... of what is sampled: prefixes, corpora, masks; what samples nothing runs once"
    parser.add_argument("--seeds", type=positive, default=1, help=seeds)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto, the faster of the first two on this machine")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    with ranks.joined(), ranks.alone(args.out):
        return run(args)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table; rank 0 writes what is not a rank's own."""
    suite, about, leads = SUITES[args.suite], args.out / "run.json", ranks.place()[0] == 0
    if args.dtype == "auto" and about.exists():  # what was the faster one when the run began
        args.dtype = json.loads(about.read_text())["model"]["dtype"]
    dtype = ranks.first(str(dtype_of(args.dtype, args.device)).removeprefix("torch."))
    editor = Editor.from_pretrained(args.model, dtype=dtype, device=ranks.device(args.device))
    methods = methods_of(args.recipes or suite.recipes, editor)
    now = described(args, editor, methods)
    if leads:
        check_same(about, now)
        ranks.merge(args.out)
    ranks.wait()
    job = Job(editor, methods, Path(args.data), args.subjects, args.seeds, args.out)
    lines = execute(job, suite, note)
    if leads:
        table = suites.summary(suite, lines, methods, args.seeds)
        with replacing(args.out / "summary.json") as temporary:
            temporary.write_text(json.dumps(table, indent=1) + "\n")
        print(text_of(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
