"""Taking a command line apart that is as it should be, without typer.

`parse` gives None for whatever is not plain: help, an unknown option, a missing argument, a value
that does not fit. typer then takes the same line apart, and knows what to say.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vfiotool.cli.declare import Argument, Commands, Context, Function, Option, Parameter
from vfiotool.cli.output import State

_MISSING = inspect.Parameter.empty
_SIMPLE: tuple[type, ...] = (str, int, float, Path)


class _NotPlain(Exception):
    """This is for typer."""


class _Parameter:
    """One parameter of a command: how it is given and what its values are."""

    def __init__(self, name: str, hint: Any, default: Any) -> None:
        self.name = name
        self.required = default is _MISSING
        hint, *more = (
            typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else [hint]
        )
        self.declared = more[0] if more else Option()
        if len(more) > 1 or not isinstance(self.declared, Parameter):
            raise _NotPlain
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
            hint = kinds[0] if len(kinds) == 1 else None
        self.many = typing.get_origin(hint) is list
        self.kind = typing.get_args(hint)[0] if self.many else hint
        if self.kind is not bool and self.kind not in _SIMPLE:
            raise _NotPlain

    def spellings(self) -> Iterator[tuple[str, bool]]:
        """Each way to write the option, and what a flag is set to by it."""
        long = self.name.replace("_", "-")
        if not self.declared.names:
            yield f"--{long}", True
            if self.kind is bool:
                yield f"--no-{long}", False
        for names in self.declared.names:
            on, slash, off = names.partition("/")
            yield on, True
            if slash:
                yield off, False

    def value(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError as error:
            raise _NotPlain from error
        low, high = self.declared.settings.get("min"), self.declared.settings.get("max")
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise _NotPlain
        return value


def parse(commands: Commands, words: Sequence[str]) -> Callable[[], Any] | None:
    """The call that the command line stands for, or None where typer has to look at it."""
    try:
        state, rest = _globals(words)
        function, rest = _find(commands, rest)
        hints = typing.get_type_hints(function, include_extras=True)
        parameters, wants_context = [], False
        for name, parameter in inspect.signature(function).parameters.items():
            if hints.get(name) is Context:
                wants_context = True
            else:
                parameters.append(_Parameter(name, hints.get(name), parameter.default))
        values = _values(parameters, rest)
    except _NotPlain:
        return None
    context = [Context(state)] if wants_context else []
    return lambda: function(*context, **values)


def _globals(words: Sequence[str]) -> tuple[State, list[str]]:
    root: str | None = None
    flags = {"--json": False, "--debug": False}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word in flags:
            flags[word] = True
        elif word == "--root" and rest and not rest[0].startswith("-"):
            root = rest.pop(0)
        elif word.startswith("--root="):
            root = word.removeprefix("--root=")
        else:
            raise _NotPlain
    return State(root=root, json=flags["--json"], debug=flags["--debug"]), rest


def _find(commands: Commands, words: list[str]) -> tuple[Function, list[str]]:
    while words:
        name, words = words[0], words[1:]
        if name in commands.functions:
            function, settings = commands.functions[name]
            if "context_settings" in settings:
                raise _NotPlain
            return function, words
        group = commands.groups.get(name)
        if not isinstance(group, Commands):
            raise _NotPlain
        commands = group
    raise _NotPlain


def _values(parameters: list[_Parameter], words: list[str]) -> dict[str, Any]:
    places = [item for item in parameters if isinstance(item.declared, Argument)]
    options = {
        spelling: (item, on)
        for item in parameters
        if item not in places
        for spelling, on in item.spellings()
    }
    values: dict[str, Any] = {}
    standing: list[str] = []
    pending = iter(words)
    for word in pending:
        if not word.startswith("-"):
            standing.append(word)
            continue
        name, equals, text = word.partition("=")
        if name not in options or not name.startswith("--"):
            raise _NotPlain
        item, on = options[name]
        if item.kind is bool:
            if equals:
                raise _NotPlain
            values[item.name] = on
            continue
        if not equals:
            text = next(pending, "-")
            if text.startswith("-"):
                raise _NotPlain
        if item.many:
            values.setdefault(item.name, []).append(item.value(text))
        else:
            values[item.name] = item.value(text)
    _place(places, standing, values)
    if any(item.required and item.name not in values for item in parameters):
        raise _NotPlain
    return values


def _place(places: list[_Parameter], words: list[str], values: dict[str, Any]) -> None:
    """Give the words that are no options to the arguments, in order; a list comes last."""
    for number, item in enumerate(places):
        if item.many:
            if number != len(places) - 1:
                raise _NotPlain
            if words:
                values[item.name] = [item.value(word) for word in words]
            return
        if not words:
            break
        values[item.name] = item.value(words[0])
        words = words[1:]
    if words:
        raise _NotPlain
