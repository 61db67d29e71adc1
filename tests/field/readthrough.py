"""The text of every reading command on every host of fixtures/, as people read it.

    python -m tests.field.readthrough          write tests/field/goldens anew
    python -m tests.field.readthrough names    first, tests/field/pci.ids from this machine's own

Read what changed before it is committed: a line that somebody would act on and regret is a fault,
whoever wrote it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from vfiotool.cli import context
from vfiotool.cli.main import main
from vfiotool.devices import names
from vfiotool.devices.inventory import read_inventory
from vfiotool.devices.mdev import read_mdevs
from vfiotool.devices.pci import list_addresses
from vfiotool.host.host import Host
from vfiotool.snapshot.load import open_root
from vfiotool.snapshot.reduce import reduce_pci_ids

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
GOLDENS = Path(__file__).resolve().parent / "goldens"
# Names for the hosts that carry none: a machine's own differ from year to year.
NAMES = Path(__file__).resolve().parent / "pci.ids"


def hosts() -> dict[str, Path]:
    """Every host by the name of its golden."""
    found = {path.parent.name: path.parent for path in (FIXTURES / "hosts").glob("*/sys.txt")}
    for path in (FIXTURES / "field").glob("*/*.txt"):
        found[f"{path.parent.name}.{path.stem}"] = path
    return dict(sorted(found.items()))


def commands(host: Host) -> Iterator[list[str]]:
    """The reading commands, and `show` and `why` of each device."""
    yield from (["groups"], ["devices"], ["doctor"], ["tree"], ["vf", "list"])
    yield from (["mdev", "types"], ["mdev", "list"], ["vdpa", "list"])
    for device in (*list_addresses(host), *(mdev.uuid for mdev in read_mdevs(host))):
        yield ["show", device]
        yield ["why", device]


def text_of(path: Path) -> str:
    """What all of them print on one host, with their exit codes."""
    host = open_root(str(path))
    own, table = names._read_table(host), NAMES.read_bytes()
    parts = []
    with (
        mock.patch.object(context, "open_host", lambda _: host),
        mock.patch.object(names, "_read_table", lambda _: own or table),
        mock.patch.dict(os.environ, {"NO_COLOR": "1", "LC_ALL": "C.UTF-8", "COLUMNS": "100"}),
    ):
        for command in commands(host):
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                code = main(["--root", str(path), *command])
            parts.append(f"$ vfiotool {' '.join(command)}\n{out.getvalue()}[exit {code}]\n")
    return "\n".join(parts).replace(str(path), "ROOT")


def write_names() -> None:
    """Take from this machine's table what the hosts of fixtures/ want of it."""
    ids = set()
    for path in hosts().values():
        for function in read_inventory(open_root(str(path))).functions:
            ids |= {
                (function.vendor or "", function.device or ""),
                (function.subsystem_vendor or "", function.subsystem_device or ""),
                ("C", function.class_code or ""),
            }
    table = names._read_table(Host.local())
    assert table is not None, "this machine has no pci.ids: apt install pci.ids"
    NAMES.write_bytes(reduce_pci_ids(table, ids))


def write() -> None:
    """Write the goldens, and remove those whose host is gone."""
    GOLDENS.mkdir(exist_ok=True)
    wanted = hosts()
    for golden in GOLDENS.glob("*.txt"):
        if golden.stem not in wanted:
            golden.unlink()
    for name, path in wanted.items():
        (GOLDENS / f"{name}.txt").write_text(text_of(path), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["names"]:
        write_names()
    write()
