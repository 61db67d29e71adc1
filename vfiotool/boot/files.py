"""Files below a root, installed by a manifest and removed by it: all of them, and nothing else.

Every folder on the way is opened relative to its parent without following links, so a planted
symbolic link cannot lead a root process astray. A file appears whole or not at all (temporary
file, fsync, rename, fsync of the folder). The manifest is written before the first file: after a
crash at any moment `remove_installed` takes away what had come to be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vfiotool.boot.places import FILES, FOLDERS, MANIFEST
from vfiotool.errors import KernelError, Refused, from_oserror

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class BootFile:
    """A file to install. `path` is relative to the root; `link` makes it a symbolic link."""

    path: str
    content: str = ""
    mode: int = 0o644
    link: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the content, or of the link's target."""
        text = self.content if self.link is None else f"-> {self.link}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What is installed: paths with their digests, the folders made for them, and the settings.

    While an installation is replaced a path stands there twice, with its old digest and its new.
    """

    files: tuple[tuple[str, str], ...]
    folders: tuple[str, ...]
    settings: dict[str, Any]

    def digests(self) -> dict[str, set[str]]:
        """What each path may hold to be taken for ours."""
        known: dict[str, set[str]] = {}
        for path, digest in self.files:
            known.setdefault(path, set()).add(digest)
        return known

    def to_text(self) -> str:
        value = {
            "version": 1,
            "files": [{"path": path, "sha256": digest} for path, digest in self.files],
            "folders": list(self.folders),
            "settings": self.settings,
        }
        return json.dumps(value, indent=2) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Raises KernelError for a text that is not a manifest of this version."""
        try:
            value = json.loads(text)
            if value["version"] != 1:
                raise ValueError(f"version {value['version']}")
            files = tuple((str(item["path"]), str(item["sha256"])) for item in value["files"])
            folders = tuple(str(item) for item in value["folders"])
            strange = [path for path, _ in files if path not in FILES]
            strange += [path for path in folders if path not in FOLDERS]
            if strange:
                raise ValueError(f"{strange[0][:80]!r} is nothing that boot enable installs")
            settings = dict(value["settings"])
            command = settings.get("command", [])
            if not isinstance(command, list) or not all(isinstance(w, str) for w in command):
                raise ValueError("its command is none")
            return cls(files, folders, settings)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise KernelError(
                f"/{MANIFEST} is not a manifest that this version wrote: {error}",
                hint=f"look at it, remove the files that it names by hand, then remove /{MANIFEST}",
            ) from error


def _parts(path: str) -> list[str]:
    """A relative path's parts. Raises ValueError if it could leave the root."""
    parts = path.split("/")
    if not path.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"path {path[:80]!r}")
    return parts


class InstallRoot:
    """The file system below `root`, walked by descriptors."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")

    def _shown(self, path: str) -> str:
        return f"{self.root}/{path}"

    @contextlib.contextmanager
    def folder(self, path: str, *, make: bool = False) -> Iterator[int]:
        """A descriptor of folder `path`; with `make` missing folders are made on the way.

        Raises FileNotFoundError, and Refused where a link or file stands in the way, or a folder
        that others may write to.
        """
        descriptor = os.open(self.root or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            walked = ""
            for part in _parts(path):
                walked = f"{walked}/{part}".lstrip("/")
                inner = self._step(descriptor, part, walked, make)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    def _step(self, outer: int, part: str, walked: str, make: bool) -> int:
        if make:
            try:
                os.mkdir(part, 0o755, dir_fd=outer)
                os.fsync(outer)
            except FileExistsError:
                pass
            except OSError as error:
                raise from_oserror(f"make folder {self._shown(walked)}", error) from error
        try:
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=outer)
        except NotADirectoryError as error:
            raise Refused(
                f"{self._shown(walked)} is a link or a file where a folder belongs",
                hint=f"look at it with ls -ld {self._shown(walked)}, and remove what was planted",
            ) from error
        facts = os.fstat(inner)
        if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & 0o022:
            os.close(inner)
            raise Refused(
                f"{self._shown(walked)} can be written to by others than its owner root",
                hint=f"chown root: and chmod go-w {self._shown(walked)}, then try again",
            )
        return inner

    def digest(self, path: str) -> str | None:
        """As `BootFile.digest` of what stands there; None if nothing does."""
        folder, _, name = path.rpartition("/")
        try:
            with self.folder(folder) as descriptor:
                facts = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if stat.S_ISLNK(facts.st_mode):
                    target = os.readlink(name, dir_fd=descriptor)
                    return hashlib.sha256(f"-> {target}".encode()).hexdigest()
                if not stat.S_ISREG(facts.st_mode):
                    return "not a file"
                return hashlib.sha256(self._read(descriptor, name)).hexdigest()
        except FileNotFoundError:
            return None

    def _read(self, folder: int, name: str) -> bytes:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
            return file.read()

    def read(self, path: str) -> str | None:
        """A file's text, None if it is absent. Raises Refused for a link."""
        folder, _, name = path.rpartition("/")
        try:
            with self.folder(folder) as descriptor:
                return self._read(descriptor, name).decode("utf-8", "replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            if os.path.islink(self._shown(path)):
                raise self._planted(path) from error
            raise from_oserror(f"read {self._shown(path)}", error) from error

    def _planted(self, path: str) -> Refused:
        return Refused(
            f"{self._shown(path)} is a symbolic link that vfiotool did not make",
            hint=f"look at it with ls -l {self._shown(path)}, remove it, and try again",
        )

    def put(self, file: BootFile) -> None:
        """Install one file, replacing what is there. Raises Refused for a planted link."""
        folder, _, name = file.path.rpartition("/")
        scratch = f".{name}.vfiotool-new"
        try:
            with self.folder(folder, make=True) as descriptor:
                is_link = os.path.islink(self._shown(file.path))
                if is_link and file.link is None:
                    raise self._planted(file.path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(scratch, dir_fd=descriptor)
                if file.link is not None:
                    os.symlink(file.link, scratch, dir_fd=descriptor)
                else:
                    _write_new(descriptor, scratch, file)
                os.rename(scratch, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
                os.fsync(descriptor)
        except OSError as error:
            raise from_oserror(f"write {self._shown(file.path)}", error) from error

    def unlink(self, path: str) -> None:
        """Remove a file or link, and what an interrupted `put` left; absence is no error."""
        folder, _, name = path.rpartition("/")
        try:
            with self.folder(folder) as descriptor:
                for item in (name, f".{name}.vfiotool-new"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(item, dir_fd=descriptor)
                os.fsync(descriptor)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_oserror(f"remove {self._shown(path)}", error) from error

    def rmdir(self, path: str) -> None:
        """Remove a folder if it is empty."""
        folder, _, name = path.rpartition("/")
        with contextlib.suppress(OSError), self.folder(folder) as descriptor:
            os.rmdir(name, dir_fd=descriptor)
            os.fsync(descriptor)


def _write_new(folder: int, name: str, file: BootFile) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=folder), "wb") as handle:
        handle.write(file.content.encode())
        os.fchmod(handle.fileno(), file.mode)
        handle.flush()
        os.fsync(handle.fileno())


def read_manifest(root: str) -> Manifest | None:
    """What is installed below `root`, None if nothing is. Raises KernelError, Refused."""
    text = InstallRoot(root).read(MANIFEST)
    return None if text is None else Manifest.from_text(text)


def changed_files(root: str, manifest: Manifest) -> dict[str, str]:
    """Installed files that are not as they were installed: path -> `missing` or `changed`."""
    tree = InstallRoot(root)
    found = {path: tree.digest(path) for path, _ in manifest.files}
    return {
        path: "missing" if found[path] is None else "changed"
        for path, digests in manifest.digests().items()
        if found[path] not in digests
    }


def install(root: str, files: Iterable[BootFile], settings: dict[str, Any]) -> Manifest:
    """Install `files` in the place of an earlier installation's.

    Raises Refused, before anything is written, where a file of the same name stands that the
    manifest does not know, or one of ours that somebody changed.
    """
    tree = InstallRoot(root)
    wanted = {file.path: file for file in files}
    before = read_manifest(root)
    known = before.digests() if before else {}
    for file in wanted.values():
        found = tree.digest(file.path)
        if found not in (None, file.digest, *known.get(file.path, ())):
            raise Refused(
                f"/{file.path} exists and is not what vfiotool installed",
                hint=f"move it away (its content may be wanted), then try again: /{file.path}",
            )
    done = tuple((path, file.digest) for path, file in sorted(wanted.items()))
    folders = list(before.folders) if before else []
    folders += [path for path in _missing_folders(root, [*wanted, MANIFEST]) if path not in folders]
    # First the intent: the old files and the new, so that a crash leaves nothing that is not known.
    old = before.files if before else ()
    intent = Manifest(tuple(sorted({*old, *done})), tuple(folders), settings)
    tree.put(BootFile(MANIFEST, intent.to_text()))
    for file in wanted.values():
        tree.put(file)
    for path in sorted(set(known) - set(wanted)):
        tree.unlink(path)
    manifest = Manifest(done, tuple(folders), settings)
    tree.put(BootFile(MANIFEST, manifest.to_text()))
    return manifest


def _missing_folders(root: str, paths: Iterable[str]) -> list[str]:
    missing: dict[str, None] = {}
    for path in paths:
        parts = _parts(path)[:-1]
        for count in range(1, len(parts) + 1):
            folder = "/".join(parts[:count])
            if not os.path.lexists(f"{root.rstrip('/')}/{folder}"):
                missing[folder] = None
    return list(missing)


def remove_installed(root: str, *, changed_too: bool = False) -> tuple[list[str], list[str]]:
    """Remove what the manifest names; returns the paths removed, and those that were kept.

    A file that somebody changed since is kept, and with it the manifest, unless `changed_too`.
    """
    tree = InstallRoot(root)
    manifest = read_manifest(root)
    if manifest is None:
        # A crash before the first manifest was whole leaves only its scratch file.
        tree.unlink(MANIFEST)
        return [], []
    removed, kept = [], []
    for path, digests in manifest.digests().items():
        found = tree.digest(path)
        if found is not None and found not in digests and not changed_too:
            kept.append(path)
            continue
        tree.unlink(path)
        if found is not None:
            removed.append(path)
    if kept:
        left = tuple((path, digest) for path, digest in manifest.files if path in kept)
        text = Manifest(left, manifest.folders, manifest.settings).to_text()
        tree.put(BootFile(MANIFEST, text))
        return removed, kept
    tree.unlink(MANIFEST)
    for folder in sorted(manifest.folders, key=lambda item: item.count("/"), reverse=True):
        tree.rmdir(folder)
    return [*removed, MANIFEST], []
