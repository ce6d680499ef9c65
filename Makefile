# Two commands: `make quickstart` trains a hybrid on real prose, `make test` runs the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Test processes of one thread each beat one of two on these small tensors; a third fills what waits leave.
JOBS   ?= 3

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo-recall docs test test-gpu test-faults fuzz check format schema check-kernels
.PHONY: mutate clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv and install ssmtrain with its development tools

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh
	@touch $(STAMP)

quickstart: install ## Train a small hybrid on five novels, about four minutes on two cores
	$(BIN)/ssmtrain fit config=quickstart

demo-recall: install ## Train Mamba-2, attention and both on associative recall, and print what each gets right
	$(BIN)/ssmtrain fit config=recall model.layout=MM,AA,MA name=demo-recall --multirun

test: install ## The tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not multi_gpu and not faults" $(ARGS)

test-gpu: install ## The tests that need one GPU, or two
	$(BIN)/python -m pytest -m "gpu or multi_gpu" $(ARGS)

test-faults: install ## Sixty and fifty kills of training runs, at random moments and inside saves; N=1000 of each
	$(if $(N),SSMTRAIN_FAULT_KILLS=$(N) )$(BIN)/python -m pytest -m faults $(ARGS)

fuzz: install ## Inputs made at random for whatever reads a page, a text, a shard or a checkpoint; N=20000 of each
	FUZZ=$(or $(N),2000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --timeout 7200 $(wildcard tests/*/test_*_fuzz.py) $(ARGS)

docs: install ## Build the documentation into site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

check-kernels: install ## Compile every Triton kernel for five GPU architectures, without a GPU
	$(BIN)/python scripts/check_kernels.py $(ARGS)

mutate: install ## Break the Triton kernels on purpose and see that tests notice
	$(BIN)/python scripts/mutate_kernels.py $(ARGS)

check: install ## Lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: install ## Regenerate the schema that --help, completion and editors read
	$(BIN)/python scripts/make_schema.py

clean: ## Remove the environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist site
