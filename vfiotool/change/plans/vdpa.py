"""Plans for vDPA devices: pure functions of what was read once."""

from __future__ import annotations

from vfiotool.change.plans.vdpa_facts import VdpaFacts
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.bind import BindDriver, LoadModule
from vfiotool.change.steps.state import ANY, Binding
from vfiotool.change.steps.vdpa import SetVdpa, SetVdpaAutoprobe, SetVdpaMac
from vfiotool.devices.vdpa import (
    DRIVERS,
    VdpaDevice,
    VdpaSettings,
    check_name,
    new_request,
    parse_mac,
)
from vfiotool.errors import NotFound, Refused, Unsupported, UsageError


def check_driver(driver: str) -> str:
    """`driver` with its underscores. Raises UsageError unless it is one of the bus's two."""
    name = driver.replace("-", "_")
    if name not in DRIVERS:
        raise UsageError(
            f"{driver[:80]!r} is no driver for vDPA devices",
            hint="vhost_vdpa makes a node for a virtual machine, virtio_vdpa a device of this host",
        )
    return name


def plan_vdpa_add(
    facts: VdpaFacts,
    name: str,
    parent: str,
    driver: str | None = None,
    settings: VdpaSettings | None = None,
) -> tuple[Step, ...]:
    """Make a device on a parent and bind it to `driver`; None leaves the driver to the kernel.

    What is there already needs no step. Raises UsageError for names and values that cannot be,
    NotFound for an unknown parent, Refused where the name stands for a device elsewhere.
    """
    settings = settings or VdpaSettings()
    new_request(0, name, parent, settings)
    wanted = None if driver is None else check_driver(driver)
    present = next((device for device in facts.devices if device.name == name), None)
    if present is not None:
        if present.parent not in (parent, None):
            raise Refused(
                f"{name} exists already, on {present.parent}",
                hint=f"choose another name, or: vfiotool vdpa remove {name}",
                device=name,
            )
        _refuse_other_settings(present, settings)
        return () if wanted is None else plan_vdpa_bind(facts, name, wanted)
    _check_parent(facts, parent, settings)
    steps: list[Step] = [
        SetVdpa(
            name=name,
            parent=parent,
            exists=True,
            mac=settings.mac,
            mtu=settings.mtu,
            max_vqp=settings.max_vqp,
            features=settings.features,
        )
    ]
    if wanted is None:
        return tuple(steps)
    steps.append(BindDriver(name, Binding(ANY, None), Binding(wanted, wanted), bus="vdpa"))
    return (*_load(facts, wanted), *_quiet(facts, steps))


def _refuse_other_settings(device: VdpaDevice, settings: VdpaSettings) -> None:
    """What a device was given when it was made stays: it has to be made anew for another."""
    config = device.config or {}
    for key in ("mac", "mtu", "max_vqp"):
        wanted, known = getattr(settings, key), config.get(key)
        if wanted is None or known is None or str(wanted).lower() == str(known).lower():
            continue
        raise Refused(
            f"{device.name} exists already, with {key} {known} and not {wanted}",
            hint=f"vfiotool vdpa remove {device.name}, and apply again",
            device=device.name,
        )


def _check_parent(facts: VdpaFacts, name: str, settings: VdpaSettings) -> None:
    if not facts.complete:
        return
    parent = next((item for item in facts.parents if item.name == name), None)
    if parent is None:
        names = ", ".join(item.name for item in facts.parents) or "none"
        raise NotFound(
            f"there is no vDPA parent {name[:80]!r}; this host has {names}",
            hint="load the module that brings it (mlx5_vdpa, vduse, …): vfiotool vdpa parents",
        )
    network = (settings.mac, settings.mtu, settings.max_vqp)
    if any(value is not None for value in network) and "net" not in parent.classes:
        raise Unsupported(
            f"{name} makes no network devices ({', '.join(parent.classes)}): it takes no mac, mtu "
            "or max_vqp",
            hint="leave them out",
        )


def plan_vdpa_remove(facts: VdpaFacts, name: str) -> tuple[Step, ...]:
    """Remove a device; an undo makes it again with its MAC address, MTU and queue pairs.

    Raises NotFound, UsageError; Unsupported where its parent is not known.
    """
    device = facts.device(check_name(name))
    if device.parent is None:
        raise Unsupported(
            f"the parent of {name} is not known here, so its removal could not be undone",
            hint="on the host itself: vfiotool vdpa list",
            device=name,
        )
    config = device.config or {}
    mac, mtu, max_vqp = (config.get(key) for key in ("mac", "mtu", "max_vqp"))
    step = SetVdpa(
        name=name,
        parent=device.parent,
        exists=False,
        mac=mac if isinstance(mac, str) else None,
        mtu=mtu if isinstance(mtu, int) else None,
        max_vqp=max_vqp if isinstance(max_vqp, int) else None,
    )
    steps: list[Step] = [step]
    if device.driver is not None:
        before = Binding(device.driver, device.driver_override)
        steps.insert(0, BindDriver(name, before, Binding(None, None), bus="vdpa"))
    # Undone in reverse: made again out of the host's sight, then bound as it was.
    return _quiet(facts, steps)


def plan_vdpa_set(facts: VdpaFacts, name: str, mac: str) -> tuple[Step, ...]:
    """Give a network device another MAC address. Raises NotFound, UsageError, Unsupported."""
    parse_mac(mac)
    device = facts.device(check_name(name))
    known = (device.config or {}).get("mac")
    if not isinstance(known, str):
        raise Unsupported(
            f"{name} has no MAC address that could be changed",
            hint="vfiotool vdpa list",
            device=name,
        )
    if known.lower() == mac.lower():
        return ()
    return (SetVdpaMac(name, known, mac.lower()),)


def _quiet(facts: VdpaFacts, steps: list[Step]) -> tuple[Step, ...]:
    if not facts.autoprobe:
        return tuple(steps)
    return (SetVdpaAutoprobe(True, False), *steps, SetVdpaAutoprobe(False, True))


def plan_vdpa_bind(facts: VdpaFacts, name: str, driver: str) -> tuple[Step, ...]:
    """Give a device to vhost_vdpa (a node for a VM) or virtio_vdpa (a device of this host).

    Raises NotFound, UsageError.
    """
    wanted = check_driver(driver)
    device = facts.device(check_name(name))
    before = Binding(device.driver, device.driver_override)
    goal = Binding(wanted, wanted)
    if before == goal:
        return ()
    return (*_load(facts, wanted), BindDriver(name, before, goal, bus="vdpa"))


def _load(facts: VdpaFacts, driver: str) -> list[Step]:
    return [] if driver in facts.drivers else [LoadModule(driver, driver, "vdpa")]
