"""The layout's rules, held against the code; each is shown to bite on a planted violation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import pytest

from tests.draw_layout import PICTURE, draw
from tests.layout import MEDIAN_FILE, ROOT, RULES, Tree, figures

# What each rule reports, planted in a copy of the tree: a file, what is added to it, what is said.
PLANTED = {
    "arrows_up": ("vfiotool/host/child.py", "import vfiotool.usage.verdict\n", "usage.verdict"),
    "circles": (
        "vfiotool/netlink/codec.py",
        "def late():\n    from vfiotool.netlink.route import set_vf\n    return set_vf\n",
        "netlink.codec -> netlink.route",
    ),
    "past_the_face": (
        "vfiotool/drivers/edu.py",
        "def late():\n    import vfiotool.vfio.type1\n",
        "vfio.type1 past vfiotool/vfio/__init__.py",
    ),
    "paths_elsewhere": ("vfiotool/usage/nodes.py", 'X = f"/dev/{1}"\n', "'/dev/'"),
    "extensions_elsewhere": (
        "vfiotool/vfio/region.py",
        "from vfiotool.native._types import Window\n",
        "native._types",
    ),
    "host_writes_elsewhere": (
        "vfiotool/usage/survey.py",
        "def f(x):\n    return getattr(x.tree, 'write_attribute')\n",
        "write_attribute",
    ),
    "file_writes_elsewhere": ("vfiotool/devices/pci.py", "open('x', 'w')\n", "writes a file"),
    "names_twice": ("vfiotool/devices/acs.py", "class Host:\n    pass\n", "Host: "),
    "too_long": (
        "vfiotool/devices/acs.py",
        "def f():\n" + "    pass\n" * 60,
        "f: 61 lines",
    ),
}


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree()


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(tree: Tree, rule: str) -> None:
    assert RULES[rule](tree) == []


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_bites(tree: Tree, rule: str) -> None:
    file, text, said = PLANTED[rule]
    found = set(RULES[rule](tree.planted({file: text}))) - set(RULES[rule](tree))
    assert any(said in line for line in found), found


def test_a_circle_of_c_files_is_found(tree: Tree) -> None:
    includes = {
        "cext/vfio/handle.h": '#include "vfio/dma.h"\n',
        "cext/vfio/dma.h": '#include "vfio/handle.h"\n',
    }
    assert any("cext/vfio/dma.h" in line for line in RULES["circles"](tree.planted(includes)))


def test_the_median_file_is_short(tree: Tree, record_property: Callable[..., None]) -> None:
    found = figures(tree)
    record_property("layout", asdict(found))
    assert found.median_lines <= MEDIAN_FILE


def test_the_picture_is_the_code_s(tree: Tree) -> None:
    """`python -m tests.draw_layout` draws it anew."""
    assert PICTURE.read_text() == draw(tree)


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "vfiotool", "tests", "cext"],
        ["ruff", "format", "--check", "vfiotool", "tests", "cext"],
        ["mypy", "--strict", "vfiotool"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_linters_are_clean(command: list[str]) -> None:
    tool = [sys.executable, "-m", *command]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
