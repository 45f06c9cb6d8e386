"""Second moments of keys, E[k k^T] over a corpus: what MEMIT's covariance and AlphaEdit's null space are made of.

The corpus is a text file, a Hugging Face data set, or text that the model says itself, so that none has to be downloaded. Texts
are streamed; of each only its first tokens are read. Moments are kept in the cache directory under the fingerprints of the
whole model and of the corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rose_engine.architecture import Decoder
from rose_engine.delta import tensor_bytes
from rose_engine.files import replacing
from rose_engine.forward import run_tree, tree_on
from rose_engine.keys import reading
from rose_engine.sample import sample_texts
from rose_kernels.cache import cache_dir

MODEL = "model"
DATASET = "hf:"
# Tokens of a text that are read, and tokens that are run at one time.
TEXT_TOKENS = 256
RUN_TOKENS = 2048


def texts_of(corpus: str) -> Iterator[str]:
    """The texts of a corpus, one after the other.

    corpus: the path of a UTF-8 text file, a text a line, or `hf:NAME[:CONFIG[:SPLIT]]`, a Hugging Face data set whose field `text` is
    read as a stream. OSError or ValueError, with what is wrong, where it cannot be read.
    """
    if not corpus.startswith(DATASET):
        with open(corpus, encoding="utf-8") as f:
            yield from (line for line in f if line.strip())
        return
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise ValueError(f"the corpus {corpus!r} needs the package datasets: pip install datasets") from e
    name, config, split, *_ = [*corpus.removeprefix(DATASET).split(":"), "", ""]
    for record in load_dataset(name, config or None, split=split or "train", streaming=True):
        if "text" not in record:
            raise ValueError(f"the corpus {corpus!r} has no field `text`; it has {', '.join(record)}")
        yield record["text"]


def tokenized(tokenizer: Any, texts: Iterable[str], tokens: int) -> Iterator[list[int]]:
    """Texts as tokens, `TEXT_TOKENS` of each at most, `tokens` in all."""
    for text in texts:
        if tokens <= 0:
            return
        ids = tokenizer(text, truncation=True, max_length=min(TEXT_TOKENS, tokens))["input_ids"]
        tokens -= len(ids)
        if ids:
            yield ids


@torch.no_grad()
def second_moments(decoder: Decoder, texts: Iterable[Sequence[int]], layers: Sequence[int]) -> dict[str, Tensor]:
    """E[k k^T] [d_in, d_in] float64 of each edited weight, on the model's device, over every token of texts.

    ValueError where there is none.
    """
    sums: dict[int, Tensor] = {}
    count = 0
    for run in _runs(texts):
        tree = tree_on(run, decoder.embedding.weight.device)
        uses = torch.bincount(torch.tensor([node for path in tree.path for node in path], device=tree.token.device))
        with reading(decoder, layers) as keys:
            run_tree(decoder, tree, range(layers[-1] + 1))
        count += int(uses.sum())
        for layer in layers:
            k = keys[layer].double()
            total = (k * uses[:, None]).T @ k
            sums[layer] = sums[layer].add_(total) if layer in sums else total
    if not count:
        raise ValueError("the corpus has no text")
    return {decoder.weight_name(layer): total / count for layer, total in sums.items()}


def _runs(texts: Iterable[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    run: list[Sequence[int]] = []
    for text in texts:
        if run and sum(map(len, run)) + len(text) > RUN_TOKENS:
            yield run
            run = []
        run.append(text)
    if run:
        yield run


def moments(decoder: Decoder, tokenizer: Any, layers: Sequence[int], corpus: str, tokens: int, seed: int) -> dict[str, Tensor]:
    """`second_moments` of the model as it is, each weight's from the cache where it was computed before.

    seed: for text sampled from the model.
    """
    about = {
        "model": model_fingerprint(decoder.model),
        "corpus": _source(corpus),
        "tokens": tokens,
        "seed": seed if corpus == MODEL else None,
    }
    device = decoder.embedding.weight.device
    paths = {}
    for layer in layers:
        digest = hashlib.sha256(json.dumps(about | {"weight": decoder.weight_name(layer)}, sort_keys=True).encode()).hexdigest()
        paths[decoder.weight_name(layer)] = cache_dir() / "moments" / f"{digest[:32]}.safetensors"
    if not all(path.exists() for path in paths.values()):
        if corpus == MODEL:
            texts: Iterable[Sequence[int]] = sample_texts(decoder.model, tokenizer, tokens, seed)
        else:
            texts = tokenized(tokenizer, texts_of(corpus), tokens)
        for name, moment in second_moments(decoder, texts, layers).items():
            with replacing(paths[name]) as temporary:
                save_file({"moment": moment.cpu().contiguous()}, temporary)
    return {name: load_file(path, device=str(device))["moment"] for name, path in paths.items()}


def model_fingerprint(model: PreTrainedModel) -> str:
    """The SHA-256 of the names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"\n{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(tensor_bytes(weight))
    return digest.hexdigest()


def _source(corpus: str) -> str:
    """What identifies a corpus: its name, or the SHA-256 of a file."""
    if corpus == MODEL or corpus.startswith(DATASET):
        return corpus
    with open(corpus, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
