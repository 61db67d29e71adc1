"""Where the lab keeps what it fetched and built, and how two labs share it.

Everything below the cache can be deleted at any time and is made again. A folder is complete or
absent: it is filled under another name and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_root() -> Path:
    """The lab's folder: `$XDG_CACHE_HOME/vfiotool`, or `~/.cache/vfiotool`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vfiotool"


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock `name`; the second lab waits for the first one's work.

    The lock dies with its holder, so that an interrupted build blocks nobody.
    """
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another lab that prepares {name}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def filled(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that becomes `target` if the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digest(*parts: str | bytes) -> str:
    """A short name for the content of `parts` (16 hexadecimal digits of SHA-256)."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


def progress(text: str) -> None:
    """Say on stderr what is being done; nothing when stderr is not a terminal."""
    if sys.stderr.isatty():
        print(f"\x1b[2mlab: {text}\x1b[0m", file=sys.stderr, flush=True)
