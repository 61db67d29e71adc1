"""Plans for a PCI function's driver: pure functions of frozen values, no host is touched."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vfiotool.change.plans.facts import DeviceFacts, Facts
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import BindDriver, LoadModule
from vfiotool.change.steps.names import DRIVER
from vfiotool.change.steps.state import ANY, PARKED, Binding
from vfiotool.devices.iommu import bridge_in_the_way, is_vfio_driver
from vfiotool.errors import Foretold, Refused, Unsupported, UsageError
from vfiotool.host.paths import SYS_PCI_DRIVERS


def driver_name(text: str) -> str:
    """`text` if it can be a driver's name, which becomes a path part. Raises UsageError."""
    if DRIVER.fullmatch(text) is None:
        raise UsageError(
            f"{text[:80]!r} cannot be a driver's name",
            hint=f"give a name as under {SYS_PCI_DRIVERS}, such as vfio-pci, or none to leave it "
            "without a driver",
        )
    return text


def group_endpoints(facts: Facts, address: str) -> tuple[str, ...]:
    """The PCI endpoints of a device's group, itself first; bridges and IOMMUs stay as they are."""
    device = facts.device(address)
    names = facts.members.get(device.group, ()) if device.group is not None else ()
    others = (facts.devices[name] for name in names if name != address and name in facts.devices)
    return (address, *(other.address for other in others if not other.stays))


def plan_bind(
    facts: Facts, addresses: Iterable[str], driver: str | None = None, *, whole_group: bool = False
) -> tuple[Step, ...]:
    """Give each device `driver`, or the best VFIO driver; the driver `none` parks.

    Raises NotFound, Refused for a bridge or a PF whose VFs are enabled, Foretold for a driver that
    nobody has, Unsupported where no IOMMU stands behind a device that is to go to a VFIO driver.
    """
    wanted = None if driver is None else facts.driver(driver_name(driver))
    chosen: list[str] = []
    for address in addresses:
        chosen.extend(group_endpoints(facts, address) if whole_group else (address,))
    steps: list[Step] = []
    for address in dict.fromkeys(chosen):
        device = facts.device(address)
        name = wanted or device.best_driver
        goal = Binding(None, PARKED) if name == "none" else Binding(name, name)
        if stands(device.binding, goal):
            continue
        _refuse_unfit(facts, device, name)
        steps += load_steps(facts, steps, goal.driver)
        steps.append(BindDriver(address, device.binding, goal, device.identity))
    return tuple(steps)


def stands(found: Binding, goal: Binding) -> bool:
    """Whether a device is where it is to be, so that nothing has to be done.

    One that a VFIO driver has by other means (`ids=`, `new_id`) is: no override is needed for it.
    """
    if found == goal:
        return True
    on_vfio = goal.driver is not None and is_vfio_driver(goal.driver)
    return on_vfio and found == Binding(goal.driver, None)


def _refuse_with_vfs(device: DeviceFacts) -> None:
    """A PF's driver takes the VFs away when it goes, and vfio-pci refuses a PF that has any."""
    if device.sriov is None or not device.sriov.num:
        return
    raise Refused(
        f"{device.address} has {device.sriov.num} VFs, which a change of its driver would destroy: "
        f"{', '.join(device.sriov.vfs)}",
        hint=f"vfiotool vf set {device.address} 0",
        device=device.address,
    )


def refuse_vgpu(device: DeviceFacts) -> None:
    """A vGPU is ready on the vendor's driver as it stands, and gone once that lets go of it."""
    if device.vgpu_type:
        raise Refused(
            f"{device.address} is a vGPU of type {device.vgpu_type}, ready on "
            f"{device.binding.driver} as it stands: another driver would destroy it",
            hint=f"vfiotool vm qemu {device.address}; or, in a policy, vgpu_type = 0 first",
            device=device.address,
        )


def _refuse_unfit(facts: Facts, device: DeviceFacts, driver: str) -> None:
    _refuse_with_vfs(device)
    refuse_vgpu(device)
    if device.is_bridge:
        if driver == "none" and bridge_in_the_way(device.class_code, device.binding.driver):
            return
        raise Refused(
            f"{device.address} is a bridge (class {device.class_code}): bridges stay with the host",
            hint=f"name the devices behind {device.address}, if there are any",
            device=device.address,
        )
    if not is_vfio_driver(driver):
        return
    if device.group is None and not facts.noiommu:
        raise Unsupported(
            f"{device.address} is in no IOMMU group: {driver} cannot take it",
            hint="vfiotool doctor tells how to switch the IOMMU on",
            device=device.address,
        )


def load_steps(facts: Facts, steps: list[Step], driver: str | None) -> list[Step]:
    """The step that loads a driver's module, unless it is registered or the plan loads it.

    Raises Foretold if there is neither such a driver nor such a module.
    """
    if driver is None or driver in facts.drivers:
        return []
    if driver in facts.missing:
        near = difflib.get_close_matches(driver, sorted(facts.drivers), n=1)
        raise Foretold(
            f"no driver named {driver} is registered, and no module of that name is there to "
            "bring it",
            reason="no-such-driver",
            evidence=f"{SYS_PCI_DRIVERS}, modules.dep",
            hint=f"did you mean {near[0]}?" if near else f"ls {SYS_PCI_DRIVERS} shows the names",
        )
    step = LoadModule(driver, driver)
    return [] if step in steps else [step]


def plan_release(facts: Facts, addresses: Iterable[str]) -> tuple[Step, ...]:
    """Give each device back to the driver it had before, or to the kernel's choice.

    A device that is not taken from its driver needs no step. Raises NotFound, and Refused for a
    PF whose VFs are enabled.
    """
    steps: list[Step] = []
    for address in dict.fromkeys(addresses):
        device = facts.device(address)
        if not device.binding.taken:
            continue
        _refuse_with_vfs(device)
        origin = device.origin
        goal = Binding(ANY if origin is None else origin.driver, None)
        if origin is not None:
            steps += load_steps(facts, steps, origin.driver)
        steps.append(BindDriver(address, device.binding, goal, device.identity))
    return tuple(steps)
