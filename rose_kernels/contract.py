"""Checks in front of every kernel: what an operator takes, told by the argument's name and what was given."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check(name: str, x: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """ValueError unless `x` has the shape (None fits any length), one of the dtypes, is contiguous, and is where `like` is."""
    if x.dim() != len(shape) or any(want is not None and want != have for want, have in zip(shape, x.shape, strict=False)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{wanted}], given {list(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, given {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, given strides {x.stride()}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, given {x.device}")


def check_index(name: str, index: Tensor, bound: int) -> None:
    """IndexError unless 0 <= index < bound.

    On a GPU reading the indices would stall the host, so there the check runs only with `ROSE_CHECK=1`, as an assertion on the device.
    """
    if index.device.type == "cpu":
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < bound):
            raise IndexError(f"{name} must lie in 0 .. {bound - 1}, given {int(index.min())} .. {int(index.max())}")
    elif os.environ.get("ROSE_CHECK") == "1":
        torch._assert_async(((index >= 0) & (index < bound)).all(), f"{name} must lie in 0 .. {bound - 1}")


def check_offsets(name: str, offset: Tensor, end: int | None) -> None:
    """ValueError unless `offset` ascends strictly from 0 to `end`; on a GPU only with `ROSE_CHECK=1`, as in `check_index`."""
    on_host = offset.device.type == "cpu"
    if not on_host and os.environ.get("ROSE_CHECK") != "1":
        return
    good = (offset[0] == 0) & (offset[1:] > offset[:-1]).all()
    if end is not None:
        good = good & (offset[-1] == end)
    message = f"{name} must ascend strictly from 0" + (f" to {end}" if end is not None else "")
    if not on_host:
        torch._assert_async(good, message)
    elif not good:
        raise ValueError(f"{message}, given {offset.tolist()[:20]}")
