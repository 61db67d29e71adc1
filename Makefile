# make demo and make test set up all that they need by themselves; see bootstrap.
SHELL := /bin/bash
PY := .venv/bin/python
LAB_KERNELS := 6.1 6.12 iommufd

.PHONY: help venv demo test test-host proofs soak lab lint bench clean

help:
	@echo "make demo       show the whole way of a device, in a guest with a virtual IOMMU"
	@echo "make test       all tests: on this machine, and in guests on three kernels"
	@echo "make proofs     the long tests too: every file in guests, soaks, kill sweeps, power loss"
	@echo "make soak       a million mappings, resets and so on, over each backend: an hour or more"
	@echo "make test-host  the tests that need no guest"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the figures"

venv:
	@./bootstrap

demo: venv
	@$(PY) -m vfiotool lab demo

# What cannot be had here is said here once, and its tests are skipped with the reason.
lab: venv
	@for kernel in $(LAB_KERNELS); do \
		echo "==> lab kernel $$kernel" >&2; \
		$(PY) -m vfiotool lab kernels --get $$kernel >/dev/null || true; \
	done

test: lab
	$(PY) -m pytest

proofs: lab
	VFIOTOOL_PROOFS=1 $(PY) -m pytest

# 0000:05:00.0 is an NVMe disk of the machine; edu cannot be reset.
SOAK := $(PY) tests/lab/soak_vfio.py --full --reset-device 0000:05:00.0
soak: lab
	@for place in 6.12:type1 iommufd:type1 iommufd:iommufd; do \
		echo "==> $$place" >&2; \
		$(PY) -m vfiotool lab run --machine storage --kernel $${place%%:*} --timeout 14400 -- \
			env PYTHONPATH=$(CURDIR) $(SOAK) --backend $${place##*:} || exit 1; \
	done

test-host: venv
	$(PY) -m pytest -m "not lab"

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: venv
	$(PY) -m tests.bench

clean:
	rm -rf .venv build vfiotool.egg-info vfiotool/native/*.so
