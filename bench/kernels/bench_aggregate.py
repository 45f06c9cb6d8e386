"""aggregate_step_: bytes are the row gradients, read, the centroids, written, and the three states, read and written."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.kernels.common import Case, main
from rose_kernels import aggregate_step_, reference


def cases(device: torch.device, small: bool) -> Iterable[Case]:
    """1 and 64 subjects of 4 relations in 8 forms, Qwen2.5-7B's width."""
    d = 64 if small else 3584
    for subjects in (1, 4) if small else (1, 64):
        rows, relations = 32 * subjects, 4 * subjects
        grad, extra = torch.randn(rows, d, device=device), torch.randn(subjects, d, device=device)
        offsets = torch.arange(0, rows + 1, 8, device=device), torch.arange(0, relations + 1, 4, device=device)
        state = [torch.zeros(subjects, d, device=device) for _ in range(3)] + [torch.zeros(subjects, dtype=torch.int32, device=device)]
        rest = torch.ones(subjects, device=device), torch.ones(subjects, dtype=torch.bool, device=device)
        arguments = (grad, *offsets, *state, *rest, extra)
        moved = 4 * d * (rows + relations + 7 * subjects)
        shape = f"S={subjects} M={relations} B={rows} d={d} fp32"
        ours, plain = (lambda f=f, a=arguments: f(*a) for f in (aggregate_step_, reference.aggregate_step_))
        yield Case("aggregate_step_", shape, ours, plain, bytes=moved)


if __name__ == "__main__":
    raise SystemExit(main(cases, __doc__))
