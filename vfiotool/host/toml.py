"""TOML as this package takes it: what tomllib gives, within bounds that its users can rely on.

Everything else that tomllib lets through makes later code fail where no fault is looked for: a
number of thousands of digits cannot be printed, a deeply nested value cannot be shown.
"""

from __future__ import annotations

from typing import Any

# More than any file of ours has.
_DEEPEST = 32


def load_toml(text: str) -> dict[str, Any]:
    """The document. Raises ValueError for what is no TOML, is nested too deeply, or has a whole
    number beyond 64 bits (TOML 1.0.0, "Integer"), which no other program would read either."""
    import tomllib

    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        # int() of a number that is longer than it takes (sys.set_int_max_str_digits).
        raise ValueError("a number of more than 64 bits") from None
    _check(document)
    return document


def _check(document: dict[str, Any]) -> None:
    level: list[tuple[str, Any]] = list(document.items())
    for _ in range(_DEEPEST):
        below: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                below += value.items()
            elif isinstance(value, list):
                below += [(key, one) for one in value]
            elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
                raise ValueError(f"{key[:64]}: a number of more than 64 bits")
        if not below:
            return
        level = below
    raise ValueError("it is nested too deeply")
