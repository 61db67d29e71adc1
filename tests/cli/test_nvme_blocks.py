"""`nvme compare` and `nvme copy`, on a model of a controller."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiotool.cli.main import main
from vfiotool.models import ModelServer
from vfiotool.models.nvme import NvmeModel

BLOCKS = 4096


@pytest.fixture
def disk() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, ModelServer(NvmeModel(BLOCKS, 9), f"{folder}/s"):
        yield f"vfio-user:{folder}/s"


def placed(lba: int, count: int) -> bytes:
    return b"".join((lba + n).to_bytes(8, "little") * 64 for n in range(count))


@pytest.fixture
def nvme(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(command: str, *words: str) -> tuple[int, Any]:
        code = main(["nvme", command, *words, "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else said.err

    return run


def test_blocks_are_copied_and_compared(disk: str, nvme: Any, tmp_path: Path) -> None:
    file = tmp_path / "blocks"
    file.write_bytes(placed(0, 3000))  # more than a command takes
    assert nvme("write", disk, "--input", str(file))[0] == 0
    code, told = nvme("compare", disk, "--input", str(file))
    assert code == 0 and told["done"] == "3000 blocks are the same" and told["nsid"] == 1
    words = ("--sdlba", "3500", "--slbs", "7,100", "--blocks", "2,3")
    code, told = nvme("copy", disk, *words)
    assert code == 4 and "destroys data" in json.dumps(told)
    code, told = nvme("copy", disk, *words, "--overwrite")
    assert code == 0 and told["done"] == "5 blocks copied to 3500 and on"
    file.write_bytes(placed(7, 2) + placed(100, 3))
    assert nvme("compare", disk, "--data", str(file), "--lba", "3500")[0] == 0
    code, told = nvme("compare", disk, "--input", str(file), "--lba", "3501")
    assert code == 5 and "compare failure" in json.dumps(told)
    assert "compare of blocks 3501 to 3505" in json.dumps(told)


@pytest.mark.parametrize(
    "words",
    [
        ("copy", "--sdlba", "0", "--slbs", "1,2", "--blocks", "1", "--overwrite"),
        ("copy", "--sdlba", "0", "--slbs", "1,", "--blocks", "1,1", "--overwrite"),
        ("copy", "--sdlba", "0", "--slbs", "-1", "--overwrite"),
        ("copy", "--sdlba", "-1", "--slbs", "1", "--overwrite"),
        ("copy", "--sdlba", f"{BLOCKS}", "--slbs", "1", "--overwrite"),
        ("copy", "--sdlba", "0", "--slbs", f"{BLOCKS}", "--overwrite"),
        ("copy", "--sdlba", "0", "--slbs", "0", "--blocks", "0", "--overwrite"),
        ("copy", "--sdlba", "0", "--slbs", ",".join("0" * 129), "--blocks", ",".join("1" * 129),
         "--overwrite"),
        ("compare", "--input", "PART"),
        ("compare", "--input", "NONE"),
        ("compare", "--input", "ONE", "--lba", "-1"),
        ("compare", "--input", "ONE", "--lba", f"{BLOCKS}"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_mistake_of_the_caller(
    words: tuple[str, ...], disk: str, nvme: Any, tmp_path: Path
) -> None:
    for name, size in (("PART", 100), ("NONE", 0), ("ONE", 512)):
        (tmp_path / name).write_bytes(bytes(size))
    command, *rest = words
    code, told = nvme(command, disk, *(
        str(tmp_path / word) if word in ("PART", "NONE", "ONE") else word for word in rest
    ))  # fmt: skip
    assert code == 2, told
