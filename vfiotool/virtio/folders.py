"""Where servers keep what outlives a connection: control sockets, in-flight logs."""

from __future__ import annotations

import os


def runtime_folder() -> str | None:
    """The service's runtime directory, /run/vfiotool for root, or the user's own; None without."""
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return given.partition(":")[0]
    if os.geteuid() == 0:
        return "/run/vfiotool"
    own = os.environ.get("XDG_RUNTIME_DIR")
    return f"{own}/vfiotool" if own else None
