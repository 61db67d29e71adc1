"""Reports from the field about the doctor."""

from __future__ import annotations

from tests.field.host import ask, folder
from vfiotool.host.distribution import read_distribution
from vfiotool.snapshot.load import open_root


def test_17_ibm_z_needs_no_firmware_setup_and_has_a_kvm_of_its_own() -> None:
    answer = ask("17", "doctor")
    assert answer.code == 0
    assert answer.text.startswith("Red Hat Enterprise Linux 9.4: ready")
    for word in ("kvm_intel", "firmware's setup", "ACPI", "intel_iommu"):
        assert word not in answer.text
    assert "fix: modprobe kvm\n" in answer.text
    assert "IBM Z has an IOMMU in every machine" in answer.text


def test_20_silverblue_makes_its_initramfs_by_its_own_tool() -> None:

    found = read_distribution(open_root(str(folder("20") / "root.txt")))
    assert found.module_option("vfio-pci", "ids=1:2")[-1] == "rpm-ostree initramfs --enable"


def test_26_the_file_that_was_edited_in_vain_is_named() -> None:
    text = ask("26", "doctor").text
    assert "/etc/default/grub has it, and is not what this machine boots with" in text


def test_24_an_edit_that_was_not_written_to_the_boot_loader_is_named() -> None:
    text = ask("24", "doctor").text
    assert "/etc/default/grub has it, and the boot loader's own configuration was not made" in text


def test_54_an_option_that_takes_both_twins_is_a_warning() -> None:
    warnings = ask("54", "doctor").lines("warning")
    assert warnings == [
        "vfio-pci.ids takes all devices with the id 10de:1b80: 0000:01:00.0, 0000:02:00.0",
        "vfio-pci.ids takes all devices with the id 10de:10f0: 0000:01:00.1, 0000:02:00.1",
    ]


def test_no_page_is_repeated() -> None:
    pages = ask("54", "doctor").lines("docs:")
    assert len(pages) == len(set(pages))
