"""Writes docs/api.md: the public functions and classes of the engine, with their signatures and docstrings.

python docs/make_api.py
"""

import importlib
import inspect
import re
from pathlib import Path

# What a user calls, by module; everything else is the engine's own.
PUBLIC = {
    "rose_engine.edits": ("Edit", "read_edits", "EditError"),
    "rose_engine.editor": ("Editor", "Result"),
    "rose_engine.recipe": ("Recipe", "preset"),
    "rose_engine.delta": ("Delta", "rebased", "DeltaError"),
    "rose_engine.adapter": ("Adapter",),
    "rose_engine.verify": ("Report", "FactReport"),
    "rose_engine.certificate": ("Certificate",),
    "rose_engine.stream": ("stream", "Step"),
    "rose_engine.ledger": ("writing", "log", "deltas", "verify", "compact", "Commit", "LedgerError"),
    "rose_engine.export": ("export_checkpoint", "export_peft", "export_tensors", "adopted", "ExportError"),
    "rose_engine.inspect": ("inspect",),
    "rose_engine.parallel": ("join", "leads", "shard_weights"),
    "rose_engine.architecture": ("UnsupportedModelError",),
}
TARGET = Path(__file__).with_name("api.md")


def entry(name: str, thing: object, level: int) -> list[str]:
    """A heading, the signature, the docstring."""
    try:
        signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", f"{name}{inspect.signature(thing)}")  # annotations are kept as text
    except (TypeError, ValueError):
        signature = name
    return [f"{'#' * level} `{name}`", "", "```text", signature, "```", "", inspect.getdoc(thing) or "", ""]


def page() -> str:
    """The whole page."""
    lines = ["# API", "", "Made from the docstrings by `python docs/make_api.py`.", ""]
    for module, names in PUBLIC.items():
        lines += [f"## {module}", ""]
        for name in names:
            thing = getattr(importlib.import_module(module), name)
            error = inspect.isclass(thing) and issubclass(thing, Exception)
            lines += entry(name, thing, 3) if not error else [f"### `{name}`", "", inspect.getdoc(thing) or "", ""]
            if inspect.isclass(thing) and not error:
                for method, function in vars(thing).items():
                    function = getattr(function, "__func__", function)
                    if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                        lines += entry(f"{name}.{method}", function, 4)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), "utf-8")
