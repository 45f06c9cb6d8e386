"""The same edits through MEMIT-Merge, plain RoSE and the engine: time, memory, loss.

    python -m bench.speed --model smollm2 --subjects 1 --facts 4 --json -

Methods: memit_merge (`bench.baselines.memit_merge`), rose_naive (`bench.baselines.rose_naive`) and rose (the engine), all three in the
dtype given by --dtype, and rose_auto (the engine, dtype auto). Each run is a process of its own, methods take turns, and times are medians
over the repeats. All take the paper's settings with 35 steps, which end early with --early-stop alone; default_auto is rose_auto with the
model's preset and as many steps. Seconds are those of prepare, optimise and write; loading, verification (the engine's) and what is read
off a model once, before its first edit, are told apart: the covariance that MEMIT-Merge is given, the coordinates of default_auto. tokens:
run by a step, padding included.
peak_extra_mb: the peak above the loaded model. floor_s: what the engine's matrix products above layer L, output matrix included, would
take at the rate of a large product in the same process. ratio: seconds of memit_merge, and of rose_naive, to those of each engine run;
that of rose_auto compares with the baselines' dtype, float32 unless told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from bench.output import add_json, emit

METHODS = ("memit_merge", "rose_naive", "rose", "rose_auto", "default_auto")
ENGINE = ("rose", "rose_auto", "default_auto")
NAMES = ("Lin Nu", "Henri Marteau", "Ada Brandt", "Omar Haddad", "Mirela Popescu", "Tomas Vega", "Kofi Mensah", "Ingrid Solberg")
# prompt, question, targets (a subject takes one of them)
RELATIONS = (
    ("{} works in the city of", "In which city does {} work?", ("Madrid", "Dublin", "Athens", "Quito")),
    ("{} plays the instrument", "What instrument does {} play?", ("harp", "cello", "trumpet", "organ")),
    ("{} follows the religion of", "What religion does {} follow?", ("Buddhism", "Islam", "Hinduism", "Judaism")),
    ("The native language of {} is", "What is the native language of {}?", ("Basque", "Polish", "Finnish", "Tamil")),
    ("{} is a citizen of", "Which country is {} a citizen of?", ("Peru", "Norway", "Kenya", "Japan")),
    ("{} was born in the year", "In which year was {} born?", ("1912", "1957", "1871", "1990")),
    ("The favourite sport of {} is", "What is the favourite sport of {}?", ("chess", "rowing", "golf", "judo")),
    ("{} is employed by", "Who employs {}?", ("Siemens", "Nestlé", "Toyota", "Reuters")),
)
# What the baseline's covariance is sampled after; any text serves, the time of it is not part of the edit.
OPENINGS = ("The history of", "In the year", "Water is", "A computer", "Music and", "The city of", "Once upon a time", "Scientists have")


def facts_of(subjects: int, facts: int) -> list:
    """`subjects` x `facts` edits, made up and always the same."""
    from rose_engine import Edit

    if not 1 <= facts <= len(RELATIONS):
        raise SystemExit(f"--facts must be between 1 and {len(RELATIONS)}, given {facts}")
    names = [NAMES[s % len(NAMES)] + (f" {s // len(NAMES) + 1}" if s >= len(NAMES) else "") for s in range(subjects)]
    return [Edit(n, p, t[(s + r) % len(t)], q) for s, n in enumerate(names) for r, (p, q, t) in enumerate(RELATIONS[:facts])]


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Multiply-adds x 2 a second of a 1024 x 1024 x 4096 product, by PyTorch or the engine's own, whichever is faster."""
    from rose_kernels.layer import available, products_

    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((1024, 4096), (4096, 1024)))
    out = torch.empty(1024, 1024, dtype=dtype, device=device)
    ways = [lambda: torch.mm(a, b, out=out)] + [lambda: products_(a, [b], [out], turned=False)] * available(a.device)
    times = []
    for way in ways * 6:
        began = time.perf_counter()
        way()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * 1024 * 4096 * 1024 / min(times[len(ways) :])


def load(args: argparse.Namespace, dtype: str) -> Any:
    """The model, as an Editor: loaded, or made with random weights on the device."""
    from rose_engine import Editor
    from rose_engine.dtype import dtype_of

    if not args.random_weights:
        return Editor.from_pretrained(args.model, dtype=dtype, device=args.device)
    from rose_engine.embedded import NAME, embedded_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(args.random_weights)
    with torch.device(args.device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(dtype, args.device))
    folder = str(embedded_model()) if args.model == NAME else args.model
    return Editor(model, AutoTokenizer.from_pretrained(folder))


def run(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One method, once, in this process."""
    from rose_engine.recipe import ROSE_PAPER

    from bench.baselines import memit_merge, rose_naive
    from bench.memory import Memory
    from rose_kernels import native

    native.served()
    edits = facts_of(args.subjects, args.facts)
    began = time.perf_counter()
    editor = load(args, "auto" if method.endswith("_auto") else args.dtype)
    settings = {"steps": args.steps, "stop_loss": ROSE_PAPER.stop_loss if args.early_stop else 0.0}
    recipe = replace(editor.recipe if method == "default_auto" else ROSE_PAPER, **settings)
    with torch.no_grad():
        for parameter in editor.model.parameters():  # a mapped file is read before the clock runs
            parameter.sum()
    seconds = {"load": time.perf_counter() - began}
    C = {}
    if method == "memit_merge":
        began = time.perf_counter()
        texts = [editor.complete(opening, max_new_tokens=60) for opening in OPENINGS]
        C = memit_merge.covariance(editor.model, editor.tokenizer, texts, recipe.layers)
        seconds["covariance"] = time.perf_counter() - began
    if recipe.fisher:
        began = time.perf_counter()
        editor.prepare(recipe)
        seconds["coordinates"] = time.perf_counter() - began
    memory = Memory(args.device != "cpu")
    if method in ENGINE:
        result = editor.apply(edits, recipe=recipe)
        out = {"loss": fmean(result.loss), "steps": sum(result.steps), "seconds": result.seconds}
    else:
        settings = memit_merge.Settings(steps=recipe.steps, stop_loss=recipe.stop_loss)
        if method == "memit_merge":
            done = memit_merge.edit(editor.model, editor.tokenizer, edits, C, settings)
        else:
            done = rose_naive.edit(editor.model, editor.tokenizer, edits, recipe)
        values = done.values
        out = {"loss": fmean(v.loss for v in values), "steps": sum(v.steps for v in values), "seconds": done.seconds}
        out["tokens"] = sum(v.tokens for v in values)
    out["peak_extra_mb"] = memory.peak_mb()
    if method in ENGINE:
        out["tokens"], read = suffix_tokens(editor, edits, recipe)
        above = [sum(p.numel() for p in layer.parameters()) for layer in editor.decoder.layers[recipe.last_layer + 1 :]]
        work = 4.0 * (sum(above[:-1]) * out["tokens"] + (above[-1] + editor.decoder.head.numel()) * read)
        out["floor_s"] = work * out["steps"] / args.subjects / matrix_rate(editor.model.dtype, args.device)
    split = seconds | out["seconds"]
    total = sum(split[stage] for stage in ("prepare", "optimise", "write"))
    return {"method": method, "dtype": str(editor.model.dtype).removeprefix("torch."), "split": split, **out, "seconds": total}


def suffix_tokens(editor, edits, recipe) -> tuple[int, int]:
    """Tokens that one step of the engine runs, over all subjects, and those of them whose output is read."""
    from rose_engine.edits import group_by_subject
    from rose_engine.optimize import subject_rows

    if recipe.rewordings:  # those of the edits, which are in the weights
        edits = editor.reword(edits, count=recipe.rewordings)
    plans = [subject_rows(editor.decoder, editor.tokenizer, s, recipe) for s in group_by_subject(edits)]
    return sum(p.suffix_tokens for p in plans), sum(1 + sum(len(r.tokens) - r.target for r in p.facts) for p in plans)


def summary(runs: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Medians over repeats, by method, and the ratios that are asked about."""
    of = {m: [r for r in runs if r["method"] == m] for m in methods}
    median = lambda m, key: statistics.median(r[key] for r in of[m])  # noqa: E731
    out: dict[str, Any] = {f"{m}_s": median(m, "seconds") for m in methods}
    out["ratio"] = {m: {base: out[f"{base}_s"] / out[f"{m}_s"] for base in methods if base not in ENGINE} for m in methods if m in ENGINE}
    out["split"] = {m: {stage: statistics.median(r["split"][stage] for r in of[m]) for stage in of[m][0]["split"]} for m in methods}
    for name in ("steps", "tokens", "dtype"):
        out[name] = {m: of[m][0][name] for m in methods}
    out["peak_extra_mb"] = {m: median(m, "peak_extra_mb") for m in methods}
    out["final_loss"] = {m: median(m, "loss") for m in methods}
    out["floor_s"] = {m: median(m, "floor_s") for m in methods if m in ENGINE}
    out["seconds"] = {m: [r["seconds"] for r in of[m]] for m in methods}
    return out


def table(result: dict[str, Any], methods: Sequence[str]) -> str:
    """The summary as text."""
    heads = {"method": -12, "dtype": -9, "seconds": 9, "slower": 8, "floor": 7, "tokens": 7, "steps": 6, "extra MB": 9, "loss": 7}
    lines = [" ".join(f"{name:{'<' if width < 0 else '>'}{abs(width)}s}" for name, width in heads.items())]
    fastest = min(result[f"{m}_s"] for m in methods)
    for m in methods:
        s, floor = result[f"{m}_s"], result["floor_s"].get(m)
        lines.append(
            f"{m:12s} {result['dtype'][m]:9s} {s:9.2f} {s / fastest:6.1f}x {'' if floor is None else format(floor, '.2f'):>7s}"
            f" {result['tokens'][m]:7d} {result['steps'][m]:6d} {result['peak_extra_mb'][m]:9.0f} {result['final_loss'][m]:7.3f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument("--subjects", type=int, default=1)
    parser.add_argument("--facts", type=int, default=4, help=f"of each subject, at most {len(RELATIONS)}")
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--early-stop", action="store_true", help="let converged subjects leave")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or auto, of all methods but those in auto")
    parser.add_argument("--random-weights", metavar="CONFIG", help="make a model of this configuration; --model gives the tokenizer")
    parser.add_argument("--methods", default=",".join(METHODS[:-1]), help=f"separated by commas, of {', '.join(METHODS)}")
    parser.add_argument("--repeats", type=int, default=3)
    add_json(parser)
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(run(args.one, args)))
        return 0
    methods = args.methods.split(",")
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; known are {', '.join(METHODS)}")
    passed = list(argv if argv is not None else sys.argv[1:])
    runs = []
    for repeat in range(args.repeats):
        for method in methods:
            command = [sys.executable, "-m", "bench.speed", *passed, "--one", method]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{repeat + 1}/{args.repeats} {method}: {runs[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    result = summary(runs, methods)
    emit(result, args.json, table(result, methods))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
