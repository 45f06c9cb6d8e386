"""A step of the value optimisation, as the engine runs it on this device, against float64 and against its floor.

    python -m bench.step --json -

Rows are random tokens in the lengths that four facts have, the model random weights: a small one for the checks, a configuration of
Qwen2.5-7B in bfloat16 for the times (both small without a GPU). On a GPU ours is a captured frame (`rose_engine.captured`), plain the same
step over padded attention, kernel by kernel. bytes: the weights above layer L and the output matrix, read forward and backward.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest.mock import patch

import torch
from rose_engine import captured
from rose_engine.architecture import decoder_of
from rose_engine.captured import Frames
from rose_engine.forms import Row
from rose_engine.forward import Prepared, Step, pack, prepare, suffix_step
from rose_engine.packing import inputs
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bench.kernels.common import Case
from bench.kernels.common import main as kernel_main

TINY = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "vocab_size": 2000, "num_attention_heads": 4}
QWEN2_7B = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064, "num_attention_heads": 28}
KEY_HEADS = {4: 2, 28: 4}


def model_of(shape: dict[str, int], device: torch.device) -> torch.nn.Module:
    """A Qwen2 of random bfloat16 weights."""
    heads = shape["num_attention_heads"]
    config = AutoConfig.for_model("qwen2", **shape, num_key_value_heads=KEY_HEADS[heads], use_sliding_window=False, pad_token_id=0)
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def rows_of(words: int, seed: int, facts: int = 4, forms: int = 10) -> list[Row]:
    """Facts of one subject of four tokens: 2 to 40 tokens before it, 3 to 12 after it, 1 to 3 of a target; the neutral row last."""
    draw = torch.Generator().manual_seed(seed)

    def several(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high + 1, (), generator=draw))
        return torch.randint(words, (count,), generator=draw).tolist()

    subject, starts = several(4, 4), [several(2, 40) for _ in range(forms)]
    rows = []
    for _ in range(facts):
        target = several(1, 3)
        for start in starts:
            text = [*start, *subject, *several(3, 12)]
            rows.append(Row((*text, *target), len(start) + 3, len(text)))
    neutral = (*subject, *several(2, 2))
    return [*rows, Row(neutral, 3, len(neutral))]


def ways(prepared: Prepared, frames: Frames | None = None) -> dict[str, Callable[[Tensor], Step]]:
    """The step of all rows with deltas [rows, d]: by packed suffixes, and where frames serve in one, and in one that is captured."""
    index = range(len(prepared.rows))
    each = torch.arange(len(index), device=prepared.hidden.device)
    batch = pack(prepared, index)
    found = {"packed": lambda given: suffix_step(batch, given, each)}
    if captured.serves(prepared):

        def run(frame: captured.Frame, given: Tensor) -> Step:
            frame.given[: len(index)] = given
            return frame.step()

        for name, held in (("frame", Frames(graphs=False)), ("graph", frames or Frames(graphs=True))):
            found[name] = partial(run, *held.lay(prepared, [index]))
    return found


def checks(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(what was compared, its relative error against float64, the bound that it must keep), of every way, for two batches in turn."""
    model = model_of(TINY, device)
    decoder, exact = decoder_of(model), decoder_of(copy.deepcopy(model).cpu().double())
    frames = Frames(graphs=True)
    for seed in (0, 1):
        rows = rows_of(TINY["vocab_size"], seed)
        prepared, true = prepare(decoder, rows, 2), prepare(exact, rows, 2)
        scale = 0.5 * true.hidden.norm(dim=-1).mean() / true.hidden.shape[1] ** 0.5
        for name, run in ways(prepared, frames).items():
            for _ in range(3):  # run, captured and replayed
                given = float(scale) * torch.randn(len(rows), true.hidden.shape[1], device=device)
                with patch.dict(os.environ, ROSE_BACKEND="reference"):
                    wanted = ways(true)["packed"](given.cpu().double())
                found = run(given)
                for what, bound in (("loss", 1e-2), ("grad", 2e-2)):
                    ours, theirs = (getattr(step, what).cpu().double() for step in (found, wanted))
                    yield f"step, {name}, batch {seed + 1}: {what}", float((ours - theirs).norm() / theirs.norm()), bound
            if name != "packed":
                yield f"step, {name}, batch {seed + 1}: waits for the host", float(_waits(partial(run, given))), 0.0


def _waits(run: Callable[[], Step]) -> bool:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """One subject of four facts."""
    shape, layer = (TINY, 2) if small else (QWEN2_7B, 8)
    decoder = decoder_of(model_of(shape, device))
    rows = rows_of(shape["vocab_size"], 0)
    prepared = prepare(decoder, rows, layer)
    given = torch.zeros(len(rows), shape["hidden_size"], device=device)
    weights = sum(p.numel() for i in prepared.layers for p in decoder.layers[i].parameters())
    tokens = sum(len(inputs(row)) - row.last for row in rows)
    read = sum(len(row.tokens) - row.target for row in rows) + 1
    found = ways(prepared)
    work = 4.0 * (weights * tokens + decoder.head.numel() * read)
    size = 2.0 * decoder.head.element_size() * (weights + decoder.head.numel())
    name = f"{len(decoder.layers)} layers of {shape['hidden_size']}, {tokens} tokens"
    for way, run in list(found.items())[1 if len(found) > 1 else 0 :]:
        yield Case(f"step, {way}", name, partial(run, given), partial(found["packed"], given), size, work)


def main(argv: Sequence[str] | None = None) -> int:
    return kernel_main(cases, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
