"""`vfiotool.values.dataclass` against the standard library's: one class, made by both."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from vfiotool import values


def make(dataclass: Callable[..., Any], slots: bool) -> tuple[type[Any], type[Any]]:
    @dataclass(frozen=True, slots=slots)
    class Base:
        """A base."""

        LIMIT: ClassVar[int] = 3
        name: str
        sizes: tuple[int, ...] = ()

    @dataclass(frozen=True, slots=slots)
    class Child(Base):
        count: int = 0
        tags: list[str] = dataclasses.field(default_factory=list, compare=False)
        note: str = dataclasses.field(default="", repr=False)

        def double(self) -> int:
            return self.count * 2

        def __str__(self) -> str:
            return f"<{self.name}>"

    return Base, Child


@dataclasses.dataclass(frozen=True)
class Pair:
    ours: tuple[type[Any], type[Any]]
    theirs: tuple[type[Any], type[Any]]


@pytest.fixture(params=[False, True], ids=["plain", "slots"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(make(values.dataclass, request.param), make(dataclasses.dataclass, request.param))


def outcome(action: Callable[[type[Any]], Any], cls: type[Any]) -> object:
    try:
        return action(cls)
    except Exception as error:
        return type(error), str(error)


ACTIONS: dict[str, Callable[[type[Any]], Any]] = {
    "fields of the class": lambda c: [f.name for f in dataclasses.fields(c)],
    "is a dataclass": dataclasses.is_dataclass,
    "match": lambda c: c.__match_args__,
    "representation": lambda c: repr(c("a")),
    "text": lambda c: str(c("a")),
    "missing argument": lambda c: c(),
    "unknown argument": lambda c: c("a", unknown=1),
    "equal": lambda c: (c("a") == c("a"), c("a") == c("b"), c("a") == 1, c("a") != c("b")),
    "hash": lambda c: hash(c("a", (1,))) == hash(c("a", (1,))),
    "in a set": lambda c: len({c("a"), c("a"), c("b")}),
    "replaced": lambda c: dataclasses.astuple(dataclasses.replace(c("a"), name="b")),
    "as a dictionary": lambda c: dataclasses.asdict(c("a", (1, 2))),
    "assigned": lambda c: setattr(c("a"), "name", "b"),
    "deleted": lambda c: delattr(c("a"), "name"),
    "copied": lambda c: copy.copy(c("a")) == c("a"),
    "copied deeply": lambda c: copy.deepcopy(c("a", (1,))) == c("a", (1,)),
    "class variable": lambda c: c.LIMIT,
    "has a dictionary": lambda c: hasattr(c("a"), "__dict__"),
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("which", [0, 1], ids=["base", "child"])
def test_it_does_what_the_standard_one_does(pair: Pair, which: int, name: str) -> None:
    """Each as the first thing that is done with the class."""
    ours = outcome(ACTIONS[name], pair.ours[which])
    assert ours == outcome(ACTIONS[name], pair.theirs[which])


def test_each_default_factory_value_is_its_own(pair: Pair) -> None:
    child = pair.ours[1]
    assert child("a").tags is not child("a").tags
    assert child("a", count=4).double() == 8


@values.dataclass(frozen=True, slots=True)
class Sent:
    number: int
    text: str = "x"


def test_a_value_comes_through_pickle_before_any_was_made() -> None:
    data = pickle.dumps(Sent(3)).replace(b"Sent", b"Came")
    assert pickle.loads(data) == Came(3)


@values.dataclass(frozen=True, slots=True)
class Came:
    number: int
    text: str = "x"


def test_no_method_is_made_before_it_is_used() -> None:
    ours, _ = make(values.dataclass, slots=False)
    before = ours.__init__
    ours("a")
    assert ours.__init__ is not before
