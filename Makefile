# make setup | demo | test | test-devices | check | clean
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP  := $(VENV)/.stamp
BIN    := $(VENV)/bin
# JOBS=2 runs the tests in two processes: faster, but what times real runtimes may find the machine too busy
JOBS   ?= 0
TEST   := $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile

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
	$(TEST)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST)

clean:
	rm -rf build dist edgeprune.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
