"""The manual: its Python runs, its API page is made from the docstrings, its links and messages exist."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def printed_by(page, tmp_path, monkeypatch):
    """What the Python blocks of a page print, run in order as one program."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(page), "exec"), {})
    return dict(line.split(": ", 1) for line in out.getvalue().splitlines() if ": " in line)


def test_the_first_edit(tmp_path, monkeypatch):
    said = printed_by(ROOT / "docs" / "README.md", tmp_path, monkeypatch)
    assert "sing" in said["says"].lower() and said["says again"] != said["says"] and (tmp_path / "marteau.safetensors").exists()


@pytest.mark.slow
def test_how_to(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    said = printed_by(ROOT / "docs" / "how-to.md", tmp_path, monkeypatch)
    assert "sing" in said["4 bits"].lower() and float(said["adopted"]) > float(said["before"])
    assert said["committed"] == "1" and said["standing"] == "0" and float(said["compressed to rank 32, relative error"]) < 0.05


def test_only_these_pages_have_python():
    assert {page.name for page in PAGES if "```python" in page.read_text()} == {"README.md", "how-to.md"}


def test_the_api_page_is_made_from_the_docstrings():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert (ROOT / "docs" / "api.md").read_text() == make_api.page(), "run `python docs/make_api.py`"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_messages_are_those_of_the_code():
    """Each message of the troubleshooting page, between its ellipses, stands in the source, whose literals may be split over lines."""
    source = "".join(path.read_text() for path in (ROOT / "engine").rglob("*.py"))
    source += "".join(path.read_text() for path in (ROOT / "rose_kernels").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = re.findall(r"^\| `([^`]*)`.*\|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(rows) > 15
    for message in rows:
        for part in (part.strip() for part in message.split("...")):
            assert part in joined.replace("`", ""), message
