"""Whole start scripts: bind what is not ready, start the machine, give back what was bound."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vfiotool.vm.handed import Handed
from vfiotool.vm.machine import Q35, GuestMachine

_HEAD = """\
#!/bin/sh
# Starts a virtual machine with: {names}
# Made by: vfiotool vm {kind} --script. What this script has bound it releases at the end, also
# when the machine fails; what was ready before stays as it was.
set -eu
bound=
give_back() {{
    code=$?
    trap - EXIT INT TERM HUP
    # shellcheck disable=SC2086
    [ -z "$bound" ] || vfiotool release $bound || code=$?
    exit "$code"
}}
trap give_back EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
"""
_BIND = """\
if ! vfiotool vm check {name}{more} >/dev/null 2>&1; then
    case $(vfiotool bind {name} --dry-run --json) in
    *'"steps": []'*) ;; # it is bound already: the check below says what it lacks
    *)
        vfiotool bind {name}
        bound="$bound {name}"
        ;;
    esac
fi
"""
_CHECK = "vfiotool vm check {names}{more} >&2\n"


def start_script(
    kind: str,
    devices: Sequence[Handed],
    words: Sequence[str],
    *,
    memory: str | None,
    vcpus: int,
    guest: GuestMachine = Q35,
    iommufd: bool = False,
    vf_token: str | None = None,
) -> str:
    """A script for `sh` that starts `kind` (qemu, cloud-hypervisor) with the options in `words`.

    Its own arguments go to the program, after the options: a disk, a kernel. `memory` None: the
    words say it. `guest` is the machine that QEMU is started as; `iommufd` and `vf_token` are as
    the words were made with, for the checks before the start.
    """
    names = " ".join(device.name for device in devices)
    parts = [_HEAD.format(names=names, kind=kind)]
    token = f" --vf-token {vf_token}" if vf_token is not None else ""
    parts += [
        _BIND.format(name=device.name, more=token if device.guard is not None else "")
        for device in devices
        if device.function is not None
    ]
    opened = [_selector(device) for device in devices]
    more = token + (" --iommufd" if iommufd else "")
    more += f" --hypervisor {kind}" if kind != "qemu" else ""
    more += f" --memory {memory} --vcpus {vcpus}" if memory else ""
    parts.append(_CHECK.format(names=" ".join(map(shlex.quote, opened)), more=more))
    parts.append(_line(_program(kind, vcpus, guest), words))
    return "".join(parts)


def _selector(device: Handed) -> str:
    return device.name if device.through_vfio else f"{device.model}:{device.name}"


def _program(kind: str, vcpus: int, guest: GuestMachine) -> str:
    if kind == "cloud-hypervisor":
        return f"cloud-hypervisor --cpus boot={vcpus}"
    # KVM where there is one: the same script runs in a guest that has none.
    cpu = f" -cpu {guest.cpu}" if guest.cpu else ""
    machine = f"{guest.kind},accel=kvm:tcg{guest.options}"
    return f"{guest.program} -machine {machine}{cpu} -smp {vcpus}"


def _line(program: str, words: Sequence[str]) -> str:
    rows = [program]
    for word in words:
        if word.startswith("-"):
            rows.append(word)
        else:
            rows[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join([*rows, '"$@"']) + "\n"
