"""libvirt's own RELAX NG schemas, fetched as Debian packages, and xmllint to hold XML against them.

Of two releases: Debian 12's 9.0 and the newest. Where they cannot be had, the reason is returned.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

from tests.oracles.fetched import fetch
from vfiotool.errors import VfiotoolError
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root

# Suite: the package with the schemas.
RELEASES = {"bookworm": "libvirt0", "sid": "libvirt-common"}
_SCHEMA = "usr/share/libvirt/schemas/domain.rng"


@cache
def schema_of(suite: str) -> Path | str:
    """The path of domain.rng of that suite's libvirt, or why there is none here."""
    folder = cache_root() / "oracles" / f"libvirt-{suite}"
    if not (folder / _SCHEMA).exists():
        try:
            fetch(suite, [RELEASES[suite]], folder / _SCHEMA, folder, dependencies=False)
        except (VfiotoolError, OSError) as error:
            return f"libvirt's schemas of {suite} cannot be fetched: {error}"
    return folder / _SCHEMA


@cache
def xmllint() -> tuple[str, dict[str, str]] | str:
    """xmllint and the environment that it runs in, or why there is none here."""
    if any(os.path.exists(f"{place}/xmllint") for place in os.environ["PATH"].split(":")):
        return "xmllint", dict(os.environ)
    folder = cache_root() / "oracles" / "xmllint"
    program = folder / "usr/bin/xmllint"
    codename = packages.os_release().get("VERSION_CODENAME", "bookworm")
    if not program.exists():
        try:
            fetch(codename, ["libxml2-utils"], program, folder, dependencies=True)
        except (VfiotoolError, OSError) as error:
            return f"xmllint cannot be fetched: {error}"
    return str(program), {**os.environ, "LD_LIBRARY_PATH": packages.library_path(folder)}


def faults(suite: str, xml: str) -> str:
    """What is wrong with a domain's XML by that suite's schema; empty if nothing is."""
    schema, tool = schema_of(suite), xmllint()
    assert isinstance(schema, Path) and not isinstance(tool, str)
    program, environment = tool
    done = subprocess.run(
        [program, "--noout", "--relaxng", str(schema), "-"],
        input=xml,
        capture_output=True,
        text=True,
        env=environment,
    )
    return "" if done.returncode == 0 else done.stderr
