"""What every step is: a frozen value with two ends, and the writer that it runs through.

Running a step *converges* the target on the state after from wherever it stands, so the same
code runs it, undoes it (the inverse is the step with its ends exchanged) and recovers it after a
crash at any write. `check` re-checks the device's identity and that it stands at one of the two
ends; `takes` names the devices that running it now would take from whoever uses them; `run` writes
through the writer and reads each write back; `holds` tells whether the goal is reached.

Whatever the engine needs to know of a step (its locks, its nodes, what it takes, what is to be
said of it) the step knows itself: a new kind of step is one file in this folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from vfiotool.change.steps.state import (
    BUSES,
    Binding,
    Identity,
    device_nodes,
    gone,
    read_locked,
    read_pci_identity,
)
from vfiotool.devices.sriov import read_vfs
from vfiotool.errors import KernelError, Refused
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES

if TYPE_CHECKING:
    from vfiotool.netlink.codec import Message, Request


class Writer(Protocol):
    """What a step runs through. Each call is journalled before it reaches the kernel.

    Before each write it is asked anew who uses what the step takes, and raises Refused where
    somebody does; `harmless` says of a write that it takes nothing from anybody.
    """

    host: Host

    def write_attribute(self, path: str, data: str, *, harmless: bool = False) -> None: ...
    def load_module(self, name: str) -> None: ...
    def send_netlink(self, request: Request) -> list[Message]: ...


class AnotherDevice(Refused):
    """The address holds another device than the one that the step is about."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A device (PCI address, mdev UUID, vDPA name) that a step takes from whoever uses it.

    With `held_only` it goes from no driver to one of the host, so that only a process that has it
    open by itself can lose it.
    """

    device: str
    held_only: bool = False


@dataclass(frozen=True, slots=True)
class Rebinding:
    """What a step does to a device's driver."""

    bus: str
    name: str
    identity: Identity
    before: Binding
    after: Binding


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
    def check(self, host: Host, *, begun: bool = False) -> None:
        """Raise if the target cannot be at one of the step's two ends.

        With `begun` the step may have been left half-way, and any state on its way will do.
        AnotherDevice for another device at the address, Refused for a state of somebody else's,
        NotFound where it is gone.
        """

    @abstractmethod
    def run(self, writer: Writer) -> None:
        """Converge on the state after. Raises KernelError, NotPermitted, NotFound or Stuck."""

    @abstractmethod
    def holds(self, host: Host) -> bool: ...

    @abstractmethod
    def check_names(self) -> None:
        """Raise UsageError if a name in it cannot be a path part: it may come from a file."""

    def takes(self, host: Host) -> Iterator[Taken]:
        """What running it would take from its users as things stand; nothing by default."""
        return iter(())

    def lock_keys(self, host: Host) -> set[str]:
        """The names of the locks that it needs; see `device_keys`."""
        return set()

    def nodes(self, host: Host) -> tuple[str, ...]:
        """The device nodes whose open files can hold it up."""
        return ()

    @property
    def facet(self) -> str:
        """What of its target it sets, where steps of its kind set different things."""
        return ""

    def outlives(self, host: Host, later: Step) -> bool:
        """Whether its goal can still be read once `later` has run."""
        vfs = later.remakes_vfs_of
        if vfs is None:
            return later.removes != self.target
        return self.present(host) and self.target not in {vf.address for vf in read_vfs(host, vfs)}

    # What others are told of it.

    @property
    def rebinding(self) -> Rebinding | None:
        """What it does to a device's driver, if that is what it does."""
        return None

    @property
    def removes(self) -> str | None:
        """The device that is not there any more after it."""
        return None

    @property
    def loads(self) -> str | None:
        """The driver that some module has to bring for this step."""
        return None

    @property
    def remakes_vfs_of(self) -> str | None:
        """The physical function whose VFs are all gone after it, or other ones."""
        return None

    @property
    def sets_vfs_of(self) -> str | None:
        """The physical function of whose VFs it sets something."""
        return self.remakes_vfs_of

    def token_owner(self, host: Host) -> str | None:
        """The physical function whose VF token guards the VFs that it makes or hands out."""
        return None


def device_keys(host: Host, bus: str, name: str) -> set[str]:
    """The locks of a device: its own, its group's and, of a VF, its physical function's."""
    base = f"{BUSES[bus].devices}/{name}"
    keys = {f"device-{name}"}
    group = host.linkname(f"{base}/iommu_group")
    if group is not None:
        keys.add(f"group-{group}")
    physfn = host.linkname(f"{SYS_PCI_DEVICES}/{name}/physfn")
    if physfn is not None:
        keys.add(f"device-{physfn}")
    return keys


def pf_nodes(host: Host, pf: str) -> tuple[str, ...]:
    """The VFIO nodes of a physical function and of its VFs."""
    names = (pf, *(vf.address for vf in read_vfs(host, pf)))
    return tuple(node for name in names for node in device_nodes(host, "pci", name))


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
        raise AnotherDevice(
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

    def check(self, host: Host, *, begun: bool = False) -> None:
        found = self._read(host)
        if found is not None and None not in self.values and found not in self.values:
            raise drifted(f"{self.target} {self.path.rpartition('/')[2]}", found, *self.values)

    def holds(self, host: Host) -> bool:
        return self._read(host) in (self.values[1], None)

    def writes(self, host: Host) -> bool:
        """Whether running it writes: also where what stands cannot be read."""
        return host.exists(self.path) and self._read(host) != self.values[1]

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
