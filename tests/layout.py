"""The package's layout as data: its import graph, and the rules that the graph and the files keep.

Each rule is a function of a `Tree` that returns one line a violation. `test_layout.py` holds them
against this checkout, and shows on planted violations that each one bites;
`python -m tests.layout DOT|SVG` draws the graph for docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Each tuple is one level; a package imports from levels before its own, and from itself.
HOST_COLUMN = (
    ("errors",),
    ("netlink",),
    ("host",),
    ("devices",),
    ("snapshot", "usage", "doctor"),
    ("change",),
    ("policy",),
    ("boot", "vm"),
    ("cli",),
)
DEVICE_COLUMN = (("errors",), ("native",), ("vfio",), ("drivers", "virtio", "models"))
# What the device column may use of the other one: finding a node is reading a host. And the host
# reads the attributes of a folder with one call of C. A served disk may be our NVMe driver's.
GROUND = {
    "host": {"native"},
    "vfio": {"host", "devices"},
    "virtio": {"netlink", "host", "drivers"},
    "models": {"host"},
}
ELSEWHERE = {"lab": {"errors", "snapshot", "models", "vfio"}, "": {"errors", "cli"}}
# The C extensions, and the package that imports them.
EXTENSIONS = ("_library", "_types")
# What writes to a host: whoever calls one of these makes a change that has to be journalled.
HOST_WRITES = ("write_attribute", "load_module", "send_netlink")
WRITING_PACKAGES = ("host", "change")
# The files that may write to the file system, and what they write there.
WRITERS = {
    "host/": "writes to sysfs, in children with a deadline",
    "snapshot/": "the snapshot file that the user names",
    "change/": "journal and locks: folders of vfiotool's own",
    "policy/saved.py": "the desired state that was applied",
    "boot/": "boot units and their manifest",
    "lab/": "the lab's cache and guests",
    "vfio/": "device nodes and mappings of an opened device",
    "cli/": "files that the user names",
    "virtio/": "sockets and images that the user names",
    "models/": "sockets that the user names",
    "drivers/": "images that the user names",
}
LONGEST_FILE = 600
LONGEST_FUNCTION = 60
MEDIAN_FILE = 200


@dataclass(frozen=True)
class Import:
    """`line` of `module` imports `target`; both are dotted names within the package. `whole`: the
    target itself, and not a name out of it."""

    module: str
    line: int
    target: str
    whole: bool = False


class Tree:
    """The sources below a checkout's `vfiotool/` and `cext/`, parsed."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.package = root / "vfiotool"
        self.texts = {
            path: path.read_text(encoding="utf-8")
            for path in (*self.package.rglob("*.py"), *(root / "cext").rglob("*.[ch]"))
            if "tests" not in path.parts
        }
        self.files = {
            path: ast.parse(text, str(path))
            for path, text in sorted(self.texts.items())
            if path.suffix == ".py"
        }

    def planted(self, added: dict[str, str]) -> Tree:
        """This tree with text added at the end of some of its files."""
        tree = Tree.__new__(Tree)
        tree.root, tree.package = self.root, self.package
        tree.texts, tree.files = dict(self.texts), dict(self.files)
        for name, text in added.items():
            path = self.root / name
            tree.texts[path] += f"\n\n{text}"
            if path.suffix == ".py":
                tree.files[path] = ast.parse(tree.texts[path], str(path))
        return tree

    @property
    def c_files(self) -> list[Path]:
        return sorted(path for path in self.texts if path.suffix in (".c", ".h"))

    def lines(self, path: Path) -> int:
        return len(self.texts[path].splitlines())

    def where(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def module(self, path: Path) -> str:
        """`vfiotool/host/tree.py` -> `host.tree`; a package's `__init__` has the package's name."""
        parts = path.relative_to(self.package).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def modules(self) -> dict[str, Path]:
        return {self.module(path): path for path in self.files}

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of one module of the package by another, those in functions included."""
        found = []
        for path, tree in self.files.items():
            module = self.module(path)
            for node in ast.walk(tree):
                for name in _imported(node):
                    target = self._named(name)
                    if target and target != module:
                        whole = name == f"vfiotool.{target}"
                        found.append(Import(module, node.lineno, target, whole))  # type: ignore[attr-defined]
        return found

    def _named(self, name: str) -> str | None:
        """The longest part of a dotted name that is a module of the package."""
        if not name.startswith("vfiotool."):
            return None
        parts = name.split(".")[1:]
        if parts[:1] == ["native"] and parts[1:2] and parts[1] in EXTENSIONS:
            return ".".join(parts[:2])
        for end in range(len(parts), 0, -1):
            if ".".join(parts[:end]) in self.modules:
                return ".".join(parts[:end])
        return None if parts == ["__version__"] else ".".join(parts)


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module: str) -> str:
    """The package that a module belongs to; `""` for `__init__` and `__main__` of the whole."""
    head = module.split(".")[0]
    return "" if head.startswith("__") else head


def _levels(column: Iterable[tuple[str, ...]]) -> dict[str, int]:
    return {name: level for level, names in enumerate(column) for name in names}


def allowed(package: str) -> set[str]:
    """The packages that `package` may import from, itself included."""
    found = {package}
    for column in (HOST_COLUMN, DEVICE_COLUMN):
        levels = _levels(column)
        if package in levels:
            found |= {name for name, level in levels.items() if level < levels[package]}
    if package == "cli":
        found |= {*_levels(DEVICE_COLUMN), "lab"}
    return found | GROUND.get(package, set()) | ELSEWHERE.get(package, set())


def arrows_up(tree: Tree) -> list[str]:
    """Imports run downwards: see the columns above."""
    known = {*_levels(HOST_COLUMN), *_levels(DEVICE_COLUMN), *ELSEWHERE}
    wrong = [
        f"{tree.where(path)}: belongs to no package of the layout"
        for module, path in tree.modules.items()
        if package_of(module) not in known
    ]
    return wrong + [
        f"{tree.where(tree.modules[item.module])}:{item.line} imports {item.target}"
        for item in tree.imports
        if package_of(item.target) not in allowed(package_of(item.module))
    ]


def circles(tree: Tree) -> list[str]:
    """No module needs itself by way of others, nor does a C file."""
    graph: dict[str, set[str]] = defaultdict(set)
    for item in tree.imports:
        graph[item.module].add(item.target)
    for path in tree.c_files:
        for name in re.findall(r'^#include "(.*?)"', tree.texts[path], re.MULTILINE):
            graph[tree.where(path)].add(f"cext/{name}")
    return [" -> ".join(circle) for circle in _strong_components(graph)]


def _strong_components(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other, of two and more (Tarjan)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in number:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], number[target])
        if lowest[node] == number[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def faces(tree: Tree) -> dict[str, set[str]]:
    """The packages whose `__init__` says in `__all__` what they offer."""
    found = {}
    for path, parsed in tree.files.items():
        if path.name != "__init__.py":
            continue
        for node in parsed.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found[tree.module(path)] = set(ast.literal_eval(node.value))
    return found


def past_the_face(tree: Tree) -> list[str]:
    """Where a package has a face, others import from it and not from the files behind it; a whole
    module only if the face names it."""
    wrong = []
    for face, names in faces(tree).items():
        behind = f"{face}."
        offered = {f"{behind}{name}" for name in names}
        wrong += [
            f"{tree.where(tree.modules[item.module])}:{item.line} imports {item.target}"
            f" past vfiotool/{face.replace('.', '/')}/__init__.py"
            for item in tree.imports
            if item.target.startswith(behind)
            and not f"{item.module}.".startswith(behind)
            and not (item.whole and item.target in offered)
        ]
    return wrong


def strings_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The string constants that are no docstrings, pieces of f-strings included."""
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            yield node.lineno, node.value


_SPELT = re.compile(r"^/(sys|proc|dev)(/|$)")
# These run on a machine of their own, or hold rules about paths rather than open them.
_SPELLERS = ("host/paths.py", "snapshot/", "lab/")


def paths_elsewhere(tree: Tree) -> list[str]:
    """Paths of the kernel's file systems are spelt in `host/paths.py`."""
    wrong = []
    for path, parsed in tree.files.items():
        name = str(path.relative_to(tree.package))
        if not name.startswith(_SPELLERS):
            wrong += [
                f"{tree.where(path)}:{line} {text!r}"
                for line, text in strings_of(parsed)
                if _SPELT.match(text) and text != "/dev/null"
            ]
    return wrong


def extensions_elsewhere(tree: Tree) -> list[str]:
    """Only `native/` imports the C extensions."""
    return [
        f"{tree.where(tree.modules[item.module])}:{item.line} imports {item.target}"
        for item in tree.imports
        if any(name in item.target.split(".") for name in EXTENSIONS)
        and package_of(item.module) != "native"
    ]


def host_writes_elsewhere(tree: Tree) -> list[str]:
    """Only the steps' write path calls what changes a host, by whatever variable or detour."""
    wrong = []
    for path, parsed in tree.files.items():
        if package_of(tree.module(path)) in WRITING_PACKAGES:
            continue
        for node in ast.walk(parsed):
            name = ""
            if isinstance(node, ast.Attribute):
                name = node.attr
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                name = str(getattr(node.args[1], "value", "")) if len(node.args) > 1 else ""
            if name in HOST_WRITES:
                wrong.append(f"{tree.where(path)}:{node.lineno} {name}")  # type: ignore[attr-defined]
    return wrong


def _is_file_write(node: ast.Call) -> bool:
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


def file_writes_elsewhere(tree: Tree) -> list[str]:
    """Files are written by those that `WRITERS` names."""
    return [
        f"{tree.where(path)}:{node.lineno} writes a file"
        for path, parsed in tree.files.items()
        if not str(path.relative_to(tree.package)).startswith(tuple(WRITERS))
        for node in ast.walk(parsed)
        if isinstance(node, ast.Call) and _is_file_write(node)
    ]


def names_twice(tree: Tree) -> list[str]:
    """A public class name means one thing in the whole package."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, parsed in tree.files.items():
        for node in parsed.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(f"{tree.where(path)}:{node.lineno}")
    return [f"{name}: {', '.join(at)}" for name, at in sorted(places.items()) if len(at) > 1]


def too_long(tree: Tree) -> list[str]:
    """Files of at most 600 lines, functions of at most 60."""
    wrong = [
        f"{tree.where(path)}: {length} lines"
        for path in (*tree.files, *tree.c_files)
        if (length := tree.lines(path)) > LONGEST_FILE
    ]
    for path, parsed in tree.files.items():
        wrong += [
            f"{tree.where(path)}:{node.lineno} {node.name}: {length} lines"
            for node in ast.walk(parsed)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
        ]
    return wrong


RULES = {
    rule.__name__: rule
    for rule in (
        arrows_up,
        circles,
        past_the_face,
        paths_elsewhere,
        extensions_elsewhere,
        host_writes_elsewhere,
        file_writes_elsewhere,
        names_twice,
        too_long,
    )
}


@dataclass(frozen=True)
class Figures:
    """What docs/architecture.md and the tests' output state of the tree's size."""

    files: int
    median_lines: int
    longest_file: int
    longest_function: int
    circles: int
    arrows_up: int


def figures(tree: Tree) -> Figures:
    lengths = sorted(tree.lines(path) for path in tree.files)
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for parsed in tree.files.values()
        for node in ast.walk(parsed)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return Figures(
        files=len(lengths),
        median_lines=lengths[len(lengths) // 2],
        longest_file=lengths[-1],
        longest_function=max(functions),
        circles=len(circles(tree)),
        arrows_up=len(arrows_up(tree)),
    )


if __name__ == "__main__":
    here = Tree()
    for name, rule in RULES.items():
        for line in rule(here):
            print(f"{name}: {line}")
    print(figures(here), file=sys.stderr)
