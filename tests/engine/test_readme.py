"""The README's Python runs as it stands."""

import contextlib
import io
import re
from pathlib import Path


def test_readme_python_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    scope: dict = {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), scope)
    lines = dict(line.split(": ", 1) for line in printed.getvalue().splitlines() if ": " in line)
    assert "sing" in lines["after"].lower() and "sing" in lines["with the adapter"].lower()
    assert lines["before"] == lines["reverted"] == lines["beside it"] != lines["after"]
    assert float(lines["previewed"]) > 0 and lines["commit"].startswith("1 ")
    assert scope["result"].report.mean("prompt_after") > scope["result"].report.mean("prompt_before")
    assert (tmp_path / "marteau.safetensors").stat().st_size < 3_000_000
