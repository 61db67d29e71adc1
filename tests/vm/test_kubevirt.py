"""KubeVirt's resources and those for network VFs, held against what their projects publish."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.vm.given import DISK, GPU, MDEV, WIDE, vf
from vfiotool.errors import Unsupported
from vfiotool.netlink.route import VfSettings
from vfiotool.vm import kubevirt
from vfiotool.vm.handed import Handed

# KubeVirt's API v1, PermittedHostDevices and HostDevice; SriovNetworkNodePolicy and SriovNetwork
# as sriov-network-operator's config/crd/bases has them; the device plug-in's resourceList.
STRING = {"type": "string", "minLength": 1}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def listed(**properties: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": closed(list(properties), **properties)}


PERMITTED = closed(
    [],
    pciHostDevices=listed(
        pciVendorSelector={"type": "string", "pattern": "^[0-9A-F]{4}:[0-9A-F]{4}$"},
        resourceName={"type": "string", "pattern": "^[a-z0-9.]+/[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"},
    ),
    mediatedDevices=listed(mdevNameSelector=STRING, resourceName=STRING),
)
POLICY = closed(
    ["nicSelector", "nodeSelector", "numVfs", "resourceName"],
    resourceName={"type": "string", "pattern": "^[a-zA-Z0-9_]+$"},
    nodeSelector={"type": "object", "additionalProperties": STRING},
    numVfs={"type": "integer", "minimum": 0},
    externallyManaged={"type": "boolean"},
    nicSelector=closed(
        [],
        vendor=STRING,
        deviceID=STRING,
        rootDevices={"type": "array", "items": STRING},
        pfNames={"type": "array", "items": STRING},
    ),
    deviceType={"enum": ["netdevice", "vfio-pci"]},
)
NETWORK = closed(
    ["resourceName"],
    resourceName=STRING,
    networkNamespace=STRING,
    vlan={"type": "integer", "minimum": 0, "maximum": 4096},
)
RESOURCES = closed(
    ["resourceList"],
    resourceList={
        "type": "array",
        "items": closed(
            ["resourceName", "selectors"],
            resourceName={"type": "string", "pattern": "^[a-zA-Z0-9_]+$"},
            selectors=closed(
                [],
                drivers={"type": "array", "items": STRING},
                pciAddresses={"type": "array", "items": STRING},
            ),
        ),
    },
)


def hold(schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator.check_schema(schema)
    errors = [error.message for error in Draft202012Validator(schema).iter_errors(value)]
    assert not errors, errors


def test_kubevirts_resources_are_as_published() -> None:
    second = vf("0000:03:10.2")
    assert second.function is not None
    second = replace(second, function=replace(second.function, vf_index=1))
    documents: Any = kubevirt.resources([*GPU, MDEV, vf(), second])
    kinds = [item["kind"] for item in documents]
    assert kinds == [
        "KubeVirt",
        "VirtualMachine",
        "ConfigMap",
        "SriovNetworkNodePolicy",
        "SriovNetwork",
    ]
    cluster, machine, plugin, policy, network = documents
    hold(PERMITTED, cluster["spec"]["configuration"]["permittedHostDevices"])
    wanted = machine["spec"]["template"]["spec"]["domain"]["devices"]["hostDevices"]
    hold(listed(name=STRING, deviceName=STRING), wanted)
    permitted = json.dumps(cluster)
    assert all(item["deviceName"] in permitted for item in wanted)
    hold(RESOURCES, json.loads(plugin["data"]["config.json"]))
    hold(POLICY, policy["spec"])
    hold(NETWORK, network["spec"])
    assert (policy["spec"]["numVfs"], network["spec"]["vlan"]) == (2, 10)
    assert machine["spec"]["template"]["spec"]["networks"] == [
        {
            "name": f"net{number}",
            "multus": {"networkName": f"default/{network['metadata']['name']}"},
        }
        for number in (0, 1)
    ]
    devices = machine["spec"]["template"]["spec"]["domain"]["devices"]
    assert devices["interfaces"][0] == {
        "name": "net0",
        "sriov": {},
        "macAddress": "52:54:00:00:00:01",
    }
    with pytest.raises(Unsupported):
        kubevirt.resources([DISK])
    with pytest.raises(Unsupported, match="domain is above ffff"):
        kubevirt.resources([WIDE])


def some_vf(index: int, vlan: int = 0, interface: str | None = "eno1") -> Handed:
    own = vf(f"0000:03:{0x10 + index // 8:02x}.{index % 8}")
    assert own.function is not None
    return replace(
        own,
        function=replace(own.function, vf_index=index),
        network=VfSettings(index, vlan=vlan),
        parent_interface=interface,
    )


def test_the_operator_is_told_of_just_the_vfs_that_were_given() -> None:
    """Without a range numVfs are the first ones; two policies for one resource are one too few."""
    chosen = [some_vf(5), some_vf(2), some_vf(0), some_vf(3)]
    documents: Any = kubevirt.resources(chosen)
    policies = [item["spec"] for item in documents if item["kind"] == "SriovNetworkNodePolicy"]
    for policy in policies:
        hold(POLICY, policy)
    assert [policy["numVfs"] for policy in policies] == [1, 4, 6]
    ranges = [policy["nicSelector"].get("pfNames") for policy in policies]
    assert ranges == [None, ["eno1#2-3"], ["eno1#5-5"]]
    assert len({policy["resourceName"] for policy in policies}) == 3
    plugin = next(item for item in documents if item["kind"] == "ConfigMap")
    listed = json.loads(plugin["data"]["config.json"])
    hold(RESOURCES, listed)
    assert [len(one["selectors"]["pciAddresses"]) for one in listed["resourceList"]] == [1, 2, 1]


def test_vfs_of_different_vlans_keep_theirs() -> None:
    documents: Any = kubevirt.resources([some_vf(0, 10), some_vf(1, 10), some_vf(2, 20)])
    networks = [item["spec"] for item in documents if item["kind"] == "SriovNetwork"]
    for network in networks:
        hold(NETWORK, network)
    assert [network["vlan"] for network in networks] == [10, 20]
    machine = next(item for item in documents if item["kind"] == "VirtualMachine")
    named = [
        one["multus"]["networkName"] for one in machine["spec"]["template"]["spec"]["networks"]
    ]
    assert (named[0] == named[1], named[1] == named[2]) == (True, False)


def test_vfs_that_no_policy_can_name_have_none() -> None:
    (run,) = kubevirt.runs_of([some_vf(1, interface=None)])
    assert not run.has_policy
    kinds = [item["kind"] for item in kubevirt.resources([some_vf(1, interface=None)])]
    assert kinds == ["VirtualMachine", "ConfigMap", "SriovNetwork"]


@pytest.mark.parametrize("model", ["vfio-ap", "vfio-ccw"])
def test_mediated_devices_of_s390x_would_be_started_as_vfio_pci(model: str) -> None:
    with pytest.raises(Unsupported, match=f"it is {model}"):
        kubevirt.resources([replace(MDEV, model=model)])
