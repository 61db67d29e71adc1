"""The table of docs/preflight.md: what each kind of finding says, and where it was seen for real.

`python -m tests.vm.findings_page` writes it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "preflight.md"
_HEAD = "| kind | what it says | seen for real |\n| --- | --- | --- |\n"
_CARDS = "tests/lab/failures_vm.py"
_FULL = "tests/lab/test_vm_failures.py"
_FIRMWARE = "tests/guests/test_preflight_firmware.py"


@dataclass(frozen=True)
class Seen:
    """Which tests make it happen, and what is said then; or why none does."""

    says: str
    words: str
    file: str = ""
    tests: tuple[str, ...] = ()

    @property
    def cell(self) -> str:
        return self.words if self.file else f"no: {self.words}"


def _real(says: str, words: str, file: str, *names: str) -> Seen:
    return Seen(says, words, file, tuple(f"test_{name}" for name in names))


KINDS = {
    "not-bound": _real(
        "it is on no VFIO driver",
        "QEMU: `Could not open '/dev/vfio/N': No such file or directory`",
        _FULL,
        "a_device_on_no_vfio_driver",
    ),
    "group-not-viable": _real(
        "another function of its group is on a host driver",
        "QEMU: `group N is not viable`",
        _FULL,
        "a_group_that_is_not_viable",
    ),
    "held": _real(
        "another process has its group open, by its pid",
        "QEMU: `Could not open '/dev/vfio/N': Device or resource busy`",
        _FULL,
        "a_second_user_of_the_group",
    ),
    "no-node": _real(
        "`/dev/vfio/N` is not there, or a vDPA device has no `/dev/vhost-vdpa-N`",
        "QEMU: `Could not open '/dev/vfio/N': No such file or directory`",
        _CARDS,
        "a_node_that_is_not_there",
    ),
    "no-iommu": _real(
        "it is in no group",
        "QEMU: `no iommu_group found: No such file or directory`",
        "tests/lab/test_vm_no_iommu.py",
        "a_device_in_no_group",
    ),
    "no-iommufd": _real(
        "the host has no iommufd, which was asked for",
        "QEMU looks for `vfio-dev` in vain",
        _FULL,
        "iommufd_on_a_kernel_without_it",
    ),
    "vf-token": _real(
        "the VF's physical function is on a VFIO driver",
        "QEMU: `error getting device from group N: Permission denied`",
        _FULL,
        "a_vf_whose_pf_is_driven_from_user_space_wants_its_token",
    ),
    "pf-down": _real(
        "the interface of the VF's physical function is down",
        "the VF's driver has no carrier and another MAC address than was set",
        "tests/lab/test_vm_pf_down.py",
        "a_vf_whose_pf_is_down_has_no_link_and_another_address",
    ),
    "no-socket": _real(
        "nothing serves that socket",
        "QEMU: `Failed to connect to 'SOCKET': No such file or directory`",
        _FULL,
        "a_socket_that_nothing_serves",
    ),
    "shared-memory": _real(
        "the guest's memory has to be shared",
        "QEMU, with private memory: `vhost start failed: Error starting vhost`",
        _FULL,
        "memory_that_is_not_shared",
    ),
    "memory-lock": _real(
        "how much locked memory is missing, by the byte",
        "QEMU: `Cannot allocate memory`",
        _FULL,
        "the_limit_on_locked_memory",
    ),
    "hugepages": _real(
        "how many huge pages its node lacks",
        "QEMU: `unable to map backing store for guest RAM: Cannot allocate memory`",
        _CARDS,
        "too_few_huge_pages",
    ),
    "numa": _real(
        "its node is too small, or devices are on several; how to stay on it",
        "the kernel: `oom-kill:constraint=CONSTRAINT_MEMORY_POLICY,nodemask=1`, where a VM is "
        "bound to a node that is too small; a distance makes nothing fail",
        _CARDS,
        "a_vm_that_is_bound_to_a_node_too_small_for_it",
    ),
    "iommu-width": _real(
        "memory lies beyond what the IOMMU translates",
        "QEMU: `vfio_container_dma_map(…) = -22 (Invalid argument)`, and does not start",
        _CARDS,
        "memory_beyond_the_width_of_the_iommu",
    ),
    "mmio-window": _real(
        "BARs may lie beyond what the IOMMU translates",
        "QEMU, when a BAR is put there: `vfio_container_dma_map(…) = -22 (Invalid argument)`",
        _CARDS,
        "a_window_above_the_width_of_the_iommu",
    ),
    "reserved-region": Seen(
        "the IOMMU keeps addresses in the midst of the guest's memory",
        "no IOMMU that QEMU emulates for x86 keeps any below the guest's memory: the board gives "
        "its virtio-iommu the regions itself",
    ),
    "mappings": _real(
        "a container takes fewer mappings than a guest may make",
        "QEMU: `vfio_container_dma_map(…) = -28 (No space left on device)`",
        _CARDS,
        "a_container_that_takes_too_few_mappings_for_any_guest",
        "more_mappings_than_a_container_takes",
    ),
    "reset": _real(
        "works once, not twice: no reset, or one of its bus that others are on",
        "QEMU: `Cannot reset device D, depends on group N which is not owned`, `Cannot reset "
        "device D, no available reset mechanism`; the second start finds what the first one left. "
        "AMD cards that no reset brings back are known by their ids alone",
        _CARDS,
        "a_function_that_is_reset_with_its_bus_of_which_the_host_has_the_rest",
        "two_functions_of_one_group_that_are_reset_with_their_bus",
        "a_function_without_a_reset",
    ),
    "d3cold": _real(
        "it is without power, and may not wake",
        "the kernel: `Unable to change power state from D3cold to D0, device inaccessible`; QEMU: "
        "`VFIO_DEVICE_SET_IRQS failure: No such device`",
        _CARDS,
        "a_card_that_does_not_wake",
        "a_card_that_does_not_wake_is_kept_awake",
    ),
    "bar-32": _real(
        "its 32-bit BARs do not fit below 4 GiB",
        "SeaBIOS: `PCI: out of 32bit address space`, and does not boot, whatever "
        "`max-ram-below-4g` is",
        _FIRMWARE,
        "bars_below_4_gib",
    ),
    "bar-64": Seen(
        "its 64-bit BARs do not fit in an older OVMF's window",
        "an OVMF of today has room (seen with 64 GiB), and the older ones are not to be had",
    ),
    "migration": _real(
        "whether the VM can be migrated",
        "QEMU: `VFIO migration is not supported in kernel`",
        _CARDS,
        "a_vm_that_is_to_be_migrated",
    ),
    "returns-to-host": _real(
        "a member of its group that a host driver may take back",
        "it does, and QEMU says `group N is not viable`",
        _CARDS,
        "a_neighbour_that_its_host_driver_takes_back",
    ),
    "other-functions": Seen(
        "functions of its card stay with the host",
        "nothing fails at a start; where a reset does, `reset` says so",
    ),
    "resizable-bar": Seen(
        "a BAR could be larger",
        "nothing fails: QEMU shows a guest the size that the BAR has",
    ),
    "vectors": Seen(
        "fewer MSI-X vectors than vCPUs",
        "nothing fails: the guest's driver makes fewer queues",
    ),
    "rom": Seen(
        "a display's ROM is the firmware's copy, or is not there",
        "no emulated firmware changes a ROM, and without one the screen only stays dark",
    ),
    "intel-graphics": Seen(
        "the guest needs its OpRegion, and wants it at 00:02.0",
        "QEMU emulates no integrated graphics, and the OpRegion is the host firmware's",
    ),
}


def with_kinds(page: str) -> str:
    """The page with the table as it is here."""
    before, _, rest = page.partition(_HEAD)
    lines = rest.splitlines(keepends=True)
    after = next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))
    rows = "".join(f"| `{kind}` | {one.says} | {one.cell} |\n" for kind, one in KINDS.items())
    return before + _HEAD + rows + "".join(lines[after:])


if __name__ == "__main__":
    PAGE.write_text(with_kinds(PAGE.read_text()))
