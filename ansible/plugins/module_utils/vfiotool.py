# Copyright: The vfiotool authors
# SPDX-License-Identifier: MIT
"""Running vfiotool on the managed host: one JSON object comes back, or the module fails with its
message, its hint and its exit code."""

from __future__ import annotations

import json

# The exit code that says: the kernel refused, and nothing of the change is left.
ROLLED_BACK = 5

COMMON = {
    "executable": {"type": "str", "default": "vfiotool"},
    "root": {"type": "path"},
}


def run(module, *words, accept=(0,)):
    """The object that the command prints, and its exit code.

    An exit code that is not in `accept` fails the module.
    """
    command = [module.params["executable"], "--json"]
    if module.params.get("root"):
        command += ["--root", module.params["root"]]
    code, out, err = module.run_command([*command, *words])
    try:
        answer = json.loads(out)
        if not isinstance(answer, dict):
            raise ValueError("it is no object")
    except ValueError:
        module.fail_json(msg="vfiotool printed no JSON: %s" % (err.strip() or out.strip()), rc=code)
    if code not in accept:
        fail(module, answer, code, err)
    return answer, code


def fail(module, answer, code, err=""):
    """Fail with what vfiotool said."""
    error = answer.get("error") or {}
    message = error.get("message") or err.strip() or "vfiotool ended with %d" % code
    if code == ROLLED_BACK:
        message += "; what had been done is rolled back"
    if error.get("hint"):
        message += " (%s)" % error["hint"]
    module.fail_json(msg=message, rc=code, kind=error.get("kind"), error=error)


def words_of(steps):
    """Steps as lines for a diff: what is, and what shall be."""
    before, after = [], []
    for step in steps:
        line = "%s %s: " % (step["verb"], step["target"])
        before.append(line + str(step["from"]))
        after.append(line + str(step["to"]))
    return "\n".join(before + [""]), "\n".join(after + [""])
