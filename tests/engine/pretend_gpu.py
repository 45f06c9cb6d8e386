"""A GPU that is none: tensors that stand on cuda:0 by all that PyTorch and the engine see of them, and have their data on the host.

    python -m tests.engine.pretend_gpu LIBRARY qwen2 bfloat16

runs the engine on it, beside the same on the CPU, and prints one JSON object. LIBRARY: `pretend_gpu.cpp`, built. What it shows: that no
operation mixes devices, that what the engine does on a GPU alone is right, and where the host waits for the device. What it does not: the
kernels of a GPU, its streams, memory and speed. FlashAttention's operators are replaced by their definition, graphs by a second run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
for library in (TORCH / "lib/libc10.so", TORCH / "lib/libtorch_cpu.so", sys.argv[1]):  # before PyTorch asks what there is
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
os.environ["ROSE_BACKEND"] = "reference"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map  # noqa: E402

from tests.engine.varlen import varlen, varlen_backward  # noqa: E402

# What the host waited for while `watching`, by its name.
waits: Counter[str] = Counter()
watching = False

READ = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "bincount", "repeat_interleave"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


def waited(what: str) -> None:
    if watching:
        waits[what] += 1


class Far(torch.Tensor):
    """A tensor on cuda:0. held: its data, on the host."""

    @staticmethod
    def __new__(cls, held):
        where = {"strides": held.stride(), "dtype": held.dtype, "device": torch.device("cuda:0")}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **where)

    def __init__(self, held):
        self.held = held

    def tolist(self):
        waited("tolist")
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor of a GPU has no NumPy array")

    def data_ptr(self):
        return self.held.data_ptr()

    def __getitem__(self, index):
        return super().__getitem__(_sent(index))

    def __setitem__(self, index, value):
        super().__setitem__(_sent(index), value)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def _sent(index):
    """An index with its lists on the device, where PyTorch puts them by ways that no dispatch sees."""
    if isinstance(index, list):
        waited("an index that is a list")
        return Far(host_tensor(index, dtype=torch.long))
    return tuple(map(_sent, index)) if isinstance(index, tuple) else index


class Device(TorchDispatchMode):
    """Within it tensors can be made on cuda:0."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """An operation on what its tensors hold. RuntimeError where it mixes devices."""
    name = function._schema.name.split("::")[1]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    near = [x for x in tensors if not isinstance(x, Far) and x.dim() > 0]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    blocking = not kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
    if far and near and name not in INDEXED | {"copy_"}:
        raise RuntimeError(f"{name} mixes devices: shapes {[list(x.shape) for x in near]} are on the host")
    if far and (name in READ or (name in INDEXED and (near or any(x.dtype == torch.bool for x in far[1:])))):
        waited(name)
    if blocking and ((name == "copy_" and far and near) or (name == "_to_copy" and asked == ("cpu" if far else "cuda"))):
        waited("a copy between host and device")
    if name == "_fused_sdp_choice":
        return 0  # the one that is made of other operations
    held = lambda x: x.held if isinstance(x, Far) else x  # noqa: E731
    given, named = tree_map(held, args), tree_map(held, kwargs)
    if asked is not None:
        named["device"] = "cpu"
    if name == "_varlen_attn":
        q, k, v, *offsets = given[:5]
        out = varlen(q, k, v, *offsets, given[8])
        return Far(out), Far(torch.zeros(q.shape[1], len(q))), Far(torch.zeros(2, dtype=torch.uint64))
    if name == "_varlen_attn_backward":
        grad, q, k, v, _, _, *offsets = given[:8]
        scale = next(x for x in (*given[8:], *named.values()) if isinstance(x, float))
        return tuple(map(Far, varlen_backward(grad, q, k, v, *offsets, scale)))
    out = function(*given, **named)
    there = bool(far) if asked is None else asked == "cuda"

    def placed(x):
        if not isinstance(x, torch.Tensor):
            return x
        return next((one for one in tensors if held(one) is x), Far(x) if there else x)

    return tree_map(placed, out)


host_tensor = torch.tensor


def tensor(*args, device=None, **kwargs):
    """`torch.tensor`, which fills a device's memory by ways that no dispatch sees."""
    out = host_tensor(*args, **kwargs)
    if device is None or torch.device(device).type == "cpu":
        return out
    waited("a tensor from the host")
    return Far(out)


class Graphs:
    """In the place of `captured.Pool`: a graph is the step run again."""

    def __init__(self, device):
        self.works, self.captures, self.replays = True, 0, 0

    def capture(self, run):
        global watching
        run()
        self.captures += 1
        before, watching = watching, True
        run()
        watching = before
        pool = self

        class Graph:
            def replay(self):
                pool.replays += 1
                run()

        return Graph()


def sent(model):
    """The model on the device."""
    for module in model.modules():
        for name, x in module._parameters.items():
            module._parameters[name] = None if x is None else torch.nn.Parameter(Far(x.data), requires_grad=False)
        for name, x in module._buffers.items():
            module._buffers[name] = None if x is None else Far(x)
    model.tie_weights()
    return model


def main(kind: str, dtype: torch.dtype) -> dict:
    from dataclasses import replace

    from rose_engine import Delta, Editor, captured, optimize
    from rose_engine.edits import group_by_subject
    from rose_engine.embedded import embedded_model
    from rose_engine.recipe import ROSE
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from tests.conftest import IMO, LIN, MARTEAU
    from tests.engine.test_families import EXTRA

    class Noise(optimize.Noise):
        """As drawn on the host, which alone has generators here."""

        def __init__(self, share, rows, seed, device):
            super().__init__(share, rows, seed, torch.device("cpu"))

        def of(self, delta):
            drawn = [
                F.normalize(torch.randn(n, delta.shape[1], generator=g), dim=-1) for n, g in zip(self.rows, self.generators, strict=True)
            ]
            drawn = [x.to(delta.device, non_blocking=True) for x in drawn]
            return torch.cat([*(self.share * delta[s].norm() * x for s, x in enumerate(drawn)), torch.zeros_like(delta)])

    torch.tensor, torch.cuda._lazy_init, torch.Tensor.pin_memory = tensor, lambda: None, lambda self: self
    torch.cuda.get_device_capability = lambda device: (9, 0)
    captured.Pool, optimize.Noise = Graphs, Noise
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model()))
    recipe = replace(ROSE, layers=(1, 2, 3), steps=12, lr=0.05, rewordings=1, fisher=3.0, stop_loss=0.0, bystanders=48, waypoints=4)

    def make():
        torch.manual_seed(5)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": len(tokenizer), "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        words = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
        config = AutoConfig.for_model(kind, **{**shape, **heads, **words, **EXTRA.get(kind, {})})
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def edited(editor):
        first, second = editor.apply((*IMO, *MARTEAU)), editor.apply(LIN, certify=True)
        return first, second

    def change(results):
        return [(U @ V).double() for result in results for U, V in result.delta.factors.values()]

    wanted = change(edited(Editor(make(), tokenizer, recipe)))
    out = {}
    with Device():
        editor = Editor(sent(make()), tokenizer, recipe)
        before = [x.cpu() for x in editor.weights().values()]
        results = edited(editor)
        out["differs"] = max(float((a - b).norm() / b.norm()) for a, b in zip(change(results), wanted, strict=True))
        pool = editor._frames.pool
        out |= {"captures": pool.captures, "replays": pool.replays} if pool else {}
        out["waits in a step"] = dict(waits)

        plans = [optimize.subject_rows(editor.decoder, tokenizer, s, recipe) for s in group_by_subject((*IMO, *LIN))]
        for steps in (8, 16, 24):
            waits.clear()

            def clock(stage):
                global watching
                watching = stage == "prepare"

            optimize.optimize_values(editor.decoder, plans, replace(recipe, steps=steps), clock=clock, batch_tokens=10**6)
            out[f"waits in {steps} steps"] = waits.total()

        with tempfile.TemporaryDirectory() as folder:
            results[0].delta.save(Path(folder) / "first.safetensors")
            again = Delta.load(Path(folder) / "first.safetensors")
            editor.restore([])
            out["streamed"] = [step.commit.number for step in editor.stream(Path(folder) / "book", MARTEAU)]
        editor.restore([])
        out["restored"] = all(torch.equal(a, b.cpu()) for a, b in zip(before, editor.weights().values(), strict=True))
        with editor.as_adapter(again):
            beside = editor.complete("Lin Nu is", max_new_tokens=4)
        editor.load(again)
        out["adapter says what the weights say"] = beside == editor.complete("Lin Nu is", max_new_tokens=4)
        editor.diagnose(editor.applied)
    return out


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[2], getattr(torch, sys.argv[3]))))
