#!/usr/bin/python
# Copyright: The vfiotool authors
# SPDX-License-Identifier: MIT
# GNU General Public License v3.0+ compatible

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vfiotool_facts
short_description: Facts about devices, IOMMU groups and readiness for passthrough
description:
  - Sets C(ansible_facts.vfiotool) to what C(vfiotool devices), C(groups) and C(doctor) say.
version_added: "0.1.0"
author:
  - The vfiotool authors (@vfiotool)
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
- name: Look at the devices
  vfiotool.host.vfiotool_facts:

- name: Name the disks that could be handed over
  ansible.builtin.debug:
    msg: "{{ ansible_facts.vfiotool.devices | selectattr('verdict', 'eq', 'available') | list }}"
"""

RETURN = r"""
ansible_facts:
  description: C(vfiotool) with C(devices), C(groups), C(ready) and C(findings).
  returned: success
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vfiotool.host.plugins.module_utils.vfiotool import COMMON, run


def main():
    module = AnsibleModule(argument_spec=dict(COMMON), supports_check_mode=True)
    devices = run(module, "devices")[0]["devices"]
    # A host without an IOMMU has no groups, and says so with exit code 8.
    groups = run(module, "groups", accept=(0, 1, 8))[0].get("groups", [])
    doctor = run(module, "doctor", accept=(0, 1))[0]
    facts = {
        "devices": devices,
        "groups": groups,
        "ready": doctor["ready"],
        "findings": doctor["findings"],
    }
    module.exit_json(changed=False, ansible_facts={"vfiotool": facts})


if __name__ == "__main__":
    main()
