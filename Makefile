# tokenmill: `make` alone lists the words.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
SEEDS  ?= 200
CASES  ?= 1000
FROM   ?= 0

.PHONY: help install up test check format simulate sampling clean

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

test: install    ## run all tests
	@$(BIN)/tokenmill pull >/dev/null
	@$(BIN)/python -m pytest $(ARGS)

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

clean:           ## remove the virtual environment and caches
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
