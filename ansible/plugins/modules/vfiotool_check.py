#!/usr/bin/python
# Copyright: The vfiotool authors
# SPDX-License-Identifier: MIT
# GNU General Public License v3.0+ compatible

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vfiotool_check
short_description: A gate before a virtual machine's start
description:
  - Runs C(vfiotool vm check) for devices that one virtual machine is to have, and fails where
    something would keep it from starting.
version_added: "0.1.0"
author:
  - The vfiotool authors (@vfiotool)
options:
  devices:
    description:
      - The devices, by any selector, in quotation marks. YAML reads V(01:00.0) without them as the
        number 60.
    type: list
    elements: str
    required: true
  memory:
    description:
      - The machine's memory, such as C(16G).
    type: str
  vcpus:
    description:
      - The machine's processors.
    type: int
  hypervisor:
    description:
      - Whose remedies are named.
    type: str
    choices: [qemu, libvirt, cloud-hypervisor]
    default: qemu
  iommufd:
    description:
      - Through iommufd, not through the group.
    type: bool
    default: false
  viommu:
    description:
      - The machine has a virtual IOMMU.
    type: bool
    default: false
  vf_token:
    description:
      - The token of virtual functions whose physical function is on vfio-pci.
      - By default that of the applied policy.
    type: str
  strict:
    description:
      - Fail on warnings too, such as a device that works once and not twice.
    type: bool
    default: false
extends_documentation_fragment:
  - vfiotool.host.vfiotool
attributes:
  check_mode:
    description: Only reads.
    support: full
  diff_mode:
    description: Changes nothing.
    support: none
"""

EXAMPLES = r"""
- name: Start no machine that would not start
  vfiotool.host.vfiotool_check:
    devices: ["0000:01:00.0", "0000:01:00.1"]
    memory: 16G
    vcpus: 8
    hypervisor: libvirt
"""

RETURN = r"""
findings:
  description: What was found, each with severity, evidence, number and remedy.
  returned: always
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vfiotool.host.plugins.module_utils.vfiotool import COMMON, run


def main():
    module = AnsibleModule(
        argument_spec=dict(
            COMMON,
            devices={"type": "list", "elements": "str", "required": True},
            memory={"type": "str"},
            vcpus={"type": "int"},
            hypervisor={
                "type": "str",
                "choices": ["qemu", "libvirt", "cloud-hypervisor"],
                "default": "qemu",
            },
            iommufd={"type": "bool", "default": False},
            viommu={"type": "bool", "default": False},
            vf_token={"type": "str", "no_log": True},
            strict={"type": "bool", "default": False},
        ),
        supports_check_mode=True,
    )
    words = ["vm", "check", "--hypervisor", module.params["hypervisor"]]
    for option in ("memory", "vcpus"):
        if module.params[option] is not None:
            words += ["--%s" % option, str(module.params[option])]
    if module.params["vf_token"] is not None:
        words += ["--vf-token", module.params["vf_token"]]
    words += ["--%s" % name for name in ("iommufd", "viommu") if module.params[name]]
    # What is named is a device, although it may begin with a dash.
    words += ["--", *module.params["devices"]]
    findings = run(module, *words, accept=(0, 1))[0]["findings"]
    bad = ("blocker", "warning") if module.params["strict"] else ("blocker",)
    against = [item for item in findings if item["severity"] in bad]
    if against:
        told = "; ".join("%s: %s" % (item["device"], item["detail"]) for item in against)
        module.fail_json(msg=told, findings=findings)
    module.exit_json(changed=False, findings=findings)


if __name__ == "__main__":
    main()
