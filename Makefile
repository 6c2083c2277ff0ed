# fastres: `make` prints what there is. PYTHON=python3.12 make demo  chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build
export MAX_JOBS ?= 2

CUDA := $(or $(FASTRES_CUDA),auto)
INSTALLED := $(BUILD)/.installed-cuda-$(CUDA)
PACKAGED := setup.py pyproject.toml $(shell find csrc kernels -type f 2>/dev/null)
LINTED := setup.py fastres kernels tests bench
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench bench-networks sanitize gpu clean distclean

help:
	@echo "make demo    set up, convert torchvision's resnet50, compare it with eager and torch.compile"
	@echo "make test    set up and run the tests"
	@echo "make lint    ruff and clang-format, checking only (make format: rewriting)"
	@echo "make bench   the benchmarks, into bench/results/<device>/ (K='bn_relu and 7x7': some, into $(BUILD)/bench)"
	@echo "make bench-networks   more networks, sizes and batches in inference, first calls and memory (K= selects)"
	@echo "make sanitize   the CPU's convolutions and memory under g++'s sanitizers, and valgrind if it is there"
	@echo "make gpu     on a machine with a GPU: build, tests, ceilings, benchmarks, sanitizer, within 9 minutes,"
	@echo "             into bench/results/<device>/ (S=ceilings,convolutions: some sections)"
	@echo "make setup   only set up: $(VENV), pinned dependencies, the extension"
	@echo "make clean   remove what was built (make distclean: $(VENV) too)"

# --- set-up: each step leaves a stamp, so that it runs again only when what it reads has changed ---

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One call of pip for everything: torchvision must not pull another torch than the pinned one.
$(VENV)/.requirements: requirements-dev.txt | $(BIN)/python
	@echo "--- dependencies: pip into $(VENV) (the longest step; some GB with a CUDA build of torch)"
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

$(INSTALLED): $(VENV)/.requirements $(PACKAGED)
	@echo "--- fastres: the extension, FASTRES_CUDA=$(CUDA), $(MAX_JOBS) jobs"
	@rm -f $(BUILD)/.installed-*
	$(BIN)/python -m pip install --verbose --no-build-isolation --no-deps -e .
	@mkdir -p $(BUILD) && touch $@

setup: $(INSTALLED)

# --- what people run ---

demo: setup
	@mkdir -p $(BUILD)/demo
	$(BIN)/fastres info
	$(BIN)/fastres compare torchvision:resnet50 --json $(BUILD)/demo/resnet50.json

test: setup
	$(BIN)/pytest

lint: $(VENV)/.requirements
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(CXX_FILES)

K ?=
bench: setup
	@mkdir -p $(BUILD)/bench
	$(BIN)/pytest bench/ --ignore=bench/bench_networks.py --benchmark-json=$(BUILD)/bench/raw.json $(if $(K),-k "$(K)")
	$(BIN)/python bench/report.py $(BUILD)/bench/raw.json --out $(if $(K),$(BUILD)/bench,bench/results)

bench-networks: setup
	@mkdir -p $(BUILD)/bench
	$(BIN)/pytest bench/bench_networks.py --benchmark-json=$(BUILD)/bench/networks.json $(if $(K),-k "$(K)")
	$(BIN)/python bench/report.py $(BUILD)/bench/networks.json --name networks --out $(if $(K),$(BUILD)/bench,bench/results)

sanitize: $(VENV)/.requirements
	$(MAKE) -C tests/native

# Sets up nothing and needs no network: the machine has its own PyTorch and Triton.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
S ?=
gpu:
	$(GPU_PYTHON) bench/gpu.py $(if $(S),--sections $(S))

clean:
	rm -rf $(BUILD) dist *.egg-info fastres/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastres kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
