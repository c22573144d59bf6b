# `make demo`, `make study`, `make bench`, `make test`, `make prove` and `make check` each make .venv and install into it
# first; nothing but make and Python 3.11 or newer has to be there. Another interpreter: `make setup PYTHON=python3.12`.
# A machine with its own torch (a GPU container, a cluster module): `SYSTEM_TORCH=1 make setup` keeps it.

PYTHON ?= python3
SYSTEM_TORCH ?= $(if $(wildcard .venv/.installed-system-torch),1)

own_torch := $(filter 1,$(SYSTEM_TORCH))
stamp := .venv/.installed$(if $(own_torch),-system-torch)
in_venv := PATH="$(CURDIR)/.venv/bin:$$PATH"

export OMP_NUM_THREADS ?= 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions
ifeq ($(wildcard /dev/nvidia[0-9]*),)
export DS_ACCELERATOR ?= cpu
endif

# Where Python is told to keep nothing compiled, each of hundreds of processes would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

KEEP := --output docs/measurements $(BENCH)

.PHONY: setup demo study bench test test-cluster prove check dashboards

setup: $(stamp)

demo: $(stamp)
	$(in_venv) bash launchers/demo.sh

# The paper in miniature on two cores, in half an hour; STUDY='--quick --output runs/quick' for two minutes of it.
study: $(stamp)
	$(in_venv) fdscale study $(STUDY)

# Speed and memory on this machine's CPUs, in some twenty minutes: steps, loader, ranks, checkpoint, start-up, each beside its
# ceiling, into docs/measurements. What this commit has given is not measured again; alone on the machine, or not at all.
bench: $(stamp)
	$(in_venv) fdscale bench step $(KEEP) --repeats 5 --figure docs/images/bench_step.png
	$(in_venv) fdscale bench loader $(KEEP) --workers 1 --workers 2 --images 1280
	$(in_venv) fdscale bench scaling $(KEEP)
	$(in_venv) fdscale bench checkpoint $(KEEP)
	$(in_venv) fdscale bench startup $(KEEP) --repeats 2

# Three at a time on two cores: a test on ranks, or of a launcher, waits for a third of its time.
test: $(stamp)
	$(in_venv) python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Real SLURM, sshd and Prometheus on this machine, in namespaces: needs root and Debian's packages, which it installs.
test-cluster: $(stamp)
	$(in_venv) python -m tests.cluster.lab packages
	$(in_venv) python -m pytest -m cluster tests/cluster tests/monitoring

# What takes hours in all: each measures, compares and writes its page in docs/measurements; done ones are skipped.
prove: $(stamp)
	$(in_venv) python -m pytest -m prove tests

# Grafana's JSON and the table of metrics, from their description in monitoring/grafana.
dashboards: $(stamp)
	$(in_venv) python -m monitoring.grafana.build

check: $(stamp)
	$(in_venv) ruff check .
	$(in_venv) ruff format --check .
	$(in_venv) mypy
	$(in_venv) shellcheck launchers/*.sh .ci/run
	$(in_venv) codespell

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fdscale needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); say: make setup PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(if $(own_torch),--system-site-packages) .venv

ifeq ($(own_torch),)
$(stamp): pyproject.toml constraints.txt | .venv/bin/pip
	.venv/bin/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@
else
# The torch that is there becomes a constraint itself, so that no dependency can replace it.
$(stamp): pyproject.toml constraints.txt | .venv/bin/pip
	@grep -q 'include-system-site-packages = true' .venv/pyvenv.cfg || \
	  { echo ".venv was made without the system's torch: remove it, then SYSTEM_TORCH=1 make setup" >&2; exit 1; }
	.venv/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/constraints.txt || \
	  { echo "SYSTEM_TORCH=1, but $(PYTHON) has no torch" >&2; exit 1; }
	grep -v -E '^(torch|torchvision)==' constraints.txt >> .venv/constraints.txt
	.venv/bin/python -m pip install --constraint .venv/constraints.txt --editable '.[demo,dev]'
	touch $@
endif
