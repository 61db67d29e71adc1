#!/usr/bin/python
# Copyright: The vfiotool authors
# SPDX-License-Identifier: MIT
# GNU General Public License v3.0+ compatible

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vfiotool_policy
short_description: Apply a vfiotool policy, all or nothing
description:
  - Brings the devices of a host into the state that a policy names (drivers, virtual functions,
    mediated and vDPA devices).
  - A policy whose steps fail is rolled back by vfiotool on that host; the task then fails there and
    says so, and other hosts go on.
  - In check mode nothing is changed, and the steps that would be taken are returned.
version_added: "0.1.0"
author:
  - The vfiotool authors (@vfiotool)
options:
  policy:
    description:
      - The policy's text. Exactly one of O(policy) and O(path) is given.
    type: str
  path:
    description:
      - A policy file on the managed host.
    type: path
  absent_ok:
    description:
      - Go on where a rule's device is not there.
    type: bool
    default: false
  allow:
    description:
      - Uses of the host that may be disrupted, as a refusal names them (C(KIND:WHAT)).
    type: list
    elements: str
    default: []
  timeout:
    description:
      - Deadline of each write to the kernel, in seconds.
    type: float
  boot:
    description:
      - Whether the policy shall be applied at every boot, too. Not touched if it is left out.
    type: bool
extends_documentation_fragment:
  - vfiotool.host.vfiotool
attributes:
  check_mode:
    description: Plans without changing anything.
    support: full
  diff_mode:
    description: Shows each device's state before and after.
    support: full
"""

EXAMPLES = r"""
- name: Hand the second port to virtual machines
  vfiotool.host.vfiotool_policy:
    policy: |
      version = 1
      [[device]]
      match = { slot = "0000:01:00" }
      driver = "vfio-pci"
    boot: true

- name: See what a policy would change
  vfiotool.host.vfiotool_policy:
    path: /etc/vfiotool/site.toml
  check_mode: true
  diff: true
"""

RETURN = r"""
steps:
  description: The steps that were taken, or in check mode would be.
  returned: success
  type: list
  elements: dict
transaction:
  description: The number of the change in C(vfiotool history); none where there was nothing to do.
  returned: success
  type: int
notes:
  description: What whoever changes the host should know.
  returned: success
  type: list
  elements: str
refusals:
  description: Why the policy was refused before anything was written.
  returned: when it was refused
  type: list
  elements: dict
"""

import os
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vfiotool.host.plugins.module_utils.vfiotool import (
    COMMON,
    fail,
    run,
    words_of,
)


def main():
    module = AnsibleModule(
        argument_spec=dict(
            COMMON,
            policy={"type": "str"},
            path={"type": "path"},
            absent_ok={"type": "bool", "default": False},
            allow={"type": "list", "elements": "str", "default": []},
            timeout={"type": "float"},
            boot={"type": "bool"},
        ),
        mutually_exclusive=[("policy", "path")],
        required_one_of=[("policy", "path")],
        supports_check_mode=True,
    )
    path = module.params["path"]
    if path is None:
        handle, path = tempfile.mkstemp(suffix=".toml", dir=module.tmpdir)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(module.params["policy"])
    module.exit_json(**act(module, path))


def act(module, path):
    """Plan, apply what is to be done, and say it."""
    choice = ["--absent-ok"] if module.params["absent_ok"] else []
    for use in module.params["allow"]:
        choice += ["--allow", use]
    plan, code = run(module, "plan", path, *choice, accept=(0, 4))
    if code == 4:
        if "error" in plan:
            fail(module, plan, code)
        details = "; ".join(row["detail"] for row in plan["refusals"])
        module.fail_json(msg="refused: %s" % details, rc=code, refusals=plan["refusals"])
    before, after = words_of(plan["steps"])
    result = {
        "changed": bool(plan["steps"]),
        "steps": plan["steps"],
        "notes": plan["notes"],
        "transaction": None,
        "diff": {"before": before, "after": after},
    }
    at_boot = wants_boot(module, path)
    result["changed"] = result["changed"] or at_boot is not None
    if module.check_mode:
        return result
    if plan["steps"]:
        if module.params["timeout"]:
            choice += ["--timeout", "%g" % module.params["timeout"]]
        done, code = run(module, "apply", path, *choice)
        result.update(steps=done["steps"], notes=done["notes"], transaction=done["transaction"])
        # Nothing may be left to do: the second run changes nothing.
        again, code = run(module, "plan", path, *choice_of_plan(choice), accept=(0, 4))
        if code == 4 or again["steps"]:
            module.fail_json(msg="applied, and the host still differs", rc=1, steps=again["steps"])
    if at_boot is not None:
        run(module, *at_boot)
    return result


def choice_of_plan(choice):
    """The options without --timeout, which a plan does not take."""
    return choice[: choice.index("--timeout")] if "--timeout" in choice else choice


def wants_boot(module, path):
    """The command that makes the boot as it is wanted; none where it is."""
    wanted = module.params["boot"]
    if wanted is None or module.params["root"]:
        return None
    status, code = run(module, "boot", "status", accept=(0, 1))
    if not wanted:
        return ("boot", "disable") if status["enabled"] else None
    same = status["enabled"] and code == 0 and installed(module) == read(path)
    return None if same else ("boot", "enable", path)


def installed(module):
    """The policy that is applied at boot."""
    return read("/etc/vfiotool/boot/policy.toml")


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


if __name__ == "__main__":
    main()
