"""What the quality benchmarks are given on the command line: a model, and subjects of a same-subject file."""

from __future__ import annotations

import argparse
import sys

from rose_engine import Editor

from bench.datasets import load
from bench.datasets.cases import Dataset
from bench.output import add_json


def parser_of(name: str, description: str | None, *, count: str, default: int) -> argparse.ArgumentParser:
    """A parser with --data, --model, --dtype, --device and --json; count: the option that says how many subjects."""
    parser = argparse.ArgumentParser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a same-subject file (S2RKE schema)")
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument(f"--{count}", dest="count", type=int, default=default, help="how many subjects of the file, from its start")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, float16 or auto; default: the checkpoint's")
    parser.add_argument("--device", default="cpu")
    add_json(parser)
    return parser


def opened(args: argparse.Namespace) -> tuple[Editor, Dataset]:
    """The editor of the model and the subjects that the arguments name."""
    return Editor.from_pretrained(args.model, dtype=args.dtype, device=args.device), load(args.data, args.count)


def note(line: str) -> None:
    """Tell progress on standard error."""
    print(line, file=sys.stderr, flush=True)
