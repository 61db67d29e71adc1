"""docs/api.md: everything public stands in it, with words of its own."""

from __future__ import annotations

import pytest

from tests import draw_api
from vfiotool import errors


@pytest.mark.parametrize("name", draw_api.FACES)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    page = draw_api.reference()
    section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
    assert section
    for public in draw_api.public_names(name):
        assert f"### {public}\n" in section or f"`{public}`" in section, public


def test_every_error_is_in_the_reference_with_its_exit_code() -> None:
    page = draw_api.reference()
    assert f"| `{errors.Refused.__name__}` | `refused` | {errors.Refused.exit_code} |" in page


def test_a_public_name_without_a_docstring_is_refused() -> None:
    class Bare:
        pass

    Bare.__doc__ = None
    with pytest.raises(ValueError, match="has no docstring"):
        list(draw_api._class("Bare", Bare))


def test_a_signature_is_as_it_is_written() -> None:
    def named(size: int, *rest: str, name: str = "x", most: float = 1.5, **more: int) -> bytes: ...

    written = "(size: int, *rest: str, name: str = 'x', most: float = 1.5, **more: int) -> bytes"
    assert draw_api._signature(named) == written

    def after(*, only: bool) -> None: ...

    assert draw_api._signature(after) == "(*, only: bool) -> None"
