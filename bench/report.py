"""The paper's tables and figures for results of `bench.run`, as Markdown, PNG and one self-contained HTML page.

    python -m bench.report OUT [OUT ...] [--to FOLDER]

Every folder of results becomes a section: `instructed` is laid out as the paper's Table 1 (and 4, for another model), `locomo` as its
Table 2, `ablation` as Fig. 6, `declarative` as Fig. 16, `sequential` as Fig. 20, time and memory as Fig. 18; means over subjects stand
with their standard errors. report.md, report.html and a PNG for each plot go to the folder; the page holds them all, and browsable
cases: what was asked, what the unedited model said, what each recipe says, what was wanted.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path

from rose_engine.files import write_files
from rose_engine.web import picture, table

from bench.tables import TITLES, Results, read_results

PAGE = Path(__file__).with_name("page.html")


def markdown(every: Sequence[Results], drawn: Sequence[Sequence[str]]) -> str:
    """The tables, and the plots by their files' names."""
    parts = ["# Results"]
    for results, names in zip(every, drawn, strict=True):
        head, rows = results.table()
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        parts += [f"## {TITLES[results.suite]}", results.told(), "\n".join(lines), *(f"![{name}]({name}.png)" for name in names)]
    return "\n\n".join(parts) + "\n"


def page(every: Sequence[Results], drawn: Sequence[Sequence[str]], pictures: dict[str, bytes]) -> str:
    """The HTML page, with everything in it."""
    e = html.escape
    links = [f'<a href="#s{i}">{e(TITLES[results.suite])}</a>' for i, results in enumerate(every)]
    body = ["<nav>", *links, '<a href="#browse">Cases</a>', "</nav>"]
    for i, (results, names) in enumerate(zip(every, drawn, strict=True)):
        head, rows = results.table()
        body += [f'<h2 id="s{i}">{e(TITLES[results.suite])}</h2>', f'<p class="note">{e(results.told())}</p>', table(head, rows)]
        body += [picture(name, pictures[name]) for name in names]
    # "<" in a text would be read as the end of the element that holds the cases.
    cases = json.dumps([case for results in every for case in results.cases()], ensure_ascii=False).replace("<", "\\u003c")
    before, _, rest = PAGE.read_text("utf-8").partition("<!--SECTIONS-->")
    between, _, after = rest.partition("/*CASES*/")
    return before + "\n".join(body) + between + cases + after


def report(folders: Sequence[Path], out: Path) -> None:
    """Write report.md, report.html and the plots of some folders of results into `out`."""
    from rose_engine.diagrams import png

    from bench.plots import plots  # needs matplotlib, as `diagrams` does

    every = [read_results(folder) for folder in folders]
    pictures: dict[str, bytes] = {}
    drawn: list[list[str]] = []
    for i, results in enumerate(every):
        drawn.append([])
        for name, figure in plots(results).items():
            name = f"{name}_{i + 1}" if name in pictures else name
            pictures[name] = png(figure)
            drawn[-1].append(name)
    files = {"report.md": markdown(every, drawn).encode(), "report.html": page(every, drawn, pictures).encode()}
    write_files(out, files | {f"{name}.png": drawing for name, drawing in pictures.items()})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="a folder that bench.run has written")
    parser.add_argument("--to", type=Path, default=None, metavar="FOLDER", help="where the report goes; default: the first OUT")
    args = parser.parse_args(argv)
    to = args.to or args.folders[0]
    try:
        report(args.folders, to)
    except ModuleNotFoundError as e:
        if e.name != "matplotlib":
            raise
        raise SystemExit("the plots need matplotlib: pip install 'rose-edit[bench]'") from e
    print(to / "report.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
