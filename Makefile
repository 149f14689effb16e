# make setup | demo | test | test-devices | check | clean
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP  := $(VENV)/.stamp
BIN    := $(VENV)/bin
# Tests of one module run in two processes; what may time a real runtime has the machine to itself
JOBS   ?= 2
UNITS  := unit or golden

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
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile -m "$(UNITS)"; units=$$?; \
	$(BIN)/python -m pytest -m "not ($(UNITS))" && exit $$units

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

clean:
	rm -rf build dist edgeprune.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
