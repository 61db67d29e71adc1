"""The fixtures hold: provenance, size, and what every reading command prints of each."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.cli.reading import reading_commands, run
from vfiotool.snapshot.load import load, open_root
from vfiotool.snapshot.text import format_snapshot

HOSTS = Path(__file__).resolve().parent.parent / "fixtures" / "hosts"
NAMES = sorted(path.name for path in HOSTS.iterdir())
REGENERATE = "if the change is meant: python fixtures/make.py expect"


@pytest.mark.parametrize("name", NAMES)
def test_every_reading_command_prints_what_is_expected(name: str) -> None:
    folder = HOSTS / name
    commands = reading_commands(open_root(str(folder)))
    wanted: dict[str, Any] = {
        path.stem: json.loads(path.read_text()) for path in (folder / "expected").iterdir()
    }
    assert set(wanted) == {key.partition("/")[0] for key in commands}
    for key, command in commands.items():
        file, _, device = key.partition("/")
        entry = wanted[file][device] if device else wanted[file]
        code, text = run(command, str(folder))
        assert json.loads(text) == entry["output"], f"{' '.join(command)}: {REGENERATE}"
        assert code == entry["exit_code"], f"{' '.join(command)}: {REGENERATE}"


@pytest.mark.parametrize("name", NAMES)
def test_a_fixture_says_where_it_comes_from(name: str) -> None:
    recipe = tomllib.loads((HOSTS / name / "host.toml").read_text())
    assert recipe["summary"]
    header = load(str(HOSTS / name / "sys.txt")).header
    if recipe.get("built"):
        assert (header["built-from"], header["machine"]) == ("public facts", name)
    elif "base" in recipe:
        assert header["derived-from"] == recipe["base"]
    else:
        assert header["machine"] == recipe["machine"]
        assert header["kernel"].startswith(recipe["kernel"])


@pytest.mark.parametrize("name", NAMES)
def test_a_fixture_is_small_plain_text_in_canonical_form(name: str) -> None:
    path = HOSTS / name / "sys.txt"
    assert path.stat().st_size < 400_000
    found = load(str(path))
    assert found.cut_off is None
    assert format_snapshot(found) == path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_fixture_tells_nothing_of_the_machine_it_was_made_on(name: str) -> None:
    text = (HOSTS / name / "sys.txt").read_text()
    assert not re.search(r" - 9p |/root/|/home/|lowerdir=", text)


def test_the_domain_above_ffff_sorts_after_all_others() -> None:
    code, text = run(["devices"], str(HOSTS / "wide-domain"))
    addresses = [device["address"] for device in json.loads(text)["devices"]]
    assert code == 0
    assert addresses[-3:] == ["10000:e1:00.0", "10000:e2:01.0", "10000:e2:02.0"]


def test_names_with_newlines_and_escapes_leave_the_output_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vfiotool.cli.main import main

    root = str(HOSTS / "hostile-names")
    for command in (["groups"], ["devices"], ["tree"], ["show", "00:01.0"], ["why", "00:01.0"]):
        main(["--root", root, *command])
        found = capsys.readouterr()
        text = found.out + found.err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text), command
        assert "Traceback" not in text
    devices = json.loads(run(["devices"], root)[1])["devices"]
    assert "ev\x1b[31mil" in {device["driver"] for device in devices}, (
        "JSON keeps names as they are"
    )
