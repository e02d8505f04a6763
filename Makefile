# Everything from a fresh clone: each target makes its own virtual environment in
# .venv, installs torch and builds the extension, once.
#
#   make demo    train a VAE with the fused op      (ARGS="--epochs 20" passes options on)
#   make test    run the tests, on the CPU and on the stand-in GPU
#                                                   (ARGS="-m slow" runs the exhaustive ones)
#   make gpu     run a program on the stand-in GPU  (SCRIPT=path, ARGS="..." are its own)
#   make integrations    run the tests with Pyro, diffusers and others, which it installs
#   make sanitize    the sanitizers of address, undefined behaviour and threads, and valgrind
#   make bench   compare speed with the rivals       (ARGS="-k calls": some of the cases)
#   make pages   measure, and write the figures of README and docs anew
#   make docs    build the documentation into build/site
#   make wheel   the sdist and the wheels of a release in dist/, checked
#   make release the same, and prints what is left to do by hand: it uploads nothing
#   make lint    ruff, clang-format and mypy
#
# What is tested is the wheel that was built; the tree has its libraries too, for a Python
# that is started in it.
#
# TORCH picks the release, PYTHON the interpreter: make test TORCH=torch==2.13.0

PYTHON ?= python3
TORCH ?= torch==2.14.1
# Processors of further wheels, by their cross compilers (Debian: g++-aarch64-linux-gnu)
CROSS ?= aarch64-linux-gnu
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc reparam_fused -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

.PHONY: demo test gpu integrations sanitize bench pages docs wheel release lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/python examples/train_vae.py $(ARGS)

# Once without a GPU, then with a stand-in for one under torch, by either kind of kernels.
# Of the stand-in's tests none takes more than one core.
test: $(VENV)/test
	$(BIN)/pytest $(ARGS)
	$(BIN)/python tests/gpu/run.py -m pytest -n 2 $(ARGS)
	$(BIN)/python tests/gpu/run.py --triton -m pytest -n 2 $(ARGS)

gpu: $(VENV)/test
	$(BIN)/python tests/gpu/run.py $(SCRIPT) $(ARGS)

integrations: $(VENV)/integrations
	$(BIN)/pytest tests/integrations $(ARGS)

# Built into build/sanitize/, of flags of its own; see tests/sanitize.py
sanitize: $(VENV)/test
	$(BIN)/python tests/sanitize.py address,undefined
	$(BIN)/python tests/sanitize.py thread
	$(BIN)/python tests/sanitize.py memcheck

bench: $(VENV)/bench
	$(BIN)/pytest benchmarks $(ARGS)

pages: $(VENV)/bench
	cd benchmarks && ../$(BIN)/python -m reparam_fused bench --json results/cpu.json
	cd benchmarks && ../$(BIN)/python pages.py

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/release
	tests/wheel/make.sh $(BIN) $(CROSS)

release: wheel
	@sed -n '/^## By hand/,$$p' RELEASING.md

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu*')
	$(BIN)/mypy

# torch comes first, in a step of its own: the extension builds against it.
$(VENV)/torch:
	@echo "== virtual environment in $(VENV), $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on "$(TORCH)" "setuptools>=77" wheel ninja numpy
	@touch $@

# Building again after a change costs seconds: build/ keeps what has not changed.
$(VENV)/wheel: $(VENV)/torch $(SOURCES)
	@echo "== building reparam_fused (a minute or two, once)"
	rm -rf $@
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w $@ .

$(VENV)/demo $(VENV)/test $(VENV)/integrations $(VENV)/bench $(VENV)/docs $(VENV)/dev $(VENV)/release: $(VENV)/wheel
	@echo "== installing the wheel and what 'make $(@F)' needs"
	$(BIN)/python -m pip install --no-deps --force-reinstall $</*.whl
	$(BIN)/python -m pip install "$$(echo $</*.whl)[$(@F)]"
	@$(BIN)/python -c "import reparam_fused; print(*(f'== {k}: {v}' for k, v in reparam_fused.backends().items()), sep='\n')"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
