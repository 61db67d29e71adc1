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
# when the machine fails or a signal ends it; what was ready before stays as it was.
set -eu
bound=
machine=
stop=
give_back() {{
    code=$?
    trap - EXIT
    trap '' INT TERM HUP # a second signal shall not leave devices bound
    if [ -n "$machine" ]; then
        kill "$machine" 2>/dev/null || :
        wait "$machine" || :
    fi
    for device in $bound; do
        vfiotool release "$device" || code=$?
    done
    exit "$code"
}}
on_signal() {{
    stop=$1
    # In the midst of a bind or a start what it did is not known yet: stop_here comes after.
    [ -n "$busy" ] || exit "$stop"
}}
stop_here() {{
    busy=
    [ -z "$stop" ] || exit "$stop"
}}
busy=
trap give_back EXIT
trap 'on_signal 130' INT
trap 'on_signal 143' TERM
trap 'on_signal 129' HUP
"""
_BIND = """\
if ! vfiotool vm check {name}{more} >/dev/null 2>&1; then
    case $(vfiotool bind {name} --dry-run --json) in
    *'"steps": []'*) ;; # it is bound already: the check below says what it lacks
    *)
        busy=yes
        vfiotool bind {name}
        bound="$bound {name}"
        stop_here
        ;;
    esac
fi
"""
# In the background and waited for, since a shell looks at signals only between its commands;
# with this script's own standard input, which a command in the background would not have.
_START = """\
exec 3<&0
busy=yes
{line} <&3 3<&- &
machine=$!
stop_here
code=0
wait "$machine" || code=$?
machine=
exit "$code"
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
    # One line, whatever a name holds: what follows a newline would be a command.
    names = " ".join(shlex.quote(device.name) for device in devices).replace("\n", " ")
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
    parts.append(_START.format(line=_line(_program(kind, vcpus, guest), words)))
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
    return " \\\n    ".join([*rows, '"$@"'])
