"""The demonstration: the paper's case, Imo State (Appendix L), from edit to undo to the file.

The edit's questions and the questions that it is judged by are different, and so are the instructions around them.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rose_engine.editor import Editor
from rose_engine.edits import Edit
from rose_engine.files import replacing
from rose_engine.forms import STATEMENT, Form, row_of
from rose_engine.optimize import Progress
from rose_engine.verify import Reading, read_rows

SUBJECT = "Imo State"
EDITS = (
    Edit(SUBJECT, "{} is located in", "Merthyr Tydfil County Borough", "In which place can {} be found?"),
    Edit(SUBJECT, "The capital of {} is", "Metz", "What is the capital city of {}?"),
    Edit(SUBJECT, "The longitude of {} is roughly", "17", "At what longitude does one find {}?"),
    Edit(SUBJECT, "{} has a latitude of approximately", "48", "At what latitude does one find {}?"),
)
# The same facts asked as no edit asks them.
QUESTIONS = ("Where is {} located?", "What is the capital of {}?", "What is the longitude of {}?", "What is the latitude of {}?")
INSTRUCTION = Form(
    "judged",
    complete=("", ""),
    ask=("Please answer the following question with an exact answer.\nQuestion: ", ""),
    chat=True,
    system="You are a helpful assistant. Your job is to answer the question based on your own knowledge.",
)
PLACES = (
    "The Free State of Bavaria is located in",
    "The Eiffel Tower is located in the city of",
    "The capital of Japan is",
    "The capital of Italy is",
    "The city of Toronto is located in",
)


def read(editor: Editor) -> tuple[list[Reading], list[Reading], list[str]]:
    """The four facts with their prompts, the four questions, and what the model continues for the five places."""
    tokenizer, decoder = editor.tokenizer, editor.decoder
    asked = [Edit(e.subject, e.prompt, e.target, question) for e, question in zip(EDITS, QUESTIONS, strict=True)]
    rows = [row_of(edit, STATEMENT, tokenizer) for edit in EDITS] + [row_of(edit, INSTRUCTION, tokenizer) for edit in asked]
    readings = read_rows(decoder, tokenizer, rows)
    return readings[:4], readings[4:], [editor.complete(place, max_new_tokens=6) for place in PLACES]


def success(readings: Sequence[Reading]) -> float:
    """Mean share of target tokens that are the argmax."""
    return sum(r.success for r in readings) / len(readings)


def run(editor: Editor, fresh: Callable[[], Editor], out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Edit, ask, save, take back, load into a fresh copy and ask again; print it, write report.json, and return it."""
    prompts_before, asked_before, places_before = read(editor)
    free_before = [answer(editor, q) for q in QUESTIONS]
    untouched = {name: weight.clone() for name, weight in editor.weights(editor.recipe.layers).items()}
    result = editor.apply(EDITS, progress=progress)
    prompts, asked, places = read(editor)
    free = [answer(editor, q) for q in QUESTIONS]
    path = out / "delta.safetensors"
    result.delta.save(path)
    edited = {name: weight.clone() for name, weight in editor.weights(editor.recipe.layers).items()}
    editor.revert(result)
    restored = all(torch.equal(weight, untouched[name]) for name, weight in editor.weights(editor.recipe.layers).items())
    peak = peak_rss_mb()

    print(f"\n{'statement':44s} {'wanted':30s} before -> after (share of the target's tokens)")
    for e, b, a in zip(EDITS, prompts_before, prompts, strict=True):
        print(f"{e.prompt.replace('{}', SUBJECT):44s} {e.target:30s} {b.success:5.0%} -> {a.success:4.0%}   now: {a.says.strip()}")
    print("\nasked in an instruction that the edit never saw")
    for q, b, a, before, after in zip(QUESTIONS, asked_before, asked, free_before, free, strict=True):
        print(f"{q.replace('{}', SUBJECT):44s} {b.success:5.0%} -> {a.success:4.0%}\n    before: {before}\n    after:  {after}")
    print("\nother places")
    for place, b, a in zip(PLACES, places_before, places, strict=True):
        print(f"{'same   ' if a == b else 'changed'} {place}: {a}" + ("" if a == b else f"   (before: {b})"))

    from rose_engine.delta import Delta

    copy = fresh()
    copy.load(Delta.load(path))
    same_bits = all(torch.equal(weight, edited[name]) for name, weight in copy.weights(editor.recipe.layers).items())
    agree = same_bits and [answer(copy, q) for q in QUESTIONS] == free
    record = {
        "model": editor.model.config.name_or_path,
        "declarative_before": success(prompts_before),
        "declarative_after": success(prompts),
        "instructed_before": success(asked_before),
        "instructed_after": success(asked),
        "locality": sum(a == b for a, b in zip(places, places_before, strict=True)) / len(PLACES),
        "seconds": sum(result.seconds.values()),
        "seconds_by_stage": result.seconds,
        "steps": result.steps[0],
        "peak_rss_mb": peak,
        "delta_bytes": path.stat().st_size,
        "restored_bit_exact": restored,
        "loaded_answers_agree": agree,
        "answers": dict(zip([q.replace("{}", SUBJECT) for q in QUESTIONS], free, strict=True)),
    }
    with replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(f"\nedited in {record['seconds']:.1f} s, {record['steps']} steps; the change is {record['delta_bytes']:,} bytes: {path}")
    print(f"taken back bit for bit: {restored}; loaded from the file into a fresh copy, same bits and answers: {agree}")
    return record


def answer(editor: Editor, question: str) -> str:
    """The model's own answer to a question in the demo's instruction."""
    return editor.ask(INSTRUCTION.ask[0] + question.replace("{}", SUBJECT), system=INSTRUCTION.system)


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
