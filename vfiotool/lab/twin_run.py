"""A twin that runs: its replayed cards served by this process, the rest by QEMU."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vfiotool.lab.guest import Guest
from vfiotool.lab.kernels import catalogue as kernels
from vfiotool.lab.machines import DeviceModel, Machine, VfioUserDevice
from vfiotool.lab.twin_facts import TwinHost
from vfiotool.lab.twin_plan import TwinPlan
from vfiotool.models import ModelServer, ReplayModel

# What holds a card as its host driver does on the original: it takes any, and moves no data.
_PLACEHOLDER = "uio_pci_generic"
_VFIO = ("vfio-pci",)
_SETUP_LIMIT_S = 120.0


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
        served=tuple(
            VfioUserDevice(sockets[one.original.address], one.properties) for one in plan.replays
        ),
    )


def setup_script(host: TwinHost, plan: TwinPlan) -> str:
    """What is done in the twin before anything is asked of it: each card on a driver of the kind
    that the original has it on, stand-ins in use."""
    lines = ["set +e", "modprobe nvme; modprobe e1000e; modprobe ext4"]
    lines.append(f"modprobe vfio-pci; modprobe {_PLACEHOLDER}")
    lines.append("on() { echo $2 > /sys/bus/pci/devices/$1/driver_override;")
    lines.append("  echo $1 > /sys/bus/pci/drivers_probe; }")
    replayed = {one.original.address for one in plan.replays}
    for one in host.functions:
        new = plan.addresses.get(one.address)
        if new is None or one.address not in replayed or one.driver is None:
            continue
        driver = one.driver if one.driver in (*_VFIO, "pci-stub") else _PLACEHOLDER
        lines.append(f"[ {driver} = pci-stub ] && modprobe pci-stub; on {new} {driver}")
    for address, kind in plan.stand_ins.items():
        lines += (
            _used_disk(plan.addresses[address])
            if kind == "nvme"
            else _used_network(plan.addresses[address])
        )
    return "\n".join(lines) + "\ntrue\n"


def _used_disk(new: str) -> list[str]:
    name = new.replace(":", "-")
    return [
        f"for n in $(seq 50); do ls /sys/bus/pci/devices/{new}/nvme/*/nvme*n1 >/dev/null 2>&1 &&"
        " break; sleep 0.1; done",
        f"disk=/dev/$(ls -d /sys/bus/pci/devices/{new}/nvme/*/nvme*n1 | head -1 | xargs basename)",
        f"mkfs.ext4 -q -F $disk; mkdir -p /run/twin/{name}; mount $disk /run/twin/{name}",
    ]


def _used_network(new: str) -> list[str]:
    return [
        f"net=$(ls /sys/bus/pci/devices/{new}/net | head -1)",
        "ip addr add 192.0.2.2/24 dev $net; ip link set $net up",
        "ip route add default via 192.0.2.1 dev $net",
    ]


@contextmanager
def running_twin(
    host: TwinHost, plan: TwinPlan, kernel: str = kernels.DEFAULT, **options: Any
) -> Iterator[Guest]:
    """The twin, booted and set up, until the end of the block.

    Raises what `Guest` raises; GuestLost where it does not come up.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfiotool-twin-")))
        sockets = {}
        for number, one in enumerate(plan.replays):
            card = ReplayModel(one.original.config, one.original.resources)
            server = stack.enter_context(ModelServer(card, str(folder / f"{number}.sock")))
            sockets[one.original.address] = server.path
        guest = stack.enter_context(Guest(twin_machine(plan, sockets), kernel, **options))
        guest.exec(["bash", "-c", setup_script(host, plan)], timeout_s=_SETUP_LIMIT_S, merge=True)
        yield guest
