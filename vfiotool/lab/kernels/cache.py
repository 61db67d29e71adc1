"""Where the lab keeps what it fetched and built, and how two labs share it.

Everything below the cache can be deleted at any time and is made again. A folder is complete or
absent: it is filled under another name and renamed. Each is sealed with the digests of its files,
which are checked whenever it is used; a cache that another user could write to is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import grp
import hashlib
import json
import os
import pwd
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from vfiotool.errors import KernelError, Refused, from_oserror

SEAL = "seal.json"


def cache_root() -> Path:
    """The lab's folder: `$XDG_CACHE_HOME/vfiotool`, or `~/.cache/vfiotool`; made if absent.

    What is in it is run. Raises Refused where another user than root and this one could write to
    it, or to a folder on the way there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return _trusted_root(os.path.abspath(base))


@functools.cache
def _trusted_root(base: str) -> Path:
    root = Path(base) / "vfiotool"
    try:
        # As written and as the links lead: whoever can turn a link chooses what is run.
        for path in (*reversed(root.parents), root):
            _refuse_foreign(path)
        root.mkdir(parents=True, exist_ok=True)
        resolved = root.resolve(strict=True)
        for path in (*reversed(resolved.parents), resolved):
            _refuse_foreign(path)
    except OSError as error:
        raise from_oserror(
            f"make the lab's cache {root}", error, hint="name another: XDG_CACHE_HOME=FOLDER"
        ) from error
    return root


def _refuse_foreign(path: Path) -> None:
    """Raise Refused if somebody else owns `path` or may change it; what is absent passes."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    trusted = (0, os.geteuid())
    if found.st_uid not in trusted:
        _refuse(path, f"belongs to user {found.st_uid}")
    if stat.S_ISLNK(found.st_mode):
        return
    others = found.st_mode & stat.S_IWOTH
    group = found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid)
    # In a sticky folder nobody replaces what is another's (/tmp).
    if (others or group) and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        _refuse(path, f"can be written to by others (mode {stat.S_IMODE(found.st_mode):o})")


def _refuse(path: Path, why: str) -> NoReturn:
    raise Refused(
        f"the lab runs what is in its cache, and {path} {why}",
        hint=f"XDG_CACHE_HOME=FOLDER of user {os.geteuid()}'s own, or: ls -ld {path}",
    )


@functools.cache
def _is_private_group(gid: int) -> bool:
    """Whether the group is root's, or this user's own and nobody else's (user private groups)."""
    if gid == 0:
        return True
    try:
        group = grp.getgrgid(gid)
        user = pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and not group.gr_mem


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
        _seal(partial, _digests(partial, {}))
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@functools.cache
def verified(folder: Path) -> Path:
    """`folder`, once everything in it was found as it was sealed; asked once a process.

    Digests are taken again of files that have been touched since (their size, inode or ctime is
    another), and always of those that this machine itself runs or boots. Raises Refused for what
    another user could write to, KernelError, with the file's name, for what has changed. A folder
    of a lab that did not seal yet is sealed as it is.
    """
    _refuse_foreign(folder)
    try:
        known = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = None
    except (OSError, ValueError) as error:
        raise _damaged(folder, SEAL) from error
    found = _digests(folder, known or {})
    if known is not None:
        for name in sorted(known.keys() | found.keys()):
            if known.get(name, [""])[0] != found.get(name, [""])[0]:
                raise _damaged(folder, name)
    if known != found:
        # Root's cache, used by somebody else: it is read in full each time.
        with contextlib.suppress(PermissionError):
            _seal(folder, found)
    return folder


def _damaged(folder: Path, name: str) -> KernelError:
    return KernelError(
        f"{folder / name} is not what the lab put there",
        hint=f"have it made again: rm -r {folder}",
    )


# What is run or booted outside of guests: its digest is taken at each use.
_ALWAYS = ("image", "usr/bin/qemu-system-x86_64", "usr/bin/busybox", "usr/bin/kmod")
Digests = dict[str, list[str]]


def _digests(folder: Path, known: Digests) -> Digests:
    """For each file its digest (a link's: its target) and what shows that it was touched."""
    found: Digests = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            facts = os.lstat(path)
            short = os.path.relpath(path, folder)
            if short == SEAL:
                continue
            _refuse_foreign(Path(path))
            if stat.S_ISLNK(facts.st_mode):
                found[short] = ["-> " + os.readlink(path)]
                continue
            if not stat.S_ISREG(facts.st_mode):
                continue
            state = f"{facts.st_size} {facts.st_ino} {facts.st_ctime_ns}"
            earlier = known.get(short, ["", ""])
            if short not in _ALWAYS and earlier[1:] == [state]:
                found[short] = earlier
                continue
            with open(path, "rb") as file:
                found[short] = [hashlib.file_digest(file, "sha256").hexdigest(), state]
    return found


def _seal(folder: Path, digests: Digests) -> None:
    scratch = folder.parent / f".{folder.name}-{os.getpid()}.seal"
    scratch.write_text(json.dumps(digests, sort_keys=True), encoding="utf-8")
    scratch.replace(folder / SEAL)


def digest(*parts: str | bytes) -> str:
    """A short name for the content of `parts` (16 hexadecimal digits of SHA-256)."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


_silent = False


def be_silent() -> None:
    """Have `progress` say nothing from now on (`lab run --quiet`)."""
    global _silent
    _silent = True


def progress(text: str) -> None:
    """Say on stderr what is being done; nothing when stderr is not a terminal."""
    if sys.stderr.isatty() and not _silent:
        print(f"\x1b[2mlab: {text}\x1b[0m", file=sys.stderr, flush=True)
