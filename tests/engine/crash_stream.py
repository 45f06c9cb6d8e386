"""Run by test_crash: streams edits on a tiny model again and again, each time in a process that is killed at a random moment.

Forked from one process that has loaded everything, so that a round costs milliseconds. Prints one JSON object.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rose_engine import ROSE, Editor, ledger
from rose_engine.stream import stream
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = replace(ROSE, rewordings=0, bystanders=0, forms=2, steps=1, lr=0.05, layers=(1, 2))


def digest(editor: Editor) -> str:
    """Of the weights that may be edited."""
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in editor.weights().values())).hexdigest()


def run(editor: Editor, folder: Path, lines: list[str]) -> None:
    """The stream to its end."""
    for _ in stream(editor, folder / "ledger", lines, recipe=RECIPE, rejects=folder / "rejects", batch_tokens=1):
        pass


def in_child(work) -> int:
    """Call `work` in a forked process; returns its id."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return child


def main(model: str, folder: Path, kills: int, seed: int) -> None:
    """Measure an uninterrupted run, then kill others until it was done `kills` times and a run came through."""
    torch.set_num_threads(1)  # no threads before the fork
    editor = Editor(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model))
    lines = [json.dumps({"subject": f"Person {i}", "prompt": "{} likes", "target": "tea"}) for i in range(40)]
    lines.insert(7, "no edit")
    began = time.perf_counter()
    os.waitpid(in_child(lambda: run(editor, folder / "whole", lines)), 0)
    whole = time.perf_counter() - began
    commits = len(ledger.verify(folder / "whole" / "ledger"))

    chance, killed, rounds, inside = random.Random(seed), 0, 0, 0
    path = folder / "killed" / "ledger"
    while True:
        rounds += 1
        child = in_child(lambda: run(editor, folder / "killed", lines))
        if killed < kills:
            # Between and inside commits: now after a share of a batch's time, now as soon as a temporary file is seen.
            watch = chance.random() < 0.5
            until = time.perf_counter() + chance.uniform(0, 1.6) * whole / commits * (20 if watch else 1)
            while time.perf_counter() < until:
                if watch and path.is_dir() and any(name.endswith(".tmp") for name in os.listdir(path)):
                    inside += 1
                    break
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        done = ledger.verify(path)  # raises where it is not whole
        if not os.WIFSIGNALED(status) and (killed >= kills or (done and done[-1].note["streams"]["<stream>"]["lines"] == len(lines))):
            break

    states = {}
    for name in ("whole", "killed"):
        editor.restore(ledger.deltas(folder / name / "ledger"))
        edits = [e["subject"] for d in ledger.deltas(folder / name / "ledger") for e in d.metadata["edits"]]
        states[name] = {"digest": digest(editor), "edits": edits, "rejects": (folder / name / "rejects").read_text()}
    print(json.dumps({"kills": killed, "inside": inside, "rounds": rounds, "commits": commits, **states}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
