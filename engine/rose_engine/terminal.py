"""What the command line shows: progress on standard error, results on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rose_engine.certificate import Certificate, tables
from rose_engine.verify import Report

errors = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress_on_terminal(what: str) -> Iterator[Any]:
    """A progress callback for `Editor.apply`: a live line on a terminal, a line every tenth step elsewhere."""
    if not errors.is_terminal:

        def lines(done: int, subjects: int, step: int, loss: float) -> None:
            if step % 10 == 0:
                print(f"{what}: subjects done {done}/{subjects}, step {step}, loss {loss:.3f}", file=sys.stderr, flush=True)

        yield lines
        return
    columns = [TextColumn("{task.description}"), TextColumn("{task.fields[state]}"), TimeElapsedColumn()]
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, state="", total=None)
        yield lambda done, subjects, step, loss: bar.update(task, state=f"subjects {done}/{subjects}, step {step}, loss {loss:.3f}")


def print_report(report: Report) -> None:
    """The verification as a table on standard output."""
    table = Table("fact", "target", "prompt", "asked", "says when asked", title="share of target tokens, before → after")
    for fact in report.facts:
        prompt = f"{fact.prompt_before.success:.0%} → {fact.prompt_after.success:.0%}"
        asked = f"{fact.instructed_before.success:.0%} → {fact.instructed_after.success:.0%}"
        statement = fact.prompt.replace("{}", fact.subject)
        table.add_row(*map(Text, (statement, fact.target, prompt, asked, fact.instructed_after.says.strip())))
    console = Console(highlight=False)
    console.print(table)
    stayed = sum(u.stayed for u in report.unrelated)
    console.print(f"unrelated prompts that kept their answer: {stayed} of {len(report.unrelated)}")


def print_rewordings(rewordings: Mapping[str, Sequence[str]]) -> None:
    """What else each prompt was said as, a line each on standard output."""
    for prompt, others in rewordings.items():
        print(f"{prompt} = {'; '.join(others) or 'no other words found'}")


def print_certificate(certificate: Certificate) -> None:
    """The certificate as tables on standard output."""
    for title, (heads, rows) in zip(("tolerance and deviation", "interference"), tables(certificate), strict=False):
        table = Table(*heads, title=title)
        for row in rows:
            table.add_row(*map(Text, row))
        Console(highlight=False).print(table)


def print_inspection(found: dict[str, Any]) -> None:
    """What `inspect` found, a line each."""
    gb = lambda size: f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"  # noqa: E731
    parts = dict(found["memory_bytes"])
    total = parts.pop("total")
    stages, subjects, facts, device = (found[name] for name in ("seconds", "subjects", "facts", "device"))
    rows = {
        "model": f"{found['family']}, {found['layers']} layers, {found['parameters'] / 1e9:.3g} B parameters",
        "weights": f"{found['dtype']}, projections of {found['bits']} bits: {gb(found['model_bytes'])}",
        "recipe": f"{found['recipe']['name']}: {found['recipe']['forms']} forms, {found['recipe']['steps']} steps",
        **{name: "x".join(map(str, shape)) for name, shape in found["weights"].items()},
        "an edit of": f"{subjects} subject(s) with {facts} fact(s): about {found['suffix_tokens']} tokens a step",
        "memory": f"{gb(total)} above the model ({', '.join(f'{name} {gb(size)}' for name, size in parts.items())})",
        "delta": gb(found["delta_bytes"]),
        "time": f"about {duration(sum(stages.values()))} on {device} ({', '.join(f'{s} {duration(t)}' for s, t in stages.items())})",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}s}  {value}")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
