"""How every benchmark tells its result: as JSON, on standard output or in a file, or as text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument("--json", default=None, metavar="FILE", help="write the result as JSON, - for standard output")


def emit(result: Any, where: str | None, text: str) -> None:
    """Print a result as JSON where `where` is -, write it as JSON into the file that it names, or print `text` where it is None."""
    if where == "-":
        print(json.dumps(result))
    elif where:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        Path(where).write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(text)
