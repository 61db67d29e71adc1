"""KubeVirt's and the SR-IOV operator's resources for the devices of a node.

Sources: KubeVirt's API reference v1 (PermittedHostDevices, HostDevice), its user guide "Host
Devices"; k8snetworkplumbingwg: sriov-network-operator, config/crd/bases (SriovNetworkNodePolicy,
SriovNetwork), and sriov-network-device-plugin, README (resourceList).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from vfiotool.errors import Unsupported
from vfiotool.vm.handed import Handed

PROGRAM = "KubeVirt"
_PREFIX = "devices.kubevirt.io"
_OPERATOR = "sriovnetwork.openshift.io"


def resources(devices: Sequence[Handed]) -> list[dict[str, object]]:
    """The documents, in this order: KubeVirt's permitted devices, the part of a VirtualMachine that
    asks for them, and for network VFs the device plug-in's resources and the operator's.

    Raises Unsupported for what KubeVirt cannot name: vDPA devices and sockets.
    """
    for device in devices:
        if not device.through_vfio:
            raise Unsupported(
                f"KubeVirt has no device for {device.name}",
                hint="it takes PCI devices and mediated devices that are there on the node",
                device=device.name,
            )
    networks = [device for device in devices if _is_network_vf(device)]
    others = [device for device in devices if device not in networks]
    found = []
    if others:
        found += [_permitted(others), _machine(others)]
    if networks:
        found += [_plugin(networks), *_operator(networks)]
    return found


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


def _machine(devices: Sequence[Handed]) -> dict[str, object]:
    wanted = [
        {"name": f"device{number}", "deviceName": resource_name(device)}
        for number, device in enumerate(devices)
    ]
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": {"name": "vm1"},
        "spec": {
            "runStrategy": "Halted",
            "template": {"spec": {"domain": {"devices": {"hostDevices": wanted}}}},
        },
    }


def _by_parent(devices: Sequence[Handed]) -> dict[str, list[Handed]]:
    found: dict[str, list[Handed]] = {}
    for device in devices:
        if device.function is not None and device.function.physfn is not None:
            found.setdefault(device.function.physfn, []).append(device)
    return found


def _plugin(devices: Sequence[Handed]) -> dict[str, object]:
    """The device plug-in's configuration, whose `config.json` is JSON in a string."""
    listed = [
        {
            "resourceName": _short(parent),
            "selectors": {
                "drivers": ["vfio-pci"],
                "pciAddresses": [device.name for device in members],
            },
        }
        for parent, members in _by_parent(devices).items()
    ]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "sriovdp-config", "namespace": "kube-system"},
        "data": {"config.json": json.dumps({"resourceList": listed})},
    }


def _operator(devices: Sequence[Handed]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for parent, members in _by_parent(devices).items():
        name = _short(parent)
        first = members[0].function
        selector: dict[str, object] = {"rootDevices": [parent]}
        if first is not None and first.vendor is not None:
            selector["vendor"] = first.vendor
        dashed = name.replace("_", "-")
        metadata = {"name": dashed, "namespace": "sriov-network-operator"}
        found.append(
            {
                "apiVersion": f"{_OPERATOR}/v1",
                "kind": "SriovNetworkNodePolicy",
                "metadata": metadata,
                "spec": {
                    "resourceName": name,
                    "nodeSelector": {"feature.node.kubernetes.io/network-sriov.capable": "true"},
                    "numVfs": len(members),
                    # vfiotool has made the VFs: the operator shall only hand them out.
                    "externallyManaged": True,
                    "nicSelector": selector,
                    "deviceType": "vfio-pci",
                },
            }
        )
        vlans = {device.network.vlan for device in members if device.network is not None}
        spec: dict[str, object] = {"resourceName": name, "networkNamespace": "default"}
        if len(vlans) == 1 and (vlan := vlans.pop()):
            spec["vlan"] = vlan
        found.append(
            {
                "apiVersion": f"{_OPERATOR}/v1",
                "kind": "SriovNetwork",
                "metadata": dict(metadata),
                "spec": spec,
            }
        )
    return found


def _short(parent: str) -> str:
    """A resource name of a physical function: letters, digits and underscores."""
    return "vfs_" + re.sub(r"[^0-9a-z]", "_", parent)
