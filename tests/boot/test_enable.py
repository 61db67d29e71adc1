"""`boot enable`, `disable`, `status`, and the run that the units call."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.change.changing import EDU, NIC, NVME, STUBBORN, TESTDEV, UUID, furnished, run_folder
from tests.fakes.kernel import FakeClock, FakeKernel
from tests.layout import ROOT
from vfiotool.boot import enable as boot
from vfiotool.boot.early import parse_aliases, parse_built_in, plan_early
from vfiotool.boot.enable import (
    called_as,
    disable,
    enable,
    late_rules,
    own_command,
    own_places,
    plan_enabling,
    read_status,
    refuse_foreign_places,
)
from vfiotool.boot.run import plan_present, read_record, run_policy, wait_for_devices
from vfiotool.boot.texts import (
    DRACUT_CONF,
    INITRAMFS_HOOK,
    MODPROBE,
    POLICY,
    UDEV_RULES,
    late_service,
    quote_argument,
    service,
    udev_value,
)
from vfiotool.cli.main import main
from vfiotool.errors import Ambiguous, KernelError, Refused, Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.policy.model import Policy
from vfiotool.policy.parse import parse_policy

COMMAND = ("/opt/vfiotool/bin/vfiotool",)
RELEASE = "6.12.0-test"
MODULES = f"/lib/modules/{RELEASE}"
ALIASES = """alias pci:v*d*sv*sd*bc01sc08i02* nvme
alias pci:v00001B36d00000010sv*sd*bc*sc*i* nvme
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias pci:v00008086d000010C9sv*sd*bc*sc*i* igb
alias usb:v1234p* usbthing
"""


def policy(*rules: str) -> Policy:
    return parse_policy("version = 1\n" + "\n".join(rules), "boot.toml")


def device(match: str, driver: str = "vfio-pci", more: str = "") -> str:
    return f'[[device]]\nmatch = {{ {match} }}\ndriver = "{driver}"\n{more}\n'


def at(address: str, driver: str = "vfio-pci") -> str:
    return device(f'address = "{address}"', driver)


@pytest.fixture
def kernel() -> FakeKernel:
    found = furnished()
    found._put("/proc/sys/kernel/osrelease", f"{RELEASE}\n".encode())
    found._put(f"{MODULES}/modules.alias", ALIASES.encode())
    found._put(f"{MODULES}/modules.builtin", b"kernel/drivers/ata/ahci.ko\n")
    for address, alias in ((NVME, "v00001B36d00000010"), (STUBBORN, "v00001B36d00000010")):
        text = f"pci:{alias}sv00001AF4sd00001100bc01sc08i02"
        found._put(f"/sys/bus/pci/devices/{address}/modalias", text.encode())
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("etc/systemd/system", "etc/initramfs-tools", "etc/dracut.conf.d", "usr/sbin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "usr/sbin/update-initramfs").write_text("#!/bin/sh\n")
    (tmp_path / "boot").mkdir()
    return tmp_path


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text() if path.is_file() else "folder"
        for path in root.rglob("*")
    }


def plan(host: Host, root: Path, rules: Policy, **more: Any) -> boot.Enabling:
    return plan_enabling(host, str(root), rules, COMMAND, ["/opt/vfiotool"], **more)


# Installing and taking away


def test_enable_then_disable_leaves_the_tree_as_it_was(kernel: FakeKernel, root: Path) -> None:
    before = tree(root)
    # Both disks of this id are wanted: nobody else would be taken.
    found = plan(kernel.host(), root, policy(at(NVME), at(STUBBORN)), early=True)
    enable(str(root), found, COMMAND)
    status = read_status(str(root))
    assert status.enabled and status.early and set(status.files.values()) == {"ok"}
    assert (root / POLICY).read_text() == policy(at(NVME), at(STUBBORN)).text
    assert (root / INITRAMFS_HOOK).stat().st_mode & 0o111
    link = root / "etc/systemd/system/multi-user.target.wants/vfiotool-boot.service"
    assert link.resolve() == root / "etc/systemd/system/vfiotool-boot.service"
    removed, kept, images = disable(str(root))
    assert removed and not kept and images
    assert tree(root) == before
    assert not read_status(str(root)).enabled


def test_planning_writes_nothing(kernel: FakeKernel, root: Path) -> None:
    before = tree(root)
    plan(kernel.host(), root, policy(at(EDU)))
    assert tree(root) == before


def test_enabling_without_early_takes_the_early_files_away(kernel: FakeKernel, root: Path) -> None:
    rules = policy(at(NVME), at(STUBBORN))
    enable(str(root), plan(kernel.host(), root, rules, early=True), COMMAND)
    assert (root / MODPROBE).exists() and (root / DRACUT_CONF).exists()
    enable(str(root), plan(kernel.host(), root, rules), COMMAND)
    assert not (root / MODPROBE).exists() and not (root / INITRAMFS_HOOK).exists()
    assert not read_status(str(root)).early


def test_status_names_what_was_changed_and_what_is_missing(kernel: FakeKernel, root: Path) -> None:
    enable(str(root), plan(kernel.host(), root, policy(at(EDU))), COMMAND)
    (root / UDEV_RULES).unlink()
    (root / POLICY).write_text("version = 1\n")
    found = read_status(str(root))
    assert found.files[UDEV_RULES] == "missing" and found.files[POLICY] == "changed"
    assert not found.in_order


def test_an_initramfs_older_than_the_settings_is_stale(kernel: FakeKernel, root: Path) -> None:
    image = root / "boot/initrd.img-6.1.0"
    image.write_text("old")
    os.utime(image, (1, 1))
    rules = policy(at(NVME), at(STUBBORN))
    found = plan(kernel.host(), root, rules, early=True)
    assert found.next == ("update-initramfs -u -k all",)
    enable(str(root), found, COMMAND)
    assert read_status(str(root)).stale_images == ("boot/initrd.img-6.1.0",)
    later = time.time() + 5
    os.utime(image, (later, later))
    assert read_status(str(root)).stale_images == ()


# The unit, as systemd reads it


def test_systemd_finds_nothing_wrong_with_the_units(
    kernel: FakeKernel, root: Path, tmp_path: Path
) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    command = (sys.executable, "-I", "-m", "vfiotool")
    host = kernel.host()
    found = plan_enabling(host, str(root), policy(at(EDU)), command, own_places(command))
    units = tmp_path / "units"
    units.mkdir()
    for file in found.files:
        if file.path.endswith(".service") and file.link is None:
            text = re.sub(r"(?m)^Documentation=.*\n", "", file.content)
            name = file.path.rpartition("/")[2].replace("@.", "@0000:00:01.0.")
            (units / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(units.iterdir()))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "vfiotool" in line]
    assert not complaints, done.stderr


@pytest.mark.parametrize("text", [service(COMMAND, [], 10), late_service(COMMAND, [])])
def test_the_manual_page_that_a_unit_names_is_there(text: str) -> None:
    pages = re.findall(r"(?m)^Documentation=man:([\w-]+)\((\d)\)$", text)
    assert pages and all((ROOT / f"docs/man/{name}.{part}").exists() for name, part in pages)


def test_the_unit_stands_before_networks_and_vm_managers() -> None:
    text = service(COMMAND, ["/opt/vfiotool"], 10)
    before = " ".join(re.findall(r"(?m)^Before=(.*)$", text)).split()
    assert {"network-pre.target", "libvirtd.service", "virtqemud.service"} <= set(before)
    assert "DefaultDependencies=no" in text and "Conflicts=shutdown.target" in text
    # What pulls network-pre.target in front of sysinit.target must not close a cycle.
    after = " ".join(re.findall(r"(?m)^After=(.*)$", text)).split()
    assert not {"sysinit.target", "basic.target", "network.target"} & set(after)
    assert '\nExecStart="/opt/vfiotool/bin/vfiotool" boot run --wait 10\n' in text


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("/a b", '"/a b"'),
        ('a"b', '"a\\"b"'),
        ("50%", '"50%%"'),
        ("$HOME", '"$$HOME"'),
        ("a\\b", '"a\\\\b"'),
    ],
)
def test_arguments_are_quoted_for_systemd(text: str, quoted: str) -> None:
    assert quote_argument(text) == quoted


def test_what_would_break_out_of_a_line_is_refused() -> None:
    with pytest.raises(UsageError):
        quote_argument("a\nExecStartPre=/bin/evil")
    for text in ('a"b', "a*", "a\nb", "$env{x}", "%k"):
        with pytest.raises(UsageError):
            udev_value(text)


# udev


def test_late_rules_watch_what_the_policy_names(kernel: FakeKernel) -> None:
    rules = policy(
        at(EDU),
        device('id = "10de:2684:1043:8888"'),
        device('serial = "twin-a"'),
        f'[[sriov]]\nmatch = {{ address = "{NIC}" }}\nvfs = 2\n'
        'vf = [ { index = 0, driver = "vfio-pci" } ]\n',
        f'[[mdev]]\nparent = "mtty"\ntype = "mtty-2"\nuuid = "{UUID}"\n',
        '[[vdpa]]\nname = "vdpa0"\nparent = "pci/0000:09:00.2"\n',
    )
    host = kernel.host()
    text = "\n".join(
        " ".join([",".join(rule.actions), *rule.keys]) for rule in late_rules(host, rules)
    )
    assert text.splitlines() == [
        f'add SUBSYSTEM=="pci" KERNEL=="{EDU}"',
        'add SUBSYSTEM=="pci" ATTR{vendor}=="0x10de" ATTR{device}=="0x2684" '
        'ATTR{subsystem_vendor}=="0x1043" ATTR{subsystem_device}=="0x8888"',
        'add SUBSYSTEM=="pci" ATTR{class}!="0x06*"',
        f'add,bind SUBSYSTEM=="pci" KERNEL=="{NIC}"',
        'add SUBSYSTEM=="pci" TEST=="physfn"',
        'change KERNEL=="mtty" ENV{MDEV_STATE}=="registered"',
        'add,bind KERNEL=="0000:09:00.2"',
    ]


def test_udev_rules_start_units_and_run_nothing(kernel: FakeKernel, root: Path) -> None:
    enable(str(root), plan(kernel.host(), root, policy(at(EDU))), COMMAND)
    lines = [line for line in (root / UDEV_RULES).read_text().splitlines() if line[0] != "#"]
    assert lines == [
        f'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="{EDU}", '
        'TEST=="/run/vfiotool/boot-started", TAG+="systemd", '
        'ENV{SYSTEMD_WANTS}+="vfiotool-late@%k.service"'
    ]


# The early variant


def test_early_gives_ids_and_soft_dependencies(kernel: FakeKernel, root: Path) -> None:
    found = plan(kernel.host(), root, policy(at(NVME), at(STUBBORN)), early=True)
    files = {file.path: file.content for file in found.files}
    assert "options vfio-pci ids=1b36:0010\n" in files[MODPROBE]
    assert "softdep nvme pre: vfio-pci\n" in files[MODPROBE]
    assert "manual_add_modules vfio_pci" in files[INITRAMFS_HOOK]
    assert 'force_drivers+=" vfio_pci' in files[DRACUT_CONF]
    assert any("vfio-pci.ids=1b36:0010" in note for note in found.notes)


def test_early_without_modules_alias_says_so(kernel: FakeKernel, root: Path) -> None:
    kernel._remove(f"{MODULES}/modules.alias")
    found = plan(kernel.host(), root, policy(at(TESTDEV)), early=True)
    assert any("modules.alias" in note for note in found.notes)


def test_early_leaves_a_twin_alone_and_says_so(kernel: FakeKernel, root: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        plan(kernel.host(), root, policy(at(NVME)), early=True)
    assert STUBBORN in caught.value.message and "same id" in caught.value.message
    found = plan(kernel.host(), root, policy(at(NVME), at(TESTDEV)), early=True)
    assert found.early is not None and found.early.ids == ("1b36:0005",)
    assert any(NVME in note and STUBBORN in note for note in found.notes)


def test_early_takes_an_id_that_is_not_there_yet(kernel: FakeKernel, root: Path) -> None:
    found = plan(kernel.host(), root, policy(device('id = "10de:2684"')), early=True)
    assert found.early is not None and found.early.ids == ("10de:2684",)


def test_early_is_vfio_pcis_alone(kernel: FakeKernel, root: Path) -> None:
    with pytest.raises(Unsupported, match="mlx5_vfio_pci"):
        plan(kernel.host(), root, policy(at(EDU, "mlx5_vfio_pci")), early=True)


def test_built_in_vfio_pci_leaves_only_the_kernels_command_line(
    kernel: FakeKernel, root: Path
) -> None:
    kernel._put(f"{MODULES}/modules.builtin", b"kernel/drivers/vfio/pci/vfio-pci.ko\n")
    (root / "etc/default").mkdir()
    (root / "etc/default/grub").write_text('GRUB_CMDLINE_LINUX="quiet"\n')
    found = plan(kernel.host(), root, policy(at(TESTDEV)), early=True)
    assert MODPROBE not in {file.path for file in found.files}
    assert any("only the kernel's command line counts" in note for note in found.notes)
    # The advice does what it says.
    command = found.next[0].replace("/etc/", f"{root}/etc/")
    subprocess.run(["sh", "-c", command], check=True)
    line = (root / "etc/default/grub").read_text()
    assert line == 'GRUB_CMDLINE_LINUX="vfio-pci.ids=1b36:0005 quiet"\n'


def test_a_built_in_owner_is_reported(kernel: FakeKernel) -> None:
    aliases = parse_built_in("nvme.alias=pci:v*d*sv*sd*bc01sc08i02*\0nvme.license=GPL\0")
    assert aliases == (("pci:v*d*sv*sd*bc01sc08i02*", "nvme"),)
    assert parse_aliases(ALIASES)[0] == ("pci:v*d*sv*sd*bc01sc08i02*", "nvme")
    modules = boot.read_modules(kernel.host())
    with_owner = type(modules)(RELEASE, (), aliases, False)
    host = kernel.host()
    functions = [boot.read_identity(host, NVME)]
    found = plan_early(
        {NVME: "vfio-pci"},
        [],
        [item for item in functions if item],
        {NVME: "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"},
        with_owner,
    )
    assert any("built into the kernel" in why for _, why in found.left)


# The run


def driver_of(host: Host, address: str) -> str | None:
    return host.linkname(f"/sys/bus/pci/devices/{address}/driver")


def test_a_run_takes_what_is_there_and_reports_what_is_absent(kernel: FakeKernel) -> None:
    host = kernel.host()
    rules = policy(at(EDU), at("0000:7f:00.0"), device('id = "10de:2684"'))
    with run_folder() as folder:
        done = run_policy(host, rules, run_folder=folder)
        assert driver_of(host, EDU) == "vfio-pci"
        assert len(done.absent) == 2 and "0000:7f:00.0" in done.absent[0]
        record = read_record(folder)
        assert record is not None and record["error"] is None and len(record["absent"]) == 2
        assert run_policy(host, rules, run_folder=folder).steps == ()


def test_a_kernel_without_vdpa_lacks_that_device_only(kernel: FakeKernel) -> None:
    rules = policy(at(EDU), '[[vdpa]]\nname = "v0"\nparent = "vdpasim_net"\n')
    found = plan_present(kernel.host(), rules, None)
    assert found.steps and any("vDPA" in text for text in found.absent)


def test_a_run_that_fails_is_rolled_back_and_recorded(kernel: FakeKernel) -> None:
    host = kernel.host()
    with run_folder() as folder:
        with pytest.raises(KernelError):
            run_policy(host, policy(at(EDU), at(STUBBORN)), run_folder=folder)
        assert driver_of(host, EDU) is None and driver_of(host, STUBBORN) == "nvme"
        record = read_record(folder)
        assert record is not None and STUBBORN in record["error"]["message"]


def test_a_policy_that_cannot_be_planned_is_recorded_too(kernel: FakeKernel) -> None:
    rules = policy(device('id = "1b36:0010"', more="expect = { count = 5 }"))
    with run_folder() as folder:
        with pytest.raises(Ambiguous):
            run_policy(kernel.host(), rules, run_folder=folder)
        record = read_record(folder)
        assert record is not None and "5 are expected" in record["error"]["message"]


def test_an_absent_device_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    queue.touch()
    clock = FakeClock()
    waited = wait_for_devices(lambda: True, 30, queue=str(queue), clock=clock)
    assert 30 <= waited < 31
    queue.unlink()
    # udev is idle: nothing more is coming, so the limit need not pass.
    assert wait_for_devices(lambda: True, 30, queue=str(queue), idle_s=3, clock=clock) < 4
    assert wait_for_devices(lambda: False, 30, queue=str(queue), clock=clock) == 0


def test_a_device_that_comes_while_udev_works_is_waited_for(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    queue.touch()
    there = threading.Event()
    clock = FakeClock()
    clock.after(15, there.set)
    waited = wait_for_devices(lambda: not there.is_set(), 20, queue=str(queue), clock=clock)
    assert there.is_set() and 15 <= waited < 16


# Whom a root process trusts


def test_a_tool_that_others_can_change_is_not_run_at_boot(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to own the files")
    tool = tmp_path / "bin" / "vfiotool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    refuse_foreign_places([str(tool)])
    tool.chmod(0o777)
    with pytest.raises(Refused, match="others than root"):
        refuse_foreign_places([str(tool)])
    tool.chmod(0o755)
    os.chown(tool.parent, 1000, 1000)
    with pytest.raises(Refused, match="others than root"):
        refuse_foreign_places([str(tool)])


def test_a_link_that_others_can_turn_is_not_followed_at_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to own the files")
    tool, link = tmp_path / "safe" / "vfiotool", tmp_path / "home" / "vfiotool"
    for path in (tool, link):
        path.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    link.symlink_to(tool)
    monkeypatch.setattr(sys, "argv", [str(link)])
    # The unit gets what the link leads to now; and a link in a stranger's folder is refused.
    assert own_command() == (str(tool),)
    refuse_foreign_places(called_as())
    os.chown(link.parent, 1000, 1000)
    with pytest.raises(Refused, match=f"{link.parent} can be changed by others"):
        refuse_foreign_places(called_as())
    os.chown(link.parent, 0, 0)
    os.chown(link, 1000, 1000, follow_symlinks=False)
    with pytest.raises(Refused, match=f"{link} can be changed by others"):
        refuse_foreign_places(called_as())


# The command line


def test_boot_refuses_another_root(capsys: pytest.CaptureFixture[str]) -> None:
    fixture = str(next(Path("fixtures/hosts").iterdir()))
    for words in (["status"], ["disable"], ["run"]):
        assert main(["--root", fixture, "--json", "boot", *words]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


def test_a_dry_run_of_enable_shows_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "policy.toml"
    source.write_text(policy(at("0000:05:01.0")).text)
    fixture = str(next(Path("fixtures/hosts").iterdir()))
    words = ["--root", fixture, "--json", "boot", "enable", str(source), "--dry-run"]
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["enabled"] is False and shown["dry_run"] is True
    contents = {file["path"]: file["content"] for file in shown["files"]}
    assert contents[f"/{POLICY}"] == source.read_text()
    assert "ExecStart=" in contents["/etc/systemd/system/vfiotool-boot.service"]


def test_import_prints_a_policy_and_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "driverctl.d"
    folder.mkdir()
    (folder / "pci-0000:05:01.0").write_text("vfio-pci\n")
    (folder / "vmbus-x").write_text("uio\n")
    (folder / "link").symlink_to("/etc/passwd")
    assert main(["import", str(folder)]) == 0
    output = capsys.readouterr()
    assert parse_policy(output.out).devices[0].driver == "vfio-pci"
    assert "vmbus" in output.err and "link" in output.err and "root:" not in output.out
    assert main(["--json", "import", str(folder)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "driverctl" and shown["leftovers"][0]["where"] == "vmbus-x"


def test_import_takes_a_command_line_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "dpdk-devbind.py -b vfio-pci 0000:01:00.0"]) == 0
    assert 'address = "0000:01:00.0"' in capsys.readouterr().out
    assert main(["import", "vfio-pci.ids=1234:11e8"]) == 0
    assert 'id = "1234:11e8"' in capsys.readouterr().out


def test_import_of_one_mdevctl_file_takes_the_parent_from_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mtty"
    folder.mkdir()
    (folder / UUID).write_text('{"mdev_type": "mtty-2", "start": "auto", "attrs": []}')
    assert main(["import", str(folder / UUID)]) == 0
    assert 'parent = "mtty"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["import", "/nowhere/at-all"], 3),
        (["import", "/nowhere", "--from", "driverctl"], 3),
        (["import", "vfio-pci.ids=x"], 1),
        (["import", "vfio-pci.ids=1234:11e8", "--from", "magic"], 2),
        (["import", "\0"], 3),
    ],
)
def test_import_errors_have_their_codes(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("linked", [False, True])
def test_the_installed_script_takes_nothing_from_its_callers_environment(
    tmp_path: Path, linked: bool
) -> None:
    script = Path(sys.prefix, "bin", "vfiotool")
    # What pip makes of it is what runs: it rewrites a first line that names Python.
    assert script.read_text() == (ROOT / "bin" / "vfiotool").read_text(), "run ./bootstrap"
    if linked:
        (tmp_path / "link").symlink_to(script)
        script = tmp_path / "link"
    for name in ("sitecustomize", "vfiotool", "json"):
        (tmp_path / f"{name}.py").write_text("print('run as root')\n")
    for name in ("python", "python3", "readlink"):
        (tmp_path / name).write_text("#!/bin/sh\necho run as root\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [str(script), "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("vfiotool ")
