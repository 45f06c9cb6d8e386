"""A run of the benchmarks on several processes that `torchrun` started: who does what, and one file of results in the end.

Each rank appends to a file of its own; rank 0 moves the lines of all of them to results.jsonl before anything is measured and when
all are done, so that a run which was killed goes on with any number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rose_engine.files import Busy, locked, replacing

RESULTS = "results.jsonl"


def mend(path: Path) -> None:
    """Take away a last line that was cut off."""
    whole, _, cut = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if cut:
        with open(path, "r+b") as f:
            f.truncate(len(whole) + 1 if whole else 0)


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 of 1 where `torchrun` did not start it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(patience: timedelta = timedelta(days=7)) -> Iterator[None]:
    """Within the block `wait` waits for all ranks. patience: how long, at most, for the slowest."""
    several = place()[1] > 1
    if several:
        dist.init_process_group("gloo", timeout=patience)
    try:
        yield
    finally:
        if several:
            dist.destroy_process_group()


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold a folder of results against a second run, rank 0 for all. SystemExit names the other."""
    with ExitStack() as held:
        if place()[0] == 0:
            try:
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(out / "lock"))
            except Busy as e:
                raise SystemExit(f"{out}: {e} is writing its results there; wait for it, or choose another --out") from e
            except OSError as e:
                raise SystemExit(f"{out}: cannot be written to: {e}") from e
        yield


def wait() -> None:
    """Go on when every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def first(value: Any) -> Any:
    """Rank 0's value."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def device(name: str) -> str:
    """The device of this rank: of several GPUs the one of its place on the machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and place()[1] > 1 else name


def own_file(out: Path) -> Path:
    """The file that this rank appends to."""
    rank, world = place()
    return out / (RESULTS if world == 1 else f"results.rank{rank}.jsonl")


def merge(out: Path) -> None:
    """Move the lines of every rank's file to results.jsonl, those of one that is there already once."""
    parts = sorted(out.glob("results.rank*.jsonl"))
    for path in (out / RESULTS, *parts):
        mend(path)
    if not parts:
        return
    lines = [line for path in (out / RESULTS, *parts) if path.exists() for line in path.read_bytes().splitlines()]
    with replacing(out / RESULTS) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in dict.fromkeys(lines)))
    for path in parts:
        path.unlink()


def share(cells: Sequence[Any]) -> list[Any]:
    """The cells of this rank: of each subject those of all recipes and seeds, of a sequence those of all counts, in turn."""
    rank, world = place()
    names: dict[str, int] = {}

    def unit(key: dict[str, Any]) -> str:
        return str([value for field, value in key.items() if (field in ("recipe", "seed")) == ("count" in key)])

    turn = [names.setdefault(unit(cell.key), len(names)) for cell in cells]
    return [cell for cell, number in zip(cells, turn, strict=True) if number % world == rank]
