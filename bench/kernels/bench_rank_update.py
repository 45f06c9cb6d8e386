"""The in-place write W += U V: bytes are W, read once and written once, and the factors, read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.kernels.common import Case, main
from rose_kernels import add_low_rank_


def cases(device: torch.device, small: bool) -> Iterable[Case]:
    """One subject's 32 columns and 64 subjects' 1,024 in the down projections of SmolLM2-135M and Qwen2.5-7B."""
    for rows, columns in ((64, 96),) if small else ((576, 1536), (3584, 18_944)):
        for n in (4,) if small else (4, 32, 1024):
            W = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
            U, V = torch.randn(rows, n, device=device), torch.randn(n, columns, device=device)
            ours = lambda W=W, U=U, V=V: add_low_rank_(W, U, V)  # noqa: E731
            plain = lambda W=W, U=U, V=V: W.copy_(torch.addmm(W.float(), U, V))  # noqa: E731
            moved = 2 * W.nbytes + U.nbytes + V.nbytes
            yield Case("add_low_rank_", f"{rows}x{columns} n={n} bf16", ours, plain, moved, 2.0 * rows * columns * n, "fp32")


if __name__ == "__main__":
    raise SystemExit(main(cases, __doc__))
