"""inject_ and row_gradients: bytes are the rows' tokens and deltas, read, and the tokens or gradients, written."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.kernels.common import Case, main
from rose_kernels import inject_, reference, row_gradients


def cases(device: torch.device, small: bool) -> Iterable[Case]:
    """1 and 64 subjects of 4 facts in 8 forms, Qwen2.5-7B's width."""
    d = 64 if small else 3584
    for subjects in (1, 4) if small else (1, 64):
        rows, tokens = 33 * subjects, 330 * subjects
        hidden = torch.randn(tokens, d, device=device, dtype=torch.bfloat16)
        delta = torch.randn(subjects, d, device=device)
        token, subject = torch.arange(0, tokens, 10, device=device), torch.arange(subjects, device=device).repeat_interleave(33)
        shape = f"N={tokens} d={d} B={rows} S={subjects} bf16"
        plain = lambda h=hidden, e=delta, t=token, s=subject: h.index_add_(0, t, e[s].to(h.dtype))  # noqa: E731
        ours = lambda h=hidden, e=delta, t=token, s=subject: inject_(h, e, t, s)  # noqa: E731
        yield Case("inject_", shape, ours, plain, bytes=rows * d * 4 + subjects * d * 4)
        plain = lambda h=hidden, t=token: reference.inject_backward(h, t)  # noqa: E731
        ours = lambda h=hidden, t=token: row_gradients(h, t)  # noqa: E731
        yield Case("row_gradients", shape, ours, plain, bytes=rows * d * 6)


if __name__ == "__main__":
    raise SystemExit(main(cases, __doc__))
