# `make demo` and `make test` set everything up themselves; a second run skips the set-up.
# the first that runs: version managers leave names on the PATH behind which nothing is installed
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import venv' 2>/dev/null && { echo $$p; break; }; done)
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test check fix bench gpu gpu-wheels clean
setup: $(READY)

# torch first and pinned: any later package that pulled its own torch would bring a CUDA build of several gigabytes.
# deepspeed is a source package that looks at the installed torch, hence no build isolation. The registry's torchaudio
# carries CUDA libraries that cannot load beside a CPU torch and would break `import transformers`: only its Python parts
# (resampling, mel filters) are kept.
$(READY): setup.py constraints-cpu.txt Makefile
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), f"Python 3.11 or 3.12 is needed, found {sys.version.split()[0]}; set PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints-cpu.txt pip wheel "setuptools<85" ninja
	$(BIN)/pip install -q -c constraints-cpu.txt $(TORCH)
	$(BIN)/python -c 'import sys, torch; torch.version.cuda and sys.exit("expected a CPU build of torch, found one for CUDA; run: rm -rf $(VENV); make setup TORCH=\"torch --index-url https://download.pytorch.org/whl/cpu\"")'
	$(BIN)/pip install -q -c constraints-cpu.txt --no-deps torchaudio
	find $(VENV) -path '*/torchaudio/lib/*.so' -delete
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints-cpu.txt --no-build-isolation deepspeed
	$(BIN)/pip install -q -c constraints-cpu.txt --no-build-isolation -e '.[demo,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/mmscale demo demo

# Two workers share what runs in one process or waits; what fills the machine with processes comes alone afterwards. Both parts
# run even if the first one fails.
SHARED := tests/unit tests/numerics tests/layout tests/aot tests/integration
test: $(READY)
	@failed=0; \
	$(BIN)/pytest -q -n 2 --dist loadfile $(SHARED) || failed=1; \
	$(BIN)/pytest -q $(addprefix --ignore=,$(SHARED)) || failed=1; \
	exit $$failed

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/layout

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m mmscale.config.reference > docs/configuration.md

bench: $(READY)
	$(BIN)/python -m benchmarks.run $(ONLY)

# For a machine with a GPU, its own CUDA torch, triton and transformers, and no network; see docs/gpu-benchmarks.md.
# Other packages that it lacks come from wheels/, which `make gpu-wheels` fills where there is a network.
PART ?= all
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu.wheels install build/gpu-site
	PYTHONPATH=.:build/gpu-site:$(PYTHONPATH) $(GPU_PYTHON) -m benchmarks.gpu --part $(PART) $(if $(ONLY),--only $(ONLY))

gpu-wheels: $(READY)
	$(BIN)/python -m benchmarks.gpu.wheels download

clean:
	rm -rf $(VENV) demo build *.egg-info
