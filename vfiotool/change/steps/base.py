"""What every step is: a frozen value with two ends, and the writer that it runs through.

Running a step *converges* the target on the state after from wherever it stands, so the same
code runs it, undoes it (the inverse is the step with its ends exchanged) and recovers it after a
crash at any write. `check` re-checks the device's identity and that it stands at one of the two
ends; `run` writes through the writer and reads each write back; `holds` tells whether the goal is
reached.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from vfiotool.change.steps.state import Identity, gone, read_locked, read_pci_identity
from vfiotool.errors import KernelError, Refused
from vfiotool.host.host import Host

if TYPE_CHECKING:
    from vfiotool.netlink.codec import Message, Request


class Writer(Protocol):
    """What a step runs through. Each call is journalled before it reaches the kernel."""

    host: Host

    def write_attribute(self, path: str, data: str) -> None: ...
    def load_module(self, name: str) -> None: ...
    def send_netlink(self, request: Request) -> list[Message]: ...


@dataclass(frozen=True)
class Step(ABC):
    """Base of all steps; see the module for what each method promises."""

    verb: ClassVar[str]
    nested: ClassVar[dict[str, type]] = {}

    @property
    @abstractmethod
    def target(self) -> str: ...

    @abstractmethod
    def ends(self) -> tuple[object, object]:
        """The states before and after, as the contract's `from` and `to`: text, number or None."""

    def words(self) -> tuple[str, str]:
        """Both ends for people."""
        before, after = self.ends()
        return _word(before), _word(after)

    @abstractmethod
    def undo_text(self) -> str | None:
        """What undoing it does, for people; None if nothing has to be undone."""

    @abstractmethod
    def inverse(self) -> Step | None: ...

    @abstractmethod
    def present(self, host: Host) -> bool:
        """Whether the target exists: what is gone needs no roll-back."""

    @abstractmethod
    def check(self, host: Host) -> None:
        """Raise Refused or NotFound if the target is another device or stands at neither end."""

    @abstractmethod
    def run(self, writer: Writer) -> None:
        """Converge on the state after. Raises KernelError, NotPermitted, NotFound or Stuck."""

    @abstractmethod
    def holds(self, host: Host) -> bool: ...


def _word(value: object) -> str:
    return "none" if value is None else str(value)


def drifted(target: str, found: object, before: object, after: object) -> Refused:
    return Refused(
        f"{target} is at {found}, where {before} or {after} was expected: it has been changed "
        "meanwhile",
        hint="plan again; nothing was written to it",
        device=target,
    )


def check_identity(host: Host, address: str, identity: Identity) -> None:
    difference = identity.differs_from(read_pci_identity(host, address))
    if difference:
        raise Refused(
            f"{address} is another device now: {difference}",
            hint="plan again; nothing was written to it",
            device=address,
        )


@dataclass(frozen=True)
class SetAttribute(Step):
    """Base of the steps that set one sysfs attribute of a device and read it back.

    The value before is None where the device is made by the same plan, or where the attribute
    cannot be read: then nothing is put back, and what cannot be read is not verified either.
    """

    @property
    @abstractmethod
    def path(self) -> str: ...

    @property
    @abstractmethod
    def values(self) -> tuple[str | None, str]:
        """The texts before and after."""

    @abstractmethod
    def reversed_to(self, value: str) -> Step:
        """The step that sets the value before."""

    def inverse(self) -> Step | None:
        before = self.values[0]
        return None if before is None else self.reversed_to(before)

    def ends(self) -> tuple[object, object]:
        return self.values

    def undo_text(self) -> str | None:
        return None if self.values[0] is None else f"set {self.values[0]}"

    def present(self, host: Host) -> bool:
        return host.exists(self.path)

    def check(self, host: Host) -> None:
        found = self._read(host)
        if found is not None and None not in self.values and found not in self.values:
            raise drifted(f"{self.target} {self.path.rpartition('/')[2]}", found, *self.values)

    def holds(self, host: Host) -> bool:
        return self._read(host) in (self.values[1], None)

    def run(self, writer: Writer) -> None:
        if self._read(writer.host) == self.values[1]:
            return
        writer.write_attribute(self.path, self.values[1])
        found = self._read(writer.host)
        if found not in (self.values[1], None):
            name = self.path.rpartition("/")[2]
            raise KernelError(
                f"{self.target}: {name} reads {found!r} after {self.values[1]!r} was written",
                device=self.target,
            )

    def _read(self, host: Host) -> str | None:
        text = read_locked(host, self.target, self.path)
        if text is None and not host.exists(self.path):
            raise gone(f"{self.target} {self.path.rpartition('/')[2]}")
        return text
