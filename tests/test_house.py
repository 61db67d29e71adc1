"""The rules of the house, held against the code: layers, doors, sizes, linters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vfiotool"
SOURCES = sorted(PACKAGE.rglob("*.py"))

HOST_COLUMN = [
    {"errors"},
    {"host", "netlink"},
    {"pci", "capabilities", "iommu", "sriov", "mdev", "vdpa", "names"},
    {"inventory", "snapshot"},
    {"usage", "verdict", "doctor", "selector"},
    {"change"},
    {"vm", "monitor"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(HOST_COLUMN) for name in names}
# What each room of the other column may import from the package, besides itself.
OTHER_COLUMN = {
    "vfio": {"errors", "host", "pci", "_native", "_mmio"},
    "drivers": {"errors", "host", "pci", "vfio"},
    "virtio": {"errors", "host", "netlink", "vfio.native"},
    "lab": {"errors"},
}
# The files that may write to the file system, and what they write there.
WRITERS = {
    "host": "the door itself, its children and its netlink sockets",
    "snapshot": "the snapshot file that the user names",
    "change/": "journal, desired state, boot units: folders of vfiotool's own",
    "lab/": "the lab's cache and guests",
    "vfio/": "device nodes and mappings of an opened device",
    "cli/": "files that the user names",
    "virtio/": "sockets and images that the user names",
    "drivers/": "images that the user names",
}


def room_of(path: Path) -> str:
    """The room of a file; `""` for the package's own `__init__` and `__main__`."""
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if name.startswith("__"):
        return ""
    # `usage_storage.py` is a part of the room `usage`.
    return name if name in LEVEL or name in OTHER_COLUMN else name.partition("_")[0]


def imports_of(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
            found.append((node.lineno, node.module))
    return [
        (line, name.removeprefix("vfiotool."))
        for line, name in found
        if name.startswith("vfiotool.") and not name.endswith("__version__")
    ]


def room_named(name: str) -> str:
    head = name.split(".")[0]
    return head if head in LEVEL or head in OTHER_COLUMN else head.partition("_")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards_only(path: Path) -> None:
    room = room_of(path)
    if room in ("", "cli"):
        return
    wrong = []
    for line, name in imports_of(path):
        target = room_named(name)
        if target == room:
            continue
        if room in OTHER_COLUMN:
            allowed = OTHER_COLUMN[room]
            fine = target in allowed or any(name.startswith(item) for item in allowed)
            fine = fine or any(item.startswith(f"{name}.") for item in allowed)
        else:
            assert room in LEVEL, f"{path} stands in no room: name it in tests/test_house.py"
            fine = target in LEVEL and LEVEL[target] <= LEVEL[room]
        if not fine:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def strings_of(path: Path) -> list[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(id(node.value))
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


def test_host_paths_are_spelt_in_the_door_alone() -> None:
    spelt = re.compile(r"^/(sys|proc|dev)(/|$)")
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {text!r}"
        for path in SOURCES
        if room_of(path) not in ("host", "snapshot", "lab")
        for line, text in strings_of(path)
        if spelt.match(text) and text != "/dev/null"
    ]
    assert not wrong


def is_write(node: ast.Call) -> bool:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("write_text", "write_bytes"):
        return True
    owner = getattr(getattr(function, "value", None), "id", "")
    if owner == "os" and name in ("write", "pwrite", "rename", "replace", "unlink", "truncate"):
        return True
    if name != "open" or owner == "os":
        return owner == "os" and name == "open" and "O_WRONLY" in ast.dump(node)
    modes = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
    modes += [k.value.value for k in node.keywords if k.arg == "mode" and hasattr(k.value, "value")]
    return any(set(str(mode)) & set("wax+") for mode in modes)


def test_there_is_one_write_door() -> None:
    wrong = []
    for path in SOURCES:
        where = str(path.relative_to(PACKAGE))
        if any(where.startswith(prefix) for prefix in WRITERS):
            continue
        wrong += [
            f"{where}:{node.lineno}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and is_write(node)
        ]
    assert not wrong


def test_host_write_is_called_by_steps_alone() -> None:
    """Only `change/` may call `host.write`: what it does is journalled and can be undone."""
    wrong = []
    for path in SOURCES:
        if room_of(path) in ("change", "host"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "write"
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "host"
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_no_file_is_over_600_lines_and_the_median_is_at_most_200() -> None:
    lengths = sorted(
        (len(path.read_text().splitlines()), str(path.relative_to(ROOT)))
        for path in [*SOURCES, *(ROOT / "cext").glob("*.[ch]")]
        if path.name != "_native.c"
    )
    assert [entry for entry in lengths if entry[0] > 600] == []
    assert lengths[len(lengths) // 2][0] <= 200


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_over_60_lines(path: Path) -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 60
    ]
    assert not long


def test_only_one_module_imports_the_c_library() -> None:
    wrong = [
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if any(name.startswith(("_native", "_mmio")) for _, name in imports_of(path))
    ]
    assert set(wrong) <= {"vfio/native.py"}


def test_groups_imports_nothing_heavy() -> None:
    fixture = str(next((ROOT / "fixtures" / "hosts").iterdir()))
    code = (
        "import sys\n"
        "from vfiotool.cli.app import main\n"
        f"main(['--root', {fixture!r}, 'groups', '--json'])\n"
        "heavy = {'rich', 'typer', 'pyudev', 'cffi', 'vfiotool.netlink', 'vfiotool._native'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
