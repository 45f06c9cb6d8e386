"""Everything that a GPU should answer, in one command: are the kernels right, and how fast are they.

    python -m bench.gpu_suite --out bench/results/gpu.json

First every operator against its definition in float64 at the engine's shapes, and a step of the engine, captured in a CUDA graph and not;
then the benchmarks of both. The JSON names hardware, versions and date. Without a GPU the same code runs at small shapes through Triton's
interpreter (TRITON_INTERPRET=1), as a smoke run. Exit code 1 where a kernel is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from bench import step
from bench.kernels import bench_aggregate, bench_inject, bench_rank_update, bench_target_nll
from bench.kernels.common import measure, table
from bench.output import emit
from rose_kernels import aggregate_step_, backend, inject, rank_update_, reference, row_gradients, target_nll

BENCHMARKS = (bench_inject, bench_aggregate, bench_target_nll, bench_rank_update, step)


def checks(device: torch.device, small: bool) -> Iterator[tuple[str, float, float]]:
    """(what was compared, its relative error against float64, the bound that it must keep)."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    error = lambda ours, true: float((ours.double() - true).norm() / true.norm())  # noqa: E731
    d, V, T = (64, 500, 9) if small else (3584, 152_064, 300)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        kind = str(dtype).removeprefix("torch.")
        hidden, delta = rand(330, d, dtype=dtype), rand(3, d)
        token, subject = torch.arange(0, 330, 10, device=device), torch.arange(33, device=device) % 3
        true = reference.inject(hidden.double(), delta.double(), token, subject)
        yield f"inject {kind}", error(inject(hidden, delta, token, subject), true), bound
        yield f"row_gradients {kind}", error(row_gradients(hidden, token), hidden.double()[token]), bound

        for softcap in (None, 30.0):
            h, head = rand(T, d, dtype=dtype).requires_grad_(), (rand(V, d) / d**0.5).to(dtype)
            target = torch.randint(V, (T,), generator=g).to(device)
            nll = target_nll(h, head, target, softcap)
            (grad,) = torch.autograd.grad(nll.sum(), h)
            exact = h.detach().double().requires_grad_()
            true = torch.cat([reference.target_nll(exact[i : i + 50], head.double(), target[i : i + 50], softcap) for i in range(0, T, 50)])
            (true_grad,) = torch.autograd.grad(true.sum(), exact)
            yield f"target_nll {kind} softcap {softcap}", error(nll, true.detach()), bound
            yield f"target_nll gradient {kind} softcap {softcap}", error(grad, true_grad), 3 * bound

        rows, columns = (60, 90) if small else (3584, 18_944)
        for n in (4, 32) if small else (4, 32, 600):
            W, K, R = rand(rows, columns, dtype=dtype), rand(columns, n), rand(rows, n)
            k = K.double()
            true = W.double() + R.double() @ torch.linalg.solve(torch.eye(n, device=device) + k.T @ k, k.T)
            rank_update_(W, K, R)
            yield f"rank_update_ {kind} n={n}", error(W, true), bound

    tree = ([3, 1, 8, 8], [13], [2, 5])
    lengths = [x for s in tree for x in s]
    offsets = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], device=device) for x in (lengths, [len(s) for s in tree])]
    state = [torch.zeros(3, d, device=device) for _ in range(3)] + [torch.zeros(3, dtype=torch.int32, device=device)]
    exact = [x.double() if x.is_floating_point() else x.clone() for x in state]
    v0_norm, active = torch.tensor([1.0, 2.0, 3.0], device=device), torch.tensor([True, True, False], device=device)
    for taken in range(1, 4):
        grad, extra = rand(sum(lengths), d), rand(3, d)
        ours = aggregate_step_(grad, *offsets, *state, v0_norm, active, extra)
        true = reference.aggregate_step_(grad.double(), *offsets, *exact, v0_norm.double(), active, extra.double())
        yield f"aggregate_step_ centroids, step {taken}", error(ours, true), 1e-5
        yield f"aggregate_step_ delta, step {taken}", error(state[0], exact[0]), 1e-3
    yield from step.checks(device)


def run(small: bool, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Checks and benchmarks, with what they ran on."""
    import triton

    began = time.perf_counter()
    verdicts = []
    for what, error, bound in checks(device, small):
        verdicts.append({"check": what, "error": error, "bound": bound, "ok": error <= bound})
        print(f"{'ok   ' if error <= bound else 'WRONG'} {what:50s} {error:.2e} (at most {bound:.0e})", file=sys.stderr, flush=True)
    rows = [measure(case, compiled) for module in BENCHMARKS for case in module.cases(device, small)]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}, interpreter: smoke run",
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "checks": verdicts,
        "kernels": rows,
        "seconds": time.perf_counter() - began,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", help="write the JSON here")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain versions")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not gpu:
        if not backend.interpreted():
            parser.error("no GPU; for a smoke run through the interpreter set TRITON_INTERPRET=1")
        os.environ["ROSE_BACKEND"] = "triton"
    result = run(not gpu, torch.device("cuda" if gpu else "cpu"), args.compile)
    print(table(result["kernels"]))
    if args.out:
        emit(result, args.out, "")
    return 0 if all(v["ok"] for v in result["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
