"""Adapters: the edited model beside the base, from one copy of the weights.

    y = W x + sum over deltas of U (V x)        within `with adapter:`;        y = W x outside

A forward hook on each edited projection adds the low-rank branch. What is on is known to each thread and task by itself
(`contextvars`), so that a server may answer with the edit in one request and without it in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from rose_engine.compress import joined
from rose_engine.delta import Delta


class Adapter:
    """Deltas as a side branch of a model's projections: on within `with adapter:`, which may be nested and repeated; off elsewhere.
    A generator that is within it is to be advanced and closed by the thread or task that entered it.

    modules: the edited projection of every weight that the deltas name. `remove` takes the branch off the model.
    """

    def __init__(self, modules: Mapping[str, nn.Module], deltas: Sequence[Delta]):
        self._on: ContextVar[int] = ContextVar("adapter", default=0)
        self._hooks = []
        for name, (U, V) in joined(deltas).items():
            device = modules[name].weight.device
            self._hooks.append(modules[name].register_forward_hook(partial(self._branch, U.to(device), V.to(device))))

    def _branch(self, U: Tensor, V: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self._on.get():
            return None
        return output + (args[0].to(U.dtype) @ V.T @ U.T).to(output.dtype)

    def __enter__(self) -> Adapter:
        if not self._hooks:
            raise ValueError("the adapter was removed")
        self._on.set(self._on.get() + 1)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._on.set(max(0, self._on.get() - 1))

    def remove(self) -> None:
        """Take the branch off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
