# make demo and make test set up all that they need by themselves; see bootstrap.
SHELL := /bin/bash
PY := .venv/bin/python
LAB_KERNELS := 6.1 6.12 iommufd

.PHONY: help venv demo test test-host proofs lab lint bench clean

help:
	@echo "make demo       show the whole way of a device, in a guest with a virtual IOMMU"
	@echo "make test       all tests: on this machine, and in guests on three kernels"
	@echo "make proofs     the long tests too: every file in guests, soaks, kill sweeps, power loss"
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

test-host: venv
	$(PY) -m pytest -m "not lab"

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: venv
	$(PY) -m tests.bench

clean:
	rm -rf .venv build vfiotool.egg-info vfiotool/*.so
