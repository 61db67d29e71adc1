"""What the benches of single calls share: peers in C, and ways that are measured in turn."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def compiled(
    source: str, function: str, arguments: list[type], *options: str
) -> Callable[..., int]:
    """A function of a C source, which returns a uint64_t; compiled with the library's flags."""
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder, "peer.c"), Path(folder, "peer.so")
        text.write_text(source)
        command = ["gcc", "-O2", *options, "-shared", "-fPIC", "-o", library, text]
        subprocess.run(command, check=True)
        found = getattr(ctypes.CDLL(str(library)), function)
    found.restype = ctypes.c_uint64
    found.argtypes = arguments
    return lambda *given: int(found(*given))


def in_turn(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way gave in each round. Whoever begins changes from round to round, so that
    neither the order nor a machine that grows faster or slower favours one; the first round,
    which warms everything up, does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            value = ways[name]()
            if number:
                taken[name].append(value)
    return taken


def ratio(values: list[float], base: list[float]) -> float:
    """The median of the ratios of each round, whose parts ran soon after each other."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def times(values: list[float], base: list[float]) -> str:
    """`ratio`, and in brackets that of the best rounds: those that were disturbed least."""
    return f"{ratio(values, base):6.2f} ({min(values) / min(base):.2f}) times C"
