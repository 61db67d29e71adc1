"""The global options' values, and the host that `--root` names."""

from __future__ import annotations

import os

from vfiotool.host.host import Host


class Globals:
    """What --root, --json, --debug and -q were given as: found while the command line is parsed.

    `stands` is what a command has done by now, in words, and `code` its exit code: both hold even
    if its report cannot be written.
    """

    def __init__(self) -> None:
        self.root: str | None = None
        self.json = False
        self.debug = False
        self.quiet = False
        self.stands: str | None = None
        self.code = 0


def open_host(root: str | None) -> Host:
    """This machine, or what a directory or a snapshot file holds. Raises UsageError for others."""
    if root is None:
        return Host.local()
    if os.path.isdir(os.path.join(root, "sys")):
        return Host.at(root)
    from vfiotool.snapshot.load import open_root

    return open_root(root)
