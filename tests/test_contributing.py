"""CONTRIBUTING.md's diffs, each applied to a copy of the tree and then used."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
_HUNK = re.compile(r"^@@ .*?@@.*\n((?:[ +-].*\n|\n)*)", re.MULTILINE)
FIXTURE = ROOT / "fixtures" / "hosts" / "shared-group"


def diffs() -> dict[str, str]:
    """The diff below each heading of the page."""
    found = re.findall(r"^### … (?:a|an) (.+?)\n(.*?)^```diff\n(.*?)^```$", PAGE, re.M | re.S)
    return {name: text for name, _, text in found}


def apply(diff: str, folder: Path) -> list[str]:
    """Apply a unified diff whose hunks are found by their content; the files that it touches."""
    touched = []
    for part in re.split(r"(?m)^--- ", diff)[1:]:
        old, new, hunks = re.match(r"(\S+)\n\+\+\+ (\S+)\n(.*)", part, re.S).groups()  # type: ignore[union-attr]
        path = folder / new.removeprefix("b/")
        text = "" if old == "/dev/null" else path.read_text(encoding="utf-8")
        for hunk in _HUNK.findall(hunks):
            lines = [line or " " for line in hunk.splitlines()]
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            assert text.count(before) == 1 or not text, f"{path}: the page's diff is out of date"
            text = text.replace(before, after, 1) if text else after
        path.write_text(text, encoding="utf-8")
        touched.append(new.removeprefix("b/"))
    return touched


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    # With the byte code: what is not touched need not be compiled again.
    for name in ("vfiotool", "tests", "docs", "cext", "fixtures"):
        ignored = shutil.ignore_patterns("bench") if name == "tests" else None
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


# What is done with each, in the copy; it has to print what stands here.
USES = {
    "kind of blocker": (
        """
from tests.usage.why_page import PAGE, with_kinds
from vfiotool.change import guard
from vfiotool.usage.blocker import KINDS
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree
from vfiotool.usage.network import rdma_usage
class Function:
    address, path = "0000:01:00.0", "/sys/devices/pci0000:00/0000:01:00.0"
from vfiotool.usage.sight import Sight
tree = MemoryTree({Function.path + "/infiniband/mlx5_0/ports/1/state": b"4: ACTIVE\\n"}, {})
host = Host(tree, live=False, name="x")
found = rdma_usage(Sight(host), Function()).blockers
print([blocker.kind for blocker in found], "rdma-port" in with_kinds(PAGE.read_text()))
""",
        "['rdma-port'] True",
    ),
    "step": (
        """
from vfiotool.change.steps.registry import step_from_json, step_kinds, step_to_json
kind = step_kinds()["set-runtime-power"]
step = kind("0000:01:00.0", "auto", "on")
print(step_from_json(step_to_json(step)) == step, step.inverse().after, step.undo_text())
""",
        "True auto set auto",
    ),
    "command": (
        f"""
from vfiotool.cli.main import main
main(["--root", {str(FIXTURE)!r}, "numa", "--json"])
""",
        '"nodes"',
    ),
    "importer": (
        """
from vfiotool.policy.importers import import_files
text = "xl pci-assignable-add 0000:03:00.0\\nreboot\\n"
found = import_files("xen.sh", {"xen.sh": text})
print(found.kind, "0000:03:00.0" in found.policy, found.leftovers[0].what)
""",
        "xen True reboot",
    ),
    "driver": (
        """
from vfiotool.drivers import find_driver
print(find_driver(0x1AF4, 0x1110, 0x050000), find_driver(0x1AF4, 0x1111, 0x050000))
""",
        "ivshmem None",
    ),
}


def test_every_diff_of_the_page_is_used() -> None:
    assert diffs().keys() == USES.keys()


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", USES)
def test_what_the_page_says_works(name: str, copy: Path) -> None:
    touched = apply(diffs()[name], copy)
    assert len(touched) <= 3
    code, printed = USES[name]
    done = run(copy, "-c", code)
    assert done.returncode == 0 and printed in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_all_of_it_together_keeps_the_rules(copy: Path) -> None:
    touched = [file for diff in diffs().values() for file in apply(diff, copy)]
    python = [file for file in touched if file.endswith(".py")]
    layout = ("tests/test_layout.py", "-k", "keeps_the_rule")
    for arguments in (
        ("pytest", "-q", "-p", "no:cacheprovider", *layout),
        ("ruff", "check", *python),
        ("ruff", "format", "--check", *python),
    ):
        done = run(copy, "-m", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
