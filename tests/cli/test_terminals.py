"""The reading commands on terminals of 80 and 60 columns, with colours and without, as they were
looked at: `python -m tests.cli.test_terminals` writes the goldens anew.

Colours are the terminal's own sixteen, so that a light and a dark terminal get the same bytes.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.cli.terminal import on_terminal
from vfiotool.cli.style import _CODES

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = Path(__file__).resolve().parent / "terminals"
HOSTS = {"shared-group": "0000:02:01.0", "vfs-enabled": "0000:02:00.0"}
COLUMNS = (80, 60)
COLOUR = {"TERM": "xterm-256color"}
PLAIN = {"NO_COLOR": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}}
_STYLE = re.compile(r"\x1b\[([0-9;]*)m")


def commands(device: str) -> list[list[str]]:
    return [
        ["groups"],
        ["devices"],
        ["show", device],
        ["why", device],
        ["doctor"],
        ["tree"],
        ["vf", "list"],
        ["vm", "check", device, "--memory", "16G", "--vcpus", "4"],
    ]


# All commands in one process: what takes long is starting Python.
PROGRAM = """
import sys
from vfiotool.cli.main import main
for line in sys.argv[1:]:
    print(f"$ vfiotool {line}", flush=True)
    main(["--root", ROOT, *line.split()])
    print(flush=True)
"""


@cache
def screens(host: str, columns: int, environment: tuple[tuple[str, str], ...]) -> str:
    """All commands one after another, with styles as `{31}` and their ends as `{}`."""
    program = ("-c", PROGRAM.replace("ROOT", repr(str(ROOT / "fixtures" / "hosts" / host))))
    lines = [" ".join(command) for command in commands(HOSTS[host])]
    code, text = on_terminal(
        *lines, columns=columns, lines=2000, env=dict(environment), program=program
    )
    assert code == 0, text
    shown = _STYLE.sub(lambda found: "{" + ("" if found[1] == "0" else found[1]) + "}", text)
    assert "\x1b" not in shown, f"more than a style: {shown!r}"
    return shown


def plain(text: str) -> str:
    """Without styles, and without the spaces that only a style made visible."""
    lines = re.sub(r"\{[0-9;]*\}", "", text).split("\n")
    return "\n".join(line.rstrip() for line in lines)


def environment(**given: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(given.items()))


def golden(host: str, columns: int) -> Path:
    return GOLDENS / f"{host}.{columns}.txt"


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_terminal_with_colours_shows_what_was_looked_at(host: str, columns: int) -> None:
    assert screens(host, columns, environment(**COLOUR)) == golden(host, columns).read_text()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("without", PLAIN)
def test_without_colours_it_is_the_same_text(host: str, columns: int, without: str) -> None:
    shown = screens(host, columns, environment(**PLAIN[without]))
    assert "{" not in shown
    assert plain(shown) == plain(golden(host, columns).read_text())


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("host", HOSTS)
def test_in_a_c_locale_it_is_ascii(host: str, columns: int) -> None:
    shown = screens(host, columns, environment(LC_ALL="C", NO_COLOR="1"))
    assert shown.isascii()
    assert shown == golden(host, columns).with_suffix(".ascii.txt").read_text()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("host", HOSTS)
def test_no_line_is_wider_than_the_terminal_but_what_is_to_be_typed(
    host: str, columns: int
) -> None:
    """A word alone in its line, such as a path, may be as long as it is."""
    for line in golden(host, columns).read_text().split("\n"):
        text = plain(line)
        typed = f"{{{_CODES['cyan']}}}" in line or text.startswith("$ ")
        assert typed or len(text) <= columns or len(text.split()) == 1, text


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for host in HOSTS:
        for columns in COLUMNS:
            path = golden(host, columns)
            path.write_text(screens(host, columns, environment(**COLOUR)))
            ascii_text = screens(host, columns, environment(LC_ALL="C", NO_COLOR="1"))
            path.with_suffix(".ascii.txt").write_text(ascii_text)


if __name__ == "__main__":
    main()
