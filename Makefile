# make demo | make test | make gpu | make docs | make lab      (each sets up .venv first; nothing else is needed)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test gpu docs lab notebooks clean
.DELETE_ON_ERROR:

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"ctvlm needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.11")'
	@echo "Setting up $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/ctvlm demo -o runs/demo $(if $(SCAN),--scan "$(SCAN)")

test: $(READY)
	$(BIN)/python tools/check_export.py
	$(BIN)/ruff check
	$(BIN)/mypy
	cd nbs && $(CURDIR)/$(BIN)/nbdev_test --n_workers 2 --path .
	$(BIN)/python -m pytest tests

# With a graphics card: tests, benchmarks and cells that need one. make gpu PART=encoder; GPU_PYTHON=python3 takes the Python that is there.
gpu: $(if $(GPU_PYTHON),,$(READY))
	$(or $(GPU_PYTHON),$(BIN)/python) tools/gpu.py $(PART)

docs: $(READY)
	$(BIN)/python tools/build_docs.py

lab: $(READY)
	$(BIN)/jupyter lab nbs

# Run notebooks in place and keep their outputs: make notebooks NB="nbs/02g_mining.ipynb"
notebooks: $(READY)
	$(BIN)/python tools/run_notebooks.py $(NB)

clean:
	rm -rf runs _docs _proc build dist
