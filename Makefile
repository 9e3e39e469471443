# tokenmill: `make` alone lists the words.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TOOLS  := $(VENV)-tools
ARGS   ?=
SEEDS  ?= 200
CASES  ?= 1000
FROM   ?= 0
JOBS   ?= 2

.PHONY: help install up test check format simulate sampling sbom audit clean

help:            ## list these words
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch first and through pip alone: pip takes a CPU build where one is provided
$(BIN)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "python3 (3.11 or newer) is needed"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: pass PYTHON=python3.12, say"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.*'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "no C++ compiler here: taking the one in the PyPI package ziglang"; \
		  $(BIN)/python -m pip install --quiet --disable-pip-version-check ziglang; }
	@touch $@

install: $(BIN)/.installed   ## make the virtual environment

up: install      ## start the whole mesh here (ARGS="--workers 2" passes options on)
	@$(BIN)/tokenmill up $(ARGS)

# files side by side: many a test waits for processes more than it computes
test: install    ## run all tests (JOBS=2 at once)
	@$(BIN)/tokenmill pull >/dev/null
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: install   ## ruff, mypy, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

simulate: install ## play SEEDS fault schedules of the whole mesh, from seed FROM on
	@$(BIN)/python -m tests.laws.simulate --seeds $(SEEDS) --from $(FROM)

sampling: install ## check CASES requests with random sampling parameters, from number FROM on
	@$(BIN)/python -m tests.laws.sampling --cases $(CASES) --from $(FROM)

format: install  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .

# beside the environment they look at, which has no need of them
$(TOOLS)/.installed: Makefile
	@test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check 'cyclonedx-bom>=7,<8' 'pip-audit>=2.10,<3'
	@touch $@

sbom: install $(TOOLS)/.installed ## write sbom.json: all that is installed, as CycloneDX
	@$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o sbom.json
	@$(BIN)/python -c 'import json; print("sbom.json:", len(json.load(open("sbom.json"))["components"]), "components")'

# strict: a package that could not be looked up is not one that is fine. Builds (+cpu) are known by their release
audit: install $(TOOLS)/.installed ## ask PyPI for known weaknesses of all that is installed
	@$(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check | sed 's/+.*//' > $(TOOLS)/installed.txt
	@$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(TOOLS)/installed.txt

clean:           ## remove the virtual environment and caches
	@rm -rf $(VENV) $(TOOLS) sbom.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
