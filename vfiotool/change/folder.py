"""A folder of vfiotool's own, opened so that nobody else can lead a root process astray.

The folder belongs to the process's user and to nobody else (0700); every name in it is a single
anchored path part and is opened relative to the folder's descriptor without following links.
"""

from __future__ import annotations

import os
import re
import stat

from vfiotool.errors import Refused, UsageError, from_oserror

_SCRATCH = ".new"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,199}", re.ASCII)


def safe_name(name: str) -> str:
    """`name` if it can be one path part of a state folder. Raises UsageError."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"{name[:80]!r} cannot be a file name in a state folder")
    return name


class Folder:
    """A state folder held open. Raises Refused for one that another user could write to."""

    descriptor: int = -1

    def __init__(self, path: str, *, _parent: Folder | None = None, mode: int = 0o700) -> None:
        self.path = path
        anchor = None if _parent is None else _parent.descriptor
        name = path if _parent is None else safe_name(path.rpartition("/")[2])
        try:
            os.mkdir(name, mode, dir_fd=anchor)
        except FileExistsError:
            pass
        except OSError as error:
            raise self._failed("make", error) from error
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.descriptor = os.open(name, flags, dir_fd=anchor)
        except NotADirectoryError as error:
            raise Refused(
                f"{path} is no folder but something planted there",
                hint=f"look at it with ls -ld {path}, remove it, and try again",
            ) from error
        except OSError as error:
            raise self._failed("open", error) from error
        facts = os.fstat(self.descriptor)
        if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o022:
            owner, found = facts.st_uid, stat.S_IMODE(facts.st_mode)
            self.close()
            raise Refused(
                f"{path} belongs to user {owner} with mode {found:o}: others could change it",
                hint=f"chown and chmod it to user {os.geteuid()} and {mode:o}, or remove it",
            )

    def _failed(self, what: str, error: OSError) -> Exception:
        return from_oserror(
            f"{what} the state folder {self.path}", error, hint="changing a host needs root"
        )

    def sub(self, name: str) -> Folder:
        """The folder of that name inside this one, made if absent."""
        return Folder(f"{self.path}/{name}", _parent=self)

    def names(self) -> list[str]:
        """The files, without those that `replace` is still writing."""
        try:
            found = os.listdir(self.descriptor)
        except OSError as error:
            raise from_oserror(f"list {self.path}", error) from error
        return sorted(name for name in found if not name.endswith(_SCRATCH))

    def open(self, name: str, flags: int) -> int:
        """A descriptor of a regular file of ours.

        Raises FileNotFoundError, KernelError or NotPermitted; Refused for anything else there.
        """
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(safe_name(name), flags, 0o600, dir_fd=self.descriptor)
        except OSError as error:
            if os.path.islink(f"{self.path}/{name}"):
                raise self._planted(name) from error
            if isinstance(error, FileNotFoundError):
                raise
            raise from_oserror(f"open {self.path}/{name}", error) from error
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            os.close(descriptor)
            raise self._planted(name)
        return descriptor

    def _planted(self, name: str) -> Refused:
        return Refused(
            f"{self.path}/{name} is not a file of ours: a link or another user's file",
            hint=f"look at it with ls -l {self.path}, remove it, and try again",
        )

    def read(self, name: str) -> bytes | None:
        """A file's content, or None if there is none of that name."""
        try:
            descriptor = self.open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            with os.fdopen(descriptor, "rb") as file:
                return file.read()
        except OSError as error:
            raise from_oserror(f"read {self.path}/{name}", error) from error

    def replace(self, name: str, data: bytes) -> None:
        """Put `data` in place of the file, so that a reader and a power loss see old or new.

        Raises KernelError or NotPermitted, with the old file in place.
        """
        scratch = f"{safe_name(name)}.{os.getpid()}{_SCRATCH}"
        try:
            descriptor = self.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self.rename(scratch, name)
        except OSError as error:
            self.remove(scratch)
            raise from_oserror(f"write {self.path}/{name}", error) from error

    def rename(self, old: str, new: str) -> None:
        """Rename inside the folder, and make it last. Raises KernelError."""
        try:
            os.rename(old, safe_name(new), src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            os.fsync(self.descriptor)
        except OSError as error:
            raise from_oserror(f"rename {old} in {self.path}", error) from error

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error. Raises KernelError, NotPermitted."""
        try:
            os.unlink(safe_name(name), dir_fd=self.descriptor)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_oserror(f"remove {self.path}/{name}", error) from error

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()
