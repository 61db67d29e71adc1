"""What a guest's firmware makes of large BARs, of which `vm check` warns: a card with such BARs, in
a machine as `vm qemu` has it, seen through QEMU's monitor. Two firmwares, no guest system."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guests.failing_cards import Card
from tests.oracles.ovmf import ovmf
from tests.vm.test_check import CARD, MEM32, MEM64, Machine
from vfiotool.errors import VfiotoolError
from vfiotool.lab import qemu
from vfiotool.lab.machines import VfioUserDevice
from vfiotool.models import BarSpec, ModelServer

pytestmark = [pytest.mark.lab, pytest.mark.proof]

MIB, GIB = 1 << 20, 1 << 30
LIMIT_S = 180.0
UEFI = "trixie"
# A bridge whose window was not set yet: its base is all ones.
UNSET = 0xFFF00000
NOWHERE = -1


def found_by_check(*bars: tuple[int, int]) -> dict[str, Any]:
    """What `vm check` says of a card with these BARs: (bytes, kind of memory)."""
    step = 2 if bars[0][1] == MEM64 else 1
    layout = tuple((number * step, size, kind) for number, (size, kind) in enumerate(bars))
    return {one.kind: one for one in Machine().card(bars=layout).check(CARD)}


@contextmanager
def firmware(folder: Path, bars: tuple[BarSpec, ...], *words: str) -> Iterator[Firmware]:
    """A machine whose firmware runs, with one card that has these BARs, behind a port."""
    try:
        program = qemu.find_newer()
    except VfiotoolError as error:
        pytest.skip(f"no lab here: {error.message}")
    model = type("Big", (Card,), {"bars": bars})()
    with ModelServer(model, str(folder / "card.sock")) as server:
        card = VfioUserDevice(server.path, (("bus", "rp"),))
        command = [
            *(*program.command, "-machine", "q35,accel=tcg,memory-backend=memory", "-nodefaults"),
            *("-display", "none", "-m", "2G", "-qmp", "stdio"),
            *("-object", "memory-backend-memfd,id=memory,size=2G,share=on"),
            *("-device", "pcie-root-port,id=rp,bus=pcie.0,addr=3", "-device", card.argument()),
            *("-chardev", f"file,id=log,path={folder / 'log'}"),
            *("-device", "isa-debugcon,iobase=0x402,chardev=log", *words),
        ]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=program.env(), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        try:
            yield Firmware(process, folder / "log")
        finally:
            process.kill()
            process.communicate()


class Firmware:
    """Its log (SeaBIOS writes one), and what it has made of the card."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log
        self.ask("qmp_capabilities")

    def ask(self, command: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"execute": command}).encode() + b"\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            told = json.loads(line)
            if "return" in told:
                return told["return"]
        raise AssertionError("QEMU ended")

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def bars(self) -> list[int] | None:
        """The addresses of the card's BARs, `NOWHERE` for one without; None so far."""
        bridges = [
            one["pci_bridge"] for one in self.ask("query-pci")[0]["devices"] if "pci_bridge" in one
        ]
        (bridge,) = bridges
        windows = [bridge["bus"][name]["base"] for name in ("memory_range", "prefetchable_range")]
        cards = bridge.get("devices", [])
        if not cards or all(base == UNSET for base in windows):
            return None
        return [region["address"] for region in cards[0]["regions"]]

    def settled(self) -> list[int]:
        """The BARs once the firmware is done with them, or has given up."""
        end = time.monotonic() + LIMIT_S
        last: list[int] | None = None
        while time.monotonic() < end and "out of 32bit" not in self.log():
            time.sleep(2)
            now = self.bars()
            if now is not None and now == last:
                return now
            last = now
        return self.bars() or []


def memory_bars(*sizes: int, wide: bool = False) -> tuple[BarSpec, ...]:
    step = 2 if wide else 1
    return tuple(
        BarSpec(number * step, size, wide=wide, prefetchable=wide)
        for number, size in enumerate(sizes)
    )


def uefi(suite: str) -> list[str]:
    folder, why = ovmf(suite)
    if folder is None:
        pytest.skip(why)
    drive = "if=pflash,format=raw"
    code, variables = folder / "OVMF_CODE_4M.fd", folder / "OVMF_VARS_4M.fd"
    return [
        *("-drive", f"{drive},readonly=on,file={code}"),
        *("-drive", f"{drive},snapshot=on,file={variables}"),
    ]


def test_bars_below_4_gib(tmp_path: Path) -> None:
    fits, too_much = (512 * MIB,), (512 * MIB, 256 * MIB)
    assert "bar-32" not in found_by_check(*((size, MEM32) for size in fits))
    found = found_by_check(*((size, MEM32) for size in too_much))["bar-32"]
    assert (found.severity, found.number) == ("warning", 768 * MIB)
    with firmware(tmp_path, memory_bars(*fits)) as seabios:
        assert NOWHERE not in seabios.settled()
    with firmware(tmp_path, memory_bars(*too_much)) as seabios:
        seabios.settled()
        assert "PCI: out of 32bit address space" in seabios.log()
    with firmware(tmp_path, memory_bars(*too_much), *uefi(UEFI)) as remedy:
        assert NOWHERE not in remedy.settled()


def test_an_ovmf_of_today_has_room_for_bars_above_4_gib(tmp_path: Path) -> None:
    """Of which the check says so: older ones are not to be had to be tried."""
    found = found_by_check((64 * GIB, MEM64))["bar-64"]
    assert (found.severity, found.number) == ("warning", 64 * GIB)
    assert "from before November 2022" in found.detail
    bars = memory_bars(64 * GIB, wide=True)
    for more in ((), tuple(found.next.split())):
        with firmware(tmp_path, bars, *uefi(UEFI), *more) as today:
            assert NOWHERE not in today.settled()
