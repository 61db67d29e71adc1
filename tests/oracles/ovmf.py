"""OVMF, the firmware of UEFI guests, fetched as a Debian package: what it makes of large BARs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.oracles.fetched import fetch
from vfiotool.errors import VfiotoolError
from vfiotool.lab.kernels.cache import cache_root


@cache
def ovmf(suite: str) -> tuple[Path | None, str]:
    """The folder with a suite's OVMF_CODE_4M.fd and OVMF_VARS_4M.fd, or None and why not."""
    folder = cache_root() / "oracles" / f"ovmf-{suite}"
    found = folder / "usr/share/OVMF"
    if not (found / "OVMF_CODE_4M.fd").exists():
        try:
            fetch(suite, ["ovmf"], found / "OVMF_CODE_4M.fd", folder, dependencies=False)
        except (VfiotoolError, OSError) as error:
            return None, f"OVMF cannot be fetched: {error}"
    return found, ""
