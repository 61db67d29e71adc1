"""The Debian package: that it fits the project, and its whole life in a chroot (`make proofs`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from vfiotool import __version__
from vfiotool.change.audit import LOG_FOLDER
from vfiotool.change.journal import RUN_FOLDER
from vfiotool.policy.saved import ETC_FOLDER

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = ROOT / "debian"
# What pyproject.toml needs and where the package has it from.
SOURCES = {
    "cffi": "python3-cffi-backend",
    "pyudev": "python3-pyudev",
    "rich": "python3-rich",
    "typer": "debian/rules",
}


def test_the_package_has_the_programs_version() -> None:
    first = (DEBIAN / "changelog").read_text().splitlines()[0]
    assert re.fullmatch(rf"vfiotool \({re.escape(__version__)}-\d+\) \S+; urgency=\w+", first)


def test_whatever_the_program_needs_the_package_has() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=!~ ]", line)[0] for line in declared}
    assert names == SOURCES.keys()
    control, rules = (DEBIAN / "control").read_text(), (DEBIAN / "rules").read_text()
    assert all(where in control for where in SOURCES.values() if not where.startswith("debian"))
    assert "'typer'" in rules and "requirements-run.lock" in rules


def test_a_purge_removes_every_folder_that_the_program_makes() -> None:
    script = (DEBIAN / "vfiotool.postrm").read_text()
    for folder in (ETC_FOLDER, RUN_FOLDER, LOG_FOLDER):
        assert re.search(rf"rm -rf .*{folder}\b", script), folder


def test_scripts_are_sound_shell() -> None:
    for path in (DEBIAN / "vfiotool.prerm", DEBIAN / "vfiotool.postrm", DEBIAN / "tests/smoke"):
        subprocess.run(["sh", "-n", str(path)], check=True)
    subprocess.run(["bash", "-n", str(ROOT / "tests/package/run")], check=True)


@pytest.mark.proof
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a chroot")
@pytest.mark.skipif(shutil.which("debootstrap") is None, reason="there is no debootstrap here")
def test_built_judged_installed_upgraded_and_purged_without_a_trace() -> None:
    done = subprocess.run([ROOT / "tests/package/run", "trixie"], capture_output=True, text=True)
    if done.returncode == 69:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "purged without a trace" in done.stderr and "\nE: " not in done.stderr
