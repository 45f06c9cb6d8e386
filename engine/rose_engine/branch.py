"""What stands in for a weight that is not written into: a low-rank branch beside a quantised projection.

    y = W x + U (V x)        W as it is quantised, U and V in float32

An edit of a quantised model ends in the branch; what is quantised keeps its bytes. A branch is copied, restored and added to where a weight
would be, so that edits, reverts and deltas are the same as elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rose_engine.delta import tensor_bytes

# Of those that transformers knows, the quantisers whose projections pass a gradient to their input.
QUANTISERS = ("bitsandbytes",)


class Branch:
    """U V [d_out, d_in] beside a projection, zero at first. A clone is held by no projection: a copy of the factors."""

    def __init__(self, d_out: int, d_in: int, device: torch.device):
        self.shape, self.device = torch.Size((d_out, d_in)), device
        self.U, self.V = torch.zeros(d_out, 0, device=device), torch.zeros(0, d_in, device=device)

    def add(self, U: Tensor, V: Tensor) -> None:
        """Add U [d_out, n] times V [n, d_in], float32."""
        self.U, self.V = torch.cat([self.U, U.to(self.device)], 1), torch.cat([self.V, V.to(self.device)])

    def clone(self) -> Branch:
        """A branch of the same factors."""
        other = Branch(*self.shape, self.device)
        other.U, other.V = self.U, self.V
        return other

    def cpu(self) -> Branch:
        """This branch: factors are replaced, never written into, and need no copy on the host."""
        return self

    def copy_(self, other: Branch) -> Branch:
        """Take another's factors."""
        self.U, self.V = other.U, other.V
        return self

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The projection's forward hook."""
        if not self.U.shape[1]:
            return None
        return output + (args[0].float() @ self.V.T @ self.U.T).to(output.dtype)


def pass_gradients(model: nn.Module) -> None:
    """Have the projections of a quantised model pass gradients to their input.

    On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights anew when a model first answers, rounds their scales and has no gradient from
    then on: that is switched off. ValueError where it has happened, for the base is then another one than what was loaded.
    """
    for module in model.modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has packed the 4-bit weights for inference; load the model again and make the editor before it answers"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_gradient(projection: nn.Module, dtype: torch.dtype) -> None:
    """ValueError where a projection's gradient is not that of a linear map: g . (f(x) - f(0)) = x . df/dx^T g."""
    draw = torch.Generator().manual_seed(0)
    x, g = (
        torch.randn(4, n, generator=draw).to(projection.weight.device, dtype) for n in (projection.in_features, projection.out_features)
    )
    with torch.enable_grad():
        y = projection(x.requires_grad_())
        (slope,) = torch.autograd.grad(y, x, g, allow_unused=True) if y.requires_grad else (None,)
    wanted = ((y.detach() - projection(torch.zeros_like(x)).detach()).double() * g.double()).sum(-1)
    found = torch.zeros_like(wanted) if slope is None else (slope.double() * x.detach().double()).sum(-1)
    if (found - wanted).norm() > 0.1 * wanted.norm():
        raise ValueError(f"no gradient passes through {type(projection).__name__} here; load the model in full precision")


def branch_beside(projection: nn.Module) -> Branch:
    """The branch that is added to what a projection puts out. ValueError where one is there that holds edits: another editor's."""
    for hook in projection._forward_hooks.values():
        if isinstance(hook, Branch):
            if hook.U.shape[1]:
                raise ValueError(
                    "the model holds edits of another editor, beside its quantised weights; go on with that one, or take them back"
                )
            return hook
    branch = Branch(projection.out_features, projection.in_features, projection.weight.device)
    projection.register_forward_hook(branch)
    return branch


def quantised_record(name: str, projection: nn.Module, method: str) -> dict[str, Any]:
    """What identifies a quantised weight in a delta's base: the SHA-256 goes over all tensors of the projection's state."""
    state = {key: x for key, x in projection.state_dict().items() if isinstance(x, Tensor)}
    shape = [projection.out_features, projection.in_features]
    return {"name": name, "shape": shape, "dtype": f"{method} {state['weight'].dtype}".replace("torch.", ""), "sha256": state_digest(state)}


def is_quantised(record: Mapping[str, Any]) -> bool:
    """Whether a record is a `quantised_record`."""
    return record["dtype"].startswith(tuple(f"{method} " for method in QUANTISERS))


def state_digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the tensors of a projection, in the order of their names within it."""
    digest = hashlib.sha256()
    for key, x in sorted(state.items()):
        digest.update(f"{key} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()
