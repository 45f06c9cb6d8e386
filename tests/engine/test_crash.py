"""A stream that is killed, and killed again, ends where an uninterrupted one does."""

import json
import random
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")
def test_killed_streams_lose_nothing_and_do_nothing_twice(make_model, tokenizer, tmp_path):
    """SIGKILL at 30 random moments, between and inside commits; after each the ledger verifies (in the script)."""
    make_model(initializer_range=0.2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["-m", "tests.engine.crash_stream", tmp_path / "model", tmp_path, 30, random.randrange(10**6)]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 30 and result["inside"] > 0 and result["commits"] == 40
    assert result["whole"]["edits"] == [f"Person {i}" for i in range(40)] and "no edit" in result["whole"]["rejects"]
    assert result["killed"] == result["whole"]
