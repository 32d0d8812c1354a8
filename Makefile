# Everything from a fresh clone: `make demo`, `make test`. Needs Python 3.11 or newer; makes its own .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PRECISION ?= bf16# of the DDPM's evaluations in `make results`: fp32 if the device has no bf16 units

.PHONY: help demo install test lint results clean

help:
	@echo "make demo     install, draw digits from the shipped weights, train a DCGAN for a minute"
	@echo "make test     install the test requirements, run the tests"
	@echo "make lint     check style, format and types"
	@echo "make results  measure and draw reports/, samples/ and the generated tables, from the shipped checkpoints"
	@echo "make clean    remove .venv, runs and caches"

demo: install
	$(BIN)/python infer.py --out runs/demo/side_by_side.png
	$(BIN)/python inference.py --digit 9 --outdir runs/demo/digit_samples
	$(BIN)/python train_gan.py --dataset digits --width 16 --batch-size 64 --epochs 30 --no-early-stop --out-dir runs/demo

install: $(VENV)/installed

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

results: install
	$(BIN)/python evaluate.py --precision $(PRECISION) --out-dir reports
	$(BIN)/python benchmarks/samplers.py --precision $(PRECISION) --steps 5 10 15 20 --full-seeds 0
	$(BIN)/python benchmarks/pitfalls.py --precision $(PRECISION)
	$(BIN)/python benchmarks/self_check.py
	$(BIN)/python benchmarks/training_seeds.py reports
	$(BIN)/python infer.py --denoising-gif samples/diffusion_denoising.gif
	$(BIN)/python inference.py
	$(BIN)/python report.py

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
