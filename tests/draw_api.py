"""docs/api.md from the docstrings and annotations of what is public (`python -m tests.draw_pages`).

A public name is one of a face below; a name without a docstring of its own is an error, so that the
page is complete. Everything is read from the objects themselves.
"""

from __future__ import annotations

import enum
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ForwardRef

from vfiotool import errors

# Module, and the names of it that are public; empty: what its __all__ lists, or what it defines.
FACES: dict[str, tuple[str, ...]] = {
    "vfiotool.vfio": (),
    "vfiotool.drivers.nvme": (),
    "vfiotool.drivers.nvme.admin": (),
    "vfiotool.drivers.nvme.blocks": (),
    "vfiotool.drivers.nvme.virtualization": (),
    "vfiotool.models": (),
    "vfiotool.virtio.device": ("VirtioConfig", "VirtioDevice"),
    "vfiotool.virtio.block": ("BlockFeature", "DiskSettings", "BlockDisk"),
    "vfiotool.virtio.net": ("NetConfig", "NetFigures", "NetCard", "Switch", "Port"),
    "vfiotool.virtio.entropy": ("EntropySource",),
    "vfiotool.virtio.storage": ("StorageConfig", "BlockStatus", "Storage", "MemoryStorage"),
    "vfiotool.virtio.console": ("Console", "TerminalConsole"),
    "vfiotool.lab.guest": ("Guest", "Options", "Completed"),
}
HEAD = """\
# API reference

What drivers, models, virtio devices and tests use from Python, made from the code's own docstrings
and annotations (`python -m tests.draw_pages`; do not edit). The guides show it at work:
[driver-guide.md](driver-guide.md), [model-guide.md](model-guide.md),
[virtio-device-guide.md](virtio-device-guide.md). Names that are not here may change at any time.
Every error is one of `vfiotool.errors`, at the end.
"""


def public_names(face: str) -> tuple[str, ...]:
    """The public names of a face, without modules."""
    module = import_module(face)
    listed = FACES[face] or getattr(module, "__all__", None)
    if listed is None:
        listed = [
            name
            for name, item in vars(module).items()
            if not name.startswith("_") and getattr(item, "__module__", None) == face
        ]
    inside = hasattr(module, "__path__")
    return tuple(name for name in listed if not (inside and find_spec(f"{face}.{name}")))


@cache
def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for name in FACES:
        module = import_module(name)
        chosen = public_names(name)
        parts.append(_module(name, module, [(each, getattr(module, each)) for each in chosen]))
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*parts, _errors()]))


def _module(name: str, module: ModuleType, public: list[tuple[str, Any]]) -> str:
    lines = [f"## {name}", "", _prose(inspect.getdoc(module) or ""), ""]
    for title, item in public:
        if inspect.isclass(item):
            lines += _class(title, item)
        elif inspect.isfunction(item):
            lines += _function(f"### {title}", title, item)
    constants = [
        t for t, item in public if not inspect.isclass(item) and not inspect.isfunction(item)
    ]
    if constants:
        lines += [f"Constants and types: {', '.join(f'`{title}`' for title in constants)}.", ""]
    return "\n".join(lines)


def _class(title: str, item: type) -> Iterator[str]:
    yield f"### {title}"
    yield ""
    made = "" if issubclass(item, enum.Enum) else _signature(item)
    yield from (f"`{title}{made}`", "") if made else ()
    yield _prose(_doc(title, item))
    yield ""
    if issubclass(item, enum.Enum):
        yield "Values: " + ", ".join(f"`{member.name}`" for member in item) + "."
        yield ""
    for name, member in sorted(_members(item).items()):
        if name.startswith("_"):
            continue
        found = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if isinstance(found, property):
            text = inspect.getdoc(found)
            if text:
                yield f"- `{name}`: {_first(text)}"
        elif inspect.ismemberdescriptor(found) and inspect.getdoc(found):
            yield f"- `{name}`: {_first(inspect.getdoc(found) or '')}"
        elif _is_function(found) and inspect.getdoc(found):
            yield f"- `{name}{_signature(found)}`: {_first(inspect.getdoc(found) or '')}"
    yield ""


def _members(item: type) -> dict[str, Any]:
    """What is written in the class itself, or in the type of C that it begins with."""
    found: dict[str, Any] = {}
    for base in reversed(item.__mro__):
        if base is item or base.__module__ == "vfiotool.native._types":
            found |= vars(base)
    return found


def _is_function(item: Any) -> bool:
    return inspect.isfunction(item) or inspect.ismethoddescriptor(item)


def _function(heading: str, name: str, item: Callable[..., Any]) -> list[str]:
    return [heading, "", f"`{name}{_signature(item)}`", "", _prose(_doc(name, item)), ""]


def _doc(name: str, item: Any) -> str:
    text = inspect.getdoc(item) or ""
    # What dataclasses write by themselves says nothing.
    if not text or text.startswith(f"{name}("):
        raise ValueError(f"{item.__module__}.{name} is public and has no docstring")
    return text


def _signature(item: Any) -> str:
    """Parameters and result as they are written, without `self`."""
    try:
        found = inspect.signature(item)
    except (ValueError, TypeError):
        return ""
    parts, starred = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        starred |= parameter.kind is parameter.VAR_POSITIONAL
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        parts.append(_parameter(parameter))
    result = found.return_annotation
    tail = "" if inspect.isclass(item) or result is found.empty else f" -> {_annotation(result)}"
    return f"({', '.join(parts)}){tail}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    value = parameter.default
    plain = value is None or isinstance(value, bool | int | float | str | bytes | tuple)
    spaced = " = " if parameter.annotation is not parameter.empty else "="
    return f"{text}{spaced}{repr(value) if plain and not isinstance(value, enum.Enum) else '…'}"


def _annotation(found: Any) -> str:
    if isinstance(found, ForwardRef):  # of a named tuple
        return found.__forward_arg__
    return found if isinstance(found, str) else inspect.formatannotation(found)


def _first(text: str) -> str:
    """A docstring in one line: its first paragraph."""
    return " ".join(text.split("\n\n")[0].split())


def _prose(text: str) -> str:
    """A docstring as markdown: what is indented as code, or as a definition's text, stays so."""
    result, code = [], False
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines if line):
            code = True
            result.append("```\n" + textwrap.dedent(block).rstrip() + "\n```")
        elif len(lines) > 1 and all(line.startswith("    ") for line in lines[1:]):
            body = " ".join(line.strip() for line in lines[1:])
            result.append(f"**{lines[0].strip()}**: {body}")
        else:
            result.append(block)
    joined = "\n\n".join(result)
    return joined.replace("```\n\n```\n", "\n") if code else joined


def _errors() -> str:
    """Each kind of error with its exit code and its kin among Python's own."""
    lines = ["## vfiotool.errors", "", _prose(inspect.getdoc(errors) or ""), ""]
    lines += ["| error | kind | exit code | is also | when |", "| --- | --- | --- | --- | --- |"]
    for name, item in sorted(vars(errors).items()):
        if not (inspect.isclass(item) and issubclass(item, errors.VfiotoolError)):
            continue
        kin = [base.__name__ for base in item.__mro__[1:] if base.__module__ == "builtins"]
        also = ", ".join(
            f"`{each}`" for each in kin if each not in ("object", "BaseException", "Exception")
        )
        text = _first(_doc(name, item)).replace("|", "\\|")
        lines.append(f"| `{name}` | `{item.kind}` | {item.exit_code} | {also} | {text} |")
    return "\n".join(lines) + "\n"
