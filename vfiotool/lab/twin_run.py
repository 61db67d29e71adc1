"""A twin that runs: its replayed cards served by this process, the rest by QEMU."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vfiotool.lab.guest import Guest
from vfiotool.lab.kernels import catalogue as kernels
from vfiotool.lab.machines import DeviceModel, Machine, VfioUserDevice
from vfiotool.lab.scratch import scratch_folder
from vfiotool.lab.twin_facts import TwinHost
from vfiotool.lab.twin_plan import Replay, TwinPlan
from vfiotool.models import EXPRESS, Model, ModelServer, NvmeModel, ReplayModel

# What holds a card as its host driver does on the original: it takes any, and moves no data.
_PLACEHOLDER = "uio_pci_generic"
# Drivers that need nothing of the card, and so are the original's own.
_OF_NOBODY = ("vfio-pci", "pci-stub")
# 16 MiB, sparse, which takes a file system.
_DISK_BLOCKS = 32768
_SETUP_LIMIT_S = 120.0
# Interrupt Pin (PCI Local Bus Specification 3.0, 6.2.4).
_PIN = 0x3D


@dataclass(frozen=True)
class Twin:
    """A twin that runs: its guest, and the models of the cards that are played, by the original's
    addresses. `failed` says of each card whose model raised, or whose QEMU does not reach it any
    more, why that is: nothing that is seen of it then is about the host."""

    guest: Guest
    models: Mapping[str, Model]
    failed: Mapping[str, str]


def twin_machine(plan: TwinPlan, sockets: dict[str, str]) -> Machine:
    """The lab machine of a plan; `sockets` has the path where each replayed card is served."""
    return Machine(
        name="twin",
        summary="a host's twin",
        devices=tuple(item for item in plan.items if isinstance(item, DeviceModel)),
        iommu=plan.iommu,
        iommu_bits=plan.iommu_bits,
        disks=plan.disks,
        networks=plan.networks,
        kernel_arguments=plan.kernel_arguments,
        numa_nodes=plan.numa_nodes,
        served=tuple(
            VfioUserDevice(sockets[one.original.address], one.properties) for one in plan.replays
        ),
    )


def setup_script(host: TwinHost, plan: TwinPlan) -> str:
    """What is done in the twin before anything is asked of it: each card on a driver of the kind
    that the original has it on, stand-ins in use."""
    lines = [
        "set +e",
        f"modprobe -a nvme e1000e igb igbvf ahci sd_mod ext4 vfio-pci {_PLACEHOLDER}",
    ]
    lines.append("on() { echo $2 > /sys/bus/pci/devices/$1/driver_override;")
    lines.append("  [ -e /sys/bus/pci/devices/$1/driver ] &&")
    lines.append("    echo $1 > /sys/bus/pci/devices/$1/driver/unbind;")
    lines.append("  echo $1 > /sys/bus/pci/drivers_probe; }")
    # What has no driver on the host gets none here, though this kernel has one for it.
    lines.append("off() { echo none > /sys/bus/pci/devices/$1/driver_override;")
    lines.append("  [ -e /sys/bus/pci/devices/$1/driver ] &&")
    lines.append("    echo $1 > /sys/bus/pci/devices/$1/driver/unbind; }")
    for address, count in plan.vfs.items():
        lines.append(f"echo {count} > /sys/bus/pci/devices/{address}/sriov_numvfs")
    replayed = {one.original.address for one in plan.replays if not one.disk}
    for one in host.functions:
        new = plan.addresses.get(one.address)
        if new is None or (one.driver is None and one.port is not None):
            continue
        if one.driver is None:
            lines.append(f"off {new}")
            continue
        if one.driver in _OF_NOBODY:
            lines.append(f"modprobe {one.driver}; on {new} {one.driver}")
        elif one.address in replayed:
            lines.append(f"on {new} {_PLACEHOLDER}")
    for address in sorted(plan.in_use):
        new = plan.addresses[address]
        disk = plan.stand_ins[address] in ("nvme", "sata")
        lines += _used_disk(new) if disk else _used_network(new)
    return "\n".join(lines) + "\ntrue\n"


def _used_disk(new: str) -> list[str]:
    name = new.replace(":", "-")
    find = (
        f"find /sys/bus/pci/devices/{new}/ -maxdepth 7 -name 'nvme*n1' -o -maxdepth 7 -name 'sd?'"
    )
    return [
        f"disk=; for n in $(seq 50); do disk=$({find} | head -1); [ $disk ] && break; sleep 0.1;"
        " done; disk=/dev/$(basename $disk)",
        # The controller's own path of a namespace is hidden where paths are joined.
        "[ -b $disk ] || disk=$(echo $disk | sed 's/c[0-9]*n/n/')",
        f"mkfs.ext4 -q -F $disk; mkdir -p /run/twin/{name}; mount $disk /run/twin/{name}",
    ]


def _used_network(new: str) -> list[str]:
    return [
        f"net=$(ls /sys/bus/pci/devices/{new}/net | head -1)",
        "ip addr add 192.0.2.2/24 dev $net; ip link set $net up",
        "ip route add default via 192.0.2.1 dev $net",
    ]


def played(replay: Replay) -> Model:
    """The model that plays an endpoint. An NVMe controller has the original's ids and serial, and
    a small disk in memory."""
    one = replay.original
    config = one.config if replay.pin else one.config[:_PIN] + b"\0" + one.config[_PIN + 1 :]
    card = ReplayModel(config, one.resources)
    if not replay.disk:
        # Whatever it says of itself, a reset of its bus resets a card.
        card.has_reset = True
        return card
    kind = type(
        "PlayedNvme",
        (NvmeModel,),
        {
            "vendor": one.vendor,
            "device": one.device,
            "revision": card.config.data[8],
            "subsystem": struct.unpack_from("<HH", card.config.data, 0x2C),
            "resets": card.config.resets_by(EXPRESS),
        },
    )
    card.close()
    model: NvmeModel = kind(blocks=_DISK_BLOCKS, shared_doorbells=False)
    model.serial = (one.serial or one.address).encode()[:20]
    model.has_reset = True
    return model


def refuse_unready(plan: TwinPlan, kernel: str) -> None:
    """Raises what `Guest` raises of a kernel, a QEMU or a machine that cannot be had; nothing is
    started."""
    Guest(twin_machine(plan, {one.original.address: os.devnull for one in plan.replays}), kernel)


@contextmanager
def running_twin(
    host: TwinHost, plan: TwinPlan, kernel: str = kernels.DEFAULT, **options: Any
) -> Iterator[Twin]:
    """The twin, booted and set up, until the end of the block.

    Raises what `Guest` raises; GuestLost where it does not come up.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_folder("sockets"))
        sockets, models = {}, {}
        failed: dict[str, str] = {}
        for number, one in enumerate(plan.replays):
            model = models[one.original.address] = played(one)
            told = functools.partial(failed.setdefault, one.original.address)
            path = str(folder / f"{number}.sock")
            server = stack.enter_context(ModelServer(model, path, report=told))
            sockets[one.original.address] = server.path
        guest = stack.enter_context(Guest(twin_machine(plan, sockets), kernel, **options))
        guest.exec(["bash", "-c", setup_script(host, plan)], timeout_s=_SETUP_LIMIT_S, merge=True)
        yield Twin(guest, models, failed)
