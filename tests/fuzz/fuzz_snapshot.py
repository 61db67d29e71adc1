"""Fuzz the snapshot parser with atheris: any bytes are refused or read, and what is read is sound.

    python tests/fuzz/fuzz_snapshot.py -runs=100000 [libFuzzer options] [CORPUS…]

Without a corpus it starts from the forms of every kind of line. What it found once is kept in
`tests/test_snapshot.py`. A file that is read must survive being written and read again, and no
path of it may lie outside of the tree.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vfiotool.snapshot_text"]):
    from vfiotool.errors import UsageError
    from vfiotool.snapshot_text import format_snapshot, parse_snapshot

from vfiotool.host import MemoryTree

_HEAD = b"vfiotool snapshot 1\nkernel: 6.12\n\n"
_SEEDS = (
    b"",
    _HEAD,
    _HEAD + b"[/sys/a]\nclass = 0x00ff00\nlabel ~ x\nempty ~\n[end 6]\n",
    _HEAD + b"[/sys/a]\nuevent |\n| A=1\n| B=2\nraw | ~\n| \\x00\\\\\n|\n[end 9]\n",
    _HEAD
    + b"[/sys/a]\nconfig # 64\n# 000: 8680\n# 03e: ffff\nvpd ! EIO\nodd ! 524\nrom ?\n[end 9]\n",
    _HEAD + b"[/]\ndriver -> ../../x\n\n[/sys/a\\x20b]\n\\x5bx = 1\n[end 8]\n",
)


def check(data: bytes) -> None:
    try:
        found = parse_snapshot(data, "fuzz")
    except UsageError as error:
        # Every refusal names the line.
        assert error.message.startswith("fuzz:"), error.message
        return
    for path in (*found.files, *found.links, *found.directories):
        assert path.startswith("/") and "\0" not in path
        assert not {"..", "."} & set(path.split("/")) and ("//" not in path)
    again = parse_snapshot(format_snapshot(found).encode(), "again")
    assert (again.files, again.links) == (dict(found.files), dict(found.links))
    assert again.cut_off is None
    tree = MemoryTree(found.files, found.links, found.directories)
    for path in list(found.links)[:8]:
        tree.exists(path)


def with_head(data: bytes) -> None:
    # Half of the inputs get past the first line for free.
    check(_HEAD + data[1:] if data[:1] == b"\x01" else data)


def main() -> None:
    arguments = list(sys.argv)
    if all(argument.startswith("-") for argument in arguments[1:]):
        folder = Path(tempfile.mkdtemp(prefix="fuzz-snapshot-"))
        for number, seed in enumerate(_SEEDS):
            (folder / f"seed-{number}").write_bytes(seed)
        arguments.append(str(folder))
    atheris.Setup(arguments, with_head)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
