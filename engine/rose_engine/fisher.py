"""Fisher information of answers about others, and the coordinates in which a value avoids the directions that they depend on.

A write reaches tokens of other subjects with a share c of the value, and to second order each of them changes what the model answers there;
all together, taken one at a time, by

    KL = c^2 / 2 delta^T F delta,    F = sum over layers, statements x and their tokens t of E_{y ~ P(. | x)} [g g^T],
    g = the gradient of log P(y | x) in the hidden state of token t after the layer.

A few directions hold most of F. A value is optimised as delta = T u, where T shrinks those and leaves the others nearly as they are
(docs/value-generalisation.md). They are read off the unedited model, once for a choice of layers, strength and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.forms import Row
from rose_engine.forward import answer_gradients, pack, prepare
from rose_engine.packing import split_rows

# Tokens that are run at one time.
RUN_TOKENS = 256
# T is rounded to multiples of it, so that its bits hardly ever depend on the order of sums in float64.
GRAIN = 2.0**-16


@dataclass(frozen=True)
class Coordinates:
    """delta = T u: T [d, d], symmetric, and its largest singular value, by which the ball that u stays in is smaller than delta's."""

    T: Tensor
    longest: float


def fisher_information(decoder: Decoder, texts: Sequence[Sequence[int]], layers: Sequence[int], seed: int = 0) -> Tensor:
    """F [d, d] float64 of texts, as tokens, after `layers`, ascending, on the model's device: of each text with one answer y, drawn with
    `seed`."""
    rows = [Row((*text, text[-1]), 0, len(text)) for text in texts]  # the answer stands where the last token is again
    generator = torch.Generator().manual_seed(seed)
    prepared = prepare(decoder, rows, layers[0])
    before = (layers[0], *prepared.layers[:-1])  # the layers after which the gradients are
    total = torch.zeros(2 * (decoder.embedding.embedding_dim,), dtype=torch.float64, device=prepared.hidden.device)
    for index in split_rows(rows, range(len(rows)), RUN_TOKENS):
        for layer, grad in zip(reversed(before), answer_gradients(pack(prepared, index), generator), strict=True):
            if layer in layers:
                grad = grad.double()
                total.addmm_(grad.T, grad)
    return total


def coordinates(information: Tensor, weight: float) -> Tensor:
    """T = c (I + weight F d / tr F)^(-1/2) [d, d], symmetric, with c such that the mean square of its singular values is 1.

    A direction in which F is average is shrunk by sqrt(1 + weight) beside one where it is 0; where F is 0 altogether T is the identity.
    float64 on a CPU, where sums of rounded numbers hardly ever depend on their order, float32 elsewhere. FloatingPointError where F is not
    finite.
    """
    if not torch.isfinite(information).all():
        raise FloatingPointError("the gradients of answers about others are not finite; load the model in float32 or bfloat16")
    value, vector = torch.linalg.eigh(information)
    value = value.clamp(min=0)
    scale = (1 + weight * value / value.mean().clamp(min=torch.finfo(value.dtype).tiny)).rsqrt()
    scale /= scale.square().mean().sqrt()
    T = (vector * scale) @ vector.T
    T = ((T + T.T) / (2 * GRAIN)).round() * GRAIN
    return T if T.device.type == "cpu" else T.float()
