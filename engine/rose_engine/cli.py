"""The command line: `rose edit`, `rose stream`, `rose export`, `rose demo`, `rose env`; the ledger's are in `ledger_commands`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rose_engine import ledger_commands
from rose_engine.terminal import duration, errors, print_certificate, print_inspection, print_report, print_rewordings, progress_on_terminal

if TYPE_CHECKING:
    from rose_engine.delta import Delta

app = typer.Typer(
    help="Edit facts inside causal language models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.add_typer(ledger_commands.app)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hugging Face id, local folder, or smollm2 (embedded).")]
EditsOption = Annotated[str, typer.Option("--edits", "-e", help="JSONL, JSON or CSV file of edits; - reads standard input.")]
RewordingsOption = Annotated[
    int | None, typer.Option(min=0, help="Other statements that are found for a prompt; 0 is none. Default: the recipe's.")
]
FormatOption = Annotated[str | None, typer.Option(help="jsonl, json or csv; default: by the file's name.")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"] | None,
    typer.Option(help="auto: the faster of float32 and bfloat16 here. Default: the checkpoint's."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
OthersOption = Annotated[
    Path | None, typer.Option(help="File of subjects, one a line, that must not change. Default: a few everyday ones.")
]


def load_editor(model: str, dtype: str | None, device: str, rewordings: int | None = None):
    """The editor of a model, said on standard error. The kernels are built before, if need be, so that no edit waits for a compiler."""
    from rose_engine.editor import Editor
    from rose_kernels.backend import serving

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("the command line is one process's; docs/how-to.md has a program for several ranks")
    serving(device, "rank_update_")
    errors.print(f"loading {model}", markup=False)
    editor = Editor.from_pretrained(model, dtype=dtype, device=device)
    if rewordings is not None:
        editor.recipe = replace(editor.recipe, rewordings=rewordings)
    return editor


@contextmanager
def _readable(edits: str) -> Iterator[None]:
    """What cannot be read is bad input."""
    from rose_engine.edits import EditError

    try:
        yield
    except OSError as e:
        raise EditError(f"cannot be read: {e.strerror or e}", edits) from e


def _facts(edits: str, format: str | None) -> list[Any]:
    from rose_engine.edits import read_edits

    with _readable(edits):
        return read_edits(edits, format)


@app.command()
def edit(
    edits: EditsOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for delta.safetensors and report.json.")],
    model: ModelOption = "smollm2",
    format: FormatOption = None,
    factors: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the delta's file; bfloat16 halves it, rounded.")] = "float32",
    certify: Annotated[bool, typer.Option(help="Measure the edit's geometry and keep the certificate in the delta.")] = False,
    others: OthersOption = None,
    rewordings: RewordingsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Write edits into a model, verify them, and save the change as a delta."""
    import torch

    from rose_engine.edits import EditError
    from rose_engine.files import replacing

    facts = _facts(edits, format)
    if out.exists() and not out.is_dir():  # said before minutes of work, not after
        raise EditError("is not a directory", str(out))
    names = _names(others)
    editor = load_editor(model, dtype, device, rewordings)
    with progress_on_terminal("optimising") as progress:
        result = editor.apply(facts, certify=certify, others=names, progress=progress)
    result.delta.save(out / "delta.safetensors", getattr(torch, factors))
    record = {"seconds": result.seconds, "steps": result.steps, "loss": result.loss, **result.report.as_dict()}
    record["rewordings"] = result.delta.metadata["rewordings"]
    if result.certificate:
        record["certificate"] = result.certificate.as_dict()
    with replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    print_report(result.report)
    print_rewordings(record["rewordings"])
    if result.certificate:
        print_certificate(result.certificate)
    errors.print(f"{sum(result.seconds.values()):.1f} s; wrote {out / 'delta.safetensors'}", markup=False)


def _names(path: Path | None) -> list[str] | None:
    """The lines of a file of names; None where there is no file."""
    if path is None:
        return None
    with _readable(str(path)):
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]


@app.command()
def reword(
    edits: EditsOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSONL file for the edits with their rewordings.")],
    model: ModelOption = "smollm2",
    format: FormatOption = None,
    count: Annotated[int, typer.Option(min=1, help="Rewordings of a prompt, at most.")] = 2,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Have the model say the prompts of edits in other words, to be looked over and edited with."""
    from rose_engine.edits import EditError
    from rose_engine.files import replacing

    if out.is_dir():  # said before minutes of work, not after
        raise EditError("is a directory; name a file in it", str(out))
    facts = _facts(edits, format)
    reworded = load_editor(model, dtype, device).reword(facts, count=count)
    with replacing(out) as temporary:
        temporary.write_text("".join(json.dumps(edit.as_dict(), ensure_ascii=False) + "\n" for edit in reworded), "utf-8")
    print_rewordings({edit.prompt: edit.rewordings for edit in reworded})


@app.command()
def stream(
    ledger: Annotated[Path, typer.Option("--ledger", "-l", help="Directory of the ledger; it is made where there is none.")],
    edits: Annotated[str, typer.Option("--edits", "-e", help="JSONL file of edits; - reads standard input.")] = "-",
    model: ModelOption = "smollm2",
    name: Annotated[str | None, typer.Option(help="By which the stream is found again. Default: the file's path, or <stdin>.")] = None,
    rejects: Annotated[Path | None, typer.Option(help="JSONL file for lines that cannot be used. Default: LEDGER/rejects.jsonl.")] = None,
    strict: Annotated[bool, typer.Option(help="Stop at the first line that cannot be used.")] = False,
    require_success: Annotated[bool, typer.Option(help="Take back, alone, each fact that the model does not say afterwards.")] = False,
    require_certificate: Annotated[bool, typer.Option(help="Take back each subject whose deviation exceeds its tolerance radius.")] = False,
    max_wait: Annotated[float | None, typer.Option(help="Seconds that a begun batch waits for more lines. Default: without end.")] = None,
    rewordings: RewordingsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Apply edits batch by batch and commit each batch; started again, it goes on after the last commit."""
    from rose_engine.stream import stream as run

    editor = load_editor(model, dtype, device, rewordings)
    began, done, total = time.perf_counter(), 0, None
    with ExitStack() as stack:
        if edits == "-":
            # Not sys.stdin, whose lock a thread that waits for a line would hold while the interpreter ends.
            lines = open(os.dup(sys.stdin.fileno()), encoding="utf-8-sig", errors="surrogateescape")  # noqa: SIM115
        else:
            with _readable(edits):
                lines = stack.enter_context(open(edits, encoding="utf-8-sig", errors="surrogateescape"))
                if lines.seekable():
                    total = sum(1 for _ in lines)
                    lines.seek(0)
        name = name or ("<stdin>" if edits == "-" else str(Path(edits).resolve()))
        progress = stack.enter_context(progress_on_terminal("optimising"))
        options = {"rejects": rejects, "strict": strict, "max_wait": max_wait}
        options |= {"require_success": require_success, "require_certificate": require_certificate}
        steps = run(editor, ledger, lines, name, progress=progress, **options)
        for step in steps:
            for fact in step.failed:
                why = "not said" if fact.prompt_after.success < 1 else "not certified"
                errors.print(f"{why}: {fact.prompt.replace('{}', fact.subject)} {fact.target}", markup=False)
            done += step.commit.edits
            rate = done / (time.perf_counter() - began)
            failed = f", failed: {len(step.failed)}" if step.failed else ""
            failed += f", rejected so far: {step.rejected}" if step.rejected else ""
            left = f", {duration((total - step.lines) / rate)} left" if total else ""
            read = f"{step.lines} of {total}" if total else f"{step.lines}"
            print(
                f"commit {step.commit.number}: {step.commit.edits} edits, {read} lines read, {rate:.2f} edits/s{left}{failed}", flush=True
            )


def _deltas_of(source: Path, at: int | None = None) -> list[Delta]:
    """Those of a ledger, after commit `at` or the last, or the one of a file, which must have been made on the base alone."""
    from rose_engine import ledger as book
    from rose_engine.delta import Delta, DeltaError

    if source.is_dir():
        return book.deltas(source, at)
    delta = Delta.load(source)
    if below := delta.metadata["below"]:
        raise DeltaError(f"{source}: was made on top of {below} other edits; give the ledger that holds them all")
    return [delta]


@app.command()
def diagnose(
    source: Annotated[Path, typer.Argument(help="A delta file, or the directory of a ledger.")],
    model: ModelOption = "smollm2",
    others: OthersOption = None,
    plot: Annotated[Path | None, typer.Option(help="Write plots (PNG) and a page (HTML) into this directory.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON on standard output.")] = False,
) -> None:
    """Measure the geometry of edits: tolerance radius, deviation by form, neighbours, interference with others."""
    from rose_engine.certificate import subject_keys

    deltas = _deltas_of(source)
    names = _names(others)
    if plot:
        from rose_engine.diagrams import write_page  # says at once where matplotlib is missing
    editor = load_editor(model, dtype, device)
    certificate = editor.diagnose(deltas, others=names)
    if as_json:
        print(json.dumps(certificate.as_dict(), ensure_ascii=False))
    else:
        print_certificate(certificate)
    if plot:
        last = editor.decoder.weight_name(max(int(layer) for layer in certificate.subjects[0].by_layer))
        errors.print(f"wrote {write_page(plot, certificate, subject_keys(last, deltas))}", markup=False)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A delta file, or the directory of a ledger.")],
    model: ModelOption = "smollm2",
    checkpoint: Annotated[Path | None, typer.Option(help="Write the edited checkpoint here, a new folder.")] = None,
    peft: Annotated[Path | None, typer.Option(help="Write a PEFT LoRA adapter here, a new folder.")] = None,
    tensors: Annotated[Path | None, typer.Option(help="Write the edited tensors alone here, a safetensors file.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the adapter: at most so many; rounded up to one that servers accept.")] = None,
    tolerance: Annotated[float, typer.Option(help="Of the adapter: relative error that each weight's change may have.")] = 1e-6,
    at: Annotated[int | None, typer.Option(help="Of a ledger: the state after this commit. Default: the last.")] = None,
    adopt: Annotated[bool, typer.Option(help="The edits were made on this model in another precision, such as a quantised one.")] = False,
) -> None:
    """Ship edits: as a checkpoint, as a PEFT adapter, as tensors; one of them or several."""
    from rose_engine import export as ship
    from rose_engine.embedded import NAME, checkpoint_folder

    if not (checkpoint or peft or tensors):
        raise ship.ExportError("say what to write: --checkpoint, --peft or --tensors")
    deltas = _deltas_of(source, at)
    base = checkpoint_folder(model)
    if adopt:
        deltas = ship.adopted(base, deltas)
    if peft:
        ship.check_base(base, deltas)
        error = ship.export_peft(deltas, peft, base=str(base) if model == NAME else model, rank=rank, tolerance=tolerance)
        print(f"adapter, relative error {error:.1e}: {peft}")
    if checkpoint:
        print(f"checkpoint: {ship.export_checkpoint(base, deltas, checkpoint)}")
    if tensors:
        print(f"tensors: {ship.export_tensors(base, deltas, tensors)}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hugging Face id or local folder with a config.json, or smollm2 (embedded).")] = "smollm2",
    subjects: Annotated[int, typer.Option(min=1, help="How many subjects an edit has.")] = 1,
    facts: Annotated[int, typer.Option(min=1, help="How many facts of each.")] = 4,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what would be edited in a model, and what memory and time an edit would take, without loading its weights."""
    from rose_engine.inspect import inspect as look

    found = look(model, subjects=subjects, facts=facts, dtype=dtype, device=device)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print_inspection(found)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for delta.safetensors and report.json.")] = Path("demo-out"),
    model: ModelOption = "smollm2",
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Edit four facts of Imo State, ask about them, take the edit back, load it from its file."""
    from rose_engine.demo import run

    editor = load_editor(model, dtype, device)
    with progress_on_terminal("optimising") as progress:
        record = run(editor, lambda: load_editor(model, dtype, device), out, progress)
    if not (record["restored_bit_exact"] and record["loaded_answers_agree"]):
        errors.print("the edit was not taken back exactly, or its file gives other answers", style="red")
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Show versions, devices, and what serves each operator."""
    import torch
    import transformers

    from rose_engine import embedded
    from rose_engine.editor import versions
    from rose_kernels.backend import backends
    from rose_kernels.cache import cache_dir

    try:
        model = str(embedded.find_gguf())
    except embedded.MissingModelError as e:
        model = str(e)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    rows = {
        "rose-edit": versions()["rose-edit"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "CPU threads": str(torch.get_num_threads()),
        "CUDA devices": ", ".join(devices) or "none",
        "cache": str(cache_dir()),
        "embedded model": model,
    }
    for name, value in rows.items():
        print(f"{name:16s} {value}")
    for operator, served in backends().items():
        print(f"{operator:16s} {', '.join(f'{device}: {name}' for device, name in served.items())}")


def main() -> None:
    """Run the command line and turn what went wrong into a message and an exit code."""
    from rose_engine.architecture import UnsupportedModelError
    from rose_engine.delta import DeltaError
    from rose_engine.edits import EditError
    from rose_engine.embedded import MissingModelError
    from rose_engine.export import ExportError
    from rose_engine.ledger import LedgerError

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _quiet_library()
    signal.signal(signal.SIGINT, _interrupted)
    try:
        app()
    except (EditError, DeltaError, ExportError, LedgerError, UnsupportedModelError, MissingModelError, FileNotFoundError) as e:
        errors.print(f"error: {e}", style="red", markup=False)
        sys.exit(2)
    except (OSError, ValueError, ArithmeticError, RuntimeError) as e:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        errors.print(f"error: {e}", style="red", markup=False)
        sys.exit(1)


def _interrupted(number: int, frame: Any) -> None:
    """Unwind as an exit would: files under way are removed, weights under way restored."""
    errors.print("interrupted; nothing was left half written")
    raise SystemExit(130)


def _quiet_library() -> None:
    from transformers.utils import logging as library

    library.disable_progress_bar()


if __name__ == "__main__":
    main()
