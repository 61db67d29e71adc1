"""Reports from the field about what a device is, and whether a virtual machine can have it."""

from __future__ import annotations

import pytest

from tests.field.host import ask, folder


def test_11_vm_check_and_why_agree_on_a_boot_frame_buffer() -> None:
    answer = ask("11", "vm", "check", "0000:04:00.0")
    assert answer.code == 1
    assert "not ready" in answer.text
    assert "BOOTFB" in answer.text


def test_12_a_domain_above_16_bits_goes_to_qemu_by_its_path() -> None:
    text = ask("12", "vm", "qemu", "10000:e1:00.0").text
    assert "vfio-pci,sysfsdev=/sys/bus/pci/devices/10000:e1:00.0" in text
    assert "host=" not in text


def test_19_a_function_without_uevent_is_listed_by_its_ids() -> None:
    assert "0004:05:00.0  10de:1db1" in ask("19", "devices").text
    assert ask("19", "show", "0004:05:00.0").code == 0


@pytest.mark.parametrize(
    ("command", "level", "words"),
    [(("why",), "note:", "no reset method"), (("vm", "check"), "warning: reset", "not twice")],
)
def test_28_a_device_that_cannot_be_reset_is_said_to_be_so(
    command: tuple[str, ...], level: str, words: str
) -> None:
    answer = ask("28", *command, "0000:09:00.0")
    assert answer.code == 0
    (said,) = answer.lines(level)
    assert words in said and "reboot" in said


def test_a_partial_tree_does_not_say_that_there_is_no_reset() -> None:
    assert "reset" not in ask("11", "why", "0000:04:00.0").text


def test_43_a_speed_that_is_not_known_is_said_in_words() -> None:
    text = ask("43", "show", "0002:01:00.0").text
    assert "None" not in text
    assert "speed unknown, width x0" in text


def test_44_a_function_that_carries_a_vdpa_device_is_in_use() -> None:
    answer = ask("44", "why", "0000:65:00.2")
    assert answer.code == 1
    assert "vdpa-children  the vDPA device vdpa0 is made from it, on vhost_vdpa" in answer.text
    assert answer.steps[0] == "vfiotool vdpa remove vdpa0"
    assert ask("44", "bind", "0000:65:00.2", "--dry-run").code == 4
    assert "vdpa0" in ask("44", "vdpa", "list").text


@pytest.mark.parametrize("case", ["46", "52"])
def test_a_device_alone_in_its_group_is_told_by_one_word(case: str) -> None:
    answer = ask(case, "why", "0002:01:00.4")
    assert answer.code == 0
    first, second = answer.text.splitlines()[:2]
    assert first == (
        "0002:01:00.4 can be passed through: nothing uses it, bind makes it ready  (available)"
    )
    assert second == "group 12  DMA-FQ  viable once 0002:01:00.4 is bound to a VFIO driver"
    assert answer.steps[0] == "vfiotool bind 0002:01:00.4"


def test_52_groups_with_devices_of_other_buses_are_listed() -> None:
    text = ask("52", "groups").text
    assert "17020000.ethernet" in text
    assert "0002:01:00.4" in text


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("root-ff", "no resource begins at 0x0"),
        ("root-cut", "the resource at 0x10 is cut off"),
        ("root-nonascii", "AB\\xffC"),
        ("root-badsum", "checksum wrong"),
    ],
)
def test_57_odd_product_data_are_shown_as_far_as_they_make_sense(root: str, words: str) -> None:
    answer = ask("57", "show", "0000:42:00.0", root=root)
    assert answer.code == 0
    assert words in answer.text
    assert ("checksum wrong" in answer.text) == (root == "root-badsum")


def test_06_a_plan_for_the_vf_does_not_remove_it() -> None:

    answer = ask("06", "plan", str(folder("06") / "vfgroup.toml"))
    assert answer.code != 0
