"""KubeVirt's and the SR-IOV operator's resources for the devices of a node.

Sources: KubeVirt's API reference v1 (PermittedHostDevices, HostDevice), its user guide "Host
Devices"; k8snetworkplumbingwg: sriov-network-operator, config/crd/bases (SriovNetworkNodePolicy,
SriovNetwork), and sriov-network-device-plugin, README (resourceList).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vfiotool.errors import Unsupported
from vfiotool.vm.handed import Handed

PROGRAM = "KubeVirt"
_PREFIX = "devices.kubevirt.io"
_OPERATOR = "sriovnetwork.openshift.io"
# Where the virtual machine is, and with it the attachments that the operator makes.
_NAMESPACE = "default"


@dataclass(frozen=True, slots=True)
class VfRun:
    """VFs of one physical function, one after another, with one VLAN: what one policy can name.

    `first` and `last` are their indices, None where the host does not tell them.
    """

    name: str
    parent: str
    interface: str | None
    members: tuple[Handed, ...]
    first: int | None
    last: int | None
    vlan: int

    @property
    def has_policy(self) -> bool:
        """Whether the operator can be told of just these VFs: of others than the first ones only
        by the interface (its helper.go, generatePfNameVfGroup)."""
        return self.first == 0 or (self.first is not None and self.interface is not None)


def resources(devices: Sequence[Handed]) -> list[dict[str, object]]:
    """The documents, in this order: KubeVirt's permitted devices, the part of a VirtualMachine that
    asks for what is given, and for network VFs the device plug-in's resources and the operator's.

    A run of VFs that no policy of the operator can name (`VfRun.has_policy`) has none. Raises
    Unsupported for what KubeVirt cannot name: vDPA devices, sockets, mdevs of
    s390x (vfio-ap, vfio-ccw), domains above ffff.
    """
    for device in devices:
        if not device.through_vfio:
            raise Unsupported(
                f"KubeVirt has no device for {device.name}",
                hint="it takes PCI devices and mediated devices that are there on the node",
                device=device.name,
            )
        if device.is_mdev and device.model != "vfio-pci":
            # Its launcher makes vfio-pci of each that is permitted (device/hostdevice/hostdev.go,
            # createMDEVHostDevice).
            raise Unsupported(
                f"KubeVirt cannot start a VM with {device.name}: it is {device.model}",
                hint="vfiotool vm libvirt and vm qemu know it",
                device=device.name,
            )
        if device.function is not None and device.address.domain > 0xFFFF:
            # It is libvirt that starts the VM (vm/libvirt.py).
            raise Unsupported(
                f"KubeVirt cannot start a VM with {device.name}: its domain is above ffff",
                hint="vfiotool vm qemu prints what QEMU takes",
                device=device.name,
            )
    runs = runs_of(devices)
    others = [device for device in devices if not _is_network_vf(device)]
    found = [_permitted(others)] if others else []
    found.append(_machine(others, runs))
    if runs:
        found.append(_plugin(runs))
        for run in runs:
            found += _operator(run)
    return found


def runs_of(devices: Sequence[Handed]) -> list[VfRun]:
    """The network VFs among `devices`, as the operator's policies can name them.

    Each run has a resource of its own: of two policies for one resource the operator drops one
    (its helper.go, mergeConfigs).
    """
    parents: dict[str, list[Handed]] = {}
    for device in devices:
        if _is_network_vf(device) and device.function is not None:
            parents.setdefault(device.function.physfn or "", []).append(device)
    found = []
    for parent, members in parents.items():
        runs: list[list[Handed]] = []
        for device in sorted(members, key=_index_key):
            if runs and _follows(runs[-1][-1], device):
                runs[-1].append(device)
            else:
                runs.append([device])
        for run in runs:
            first, last = _index(run[0]), _index(run[-1])
            name = _short(parent)
            if len(runs) > 1:
                name += "_" + re.sub(
                    r"[^0-9a-z]", "_", run[0].name if first is None else str(first)
                )
            vlan = _vlan(run[0])
            interface = run[0].parent_interface
            found.append(VfRun(name, parent, interface, tuple(run), first, last, vlan))
    return found


def _index(device: Handed) -> int | None:
    return None if device.function is None else device.function.vf_index


def _index_key(device: Handed) -> tuple[int, str]:
    index = _index(device)
    return (1 << 16 if index is None else index, device.name)


def _vlan(device: Handed) -> int:
    return (device.network.vlan or 0) if device.network is not None else 0


def _follows(before: Handed, after: Handed) -> bool:
    first, second = _index(before), _index(after)
    in_a_row = first is not None and second == first + 1
    return in_a_row and _vlan(before) == _vlan(after)


def _is_network_vf(device: Handed) -> bool:
    function = device.function
    is_vf = function is not None and function.physfn is not None
    return is_vf and (function.class_code or "").startswith("02") if function else False


def resource_name(device: Handed) -> str:
    """`devices.kubevirt.io/10de_2684`, or of an mdev its type's name."""
    if device.function is None:
        kind = re.sub(r"[^A-Za-z0-9_.-]+", "_", device.type or device.model).strip("_.-")
        return f"{_PREFIX}/{kind or 'mdev'}"
    return f"{_PREFIX}/{device.function.vendor}_{device.function.device}"


def _permitted(devices: Sequence[Handed]) -> dict[str, object]:
    pci: dict[str, dict[str, object]] = {}
    mediated: dict[str, dict[str, object]] = {}
    for device in devices:
        name = resource_name(device)
        if device.function is not None:
            selector = f"{device.function.vendor}:{device.function.device}".upper()
            pci[name] = {"pciVendorSelector": selector, "resourceName": name}
        else:
            mediated[name] = {"mdevNameSelector": device.type or "", "resourceName": name}
    permitted: dict[str, object] = {}
    if pci:
        permitted["pciHostDevices"] = list(pci.values())
    if mediated:
        permitted["mediatedDevices"] = list(mediated.values())
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "KubeVirt",
        "metadata": {"name": "kubevirt", "namespace": "kubevirt"},
        "spec": {
            "configuration": {
                "developerConfiguration": {"featureGates": ["HostDevices"]},
                "permittedHostDevices": permitted,
            }
        },
    }


def _machine(devices: Sequence[Handed], runs: Sequence[VfRun]) -> dict[str, object]:
    wanted: list[dict[str, object]] = [
        {"name": f"device{number}", "deviceName": resource_name(device)}
        for number, device in enumerate(devices)
    ]
    interfaces: list[dict[str, object]] = []
    networks: list[dict[str, object]] = []
    for run in runs:
        for device in run.members:
            name = f"net{len(interfaces)}"
            interface: dict[str, object] = {"name": name, "sriov": {}}
            mac = device.network.mac if device.network is not None else None
            if mac not in (None, "00:00:00:00:00:00"):
                interface["macAddress"] = mac
            interfaces.append(interface)
            network = f"{_NAMESPACE}/{_dashed(run.name)}"
            networks.append({"name": name, "multus": {"networkName": network}})
    asked: dict[str, object] = {}
    if wanted:
        asked["hostDevices"] = wanted
    if interfaces:
        asked["interfaces"] = interfaces
    spec: dict[str, object] = {"domain": {"devices": asked}}
    if networks:
        spec["networks"] = networks
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": {"name": "vm1"},
        "spec": {"runStrategy": "Halted", "template": {"spec": spec}},
    }


def _plugin(runs: Sequence[VfRun]) -> dict[str, object]:
    """The device plug-in's configuration, whose `config.json` is JSON in a string."""
    listed = [
        {
            "resourceName": run.name,
            "selectors": {
                "drivers": ["vfio-pci"],
                "pciAddresses": [device.name for device in run.members],
            },
        }
        for run in runs
    ]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "sriovdp-config", "namespace": "kube-system"},
        "data": {"config.json": json.dumps({"resourceList": listed})},
    }


def _operator(run: VfRun) -> list[dict[str, object]]:
    metadata = {"name": _dashed(run.name), "namespace": "sriov-network-operator"}
    found: list[dict[str, object]] = []
    if run.has_policy and run.last is not None:
        found.append(
            {
                "apiVersion": f"{_OPERATOR}/v1",
                "kind": "SriovNetworkNodePolicy",
                "metadata": metadata,
                "spec": {
                    "resourceName": run.name,
                    "nodeSelector": {"feature.node.kubernetes.io/network-sriov.capable": "true"},
                    "numVfs": run.last + 1,
                    # vfiotool has made the VFs: the operator shall only hand them out.
                    "externallyManaged": True,
                    "nicSelector": _selector(run),
                    "deviceType": "vfio-pci",
                },
            }
        )
    spec: dict[str, object] = {"resourceName": run.name, "networkNamespace": _NAMESPACE}
    if run.vlan:
        spec["vlan"] = run.vlan
    found.append(
        {
            "apiVersion": f"{_OPERATOR}/v1",
            "kind": "SriovNetwork",
            "metadata": dict(metadata),
            "spec": spec,
        }
    )
    return found


def _selector(run: VfRun) -> dict[str, object]:
    """The physical function, and of its VFs which: without a range they are the first ones."""
    selector: dict[str, object] = {"rootDevices": [run.parent]}
    function = run.members[0].function
    if function is not None and function.vendor is not None:
        selector["vendor"] = function.vendor
    if run.first != 0:
        selector["pfNames"] = [f"{run.interface}#{run.first}-{run.last}"]
    return selector


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _short(parent: str) -> str:
    """A resource name of a physical function: letters, digits and underscores."""
    return "vfs_" + re.sub(r"[^0-9a-z]", "_", parent)
