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
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from rose_engine import captured
from rose_engine.architecture import decoder_of
from rose_engine.captured import Frames
from rose_engine.forms import Row
from rose_engine.forward import Prepared, Step, pack, prepare, suffix_step
from rose_engine.optimize import SubjectRows, optimize_values
from rose_engine.packing import inputs
from rose_engine.recipe import ROSE_PAPER
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bench.kernels.common import Case
from bench.kernels.common import main as kernel_main

TINY = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "vocab_size": 2000}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
QWEN2_7B = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064}
QWEN2_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4}


def model_of(shape: dict[str, int], device: torch.device, initializer_range: float = 0.02) -> torch.nn.Module:
    """A Qwen2 of random bfloat16 weights."""
    config = AutoConfig.for_model("qwen2", **shape, use_sliding_window=False, pad_token_id=0, initializer_range=initializer_range)
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def subject_of(words: int, seed: int, facts: int = 4, forms: int = 10) -> SubjectRows:
    """A subject of four tokens: 2 to 40 tokens before it, 3 to 12 after it, 1 to 3 of a target. The lengths are the same for every seed."""
    lengths, tokens = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)

    def several(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high + 1, (), generator=lengths))
        return torch.randint(words, (count,), generator=tokens).tolist()

    subject, starts = several(4, 4), [several(2, 40) for _ in range(forms)]
    relations = []
    for _ in range(facts):
        target, texts = several(1, 3), [(start, [*start, *subject, *several(3, 12)]) for start in starts]
        relations.append(tuple(Row((*text, *target), len(start) + 3, len(text)) for start, text in texts))
    neutral = (*subject, *several(2, 2))
    return SubjectRows(tuple(relations), Row(neutral, 3, len(neutral)))


def rows_of(subject: SubjectRows) -> list[Row]:
    """The facts' rows, then the neutral one."""
    return [*subject.facts, subject.neutral]


def ways(prepared: Prepared, kept: dict[str, Frames]) -> dict[str, Callable[[Tensor], Step]]:
    """The step of all rows with deltas [rows, d]: by packed suffixes, and where frames serve in each of those that are kept."""
    index = range(len(prepared.rows))
    each = torch.arange(len(index), device=prepared.hidden.device)
    batch = pack(prepared, index)
    found = {"packed": lambda given: suffix_step(batch, given, each)}

    def run(frame: captured.Frame, given: Tensor) -> Step:
        frame.given[: len(index)] = given
        return frame.step()

    if captured.serves(prepared):
        found |= {name: partial(run, *frames.lay(prepared, [index])) for name, frames in kept.items()}
    return found


def some_frames() -> dict[str, Frames]:
    """Frames that are run kernel by kernel, and such as are captured."""
    return {"frame": Frames(graphs=False), "graph": Frames(graphs=True)}


def checks(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(what was compared, its relative error, the bound that it must keep): a step of every way against float64, for two batches that are
    laid into the same frame; and values that were found in graphs against those of the same kernels without."""
    model = model_of(TINY, device, initializer_range=0.1)
    decoder, exact = decoder_of(model), decoder_of(copy.deepcopy(model).cpu().double())
    kept = some_frames()
    subjects = [subject_of(TINY["vocab_size"], seed) for seed in (1, 2)]
    laid = []
    for number, subject in enumerate(subjects, 1):
        rows = rows_of(subject)
        prepared, true = prepare(decoder, rows, 2), prepare(exact, rows, 2)
        scale = 0.5 * float(true.hidden.norm(dim=-1).mean()) / true.hidden.shape[1] ** 0.5
        exactly = ways(true, {})["packed"]
        for name, run in ways(prepared, kept).items():
            for time in ("first", "second", "third"):  # run, captured and replayed
                given = scale * torch.randn(len(rows), true.hidden.shape[1], device=device)
                with patch.dict(os.environ, ROSE_BACKEND="reference"):
                    wanted = exactly(given.cpu().double())
                found = run(given)
                for what, bound in (("loss", 1e-2), ("grad", 1e-1)):
                    ours, theirs = (getattr(step, what).cpu().double() for step in (found, wanted))
                    error = float((ours - theirs).norm() / theirs.norm())
                    yield f"step {number}, {name}, {time} time: {what}", error, bound
            if name == "frame":
                yield f"step {number}, {name}: waits for the host", float(_waits(partial(run, given))), 0.0
        laid.append([frame for frames in kept.values() for frame in frames.held])
    yield "the second batch has the frames of the first", float(laid[0] != laid[1]), 0.0
    if any(laid):
        recipe = replace(ROSE_PAPER, layers=(1, 2), steps=20, stop_loss=0.0, noise=0.1)
        found = [optimize_values(decoder, subjects, recipe, frames=frames).delta for frames in kept.values()]
        yield "values, in graphs and kernel by kernel", float((found[1] - found[0]).norm() / found[0].norm()), 1e-3


def _waits(run: Callable[[], Step]) -> bool:
    """Whether the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as e:
        if "synchroniz" not in str(e):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """One subject of four facts."""
    shape, layer = (TINY, 2) if small else (QWEN2_7B, 8)
    decoder = decoder_of(model_of(shape, device))
    rows = rows_of(subject_of(shape["vocab_size"], 1))
    prepared = prepare(decoder, rows, layer)
    given = torch.zeros(len(rows), shape["hidden_size"], device=device)
    weights = sum(p.numel() for i in prepared.layers for p in decoder.layers[i].parameters())
    tokens = sum(len(inputs(row)) - row.last for row in rows)
    read = sum(len(row.tokens) - row.target for row in rows) + 1
    found = ways(prepared, some_frames())
    work = 4.0 * (weights * tokens + decoder.head.numel() * read)
    size = 2.0 * decoder.head.element_size() * (weights + decoder.head.numel())
    name = f"{len(decoder.layers)} layers of {shape['hidden_size']}, {tokens} tokens"
    for way, run in list(found.items())[1 if len(found) > 1 else 0 :]:
        yield Case(f"step, {way}", name, partial(run, given), partial(found["packed"], given), size, work)


def main(argv: Sequence[str] | None = None) -> int:
    return kernel_main(cases, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
