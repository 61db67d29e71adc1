"""Exceptions as people who write Python meet them: kin of the built-in ones, hints as notes."""

from __future__ import annotations

import errno
import pickle
import traceback

import pytest

from vfiotool.errors import (
    KernelError,
    NotFound,
    NotPermitted,
    TimedOut,
    UsageError,
    VfiotoolError,
    errno_name,
    from_oserror,
)


@pytest.mark.parametrize(
    ("made", "kin", "number"),
    [
        (KernelError("busy", errno_name="EBUSY"), OSError, errno.EBUSY),
        (KernelError("late", errno_name="ETIMEDOUT"), TimeoutError, errno.ETIMEDOUT),
        (NotPermitted("no", errno_name="EACCES"), PermissionError, errno.EACCES),
        (UsageError("odd"), ValueError, None),
    ],
)
def test_an_error_is_kin_of_python_s_own(
    made: VfiotoolError, kin: type[Exception], number: int | None
) -> None:
    assert isinstance(made, kin) and isinstance(made, VfiotoolError)
    assert made.errno == number
    assert str(made) == made.message
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is type(made) and again.errno == number


@pytest.mark.parametrize(
    ("said", "name"),
    [("EOPNOTSUPP", "ENOTSUP"), ("ENOTSUP", "ENOTSUP"), ("EWOULDBLOCK", "EAGAIN"), ("524", "524")],
)
def test_a_number_has_one_name_whichever_was_said(said: str, name: str) -> None:
    assert KernelError("no", errno_name=said).errno_name == name
    assert errno_name(KernelError("no", errno_name=said).errno) in (name, None)


def test_code_that_knows_nothing_of_vfiotool_can_handle_them() -> None:
    with pytest.raises(OSError, match="busy") as caught:
        raise KernelError("open it: busy", errno_name="EBUSY", hint="end that program")
    assert (caught.value.errno, caught.value.strerror) == (errno.EBUSY, "open it: busy")
    assert type(KernelError("x", errno_name="ETIMEDOUT")) is TimedOut
    assert type(KernelError("x", errno_name="EIO")) is KernelError
    assert TimedOut("x", errno_name="ETIMEDOUT").exit_code == KernelError.exit_code


def test_a_traceback_shows_the_hint_also_one_that_was_given_later() -> None:
    error = NotFound("no such device", hint="vfiotool devices")
    assert "hint: vfiotool devices" in "".join(traceback.format_exception(error))
    error.hint = "look again"
    shown = "".join(traceback.format_exception(error))
    assert "hint: look again" in shown and "vfiotool devices" not in shown
    error.hint = None
    assert "hint" not in "".join(traceback.format_exception(error))


def test_an_error_of_ours_is_not_wrapped_as_one_of_the_system_s() -> None:
    ours = KernelError("write: short", hint="again")
    assert from_oserror("write", ours) is ours
