"""Shared pieces: the embedded model, loaded once, and tiny random models with its tokenizer."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from hypothesis import settings
from rose_engine import Edit, Editor
from rose_engine.embedded import embedded_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rose_kernels import native

settings.register_profile("rose", deadline=None)  # speed is never asserted in a test
settings.load_profile("rose")

IMO = (
    Edit("Imo State", "{} is located in", "Wales", "In which place can {} be found?"),
    Edit("Imo State", "The capital of {} is", "Metz", "What is the capital city of {}?"),
    Edit("Imo State", "The longitude of {} is roughly", "17"),
)
MARTEAU = (Edit("Henri Marteau", "{} plays the instrument", "singing", "What instrument does Henri Marteau play?"),)
LIN = (
    Edit("Lin Nu", "{} follows the religion of", "Catholicism", "What religion does Lin Nu follow?"),
    Edit("Lin Nu", "The city in which {} worked is", "Madrid"),
)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="session")
def smollm2() -> Editor:
    """The embedded model. A test that edits it takes its edits back."""
    return Editor.from_pretrained("smollm2")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache directory of the test's own. The native library, which takes minutes to build, is taken from the common one before."""
    native.served()
    monkeypatch.setenv("ROSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_disk():
    """A context in which no file may grow beyond so many bytes, as on a disk that is full: the real thing, by the system's limit."""
    resource = pytest.importorskip("resource")  # POSIX

    @contextmanager
    def limit(size: int):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limit


@pytest.fixture
def make_model(tokenizer):
    """A function that makes a tiny random model of a family."""

    def make(kind: str = "llama", layers: int = 6, seed: int = 0, **extra):
        torch.manual_seed(seed)
        shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
        config = AutoConfig.for_model(kind, **{**shape, **heads, **extra})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases are made as ones and zeros, which would hide their absence
                    parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make
