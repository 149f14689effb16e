# make setup | demo | test | test-devices | check | clean
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP  := $(VENV)/.stamp
BIN    := $(VENV)/bin
# Tests run in two processes, but for those that time a real runtime: these have the machine to themselves
JOBS   ?= 2

.PHONY: setup demo test test-devices check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[openvino,onnx,vision,plot,parquet,dev]'
	touch $@

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" sh examples/demo.sh

test-devices:
	.ci/devices

test: setup
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile -m "not timed"; others=$$?; \
	$(BIN)/python -m pytest -m timed && exit $$others

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

clean:
	rm -rf build dist edgeprune.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
