"""The base: the unedited weights of the layers that are edited, and what deltas make of them.

They are kept on the host from a layer's first edit on. Taking edits back copies them and writes the deltas that stay in their order, so
that the bits are those that were there. Which deltas are in the weights is `editor`'s to know; what a delta's file holds is `delta`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.branch import Branch, quantised_record
from rose_engine.delta import Delta, DeltaError, check_record, fingerprint
from rose_engine.write import all_or_nothing
from rose_kernels import add_low_rank_


class Base:
    """tensors: the unedited weights by state-dict name, of the layers kept so far; records: what identifies each in a delta."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.tensors: dict[str, Tensor] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def weights(self, layers: Iterable[int] | None = None) -> dict[str, Tensor | Branch]:
        """The live weights [d_out, d_in] of the given layers, or of all; of a quantised model the branches beside them."""
        layers = range(len(self.decoder.layers)) if layers is None else layers
        return {self.decoder.weight_name(layer): self.decoder.weight(layer) for layer in layers}

    def keep(self, layers: Sequence[int]) -> None:
        """Keep the weights of layers that are about to be edited for the first time."""
        for layer in layers:
            name, weight = self.decoder.weight_name(layer), self.decoder.weight(layer)
            if name not in self.tensors:  # which comes last, so that an interruption leaves nothing half kept
                self.records[name] = self._record(layer, name, weight)
                self.tensors[name] = weight.cpu().clone()

    def _record(self, layer: int, name: str, weight: Tensor | Branch) -> dict[str, Any]:
        if self.decoder.quantiser:
            return quantised_record(name, self.decoder.projection(layer), self.decoder.quantiser)
        sharding = self.decoder.sharding
        return fingerprint({name: weight if sharding is None else sharding.whole_weight(weight)})[0]

    def check(self, delta: Delta) -> list[int]:
        """The layers that a delta edits, which are kept from here on. DeltaError where it was made on other weights."""
        layer_of = self.decoder.layer_of()
        for record in delta.metadata["base"]:
            if record["name"] not in layer_of:
                raise DeltaError(f"the delta edits `{record['name']}`, which this model does not have")
        layers = [layer_of[record["name"]] for record in delta.metadata["base"]]
        self.keep(layers)
        for record in delta.metadata["base"]:
            check_record(self.records[record["name"]], record)
        return layers

    def add(self, delta: Delta) -> None:
        """Write a delta over the weights as they are."""
        weights, sharding = self.weights(), self.decoder.sharding
        if self.decoder.quantiser:
            for name, factors in delta.factors.items():
                weights[name].add(*factors)
            return
        W = [weights[name] for name in delta.factors]
        U, V = ([factors[i].to(w.device) for w, factors in zip(W, delta.factors.values(), strict=True)] for i in (0, 1))
        add_low_rank_(W, U, V if sharding is None else [sharding.part(v, 1).contiguous() for v in V])

    def rewrite(self, deltas: Sequence[Delta]) -> None:
        """Make the weights the unedited ones with these deltas, written in their order; as before where that fails."""
        weights = self.weights()
        with all_or_nothing(weights[name] for name in self.tensors):
            for name, tensor in self.tensors.items():
                weights[name].copy_(tensor)
            for delta in deltas:
                self.add(delta)
