"""`serve vfio-user` as one types it, and drivers' commands on what it serves."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.models.served import open_files
from vfiotool.cli import serve_model
from vfiotool.cli.main import main
from vfiotool.models import FAULT_NAMES

CARD = """
from vfiotool.models import Model

class Card(Model):
    vendor, device, class_code = 0x1234, 0x4321, 0xFF0000

not_a_model = int

class Unborn(Card):
    def __init__(self):
        self.size = 1 // 0

class Wanting(Card):
    def __init__(self, size):
        super().__init__()
"""


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command running, and its socket; ended by SIGTERM with exit code 0."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/s"
        command = [sys.executable, "-m", "vfiotool", "serve", "vfio-user", *arguments]
        process = subprocess.Popen(
            [*command, "--socket-path", path], stderr=subprocess.PIPE, text=True
        )
        try:
            for _ in range(2000):
                if os.path.exists(path) or process.poll() is not None:
                    break
                threading.Event().wait(5e-3)
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield process, path
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            assert not os.path.exists(path)
        finally:
            process.kill()
            process.wait()


def test_a_demo_runs_on_a_device_that_a_process_serves(capsys: pytest.CaptureFixture[str]) -> None:
    with serving("edu") as (_, path):
        assert main(["demo", f"vfio-user:{path}"]) == 0
        assert "5 of 5" in (out := capsys.readouterr().out) or "FAIL" not in out
        assert main(["device", "info", f"vfio-user:{path}", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["backend"] == "vfio-user"
        assert main(["device", "read", f"vfio-user:{path}", "bar0", "0"]) == 0
        assert "010000ed" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [(("demo", "{}"), "liveness"), (("device", "read", "{}", "bar0", "0"), "010000ed")],
)
def test_a_trace_on_standard_output_is_a_stream_of_its_own(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving("edu") as (_, path):
        command = [word.format(f"vfio-user:{path}") for word in words]
        assert main([*command, "--trace", "-"]) == 0
        told = capsys.readouterr()
        assert {json.loads(line)["event"] for line in told.out.splitlines()} >= {"read"}
        assert said in told.err
        # The next command of this process has its standard output back.
        assert main(command) == 0
        assert said in capsys.readouterr().out


def test_a_model_in_a_file_of_one_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "card.py"
    file.write_text(CARD)
    with serving(f"{file}:Card", "--fault", "reset-fails") as (process, path):
        assert main(["device", "info", f"vfio-user:{path}"]) == 0
        assert "through vfio-user" in capsys.readouterr().out
        assert main(["device", "read", f"vfio-user:{path}", "config", "0"]) == 0
        assert "43211234" in capsys.readouterr().out
        assert main(["device", "reset", f"vfio-user:{path}"]) == 5
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], 10)[0]
        assert "the client has gone" in process.stderr.readline()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nothing"], 2, "is not MODULE:CLASS"),
        (["no.such.module:X"], 3, "no module"),
        (["vfiotool.models.edu:Nothing"], 3, "has no class"),
        (["vfiotool.models.edu:BarSpec"], 2, "not a subclass"),
        (["./no/file.py:X"], 3, "no file"),
        (["edu", "--fault", "rain"], 2, "is not a fault"),
    ],
)
def test_what_is_no_model_is_said(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["serve", "vfio-user", *words, "--socket-path", str(tmp_path / "s")]
    assert main(arguments) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "code", "said"),
    [
        (CARD, "Unborn", 2, ["Unborn() fails: ZeroDivisionError", "(card.py:11, __init__)"]),
        (CARD, "Wanting", 2, ["missing 1 required positional argument", "give them defaults"]),
        ("def (", "Card", 2, ["cannot be imported: SyntaxError: invalid syntax (card.py:1)"]),
        ("import no_such_thing", "Card", 2, ["No module named 'no_such_thing' (card.py:1)"]),
        ("raise SystemExit(7)", "Card", 2, ["cannot be imported: SystemExit: 7 (card.py:1)"]),
    ],
    ids=["raises", "arguments", "syntax", "import", "exit"],
)
def test_a_class_that_cannot_be_made_is_one_error_that_says_where(
    text: str,
    name: str,
    code: int,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "card.py").write_text(text)
    words = ["serve", "vfio-user", f"{tmp_path}/card.py:{name}", "--socket-path", "s"]
    assert main(words) == code
    told = capsys.readouterr().err
    assert all(one in told for one in said) and "Traceback" not in told, told


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("{}/none/s", 5, "there is no folder"),
        ("{}", 2, "exists and is not a socket"),
        ("{}/" + "a" * 120, 2, "a socket's path has 1 to 107 bytes"),
        ("", 2, "a socket's path has 1 to 107 bytes"),
    ],
    ids=["folder", "not a socket", "long", "empty"],
)
def test_a_path_that_cannot_be_a_socket_s_is_said(
    path: str, code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["serve", "vfio-user", "edu", "--socket-path", path.format(tmp_path)]
    before = open_files()
    assert main(arguments) == code
    assert open_files() <= before  # what an earlier test left may go meanwhile
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_the_help_names_every_fault() -> None:
    assert serve_model._FAULTS == FAULT_NAMES


def test_a_socket_that_is_served_is_not_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    with serving("edu") as (_, path):
        assert main(["serve", "vfio-user", "edu", "--socket-path", path]) == 5
        assert "served already" in capsys.readouterr().err
