"""Compile every Triton kernel as the engine launches it for a 7B model, for sm_80 and sm_90, without a GPU.

    python -m tests.kernels.compile_all [FOLDER]

prints one JSON list of {kernel, arch, registers, shared, local, spills}: registers and bytes of local memory a thread and bytes of shared
memory a program, read from the cubin's resource usage; spills are the loads and stores of local memory in its assembly.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rose_kernels import backend

# The package's names are the operators; the modules that hold the kernels are behind them.
aggregate, inject, rank_update, target_nll = (
    sys.modules[f"{backend.__package__}.{name}"] for name in ("aggregate", "inject", "rank_update", "target_nll")
)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
F32, BF16, I64, I32, BOOL = "*fp32", "*bf16", "*i64", "*i32", "*i1"
NLL = {"CAP": False, "WIDEN": False, "BLOCK_T": target_nll.BLOCK_T, "BLOCK_V": target_nll.BLOCK_V, "BLOCK_D": target_nll.BLOCK_D}
WRITE = {"BLOCK_M": rank_update.BLOCK_M, "BLOCK_N": rank_update.BLOCK_N, "BLOCK_K": rank_update.BLOCK_K}
# kernel, argument types in order (a constant's value stands in the last entry), constants
CONFIGURATIONS = [
    ("inject", inject.inject_kernel, [BF16, F32, I64, I64, "i32"], {"BLOCK": inject.BLOCK}),
    ("gather", inject.gather_kernel, [BF16, I64, F32, "i32"], {"BLOCK": inject.BLOCK}),
    ("scatter", inject.scatter_kernel, [BF16, I64, I64, F32, "i32", "i32"], {"BLOCK": inject.BLOCK}),
    (
        "aggregate",
        aggregate.aggregate_kernel,
        [F32, I64, I64, F32, F32, F32, I32, F32, BOOL, F32, F32, "i32", *["fp32"] * 8],
        {"HAS_EXTRA": True, "BLOCK": aggregate.BLOCK},
    ),
    *(
        (f"target_nll_forward{suffix}", target_nll.forward_kernel, [BF16, BF16, I64, F32, F32, F32, *["i32"] * 3, "fp32", "i32"], nll)
        for suffix, nll in (("", NLL), ("_cap", {**NLL, "CAP": True}))
    ),
    ("target_nll_join", target_nll.join_kernel, [F32] * 5 + ["i32"] * 2, {"BLOCK_T": target_nll.BLOCK_T}),
    *(
        (
            f"target_nll_backward{suffix}",
            target_nll.backward_kernel,
            [BF16, BF16, I64, F32, F32, BF16, *["i32"] * 3, "fp32", "i32", "i32"],
            nll,
        )
        for suffix, nll in (("", NLL), ("_cap", {**NLL, "CAP": True}))
    ),
    *(
        (f"write_{kind}", rank_update.write_kernel, [w, F32, F32, "i32", "i32", "i32"], WRITE)
        for kind, w in (("bf16", BF16), ("fp32", F32))
    ),
]


def tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def report(folder: Path) -> list[dict]:
    rows = []
    for name, kernel, types, constants in CONFIGURATIONS:
        signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
        divisible = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t.startswith("*") or t == "i32"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
        for arch in (80, 90):
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
            cubin = folder / f"{name}.sm_{arch}.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = tool("cuobjdump", "--dump-resource-usage", str(cubin))
            local = int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])
            spills = len(re.findall(r"\b(?:LDL|STL)\b", tool("nvdisasm", "-c", str(cubin))))
            registers = int(re.search(r"REG:(\d+)", usage)[1])
            shared = max(int(re.search(r"SHARED:(\d+)", usage)[1]), compiled.metadata.shared)
            rows.append({"kernel": name, "arch": arch, "registers": registers, "shared": shared, "local": local, "spills": spills})
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(report(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary))))
