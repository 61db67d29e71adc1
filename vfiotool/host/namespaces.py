"""Every network or mount namespace that something here leads to, with or without processes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from vfiotool.host.paths import PROC
from vfiotool.host.processes import (
    DENIED,
    GONE,
    living,
    plain,
    processes,
    tables_of,
    threads,
    unlisted,
)

_NAME = re.compile(r"(net|mnt):\[(\d+)\]")
# Ways into one namespace that are kept: a process may end before it is used.
_WAYS = 8
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Place:
    """One way into a namespace: a path that opens it. `pid` is that of a process in it, or ""."""

    path: str
    name: str
    pid: str = ""

    @property
    def lasts(self) -> bool:
        """Whether it still leads there: a process or descriptor may be gone by now."""
        return os.path.exists(self.path)


@dataclass(slots=True)
class Found:
    """Namespaces by number. `hidden` processes could not be looked into, `unknown` says what else.

    `own` is the number of the one that this process is in.
    """

    own: int
    places: dict[int, list[Place]] = field(default_factory=dict)
    hidden: int = 0
    unknown: list[str] = field(default_factory=list)


def find_namespaces(kind: str) -> Found:
    """The namespaces of a kind (`net`, `mnt`): of processes and threads, mounts, descriptors.

    Raises OSError where looking failed for another reason than that a process ended or may not
    be looked into.
    """
    found = Found(_number(os.readlink(f"{PROC}/self/ns/{kind}"), kind) or 0)
    tables: set[str] = set()
    for pid in processes():
        try:
            table = os.readlink(f"{PROC}/{living(pid)}/ns/mnt")
            for place, number in _of_process(pid, kind):
                _keep(found, place, number)
            if table not in tables:
                for place, number in _mounted(living(pid), kind):
                    _keep(found, place, number)
                tables.add(table)
        except OSError as error:
            if error.errno in GONE:
                continue
            if error.errno not in DENIED:
                raise
            found.hidden += 1
    found.unknown += unlisted()
    return found


def _keep(found: Found, place: Place, number: int) -> None:
    places = found.places.setdefault(number, [])
    if len(places) < _WAYS:
        places.append(place)


def _of_process(pid: int, kind: str) -> Iterator[tuple[Place, int]]:
    for thread in threads(pid):
        path = f"{PROC}/{pid}/task/{thread}/ns/{kind}"
        try:
            number = _number(os.readlink(path), kind)
        except OSError as error:
            if error.errno in GONE:
                continue
            raise
        if number is not None:
            # What a thread has of its own is not what the process's folder shows.
            who = str(pid) if thread == pid else f"{pid}/task/{thread}"
            yield Place(path, f"{who}", who), number
    for table in tables_of(pid):
        for descriptor in os.listdir(table):
            path = f"{table}/{descriptor}"
            try:
                number = _number(os.readlink(path), kind)
            except OSError as error:
                if error.errno in GONE:
                    continue
                raise
            if number is not None:
                yield Place(path, path), number


def _mounted(pid: int, kind: str) -> Iterator[tuple[Place, int]]:
    """Namespaces that are kept by a mount (`ip netns add`), as this process sees them."""
    try:
        with open(f"{PROC}/{pid}/mountinfo", encoding="utf-8", errors="backslashreplace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        if error.errno is not None and error.errno not in (*GONE, *DENIED, 22):
            raise
        return
    for line in lines:
        left, _, right = line.partition(" - ")
        words = left.split()
        if not right.startswith("nsfs ") or len(words) < 5:
            continue
        number = _number(words[3], kind)
        if number is not None:
            point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), words[4])
            yield Place(f"{PROC}/{pid}/root{point}", plain(point)), number


def _number(text: str, kind: str) -> int | None:
    match = _NAME.fullmatch(text)
    return None if match is None or match[1] != kind else int(match[2])
