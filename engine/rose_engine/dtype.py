"""Which dtype a model is edited in: as told, the checkpoint's, or whichever is the faster one here."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from rose_kernels.layer import available, products_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
# What bfloat16 must save to be worth its rounding.
WORTH = 1.3


def dtype_of(name: str | torch.dtype | None, device: str | torch.device) -> torch.dtype | None:
    """The dtype of that name; `auto` takes the faster one on the device; None stays None. ValueError where there is none of that name."""
    if name == AUTO:
        return faster_dtype(torch.device(device))
    if isinstance(name, str):
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or {AUTO}, given {name!r}")
        return DTYPES[name]
    return name


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs that have it, and on a CPU where a matrix product is at least `WORTH` times faster in it than in float32.

    The CPU is measured, in a few hundredths of a second (and csrc built, if it was not yet); those with AMX or AVX512-BF16 gain.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    seconds = {dtype: min(_product_seconds(dtype) for _ in range(5)) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if seconds[torch.float32] > WORTH * seconds[torch.bfloat16] else torch.float32


def _product_seconds(dtype: torch.dtype, rows: int = 256, columns: int = 1536, depth: int = 576) -> float:
    """Seconds of one product of the kind that a step is made of, by what serves it."""
    a, w = torch.ones(rows, depth, dtype=dtype), torch.ones(columns, depth, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    began = time.perf_counter()
    if available(a.device):
        products_(a, [w], [out], turned=True)
    else:
        F.linear(a, w)
    return time.perf_counter() - began
