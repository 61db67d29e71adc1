"""A real ansible-core, in a venv of the cache for tests that play; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from vfiotool.errors import VfiotoolError
from vfiotool.lab.kernels.cache import cache_root, locked

VERSION = "2.17.7"


def playbook() -> Path | None:
    """The ansible-playbook that is told, installed or in the cache; None without one."""
    if found := os.environ.get("ANSIBLE_PLAYBOOK") or shutil.which("ansible-playbook"):
        return Path(found)
    try:
        kept = _folder() / "bin/ansible-playbook"
    except VfiotoolError:
        # A cache that others may write to is used for nothing.
        return None
    return kept if kept.exists() else None


def get() -> Path:
    """As `playbook`, fetched where there is none. Raises OSError or CalledProcessError."""
    with locked("oracle-ansible"):
        if (found := playbook()) is not None:
            return found
        shutil.rmtree(_folder(), ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(_folder())], check=True)
        pip = [str(_folder() / "bin/python"), "-m", "pip", "install", "-qq"]
        subprocess.run([*pip, f"ansible-core=={VERSION}"], check=True)
    return _folder() / "bin/ansible-playbook"


def _folder() -> Path:
    return cache_root() / "oracles" / f"ansible-{VERSION}"
