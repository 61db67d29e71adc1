"""State files that were damaged or written by somebody else: refused by name, and never believed.

Bits flip, and whole values are replaced by hostile ones under a checksum that is right. What reads
the files then does what it says, or names the file; it writes to nothing but the kernel's files for
devices, drivers and types that the host has, and no fault of vfiotool's own comes out.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.change.changing import (
    BEHIND,
    NIC,
    NVME,
    UUID,
    binding,
    counting,
    creating,
    do,
    furnished,
    releasing,
    run_folder,
)
from tests.fakes.kernel import FakeKernel, Fault
from tests.guests.runs import PROOFS_WANTED
from vfiotool.boot.files import BootFile, install, read_manifest, remove_installed
from vfiotool.boot.places import MANIFEST, MODPROBE, UNITS
from vfiotool.boot.run import read_record
from vfiotool.change.confirm import Pending, attach, confirm, revert_unconfirmed
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.sealed import seal, unseal
from vfiotool.change.undo import undo
from vfiotool.errors import Stuck, VfiotoolError
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.saved import DesiredState, parse_saved, plan_to_text

WANTED = bool(os.environ.get(PROOFS_WANTED))
FLIPS, EDITS = (10_000, 1_000) if WANTED else (200, 150)

HOSTILE: tuple[Any, ...] = (
    "../../../../tmp/evil",
    "/etc/passwd",
    "..",
    "",
    "a\nb",
    "\x1b[31mred",
    "x" * 5000,
    "0000:00:00.0/../../../../../../etc",
    "-rmmod",
    "vfio-pci -C /tmp/evil",
    "\ud800",
    None,
    True,
    -1,
    2**70,
    1e300,
    float("nan"),
    [],
    {},
    [[[[]]]],
    "set-mdev",
    "load-module",
)
# Where a change of the furnished host may write: names of its own devices, drivers and types.
WRITTEN = re.compile(
    r"modprobe|netlink|/sys/bus/pci/(drivers_probe|drivers/[A-Za-z0-9_.+ -]+/(un)?bind)|"
    r"/sys/bus/pci/devices/[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]/\w+|"
    r"/sys/bus/mdev/devices/[0-9a-f-]{36}/\w+|"
    r"/sys/class/mdev_bus/[A-Za-z0-9_.:+ -]+/mdev_supported_types/[A-Za-z0-9_.:+ -]+/create"
)


class Host:
    """A host with a journal that holds every kind of state: done, open, origin, pending."""

    def __init__(self, folder: str) -> None:
        self.kernel: FakeKernel = furnished()
        self.folder = folder
        self.journal = Journal(self.kernel.host(), folder)
        do(self.kernel.host(), self.journal, creating("mtty", "mtty-1", UUID))
        do(self.kernel.host(), self.journal, counting(NIC, 2, False))
        number = do(self.kernel.host(), self.journal, binding(NVME)).transaction
        entry = {"pid": 1, "since": "7", "after": 0, "transaction": number, "failed": None}
        self.journal.pending.replace("token", seal(entry))
        self.kernel.faults = (Fault("hang", len(self.kernel.writes) + 2),)
        with pytest.raises(Stuck):
            do(self.kernel.host(), self.journal, binding(BEHIND, driver="none", whole_group=True))
        self.kernel.clear_faults()
        self.kernel.writes.clear()

    def files(self) -> list[Path]:
        (boot,) = Path(self.folder).glob("boot-*")
        found = [*boot.glob("*.done"), *boot.glob("*.open"), *boot.glob("*/*")]
        return sorted(path for path in found if path.is_file())

    def use(self) -> list[str]:
        """Everything that reads the state; what it said. Anything but an error of ours fails."""
        host = self.kernel.host()
        said = []
        for act in (
            lambda: self.journal.history(),
            lambda: recover(host, self.journal),
            lambda: confirm(host, self.journal),
            lambda: revert_unconfirmed(host, self.journal, "token", 1, tries=1),
            lambda: do(host, self.journal, releasing(NVME)),
            lambda: undo(host, self.journal),
        ):
            try:
                act()
            except VfiotoolError as error:
                said.append(f"{error.message} {error.hint}")
        for path, data in self.kernel.writes:
            assert WRITTEN.fullmatch(path), (path, data)
            assert "\n" not in data.rstrip("\n") and "/" not in data, (path, data)
        return said


@pytest.fixture
def folder() -> Iterator[str]:
    with run_folder() as path:
        yield path


def count_of_files() -> int:
    with run_folder() as folder:
        return len(Host(folder).files())


@pytest.mark.parametrize("number", range(count_of_files()))
def test_a_flipped_bit_of_a_state_file_is_refused_by_name(number: int) -> None:
    luck = random.Random(number)
    with run_folder() as folder:
        host = Host(folder)
        path = host.files()[number]
        whole = path.read_bytes()
        for _ in range(FLIPS):
            at, bit = luck.randrange(len(whole)), luck.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(VfiotoolError) as caught:
                read_one(host, path)
            assert path.name in caught.value.message
            assert caught.value.hint


def read_one(host: Host, path: Path) -> None:
    """Read the state that this file holds, with nothing else in the way."""
    if path.parent.name == "origins":
        releasing(path.name.removeprefix("pci-"))(host.kernel.host(), host.journal)
    elif path.parent.name == "pending":
        attach(host.journal, "token", 1)
    else:
        host.journal.history()


def edited(luck: random.Random, value: Any) -> Any:
    """The same with one value, at any depth, turned hostile; or a key taken out or added."""
    if isinstance(value, dict) and value and luck.random() < 0.85:
        key = luck.choice(sorted(value))
        found = dict(value)
        if luck.random() < 0.08:
            del found[key]
        elif luck.random() < 0.05:
            found["added"] = luck.choice(HOSTILE)
        else:
            found[key] = edited(luck, value[key])
        return found
    if isinstance(value, list) and value and luck.random() < 0.85:
        at = luck.randrange(len(value))
        return [*value[:at], edited(luck, value[at]), *value[at + 1 :]]
    return luck.choice(HOSTILE)


@pytest.mark.parametrize("number", range(count_of_files()))
def test_a_hostile_edit_of_a_state_file_leads_nowhere(number: int) -> None:
    luck = random.Random(number)
    for _ in range(EDITS // 5):
        with run_folder() as folder:
            host = Host(folder)
            path = host.files()[number]
            lines = path.read_bytes().splitlines()
            at = luck.randrange(len(lines))
            lines[at] = seal(edited(luck, unseal(lines[at])) or {}).rstrip(b"\n")
            path.write_bytes(b"\n".join(lines) + b"\n")
            host.use()


def damaged(luck: random.Random, text: str) -> str:
    """A JSON text with a flipped bit, or with a hostile value in it."""
    if luck.random() < 0.5:
        data = bytearray(text.encode())
        data[luck.randrange(len(data))] ^= 1 << luck.randrange(8)
        return data.decode("utf-8", "replace")
    return json.dumps(edited(luck, json.loads(text)))


def plain_files(tmp_path: Path) -> dict[str, tuple[str, Callable[[str], object]]]:
    """The state that people may read and write too: JSON without checksums, and what reads it."""
    kernel = furnished()
    policy = parse_policy(f'version = 1\n[[device]]\nmatch = {{ address = "{NVME}" }}\n')
    with run_folder() as folder:
        steps = binding(NVME)(kernel.host(), Journal(kernel.host(), folder))
    root, etc = tmp_path / "root", tmp_path / "etc"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "passwd").write_text("root")
    files = [BootFile(f"{UNITS}/vfiotool-boot.service", "[Unit]\n"), BootFile(MODPROBE, "#\n")]
    install(str(root), files, {"command": ["/usr/bin/vfiotool"], "early": True, "ids": []})
    DesiredState(str(etc)).save(policy, 1)

    def manifest(text: str) -> None:
        (root / MANIFEST).write_text(text)
        try:
            read_manifest(str(root))
            remove_installed(str(root))
        finally:
            assert (root / "etc" / "passwd").read_text() == "root"
            install_again()

    def install_again() -> None:
        (root / MANIFEST).unlink(missing_ok=True)
        for file in files:
            (root / file.path).unlink(missing_ok=True)
        install(str(root), files, {})

    def desired(text: str) -> None:
        (etc / "applied.json").write_text(text)
        DesiredState(str(etc)).load()

    def record(text: str) -> None:
        (tmp_path / "run").mkdir(mode=0o700, exist_ok=True)
        (tmp_path / "run" / "boot.json").write_text(text)
        read_record(str(tmp_path / "run"))

    return {
        "manifest": ((root / MANIFEST).read_text(), manifest),
        "applied": ((etc / "applied.json").read_text(), desired),
        "plan": (plan_to_text(policy, steps), lambda text: parse_saved(text, "x.plan")),
        "boot record": ('{"at": 1.0, "error": null, "steps": [], "absent": []}', record),
    }


@pytest.mark.parametrize("name", ["manifest", "applied", "plan", "boot record"])
def test_a_damaged_file_is_refused_or_holds_what_it_may_hold(tmp_path: Path, name: str) -> None:
    luck = random.Random(name)
    text, read = plain_files(tmp_path)[name]
    for number in range(EDITS * 2):
        try:
            read(damaged(luck, text) if number else "[" * 100_000)
        except VfiotoolError as error:
            assert error.hint, error.message


def test_a_pending_entry_is_read_back_as_it_was_kept() -> None:
    with run_folder() as folder:
        journal = Host(folder).journal
        attach(journal, "token", 3)
        data = journal.pending.read("token")
        assert data is not None
        assert Pending(**unseal(data.rstrip(b"\n"))).transaction == 3
