"""What the project needs from a machine: the list `needs.txt`, and what of it is missing here."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vfiotool.errors import Unsupported

LIST = Path(__file__).with_name("needs.txt")
# Programs of the system's own are in these, whatever the caller's PATH.
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Need:
    """One line of the list; see its head for what each column means."""

    use: str
    package: str
    seen_by: str
    purpose: str

    def is_here(self) -> bool:
        kind, _, name = self.seen_by.partition(":")
        if kind == "program":
            return shutil.which(name, path=search_path()) is not None
        if kind == "python":
            return importlib.util.find_spec(name) is not None
        if kind == "header":
            return os.path.exists(os.path.join(sysconfig.get_path("include"), name))
        return os.path.exists(name)


def search_path() -> str:
    """Where programs are looked for: the caller's PATH, then the system's folders."""
    return f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"


@functools.cache
def needs() -> tuple[Need, ...]:
    """The whole list, in its order."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return tuple(Need(*line.split(None, 3)) for line in lines if line and not line.startswith("#"))


def packages_for(*uses: str) -> tuple[str, ...]:
    """The Debian packages of these uses, in the list's order."""
    return tuple(need.package for need in needs() if need.use in uses)


def missing(*uses: str) -> tuple[Need, ...]:
    """What these uses need and this machine lacks."""
    return tuple(need for need in needs() if need.use in uses and not need.is_here())


def require(purpose: str, *uses: str) -> None:
    """Raise Unsupported that names all that is missing for `purpose` at once."""
    refuse(purpose, missing(*uses))


def refuse(purpose: str, lacking: Iterable[Need]) -> None:
    names = list(dict.fromkeys(need.package for need in lacking))
    if names:
        raise Unsupported(
            f"{purpose} needs {', '.join(names)}",
            hint=f"as root on Debian: apt-get install {' '.join(names)}",
        )
