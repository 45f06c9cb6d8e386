"""Edits on several ranks, each a process of its own: one process's deltas, and no harm where a rank dies."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from rose_engine import ledger
from rose_engine.architecture import decoder_of
from rose_engine.parallel import join, shares_of
from rose_engine.sharding import sharding_of

from rose_kernels import layer, native

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def launch(ranks, *arguments):
    """torchrun with so many ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", port, "-m", "tests.engine.ranks"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command), *map(str, arguments)], env=environment, start_new_session=True, **pipes)


def end(process):
    """End torchrun and its ranks, if they are still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def extra():
    """What the model's configuration has of its own."""
    return {}


@pytest.fixture
def folder(make_model, tokenizer, tmp_path, extra):
    make_model(initializer_range=0.2, **extra).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Of layers that `block` writes out: with biases, with norms of queries and keys, and with heads that do not divide over two ranks.
BIASED = {"head_dim": 32, "attention_bias": True, "mlp_bias": True}
NORMED = {"kind": "qwen3", "head_dim": 32}
ODD = {"hidden_size": 96, "head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 3}


@pytest.mark.parametrize(
    ("extra", "ranks", "ways"),
    [
        ({}, 2, ("1:no", "2:engine", "2:library")),
        (BIASED, 2, ("2:engine",)),
        (NORMED, 2, ("2:engine",)),
        (ODD, 2, ("2:engine",)),
        pytest.param({}, 4, ("2:engine",), marks=pytest.mark.slow),
    ],
    ids=["library", "biased", "normed", "odd", "four"],
)
def test_ranks_write_what_one_process_writes(folder, extra, ranks, ways):
    process = launch(ranks, "same", folder, *ways)
    try:
        said, errors = process.communicate(timeout=300)
    finally:
        end(process)
    assert process.returncode == 0, errors[-3000:]
    for way, found in zip(ways, json.loads(said.splitlines()[-1]), strict=True):
        spread = way != "1:no"
        assert found["far"] < 1e-4 and found["weights"] < 1e-5, way
        assert found["first"] < (1e-5 if found["written"] else 1e-4), way
        assert found["agree"] and found["restored"] and found["base"] and found["loaded"] < 1e-6, way
        assert found["written"] == (bool(extra) and "cpu" in native.served()), way
        assert found["values"] or not found["written"] or not layer._serves(torch.empty(1, 1)), way
        assert found["sharded"] == spread and found["head"] == ("DTensor" if way == "2:library" else "Parameter"), way
        assert ("spread over ranks" in found["refused"]) == spread, way
        assert found["read"] < 1e-3, way
        assert found["words"] == [["{} is believed by 0 to be of"]] * ranks, way
        assert found["diverged"] == [1] and found["broken"] == ("K holds NaN or Inf" if spread else ""), way


def test_a_rank_that_dies_takes_the_others_with_it(folder, tmp_path):
    """SIGKILL in the middle of an edit: torchrun and the other rank end with an error, base and ledger are whole."""
    files = {file: hashlib.sha256(file.read_bytes()).digest() for file in sorted(folder.iterdir())}
    process = launch(2, "killed", folder, tmp_path / "book")
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        survivor, victim = (int((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
        os.kill(victim, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode and "SIGKILL" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(survivor, 0)
    assert [commit.number for commit in ledger.verify(tmp_path / "book")] == [1]
    assert files == {file: hashlib.sha256(file.read_bytes()).digest() for file in sorted(folder.iterdir())}


def test_shares_are_whole_batches():
    assert shares_of([2, 2, 1, 3], 2) == [0, 4, 8]
    assert shares_of([5], 2) in ([0, 0, 5], [0, 5, 5])
    assert shares_of([1] * 7, 3)[-1] == 7


def test_what_cannot_be_joined(monkeypatch, make_model):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="not started by torchrun"):
        join()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="over 2 of 3 ranks"):
        join(tensor_parallel=2)
    assert sharding_of(decoder_of(make_model()).projection(0).weight) is None
