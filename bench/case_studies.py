"""The paper's case studies by name: what a model answers before and after an edit, by several methods.

    python -m bench.case_studies imo_state --recipes memit_merge,rose

Names: imo_state, bavaria, caroline, iphone, or all. A question either wants the edited answer, which must stand in what is generated, or
must keep the answer of the unedited model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rose_engine import Editor
from rose_engine.edits import edit_from_dict

from bench.datasets.cases import INSTRUCTIONS
from bench.methods import Method, edited, methods_of
from bench.metrics import chat_probe, contains, generate, normalise
from bench.output import add_json, emit

STUDIES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("case_studies.json").read_text("utf-8"))


def study(editor: Editor, name: str, methods: dict[str, Method]) -> list[dict[str, Any]]:
    """Of every question: ask, wanted (None where the answer must stay), before, and by method what is said after and if it is right."""
    case = STUDIES[name]
    edits = [edit_from_dict(edit, f"{name}: edit {number}") for number, edit in enumerate(case["edits"], 1)]
    system, lead, tail = INSTRUCTIONS[1]
    texts = [chat_probe(editor.tokenizer, lead + question["ask"] + tail, "", system).text for question in case["questions"]]
    say = lambda: generate(editor.model, editor.tokenizer, texts, chat=bool(editor.tokenizer.chat_template))  # noqa: E731
    asked = [
        {"ask": question["ask"], "wanted": question.get("wanted"), "before": before, "after": {}}
        for question, before in zip(case["questions"], say(), strict=True)
    ]
    for method_name, method in methods.items():
        with edited(editor, method, [edits], 0):
            for question, said in zip(asked, say(), strict=True):
                kept = normalise(said) == normalise(question["before"])
                right = contains(said, question["wanted"]) if question["wanted"] else kept
                question["after"][method_name] = {"said": said, "right": right}
    return asked


def text_of(results: dict[str, list[dict[str, Any]]]) -> str:
    """The studies as lines of text."""
    lines = []
    for name, questions in results.items():
        lines += [f"{name}: {STUDIES[name]['about']}"]
        for question in questions:
            lines += ["", f"  {question['ask']}  ({'wanted: ' + question['wanted'] if question['wanted'] else 'must stay'})"]
            lines.append(f"    {'before':14s} {question['before']}")
            lines += [f"    {method:14s} {'+' if after['right'] else '-'} {after['said']}" for method, after in question["after"].items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.case_studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*STUDIES, "all"))
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument("--recipes", default="memit_merge,rose", help="methods by name (`bench.methods`), separated by commas")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--device", default="cpu")
    add_json(parser)
    args = parser.parse_args(argv)
    editor = Editor.from_pretrained(args.model, dtype=args.dtype, device=args.device)
    methods = methods_of(args.recipes, editor)
    results = {name: study(editor, name, methods) for name in (STUDIES if args.name == "all" else [args.name])}
    emit(results, args.json, text_of(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
