"""The fused weight write against MEMIT's way and against Woodbury in plain PyTorch.

    python -m bench.kernels.bench_rank_update --json -

For each shape: dense_s, `torch.linalg.solve` of the d_in x d_in system in float64 and a dense addition, as MEMIT publishes it (left out
where its matrices need over 10 GB); woodbury_s, the n x n system in float64 and W + R V in float32, rounded once, in plain PyTorch;
rank_update_s, the fused operator; peak_extra_mb, the memory that it takes beyond its arguments, results included; floor_s,
reading and writing W's bytes once. All run in this process, one after the other; times are medians, of one run for the dense way.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.kernels.common import Case, device_name, seconds
from bench.memory import Memory
from bench.output import add_json, emit
from rose_kernels import add_low_rank_, rank_update_
from rose_kernels.backend import serving

# name, d_out, d_in, n, dtype. The systems of one fact, of one subject (4 facts in 8 forms) and of 8 subjects.
SHAPES = [
    ("SmolLM2-135M", 576, 1_536, 4, torch.float32),
    ("SmolLM2-135M", 576, 1_536, 32, torch.float32),
    ("SmolLM2-135M", 576, 1_536, 256, torch.float32),
    ("Qwen2.5-0.5B", 896, 4_864, 4, torch.float32),
    ("Qwen2.5-0.5B", 896, 4_864, 32, torch.float32),
    ("Qwen2.5-0.5B", 896, 4_864, 32, torch.bfloat16),
    ("Qwen2.5-7B", 3_584, 18_944, 4, torch.bfloat16),
    ("Qwen2.5-7B", 3_584, 18_944, 32, torch.bfloat16),
    ("Qwen2.5-7B", 3_584, 18_944, 256, torch.bfloat16),
    ("Qwen2.5-14B", 5_120, 13_824, 32, torch.bfloat16),
]
DENSE_BYTES = 10e9


def dense(W: Tensor, K: Tensor, R: Tensor) -> None:
    """MEMIT's update, C being the identity: five d_in x d_in float64 matrices live at its height."""
    C = torch.eye(len(K), dtype=torch.float64, device=K.device)
    k = K.double()
    adjusted = torch.linalg.solve(1.0 * C + k @ k.T, k)
    W += (R.double() @ adjusted.T).to(W.dtype)


def woodbury(W: Tensor, K: Tensor, R: Tensor) -> None:
    """The same update by the push-through identity, in plain PyTorch."""
    k = K.double()
    gram = torch.eye(k.shape[1], dtype=k.dtype, device=k.device) + k.T @ k
    V = torch.cholesky_solve(k.T, torch.linalg.cholesky(gram)).float()
    W.copy_(torch.addmm(W.float(), R, V))


def touch(W: Tensor) -> None:
    """Read and write every byte of W once."""
    W.view(torch.int32).bitwise_not_()


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median seconds."""
    if torch.cuda.is_available():
        return seconds(run)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_extra_mb(run: Callable[[], object]) -> float | None:
    """How far memory rises during a run, in MB: the allocator's peak on a GPU, the process's resident peak on Linux, None elsewhere."""
    gpu = torch.cuda.is_available()
    if not gpu and not Path("/proc/self/clear_refs").exists():
        return None
    if not gpu:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system, so that this one cannot hide in it
    memory = Memory(gpu)
    run()
    return memory.peak_mb()


def measure(name: str, d_out: int, d_in: int, n: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """One shape, every way, on the same tensors."""
    W = (torch.randn(d_out, d_in, device=device) / d_in**0.5).to(dtype)
    K, R = torch.randn(n, d_in, device=device).T, torch.randn(d_out, n, device=device) / 1e3
    row: dict[str, object] = {"shape": name, "d_out": d_out, "d_in": d_in, "n": n, "dtype": str(dtype).removeprefix("torch.")}
    rank_update_(W, K, R)
    row["dense_s"] = timed(lambda: dense(W, K, R), 1) if 5 * 8 * d_in**2 <= DENSE_BYTES else None
    row["woodbury_s"] = timed(lambda: woodbury(W, K, R), 5)
    row["rank_update_s"] = timed(lambda: rank_update_(W, K, R), 7)
    row["peak_extra_mb"] = peak_extra_mb(lambda: rank_update_(W, K, R))
    row["floor_s"] = timed(lambda: touch(W), 7)
    return row


def table(rows: Iterable[dict[str, object]]) -> str:
    """The rows as text: milliseconds, and how many times the fused operator's time the others take."""
    lines = [
        f"{'shape':14s} {'d_out':>6s} {'d_in':>6s} {'n':>4s} {'dtype':>9s} {'dense':>10s} {'Woodbury':>9s} {'fused':>8s} {'floor':>8s}"
        f" {'dense/f':>8s} {'Woodb/f':>8s} {'extra MB':>9s}"
    ]
    for r in rows:
        ms = [1e3 * (r[k] if r[k] is not None else math.nan) for k in ("dense_s", "woodbury_s", "rank_update_s", "floor_s")]
        shape = f"{r['shape']:14s} {r['d_out']:6d} {r['d_in']:6d} {r['n']:4d} {r['dtype']:>9s}"
        times = f"{ms[0]:10.1f} {ms[1]:9.2f} {ms[2]:8.2f} {ms[3]:8.2f} {ms[0] / ms[2]:8.0f} {ms[1] / ms[2]:8.1f}"
        lines.append(f"{shape} {times} {r['peak_extra_mb'] if r['peak_extra_mb'] is not None else math.nan:9.1f}")
    return "\n".join(lines)


def cases(device: torch.device, small: bool) -> Iterable[Case]:
    """For the GPU suite, the in-place write alone: one subject's 32 columns and more, at SmolLM2-135M's and Qwen2.5-7B's shapes."""
    for rows, columns in ((64, 96),) if small else ((576, 1536), (3584, 18_944)):
        for n in (4,) if small else (4, 32, 1024):
            W = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
            U, V = torch.randn(rows, n, device=device), torch.randn(n, columns, device=device)
            ours = lambda W=W, U=U, V=V: add_low_rank_([W], [U], [V])  # noqa: E731
            plain = lambda W=W, U=U, V=V: W.copy_(torch.addmm(W.float(), U, V))  # noqa: E731
            moved = 2 * W.nbytes + U.nbytes + V.nbytes
            yield Case("add_low_rank_", f"{rows}x{columns} n={n} bf16", ours, plain, moved, 2.0 * rows * columns * n, "fp32")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.kernels.bench_rank_update", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_json(parser)
    parser.add_argument("--shapes", default="", metavar="NAME", help="only shapes whose name holds this")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"served by {serving(device, 'rank_update_')} on {device_name() or device}, {torch.get_num_threads()} threads", file=sys.stderr)
    rows = []
    for shape in SHAPES:
        if args.shapes in shape[0]:
            rows.append(measure(*shape, device))
            print(table(rows[-1:]).splitlines()[1], file=sys.stderr, flush=True)
    emit({"results": rows}, args.json, table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
