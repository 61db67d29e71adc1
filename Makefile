# make demo and make test set up all that they need by themselves; see bootstrap.
SHELL := /bin/bash
PY := .venv/bin/python
# Tests of this machine are spread over its processors, a file's tests in one process; more than four
# processes would only make set-up more often.
# Files of long tests first (tests/conftest.py), so that none is left over for the end.
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
LAB_KERNELS := 6.1 6.12 iommufd
# As Debian calls them: the releases that a bare machine is tried with.
BARE := bookworm trixie

.PHONY: help venv demo check test test-host proofs bare soak lab lint lock bench dist deb site clean

help:
	@echo "make demo       show the whole way of a device, in a guest with a virtual IOMMU"
	@echo "make check      what a change needs before it is sent: under a minute, no guests"
	@echo "make test       all tests: on this machine, and in guests on three kernels"
	@echo "make test-host  all tests that need no guest: about three minutes (some: ARGS=tests/vfio)"
	@echo "make proofs     the long tests too: every file in guests, soaks, kill sweeps, power"
	@echo "                loss, bare machines"
	@echo "make bare       demo and test in chroots of Debian 12 and 13 that have nothing (root)"
	@echo "make soak       a million mappings, resets and so on, over each backend: an hour or more"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the figures of docs/benchmarks.md"
	@echo "make venv       .venv, with vfiotool in .venv/bin (what ./bootstrap does)"
	@echo "make lab        fetch and build the lab's QEMU and kernels ($(LAB_KERNELS))"
	@echo "make dist       source archive and wheel, in dist/"
	@echo "make deb        the Debian package, built and tried in a chroot, in dist/ (root)"
	@echo "make site       the documentation as a web site, in build/site"
	@echo "make lock       requirements.lock anew, from the newest versions"
	@echo "make clean      remove .venv and all that was built"

venv:
	@./bootstrap

demo: venv
	@$(PY) -m vfiotool lab demo

check: venv
	$(PY) -m pytest -q $(SPREAD) -m "not lab and not slow"

# What cannot be had here is said here once, and its tests are skipped with the reason.
lab: venv
	@for kernel in $(LAB_KERNELS); do \
		echo "==> lab kernel $$kernel" >&2; \
		$(PY) -m vfiotool lab kernels --get $$kernel >/dev/null || true; \
	done

# Guests beside the tests of this machine, in a process of their own: what one test does to its
# process (environment, signals, forks) is not to reach a guest. What they need is fetched and built
# meanwhile. One guest at a time until this machine's tests are over, then as many as there are
# processors; tests that boot guests of their own come first, files in guests beside them. What
# became of them is printed last.
define BOTH
beside=$$(mktemp) log=$$(mktemp); trap 'rm -f $$beside $$log' EXIT; \
{ $(MAKE) --no-print-directory lab; \
  VFIOTOOL_LAB_BESIDE=$$beside $(PY) -m pytest -m lab; } >$$log 2>&1 & guests=$$!; \
$(PY) -m pytest $(SPREAD) -m "not lab"; host=$$?; \
rm $$beside; echo "==> tests in guests" >&2; wait $$guests; lab=$$?; cat $$log; \
[ $$host = 0 ] && [ $$lab = 0 ]
endef

test: venv
	@$(BOTH)

proofs: venv
	@export VFIOTOOL_PROOFS=1; $(BOTH)
	$(MAKE) bare

# Each begins with nothing: no Python, no compiler, an empty cache.
bare:
	@failed=; \
	for suite in $(BARE); do \
		for what in "demo" "demo visitor" "test"; do \
			tests/bare/run $$suite $$what || failed="$$failed $$suite/$${what// /-}"; \
		done; \
		BARE_PACKAGES=qemu-system-x86 tests/bare/run $$suite demo || \
			failed="$$failed $$suite/with-qemu"; \
	done; \
	[ -z "$$failed" ] || { echo "bare machines failed:$$failed" >&2; exit 1; }

# 0000:05:00.0 is an NVMe disk of the machine; edu cannot be reset.
SOAK := $(PY) tests/lab/soak_vfio.py --full --reset-device 0000:05:00.0
soak: lab
	@for place in 6.12:type1 iommufd:type1 iommufd:iommufd; do \
		echo "==> $$place" >&2; \
		$(PY) -m vfiotool lab run --machine storage --kernel $${place%%:*} --timeout 14400 -- \
			env PYTHONPATH=$(CURDIR) $(SOAK) --backend $${place##*:} || exit 1; \
	done

test-host: venv
	$(PY) -m pytest $(SPREAD) -m "not lab" $(ARGS)

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: venv
	$(PY) -m tests.bench

lock:
	@.ci/lock

dist: venv
	rm -rf dist
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist .
	$(PY) -c 'from setuptools.build_meta import build_sdist; print("dist/" + build_sdist("dist"))'

deb:
	tests/package/run

site: venv
	$(PY) -m pip install -q "mkdocs>=1.6,<2"
	$(PY) -m mkdocs build --strict --quiet --site-dir build/site

clean:
	rm -rf .venv build dist vfiotool.egg-info vfiotool/native/*.so
