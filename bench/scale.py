"""What editing larger models needs, as docs/scale.md tells it: memory and time, estimated from shapes alone.

    python -m bench.scale --bandwidth 4.8e12 --rate 5e14

Nothing is run. bandwidth (bytes/s) and rate (multiply-adds count two) are those of one GPU: a product takes the time of its
multiplications or of reading its weights, whichever is longer (`rose_engine.estimate.seconds`). Exchanges between GPUs are not counted.
Weights are bfloat16; an edit is one subject with four facts, of average texts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from rose_engine import ROSE
from rose_engine.architecture import decoder_of
from rose_engine.estimate import Shapes, bystander_nodes, memory, seconds, shapes_of, typical_work
from transformers import AutoConfig, AutoModelForCausalLM

from bench.output import add_json, emit

# hidden width, MLP width, layers, heads, key heads, vocabulary: the published configurations of these families.
MODELS = {
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen2.5-14B": ("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "Llama-3.1-70B": ("llama", 8192, 28672, 80, 64, 8, 128256),
    "Llama-3.1-405B": ("llama", 16384, 53248, 126, 128, 8, 128256),
}
GPU_BYTES = 141e9


def shapes(name: str) -> Shapes:
    """The shapes of a model, without its weights."""
    kind, d, inner, layers, heads, keys, vocabulary = MODELS[name]
    config = AutoConfig.for_model(kind, hidden_size=d, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    config.num_key_value_heads, config.vocab_size = keys, vocabulary
    with torch.device("meta"):
        return shapes_of(decoder_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)))


def row(s: Shapes, facts: int, bandwidth: float, rate: float) -> dict[str, float]:
    """Figures of one model; bytes and seconds."""
    work = typical_work(1, facts, ROSE.forms)
    model, others = s.parameters * s.element, bystander_nodes(ROSE, 1)
    need = memory(s, work, ROSE, "cuda")["total"]
    ranks = 1 << max(0, math.ceil(math.log2((model + need) / (0.9 * GPU_BYTES))))
    edit = sum(seconds(s, work, ROSE, lambda rows: max(s.element / bandwidth, 2 * rows / rate)).values()) / ranks
    return {
        "model_bytes": model,
        "memory_bytes": need,
        "ranks": ranks,
        "edit_s": edit,
        "subjects_an_hour": 3600 / edit,
        "delta_bytes": 4 * len(ROSE.layers) * work.columns * (s.d + 2 * s.d_in),
        "exchanged_bytes": len(ROSE.layers) * (8 * work.columns**2 + 8 * others**2 + 8 * work.columns * s.d_in) if ranks > 1 else 0,
        "covariance_bytes": 4 * len(ROSE.layers) * s.d_in**2,
    }


def text_of(found: dict[str, dict[str, float]]) -> str:
    """A Markdown table."""
    size = lambda x: f"{x / 1e9:.3g} GB" if x >= 1e9 else f"{x / 1e6:.3g} MB"  # noqa: E731
    lines = ["| | weights | above them | GPUs | an edit | subjects an hour | delta | MEMIT's covariances |", "|" + "---|" * 8]
    for name, r in found.items():
        cells = [name, size(r["model_bytes"]), size(r["memory_bytes"]), str(r["ranks"]), f"{r['edit_s']:.2g} s"]
        cells += [f"{r['subjects_an_hour']:,.0f}", size(r["delta_bytes"]), size(r["covariance_bytes"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second of one GPU's memory; default: an H200's")
    parser.add_argument("--rate", type=float, default=5e14, help="operations a second of one GPU; default: half an H200's dense peak")
    parser.add_argument("--facts", type=int, default=4)
    add_json(parser)
    args = parser.parse_args(argv)
    found = {name: row(shapes(name), args.facts, args.bandwidth, args.rate) for name in MODELS}
    emit(found, args.json, text_of(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
