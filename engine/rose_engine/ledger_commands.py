"""The command line's commands of a ledger: `rose log`, `show`, `revert`, `checkout`, `compact`, `verify`. None of them needs a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

LedgerArgument = Annotated[Path, typer.Argument(help="Directory of the ledger.")]


def _existing(ledger: Path) -> Path:
    if not ledger.is_dir():
        raise FileNotFoundError(f"{ledger}: there is no such ledger")
    return ledger


@app.command()
def log(ledger: LedgerArgument) -> None:
    """List the commits of a ledger; those that are in the weights are marked."""
    from rose_engine import ledger as book

    commits = book.log(_existing(ledger))
    active = set(book.standing(commits))
    for commit in commits:
        mark = "*" if commit.number in active else " "
        print(f"{mark} {commit.number:6d}  {commit.created}  {_what(commit)}")


def _what(commit: Any) -> str:
    return {
        "apply": f"{commit.edits} edits",
        "revert": f"takes back commit {commit.refers_to}",
        "checkout": f"goes back to the state after commit {commit.refers_to}",
    }[commit.kind]


def _commit(ledger: Path, act: Callable[[Any], Any]) -> None:
    """Append one commit to a ledger, made by `act` from its writer, and say what it does."""
    from rose_engine import ledger as book

    with book.writing(_existing(ledger)) as writer:
        commit = act(writer)
    print(f"commit {commit.number} {_what(commit)}")


@app.command()
def revert(ledger: LedgerArgument, number: Annotated[int, typer.Argument(help="The commit to take back.")]) -> None:
    """Take one commit back, whichever it is. The weights of `rose stream` and `Editor.restore` are then without it."""
    _commit(ledger, lambda writer: writer.revert(number))


@app.command()
def show(ledger: LedgerArgument, number: Annotated[int, typer.Argument(help="The commit to show.")]) -> None:
    """Print a commit as JSON: what it did and, of its delta, the edits, the recipe and the report."""
    from dataclasses import asdict

    from rose_engine import ledger as book

    commit = book.commit_of(_existing(ledger), number)
    record = asdict(commit)
    if commit.delta is not None:
        metadata = book.delta_of(ledger, commit).metadata
        record["contents"] = {key: value for key, value in metadata.items() if key != "columns"}
    print(json.dumps(record, ensure_ascii=False, indent=1))


@app.command()
def checkout(ledger: LedgerArgument, number: Annotated[int, typer.Argument(help="The commit to go back to; 0: no edit.")]) -> None:
    """Go back to the state after a commit, as a new commit; nothing is lost, and streams go on from there."""
    _commit(ledger, lambda writer: writer.checkout(number))


@app.command()
def compact(
    ledger: LedgerArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new ledger.")],
    tolerance: Annotated[float, typer.Option(help="Relative error that each weight's change may have.")] = 1e-6,
) -> None:
    """Write a new ledger that holds all edits as one small delta; the old one stays as it is."""
    from rose_engine import ledger as book

    commit = book.compact(_existing(ledger), out, tolerance)
    size = book.delta_file(out, commit.number).stat().st_size
    print(f"{commit.edits} edits in one delta of {size:,} bytes, relative error {commit.note['compacted']['error']:.1e}: {out}")


@app.command()
def verify(ledger: LedgerArgument) -> None:
    """Check the chain of commits and every delta's file."""
    from rose_engine import ledger as book

    print(f"{len(book.verify(_existing(ledger)))} commits, all whole")
