"""What the host does with parts of a function that are neither disk, interface nor display.

The keyboard on a USB controller, the watchdog that will reset the machine, the source of random
numbers, the copy engine that the network stack uses: each ends when the driver lets go.
Source: Documentation/input/input.rst, Documentation/watchdog/sysfs-class-watchdog
(Documentation/ABI/testing/sysfs-class-watchdog), Documentation/admin-guide/hw_random.rst,
Documentation/driver-api/dmaengine, Documentation/networking/netconsole.rst.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection

from vfiotool.devices.attached import owners
from vfiotool.devices.pci import PciFunction
from vfiotool.host.paths import (
    NO_CONFIGFS,
    PROC_CMDLINE,
    PROC_CRYPTO,
    SYS_DMA,
    SYS_HWRNG,
    SYS_INPUT,
    SYS_MODULE,
    SYS_NET,
    SYS_NETCONSOLE,
    SYS_PCI_DRIVERS,
    SYS_WATCHDOG,
)
from vfiotool.usage.blocker import Blocker, Usage
from vfiotool.usage.sight import Sight

# include/uapi/linux/input-event-codes.h: event types, and keys that only a keyboard has.
_EV_KEY = 1
_KEY_ENTER, _KEY_A = 28, 30
# include/linux/pci_ids.h: encryption controllers, and co-processors, as QAT calls itself.
CRYPTO_CLASSES = ("10", "0b40")
# `netconsole=…`, and the same as a parameter of the module that is built in.
_NETCONSOLE_OPTION = re.compile(r"(netconsole\.)?netconsole=.")


def parts_usage(sight: Sight, function: PciFunction, interfaces: Collection[str]) -> Usage:
    """Input devices, watchdogs, random numbers, copy engines, and consoles over the network."""
    found = [
        *_class_devices(sight, function, "input", SYS_INPUT, _input),
        *_class_devices(sight, function, "watchdog", SYS_WATCHDOG, _watchdog),
        *_class_devices(sight, function, "dma-engine", SYS_DMA, _channel),
        *_random(sight, function),
        *_crypto(sight, function),
        *netconsoles(sight, function.address, interfaces),
    ]
    return Usage(tuple(found))


_Judge = Callable[[Sight, str, str], "str | None"]


def _class_devices(
    sight: Sight, function: PciFunction, kind: str, folder: str, judge: _Judge
) -> list[Blocker]:
    """A class's devices that are part of the function and, as `judge` says, in use."""
    found = []
    for name in class_by_owner(sight, folder).get(function.path, ()):
        detail = judge(sight, name, f"{folder}/{name}")
        if detail is not None:
            evidence = f"{folder}/{name}"
            found.append(Blocker(kind, function.address, name, detail, evidence))
    return found


def class_by_owner(sight: Sight, folder: str) -> dict[str, list[str]]:
    """A class's devices by the paths of the functions that each is part of."""
    return sight.once(("class", folder), lambda look: _by_owner(look, folder))


def _by_owner(sight: Sight, folder: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sight.listdir(folder):
        for owner in owners(sight.realpath(f"{folder}/{name}") or ""):
            found.setdefault(owner, []).append(name)
    return found


def _input(sight: Sight, name: str, base: str) -> str | None:
    """A keyboard or a pointing device; buttons and jacks of cards are none."""
    if not name.startswith("input"):
        return None
    keys = _bits(sight.read(f"{base}/capabilities/key"))
    events = _bits(sight.read(f"{base}/capabilities/ev"))
    called = sight.read(f"{base}/name") or name
    if events >> _EV_KEY & 1 and keys >> _KEY_ENTER & 1 and keys >> _KEY_A & 1:
        return f"the keyboard {called} is attached to it"
    if any(child.startswith("mouse") for child in sight.listdir(base)):
        return f"the pointing device {called} is attached to it"
    return None


def _bits(text: str | None) -> int:
    """A bitmap of input's attributes: words of a long, the highest first, each in hexadecimal.

    A word's width is not told; of the low 32 bits, which are all that is asked for, it does not
    matter.
    """
    try:
        return int((text or "0").split()[-1], 16)
    except (ValueError, IndexError):
        return 0


def _watchdog(sight: Sight, name: str, base: str) -> str | None:
    if sight.read(f"{base}/state") != "active":
        return None
    return f"the watchdog {name} runs: nobody would feed it any more"


def _channel(sight: Sight, name: str, base: str) -> str | None:
    used = sight.read_int(f"{base}/in_use")
    return f"{used} users have the DMA channel {name}" if used else None


def _random(sight: Sight, function: PciFunction) -> list[Blocker]:
    """The kernel's source of random numbers, where it is a virtio device (`virtio_rng.0`)."""
    current = sight.read(SYS_HWRNG)
    if current is None or not current.startswith("virtio_rng"):
        return []
    for name in sight.listdir(function.path):
        driver = sight.linkname(f"{function.path}/{name}/driver")
        if name.startswith("virtio") and driver == "virtio_rng":
            detail = f"the kernel takes random numbers from it ({current})"
            evidence = f"{SYS_HWRNG} is {current}"
            return [Blocker("random-source", function.address, current, detail, evidence)]
    return []


def _crypto(sight: Sight, function: PciFunction) -> list[Blocker]:
    """What the kernel encrypts with a crypto engine (dm-crypt, IPsec, TLS, af_alg).

    /proc/crypto tells an algorithm's module and not which of several engines does the work, so
    each of them counts. An algorithm that nobody uses has one reference.
    """
    modules = _engine_modules(sight, function)
    found: dict[str, None] = {}
    for entry in (sight.read(PROC_CRYPTO) or "").split("\n\n") if modules else ():
        lines = (line.partition(":") for line in entry.splitlines())
        keys = {name.strip(): value.strip() for name, _, value in lines}
        module, references = keys.get("module", ""), keys.get("refcnt", "")
        if not references.isdecimal() or int(references) < 2:
            continue
        # What drives the engine may share the algorithms' module with others (intel_qat).
        if module in modules or any(
            sight.exists(f"{SYS_MODULE}/{module}/holders/{name}") for name in modules
        ):
            found[keys.get("driver", "")] = None
    return [
        Blocker(
            "crypto-engine",
            function.address,
            name,
            f"the kernel encrypts with it, or with another of its kind ({name})",
            f"{PROC_CRYPTO}: refcnt of {name} is above 1",
        )
        for name in found
    ]


def _engine_modules(sight: Sight, function: PciFunction) -> frozenset[str]:
    """The modules that drive a crypto engine, empty for other functions."""
    found = set()
    for name in sight.listdir(function.path):
        if name.startswith("virtio"):
            driver = sight.linkname(f"{function.path}/{name}/driver")
            found |= {driver} if driver == "virtio_crypto" else set()
    code = function.class_code or ""
    if code.startswith(CRYPTO_CLASSES) and function.driver is not None:
        module = sight.linkname(f"{SYS_PCI_DRIVERS}/{function.driver}/module")
        found |= {module or function.driver}
    return frozenset(name for name in found if name)


def netconsoles(sight: Sight, address: str, interfaces: Collection[str]) -> list[Blocker]:
    """Kernel consoles over the network, on one of the `interfaces` of a device and what stands on
    them."""
    found = []
    hidden = _hidden_target(sight) if interfaces else None
    if hidden is not None:
        sight.miss(SYS_NETCONSOLE, hidden)
    known = {*interfaces, *sight.listdir(SYS_NET)} if interfaces else interfaces
    for target in sight.listdir(SYS_NETCONSOLE):
        base = f"{SYS_NETCONSOLE}/{target}"
        name = sight.read(f"{base}/dev_name")
        if not interfaces or not sight.read_int(f"{base}/enabled"):
            continue
        if name in interfaces:
            detail = f"the kernel's console runs over {name} (netconsole)"
            remedy = f"echo 0 > {shlex.quote(base)}/enabled"
            blocker = Blocker(
                "console", address, name or target, detail, f"{base}/enabled is 1", remedy
            )
            found.append(blocker)
        elif name not in known:
            # By an alternative name, or by a MAC address (net/core/netpoll.c, netpoll_setup).
            sight.miss(base, f"a console over the network runs over {name}, whatever that is")
    return found


def _hidden_target(sight: Sight) -> str | None:
    """Why netconsole may have a target that does not show, whatever others show; None if not.

    One that it was given when it was loaded has no folder in configfs; since Linux 6.7 it gets one
    only once somebody makes `cmdline0` (drivers/net/netconsole.c, alloc_param_target). Nor does
    sysfs show the option, a module's may have been typed by hand, and what the kernel's command
    line names may have another name by now.
    """
    if sight.exists(f"{SYS_MODULE}/netconsole/initstate"):
        if not sight.exists(SYS_NETCONSOLE):
            return f"netconsole is loaded, {NO_CONFIGFS}"
        return "netconsole is loaded, and a target that it was loaded with does not show there"
    if not sight.exists(f"{SYS_MODULE}/netconsole"):
        return None
    # Built in: the command line alone can have given it one.
    words = (sight.read(PROC_CMDLINE) or "").split()
    given = next((word for word in words if _NETCONSOLE_OPTION.match(word)), None)
    return None if given is None else f"the kernel was started with {given}"
