"""Prometheus' own promtool, fetched as a Debian package, to hold what `metrics` prints against."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

from tests.oracles.fetched import fetch
from vfiotool.errors import VfiotoolError
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root


@cache
def promtool() -> tuple[str | None, str]:
    """The program, or None and why there is none here."""
    if found := shutil.which("promtool"):
        return found, ""
    folder = cache_root() / "oracles" / "prometheus"
    program = folder / "usr/bin/promtool"
    if not program.exists():
        codename = packages.os_release().get("VERSION_CODENAME", "bookworm")
        try:
            fetch(codename, ["prometheus"], program, folder, dependencies=False)
        except (VfiotoolError, OSError) as error:
            return None, f"promtool cannot be fetched: {error}"
    return str(program), ""


def faults(text: str) -> str:
    """What `promtool check metrics` says of a scrape; empty if nothing is wrong."""
    program, _ = promtool()
    assert program is not None
    done = subprocess.run(
        [program, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr if done.returncode else ""
