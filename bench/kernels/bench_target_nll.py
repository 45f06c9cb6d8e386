"""target_nll, forward and backward: bytes are the head, read once forward and twice backward (logits, gradient).

Multiply-adds: T V d forward, twice that backward.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.kernels.common import Case, main
from rose_kernels import reference, target_nll


def cases(device: torch.device, small: bool) -> Iterable[Case]:
    """The target tokens of 1 and 32 subjects under the heads of Qwen2.5-7B and Llama-3.1-8B."""
    heads = ((500, 64),) if small else ((152_064, 3584), (128_256, 4096))
    for V, d in heads:
        head = torch.randn(V, d, device=device, dtype=torch.bfloat16) / d**0.5
        for T in (8,) if small else (64, 2048):
            hidden = torch.randn(T, d, device=device, dtype=torch.bfloat16, requires_grad=True)
            target = torch.randint(V, (T,), device=device)
            shape, read = f"T={T} V={V} d={d} bf16", head.nbytes
            forward = [lambda f=f, h=hidden, w=head, t=target: f(h.detach(), w, t) for f in (target_nll, reference.target_nll)]
            yield Case("target_nll forward", shape, *forward, bytes=read, flops=2 * T * V * d)
            both = [
                lambda f=f, h=hidden, w=head, t=target: torch.autograd.grad(f(h, w, t).sum(), h) for f in (target_nll, reference.target_nll)
            ]
            yield Case("target_nll both", shape, *both, bytes=3 * read, flops=6 * T * V * d)


if __name__ == "__main__":
    raise SystemExit(main(cases, __doc__))
