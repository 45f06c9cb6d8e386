"""Run by test_parallel on every rank: the same edits on several ranks as in one process. Rank 0 prints one JSON object a check.

python -m tests.engine.ranks CHECK FOLDER [...], with the variables that torchrun sets
"""

import json
import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from rose_engine import ROSE, Delta, Editor, forward, ledger, optimize, rewording, sample, write
from rose_engine.parallel import join, leads, shard_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import IMO, LIN, MARTEAU

# Few steps and evaluations, for where the library runs the layers they make sums in another order grow.
RECIPE = replace(ROSE, rewordings=0, fisher=3.0, forms=4, steps=12, lr=0.05, layers=(1, 2), bystanders=6, waypoints=3, stop_loss=0.0)
EDITS, MORE = (*IMO, *LIN), (*MARTEAU, replace(LIN[0], target="Buddhism"))


def loaded(folder: Path) -> tuple:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def edited(editor: Editor) -> tuple[list[Delta], Tensor]:
    """Two edits, the second on top of the first, of a subject anew and of another; and the first one's values."""
    results = [editor.apply(edits, verify=False) for edits in (EDITS, MORE)]
    return [result.delta for result in results], results[0].values.delta


def far(ours: list[Delta], theirs: list[Delta]) -> float:
    """The largest difference of a weight's change, relative to the change."""
    return max(
        float((U @ V - there.factors[name][0] @ there.factors[name][1]).norm() / (U @ V).norm())
        for here, there in zip(ours, theirs, strict=True)
        for name, (U, V) in here.factors.items()
    )


def same(folder: Path, tensor_parallel: int, sharded: str) -> dict:
    """Edits on ranks beside one process; taken back; a delta of one process loaded."""
    mesh = join(tensor_parallel=tensor_parallel)
    model, tokenizer = loaded(folder)
    one = Editor(model, tokenizer, RECIPE)
    as_read = _read(one)
    alone, values = edited(one)
    whole = {name: weight.clone() for name, weight in one.weights().items()}
    if sharded == "library":
        from transformers.distributed.configuration_utils import DistributedConfig

        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=tensor_parallel, tp_plan="auto"))
    else:
        model, _ = loaded(folder)
        if tensor_parallel > 1:
            shard_weights(model, mesh["weights"])
    editor = Editor(model, tokenizer, RECIPE, group=mesh["subjects"].get_group())
    read = max(abs(a - b) for a, b in zip(_read(editor), as_read, strict=True))
    before = {name: weight.clone() for name, weight in editor.weights().items()}
    deltas, same_values = edited(editor)
    sums = [None] * dist.get_world_size()
    dist.all_gather_object(sums, [float(U.sum() + V.sum()) for delta in deltas for U, V in delta.factors.values()])
    sharding = editor.decoder.sharding
    part = (lambda x: x) if sharding is None else (lambda x: sharding.part(x, 1))
    now = editor.weights()
    off = max(float((now[name] - part(weight)).norm() / weight.norm()) for name, weight in whole.items())
    editor.restore([])
    restored = all(torch.equal(weight, before[name]) for name, weight in editor.weights().items())
    editor.restore(alone)
    loaded_off = max(float((editor.weights()[name] - part(weight)).abs().max()) for name, weight in whole.items())
    refused = ""
    try:
        editor.apply(MARTEAU, certify=True)
    except ValueError as e:
        refused = str(e)
    diverged = []
    try:
        with mock.patch.object(optimize, "suffix_step", partial(_of_lin_not_finite, tokenizer, optimize.suffix_step)):
            editor.apply(EDITS, verify=False)
    except optimize.Diverged as e:
        diverged = list(e.subjects)
    broken = ""
    if sharding is not None:  # in one rank's part alone
        K, R = torch.ones(sharding.sizes[sharding.rank], 2), torch.ones(32, 2)
        K[0, 0] = torch.nan if sharding.rank else 1.0
        try:
            sharding.check_finite(K=K, P=None, R=R)
        except ValueError as e:
            broken = str(e)
    records = [delta.metadata["base"] == other.metadata["base"] for delta, other in zip(deltas, alone, strict=True)]
    return {
        "far": far(deltas, alone),
        "first": far(deltas[:1], alone[:1]),
        "values": torch.equal(same_values, values),
        "weights": off,
        "agree": all(x == sums[0] for x in sums),
        "restored": restored,
        "loaded": loaded_off,
        "base": all(records),
        "sharded": sharding is not None,
        "head": type(editor.decoder.head).__name__,
        "written": forward.blocks_of(editor.decoder, range(3, len(editor.decoder.layers))) is not None,
        "refused": refused,
        "broken": broken,
        "diverged": diverged,
        "read": read,
        "words": _words(editor),
    }


def _read(editor: Editor) -> list[float]:
    """What rewordings are read by: likely lines, of a model made sure of itself, how likely a line is, and how far prompts are."""
    model = editor.decoder, editor.tokenizer
    lines = sample.likely_lines(*model, "A\n", ["The", "Lin Nu"], 5, 0.05, temperature=0.02)
    chances = sample.chances_of_lines(*model, "A\n", [("The", " book"), ("Lin Nu", " believes"), ("Lin Nu", " is")])
    (far,) = rewording.divergences(*model, {"{} sells": ["{} buys", "The goods of {} are"]}, ["Lin Nu", "Peru"]).values()
    return [float(sum(map(len, lines))), *chances, *far.tolist()]


def _words(editor: Editor) -> list[list[str]]:
    """The rewordings that each rank goes on with, where each finds others."""
    with mock.patch("rose_engine.readings.written", lambda *args: [[f"{{}} is believed by {dist.get_rank()} to be of"]]):
        (edit,) = editor.reword(LIN[:1])
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, list(edit.rewordings))
    return found


def _of_lin_not_finite(tokenizer, honest, batch, delta, subject):
    """A step whose losses are NaN in the rows that speak of Lin Nu, the second subject: one rank alone has them."""
    done = honest(batch, delta, subject)
    for b, r in enumerate(batch.suffixes.row.tolist()):
        if "Lin Nu" in tokenizer.decode(batch.prepared.rows[r].tokens):
            done.loss[b] = torch.nan
    return done


def killed(folder: Path, book: Path) -> None:
    """Commit one edit, and begin one that takes longer than anybody waits."""
    mesh = join()
    (book.parent / f"rank{dist.get_rank()}").write_text(str(os.getpid()))
    editor = Editor(*loaded(folder), RECIPE, group=mesh["subjects"].get_group())
    deltas = [editor.apply(EDITS, verify=False).delta]
    if leads():
        with ledger.writing(book) as writer:
            writer.apply(deltas[0])
        (book.parent / "ready").touch()
    editor.apply((*MARTEAU, *LIN), recipe=replace(RECIPE, steps=10**6), verify=False)


def main(check: str, folder: str, *rest: str) -> None:
    torch.set_num_threads(1)
    if check == "killed":
        return killed(Path(folder), Path(rest[0]))
    found = [same(Path(folder), int(tensor_parallel), sharded) for tensor_parallel, sharded in (how.split(":") for how in rest)]
    if leads():
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    write.LEARNT = math.inf  # a random model learns nothing; its values are written by waypoints all the same
    main(*sys.argv[1:])
