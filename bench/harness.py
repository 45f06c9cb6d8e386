"""lm-evaluation-harness on an exported checkpoint and on its base, side by side: what an edit does to general tasks.

    rose export edits/ --model smollm2 --checkpoint edited
    python -m bench.harness --base BASE --edited edited --tasks arc_easy,hellaswag --json -

Needs `pip install lm_eval`, which fetches its tasks' data itself; --include adds a folder of task files of your own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rose_engine.embedded import checkpoint_folder

from bench.output import add_json, emit


def scores(
    folder: str, tasks: Sequence[str], include: str | None, limit: int | None, device: str, dtype: str
) -> dict[str, dict[str, float]]:
    """task -> metric -> value of a checkpoint folder."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    model = f"pretrained={folder},dtype={dtype}"
    found = lm_eval.simple_evaluate(
        model="hf", model_args=model, tasks=list(tasks), task_manager=TaskManager(include_path=include), limit=limit, device=device
    )
    numbers = lambda row: {name: value for name, value in row.items() if isinstance(value, int | float)}  # noqa: E731
    return {task: numbers(row) for task, row in found["results"].items()}


def text_of(result: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line a metric: before, after."""
    lines = [f"{'task':24s} {'metric':24s} {'base':>10s} {'edited':>10s}"]
    for task, metrics in result["base"].items():
        lines += [f"{task:24s} {name:24s} {value:10.4f} {result['edited'][task][name]:10.4f}" for name, value in metrics.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the unedited checkpoint: Hugging Face id, folder, or smollm2")
    parser.add_argument("--edited", required=True, help="the checkpoint that `rose export --checkpoint` has written")
    parser.add_argument("--tasks", required=True, help="separated by commas")
    parser.add_argument("--include", default=None, metavar="FOLDER", help="task files besides those of the harness")
    parser.add_argument("--limit", type=int, default=None, help="examples of each task; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    add_json(parser)
    args = parser.parse_args(argv)
    try:
        import lm_eval  # noqa: F401
    except ImportError as e:
        raise SystemExit("this needs lm-evaluation-harness: pip install lm_eval") from e
    folders: dict[str, Any] = {"base": str(checkpoint_folder(args.base)), "edited": args.edited}
    options = (args.tasks.split(","), args.include, args.limit, args.device, args.dtype)
    result = {name: scores(folder, *options) for name, folder in folders.items()}
    emit(result, args.json, text_of(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
