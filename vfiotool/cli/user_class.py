"""A class of somebody's own, by `MODULE:CLASS` or `FILE.py:CLASS`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from vfiotool.errors import NotFound, UsageError, VfiotoolError, described, from_oserror

_T = TypeVar("_T")


def load_class(text: str, base: type[_T]) -> type[_T]:
    """The class, which is a subclass of `base`.

    A module is searched where Python searches; a file is given by its path, with a slash or `.py`,
    and must not be one that others may write to. Raises UsageError or NotFound, which name what is
    wrong.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise UsageError(
            f"{text!r} is not MODULE:CLASS", hint="as mydevice:Dice, or ./mydevice.py:Dice"
        )
    module = _from_file(where) if where.endswith(".py") or "/" in where else _by_name(where)
    found = getattr(module, name, None)
    if found is None:
        raise NotFound(f"{where} has no class {name}")
    if not isinstance(found, type) or not issubclass(found, base) or found is base:
        raise UsageError(f"{text}: not a subclass of {base.__module__}.{base.__name__}")
    return found


def make(kind: type[_T], text: str) -> _T:
    """An instance of the class that `text` named. Raises what vfiotool itself raises, and
    UsageError, which says where, for anything else."""
    try:
        return kind()
    except VfiotoolError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{text}: {kind.__name__}() fails: {described(error)}",
            hint="it is made without arguments: give them defaults"
            if isinstance(error, TypeError)
            else None,
        ) from error


def _by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotFound(
            f"there is no module {error.name}",
            hint=f"install it, or name its file: ./{name.replace('.', '/')}.py",
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name} cannot be imported: {described(error)}") from error


def _from_file(where: str) -> ModuleType:
    path = Path(where).absolute()
    try:
        status = path.stat()
    except FileNotFoundError:
        raise NotFound(f"there is no file {where}") from None
    except OSError as error:
        raise from_oserror(f"read {where}", error) from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{where}: not a regular file")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid()):
        raise UsageError(
            f"{where}: others may write to it, and it would run as you",
            hint=f"chmod go-w {where}",
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{where}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by its name.
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{where} cannot be imported: {described(error)}") from error
    return module
