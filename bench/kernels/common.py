"""What every kernel benchmark shares: cases, timing, floors, and the table.

A case is one operator at one shape with the bytes that it must move and the multiply-adds that it must do. Its floor is the larger of
bytes / bandwidth and flops / rate of the device. On a CPU the shapes shrink and the run is a smoke run: the figures say that everything
works and nothing about speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.output import add_json, emit

# (bytes a second, bf16 and fp32 multiply-adds x 2 a second): NVIDIA's data sheets, dense rates, fp32 without tensor cores.
DEVICES = {
    "H200": (4.8e12, {"bf16": 989e12, "fp32": 67e12}),
    "H100": (3.35e12, {"bf16": 989e12, "fp32": 67e12}),
    "A100": (2.0e12, {"bf16": 312e12, "fp32": 19.5e12}),
}


@dataclass(frozen=True)
class Case:
    """One operator at one shape. ours, plain: no arguments, run it once."""

    kernel: str
    shape: str
    ours: Callable[[], Any]
    plain: Callable[[], Any]
    bytes: float
    flops: float = 0.0
    rate: str = "bf16"


def device_name() -> str | None:
    """The key of `DEVICES` that the GPU's name holds, or None."""
    if not torch.cuda.is_available():
        return None
    return next((key for key in DEVICES if key in torch.cuda.get_device_name()), None)


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of a run: CUDA events with a cold L2 cache on a GPU, the clock on a CPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(run, warmup=50, rep=200, return_mode="median") / 1e3
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(case: Case, compiled: bool) -> dict[str, Any]:
    """ours_s, plain_s, compiled_s, floor_s (None on an unknown device), and ours / floor."""
    floor, name = None, device_name()
    if name:
        bandwidth, rates = DEVICES[name]
        floor = max(case.bytes / bandwidth, case.flops / rates[case.rate])
    ours = seconds(case.ours)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "ours_s": ours,
        "plain_s": seconds(case.plain),
        "compiled_s": seconds(torch.compile(case.plain)) if compiled else None,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_s": floor,
        "of_floor": ours / floor if floor else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, times in microseconds."""
    show = lambda s: f"{1e6 * s:10.1f}" if s is not None else f"{'-':>10s}"  # noqa: E731
    lines = [f"{'kernel':22s} {'shape':44s} {'ours us':>10s} {'plain us':>10s} {'compile us':>10s} {'floor us':>10s} {'x floor':>8s}"]
    for r in rows:
        times = " ".join(show(r[k]) for k in ("ours_s", "plain_s", "compiled_s", "floor_s"))
        lines.append(f"{r['kernel']:22s} {r['shape']:44s} {times} {r['of_floor'] or float('nan'):8.2f}")
    return "\n".join(lines)


def main(cases: Callable[[torch.device, bool], Iterable[Case]], description: str | None, argv: Sequence[str] | None = None) -> int:
    """The command line of a kernel benchmark. cases(device, small) yields its cases."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain version")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not gpu:
        print("no GPU: a smoke run at small shapes; its times mean nothing", file=sys.stderr)
    rows = [measure(case, args.compile) for case in cases(torch.device("cuda" if gpu else "cpu"), not gpu)]
    emit({"results": rows}, args.json, table(rows))
    return 0
