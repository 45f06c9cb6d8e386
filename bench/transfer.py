"""What an edit is worth on the same model in another precision: each subject is edited on one base, and its delta adopted by the others.

    python -m bench.transfer --data same_subject_dev.json --made float32,nf4 --read float32,bfloat16,int8,nf4 --subjects 10 --json -

Bases: float32, bfloat16, float16, and by bitsandbytes int8 and nf4 (products in float32). Metrics as in `bench.quality`, teacher-forced, of
recall alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import torch
from rose_engine import Delta, Editor
from rose_engine.embedded import checkpoint_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bench.datasets import load
from bench.datasets.cases import Dataset, SubjectCases, paraphrases_of
from bench.methods import Method, edited, methods_of
from bench.output import add_json
from bench.quality import RECALL, emit_means, keep, probes_of, read
from bench.subjects import note

BASES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "nf4": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)},
}


def base(name: str, kind: str, device: str) -> Editor:
    """The editor of a model by Hugging Face id, folder or `smollm2`, in one of `BASES`."""
    folder = checkpoint_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, **BASES[kind])
    return Editor(model, AutoTokenizer.from_pretrained(folder))


def evaluate(
    made: Editor, readers: dict[str, Editor], data: Dataset, methods: dict[str, Method], told: Callable[[str], None] = lambda line: None
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(method, reader) -> metric -> one mean a subject. Every delta is made on `made`, and adopted by each of the readers, of which it may
    be one."""
    results = {(name, reader): {metric: [] for metric in RECALL} for name in methods for reader in readers}
    for number, subject in enumerate(data.subjects, 1):
        for name, method in methods.items():
            with edited(made, method, [subject.edits], 0, paraphrases_of(subject)):
                deltas = list(made.applied)
            for reader, editor in readers.items():
                means = _recall(editor, editor.adopt(deltas), subject, data)
                told(f"{number}/{len(data.subjects)} {name} on {reader}: {keep(means, results[name, reader])}")
    return results


def _recall(editor: Editor, deltas: Sequence[Delta], subject: SubjectCases, data: Dataset) -> dict[str, float]:
    """Every metric of a subject that has probes of it, in the weights with the deltas, which are afterwards without any."""
    probes = probes_of(editor.tokenizer, subject, data)
    editor.restore(deltas)
    try:
        outcomes = read(editor, {metric: probes[metric] for metric in RECALL})
    finally:
        editor.restore([])
    return {metric: fmean(outcome.success for outcome in group) for metric, group in outcomes.items() if group}


def _bases(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in BASES]:
        raise argparse.ArgumentTypeError(f"unknown base {unknown[0]!r}; known are {', '.join(BASES)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a same-subject file (S2RKE schema)")
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument("--made", type=_bases, default=["float32", "nf4"], help="bases on which edits are made")
    parser.add_argument("--read", type=_bases, default=["float32", "bfloat16", "int8", "nf4"], help="bases on which they are read")
    parser.add_argument("--recipes", default="rose", help="methods by name (`bench.methods`), separated by commas")
    parser.add_argument("--subjects", type=int, default=10, help="how many subjects of the file, from its start")
    parser.add_argument("--device", default="cpu")
    add_json(parser)
    args = parser.parse_args(argv)
    of = {kind: base(args.model, kind, args.device) for kind in dict.fromkeys((*args.made, *args.read))}
    data, results = load(args.data, args.subjects), {}
    for made in args.made:
        readers = {kind: of[kind] for kind in args.read}
        methods = methods_of(args.recipes, of[made])
        if own := [name for name, method in methods.items() if method.edit is not None]:
            raise SystemExit(f"{own[0]} leaves no delta to be adopted; take a recipe of the engine")
        found = evaluate(of[made], readers, data, methods, partial(_noted, made))
        results |= {f"{name}, made on {made}, read on {reader}": metrics for (name, reader), metrics in found.items()}
    emit_means(results, RECALL, args.json)
    return 0


def _noted(made: str, line: str) -> None:
    note(f"made on {made}: {line}")


if __name__ == "__main__":
    raise SystemExit(main())
