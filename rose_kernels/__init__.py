"""Operators of the editing engine on plain tensors. This package knows no model, no tokenizer and no file.

Each is a `torch.library` operator under `rose::`; `reference` defines it and `backend` tells what serves it where.
"""

from rose_kernels.aggregate import aggregate_step_
from rose_kernels.inject import inject, inject_, row_gradients
from rose_kernels.rank_update import add_low_rank_, forget_refused, raise_refused, rank_gram, rank_solve, rank_update_, write_error
from rose_kernels.target_nll import target_nll

__all__ = [
    "add_low_rank_",
    "aggregate_step_",
    "forget_refused",
    "inject",
    "inject_",
    "raise_refused",
    "rank_gram",
    "rank_solve",
    "rank_update_",
    "row_gradients",
    "target_nll",
    "write_error",
]
