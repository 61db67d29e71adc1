"""Fuzz the snapshot parser with atheris: any bytes are refused or read, and what is read is sound.

    python tests/fuzz/fuzz_snapshot.py -runs=100000 [libFuzzer options] [CORPUS…]
    python tests/fuzz/fuzz_snapshot.py --keep CORPUS     keep a corpus as a regression test

Without a corpus it starts from the forms of every kind of line. `tests/test_fuzz_corpus.py`
replays what was kept.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

with atheris.instrument_imports(include=["vfiotool.snapshot_text"]):
    from snapshot_check import HEAD, check, with_head

KEPT = TESTS / "fuzz" / "snapshot_corpus.json"
_SEEDS = (
    b"",
    HEAD,
    HEAD + b"[/sys/a]\nclass = 0x00ff00\nlabel ~ x\nempty ~\n[end 6]\n",
    HEAD + b"[/sys/a]\nuevent |\n| A=1\n| B=2\nraw | ~\n| \\x00\\\\\n|\n[end 9]\n",
    HEAD
    + b"[/sys/a]\nconfig # 64\n# 000: 8680\n# 03e: ffff\nvpd ! EIO\nodd ! 524\nrom ?\n[end 9]\n",
    HEAD + b"[/]\ndriver -> ../../x\n\n[/sys/a\\x20b]\n\\x5bx = 1\n[end 8]\n",
)


def keep(folder: Path) -> None:
    """Write a corpus' inputs of up to 400 bytes into one file, sorted."""
    inputs = sorted(path.read_bytes() for path in folder.iterdir())
    texts = [base64.b64encode(data).decode() for data in inputs if len(data) <= 400]
    KEPT.write_text(json.dumps(texts, indent=0) + "\n")


def main() -> None:
    arguments = list(sys.argv)
    if arguments[1:2] == ["--keep"]:
        keep(Path(arguments[2]))
        return
    if all(argument.startswith("-") for argument in arguments[1:]):
        folder = Path(tempfile.mkdtemp(prefix="fuzz-snapshot-"))
        for number, seed in enumerate(_SEEDS):
            (folder / f"seed-{number}").write_bytes(seed)
        arguments.append(str(folder))
    atheris.Setup(arguments, lambda data: check(with_head(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
