"""`import`: another tool's settings as a policy."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import area, examples, wants_json
from vfiotool.errors import AnswerIsNo, NotFound, UsageError, from_oserror

app = area()
_LARGEST_FOLDER = 10_000
_UUID_NAME = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@app.command(
    "import",
    epilog=examples(
        "vfiotool import /etc/modprobe.d/vfio.conf",
        "vfiotool import /etc/driverctl.d",
        "virsh dumpxml vm1 | vfiotool import - | vfiotool plan -",
        "vfiotool import 'vfio-pci.ids=10de:2684,10de:22ba'",
    ),
)
def import_source(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file, a folder, - for standard input, or text.",
            autocompletion=candidates.files,
        ),
    ],
    kind: Annotated[
        str | None, typer.Option("--from", metavar="KIND", help="What wrote it, if not seen.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which node of a Proxmox cluster.")
    ] = None,
) -> int:
    """Turn another tool's settings into a policy, printed on standard output.

    Reads driverctl, mdevctl, modprobe.d, kernel command lines, libvirt, Proxmox and others. Each
    line that is not carried over is named, with the reason.
    """
    from vfiotool.policy.importers import import_files

    origin, files = read_source(source)
    done = import_files(origin, files, kind, node=node)
    if wants_json(context):
        output.emit(
            {
                "source": origin,
                "kind": done.kind,
                "policy": done.policy,
                "rules": [rule.as_json() for rule in done.rules],
                "leftovers": [item.as_json() for item in done.leftovers],
            }
        )
        return 0 if done.rules else 1
    for item in done.leftovers:
        output.warn(f"vfiotool: not carried over: {item.where}: {item.what}: {item.why}")
    if not done.rules:
        raise AnswerIsNo(f"nothing of {origin} could be carried over")
    output.text(done.policy)
    return 0


def read_source(source: str) -> tuple[str, dict[str, str]]:
    """The name of a source and its files, path to text. Links in a folder are not followed.

    Raises NotFound, UsageError for a source that is too large, NotPermitted.
    """
    if source == "-":
        return "standard input", {"stdin": _decode("standard input", sys.stdin.buffer.read())}
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        # A command line was given as it is: it has blanks or assignments and is no file.
        if " " in source.strip() or "=" in source:
            return "the command line", {"text": source}
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise from_oserror(f"read {source[:200]}", error) from error
        raise NotFound(f"there is no file or folder {source[:200]!r}") from error
    if stat.S_ISDIR(mode):
        return source, _read_folder(path)
    # mdevctl's folder names the parent, its file the UUID: one file alone needs both.
    parent = path.absolute().parent.name
    name = f"{parent}/{path.name}" if _UUID_NAME.fullmatch(path.name) else path.name
    return source, {name: _read_text(path)}


def _read_folder(folder: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    for where, _, names in os.walk(folder, followlinks=False):
        for name in sorted(names):
            path = Path(where, name)
            if path.is_symlink() or not path.is_file():
                output.warn(f"vfiotool: not carried over: {path}: not a regular file")
                continue
            files[str(path.relative_to(folder))] = _read_text(path)
            if len(files) > _LARGEST_FOLDER:
                raise UsageError(f"{folder} holds more than {_LARGEST_FOLDER} files")
    return files


def _read_text(path: Path) -> str:
    from vfiotool.policy.importers import LARGEST_BYTES

    try:
        with open(path, "rb") as file:
            return _decode(str(path), file.read(LARGEST_BYTES + 1))
    except OSError as error:
        raise from_oserror(f"read {path}", error) from error


def _decode(where: str, data: bytes) -> str:
    from vfiotool.policy.importers import LARGEST_BYTES

    if len(data) > LARGEST_BYTES:
        raise UsageError(f"{where} is larger than {LARGEST_BYTES >> 20} MiB")
    return data.decode("utf-8", "backslashreplace")
