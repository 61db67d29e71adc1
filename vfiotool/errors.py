"""Every exception of vfiotool, one exit code a branch.

An error names the operation and the object, carries the kernel's errno by name where there is
one, and a hint: the next thing to type. The command line prints it; nothing else does. In a script
a traceback shows the hint as a note (PEP 678).

They are kin of Python's own, so that code which knows nothing of vfiotool can handle them:
KernelError is an OSError with its `errno`, TimedOut a TimeoutError too, NotPermitted a
PermissionError, UsageError a ValueError.
"""

from __future__ import annotations

import errno as _errno
import os as _os

# Of what another's exception says.
_LONGEST_SAID = 300
# By every name. Some numbers have two: 95 is EOPNOTSUPP to the kernel and ENOTSUP to Python's
# errorcode, whose name errors carry.
_NUMBERS = {name: getattr(_errno, name) for name in dir(_errno) if name.startswith("E")}


class VfiotoolError(Exception):
    """Base of all errors that vfiotool raises on purpose.

    `message` is one sentence naming the operation, the object and the reason; `hint` is what to
    do or type next; `device` is the object's identifier where the error concerns one device;
    `errno_name` is the kernel's errno by name (``"EBUSY"``): one name a number, as `errno_name()`
    gives it, whichever was said.
    """

    kind = "error"
    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        device: str | None = None,
        errno_name: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.device = device
        self.errno_name = _one_name(errno_name)
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    @property
    def hint(self) -> str | None:
        """What to do or type next; a note of the exception as well."""
        return self._hint

    @hint.setter
    def hint(self, text: str | None) -> None:
        self._hint = text
        self.__notes__ = [] if text is None else [f"hint: {text}"]

    @property
    def errno(self) -> int | None:
        """The kernel's errno as a number, as an OSError has it."""
        if self.errno_name is None:
            return None
        return _NUMBERS.get(self.errno_name)

    @property
    def strerror(self) -> str:
        """The message, as an OSError has it."""
        return self.message

    def as_json(self) -> dict[str, object]:
        """The contract's error object (CONTRACT: `{"format_version", "error": {…}}`)."""
        return {
            "format_version": "1.0",
            "error": {
                "kind": self.kind,
                "message": self.message,
                "hint": self.hint,
                "device": self.device,
                "errno": self.errno_name,
            },
        }


class AnswerIsNo(VfiotoolError):
    """The question was answered, and the answer is no."""

    kind = "no"
    exit_code = 1


class UsageError(VfiotoolError, ValueError):
    """Bad arguments, a bad policy, or a root that cannot be used."""

    kind = "usage"
    exit_code = 2


class NotFound(VfiotoolError):
    """No such device, group, type or id."""

    kind = "not-found"
    exit_code = 3


class Ambiguous(VfiotoolError):
    """A selector that names several devices; the message lists them."""

    kind = "ambiguous"
    exit_code = 3


class Refused(VfiotoolError):
    """vfiotool will not do it, because it would hurt the host."""

    kind = "refused"
    exit_code = 4


class Foretold(Refused):
    """The kernel would refuse it; that was seen before anything was written.

    `reason` names what was seen in a word (`no-vf-memory`), `evidence` where.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "foretold",
        evidence: str = "",
        hint: str | None = None,
        device: str | None = None,
        errno_name: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, device=device, errno_name=errno_name)
        self.reason = reason
        self.evidence = evidence


class KernelError(VfiotoolError, OSError):  # type: ignore[misc, override]
    """The kernel refused or failed; what was done before has been rolled back.

    One with ETIMEDOUT is a `TimedOut`, as an OSError with it is a TimeoutError.
    """

    kind = "kernel"
    exit_code = 5

    def __new__(cls, message: str = "", **context: str | None) -> KernelError:
        """An instance of the branch that the errno belongs to."""
        late = cls is KernelError and context.get("errno_name") == "ETIMEDOUT"
        return super().__new__(TimedOut if late else cls, message)


class TimedOut(KernelError, TimeoutError):  # type: ignore[misc, override]
    """What was waited for did not come in time (ETIMEDOUT)."""


class Stuck(VfiotoolError):
    """A write did not return in time, or a roll-back failed: the host is half done."""

    kind = "stuck"
    exit_code = 6


class NotPermitted(VfiotoolError, PermissionError):  # type: ignore[misc, override]
    """The process lacks a permission, which the message names."""

    kind = "not-permitted"
    exit_code = 7


class Unsupported(VfiotoolError):
    """This host or kernel lacks the facility; the message names the option or module."""

    kind = "unsupported"
    exit_code = 8


class InternalError(VfiotoolError):
    """A fault of vfiotool itself, which nobody can mend by typing something else.

    Its exit code is none of the contract's answers, so that no script takes it for one: 70, as
    sysexits.h has it.
    """

    kind = "internal"
    exit_code = 70

    @classmethod
    def of(cls, error: Exception) -> InternalError:
        """What an operator is told of an exception that nobody expected."""
        number = error.errno if isinstance(error, OSError) else None
        return cls(
            f"this is a fault in vfiotool: {type(error).__name__}: {error}",
            hint="the same command with --debug shows where; please report it",
            errno_name=errno_name(number),
        )


def _one_name(name: str | None) -> str | None:
    number = _NUMBERS.get(name or "")
    return name if number is None else _errno.errorcode[number]


def errno_name(number: int | None) -> str | None:
    """The symbolic name of an errno, or None (`16` -> `"EBUSY"`)."""
    return None if number is None else _errno.errorcode.get(number, str(number))


def from_oserror(
    operation: str, error: OSError, *, hint: str | None = None, device: str | None = None
) -> VfiotoolError:
    """Turn an OSError into the branch that its errno belongs to.

    EACCES and EPERM become NotPermitted, everything else KernelError. ENOENT and ENODEV are left
    to the caller, who alone knows whether absence is an error here. An error of vfiotool's own is
    returned as it is.
    """
    if isinstance(error, VfiotoolError):
        return error
    name = errno_name(error.errno)
    reason = _errno_text(error)
    branch = NotPermitted if error.errno in (_errno.EACCES, _errno.EPERM) else KernelError
    return branch(f"{operation}: {reason}", hint=hint, device=device, errno_name=name)


def described(error: BaseException) -> str:
    """An exception of code that is not vfiotool's, in one line: its type, what it says, and the
    innermost place outside this package: `ZeroDivisionError: division by zero (card.py:12, run)`.
    """
    place, ours = "", _os.path.dirname(__file__) + _os.sep
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        if not code.co_filename.startswith((ours, "<")):
            name = _os.path.basename(code.co_filename)
            place = f"{name}:{at.tb_lineno}" + f", {code.co_name}" * (code.co_name[0] != "<")
        at = at.tb_next
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{_os.path.basename(error.filename)}:{error.lineno}"
    text = " ".join(said.split())[:_LONGEST_SAID]
    told = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{told} ({place})" if place else told


def _errno_text(error: OSError) -> str:
    name = errno_name(error.errno)
    text = error.strerror or str(error)
    return f"{text} ({name})" if name else text
