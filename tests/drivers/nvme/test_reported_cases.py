"""What others met in their drivers, case by case: the tests that replay it.

The numbers are those of the collection of public reports that the driver was measured by.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.guests.runs import KERNELS, constants

TESTS = Path(__file__).resolve().parents[2]

# Number, what was met: file (relative to tests/) and test, in twos.
CASES: dict[str, tuple[tuple[str, str], ...]] = {
    "01 fatal status at a time-out": (
        ("lab/test_nvme_ends.py", "test_a_fatal_status_is_named_and_a_reset_brings_it_back"),
        ("drivers/nvme/test_waits.py", "test_a_dead_controller_is_named_and_asked_nothing_more"),
    ),
    "02 addresses of 39 bits": (
        ("lab/test_vfio_dma.py", "test_places_can_be_fixed_and_aligned"),
        ("vfio/test_iova.py", "test_fixed_places_are_checked"),
    ),
    "03 D3hot, then MMIO": (
        ("lab/test_vfio_reach.py", "test_d3hot_in_every_width_and_by_every_method"),
    ),
    "05 a namespace with metadata": (
        ("lab/test_nvme_odd.py", "test_odd_namespaces_are_told_as_what_they_are"),
        ("lab/test_nvme_odd.py", "test_metadata_moves_with_its_blocks"),
    ),
    "06 MQES of 31": (
        (
            "drivers/nvme/test_waits.py",
            "test_the_default_queue_is_no_larger_than_the_controller_takes",
        ),
        ("lab/test_nvme_odd.py", "test_large_blocks_and_a_small_transfer_size"),
    ),
    "08 a zoned namespace": (
        ("lab/test_nvme_odd.py", "test_zones_are_written_in_order_and_reported"),
    ),
    "09 an event completes in admin": (
        ("lab/test_nvme_ends.py", "test_an_event_of_before_is_not_anothers_answer"),
        ("drivers/nvme/test_commands.py", "test_an_event_ends_no_other_admin_command"),
    ),
    "11 flush with writes in flight": (
        (
            "lab/test_nvme_slow.py",
            "test_flush_ends_by_its_own_completion_behind_writes_that_are_out",
        ),
        ("drivers/nvme/test_commands.py", "test_flush_is_sent_and_takes_nobodys_completion"),
    ),
    "12 unmap of a part": (
        ("lab/test_vfio_device.py", "test_unmapping_tells_how_much_was_mapped"),
        ("lab/test_vfio_dma.py", "test_both_interfaces_answer_alike"),
    ),
    "14 memory lock, not root": (
        ("lab/test_vfio_dma.py", "test_a_memory_lock_shortage_says_how_much_is_missing"),
    ),
    "15 unplug while open": (
        (
            "lab/test_vfio_irq.py",
            "test_the_kernel_asks_for_the_device_back_and_waits_until_it_is_closed",
        ),
    ),
    "16 fork and multiprocessing": (
        ("lab/test_vfio_device.py", "test_a_child_is_refused_and_holds_nothing"),
        (
            "drivers/nvme/test_interrupted.py",
            "test_a_child_at_any_moment_is_refused_and_the_parent_goes_on",
        ),
    ),
    "17 transfers across PRP pages": (
        ("lab/test_nvme.py", "test_every_shape_of_prp_moves_its_bytes_alone"),
        ("lab/test_nvme.py", "test_refusals_come_before_the_device_sees_a_command"),
    ),
    "19 asyncio on a dead controller": (
        ("lab/test_nvme_ends.py", "test_leaving_a_dead_async_queue_is_bounded"),
    ),
    "21 MSI-X again, with another count": (
        ("lab/test_vfio_msix.py", "test_vectors_are_added_while_others_are_in_use"),
        (
            "lab/test_vfio_msix.py",
            "test_reset_brings_registers_back_keeps_interrupts_and_ends_bus_mastering",
        ),
    ),
    "22 INTx storm": (
        (
            "lab/test_vfio_irq.py",
            "test_intx_is_masked_when_it_fires_and_unmasked_by_hand_and_by_eventfd",
        ),
    ),
    "24 reset, end and kill with I/O in flight": (
        ("lab/test_nvme_ends.py", "test_a_load_in_another_thread_survives_resets"),
        ("lab/test_nvme.py", "test_closing_in_the_middle_of_a_load_leaves_a_usable_disk"),
        ("lab/test_nvme.py", "test_a_killed_process_leaves_a_usable_disk"),
    ),
    "25 media errors": (
        ("lab/test_nvme_odd.py", "test_a_failing_block_is_named_and_the_others_arrive"),
        ("lab/test_nvme.py", "test_the_controllers_own_refusals_have_names"),
    ),
    "27 admin commands": (
        ("lab/test_nvme_odd.py", "test_every_command_meets_a_controller"),
        ("lab/test_nvme_odd.py", "test_few_queues_vectors_and_a_detached_namespace"),
    ),
    "29 two processes": (
        ("lab/test_vfio_device.py", "test_a_second_open_is_busy_and_says_who_to_end"),
    ),
    "30 shutdown notification": (
        ("lab/test_nvme_slow.py", "test_a_controller_is_told_of_the_end_before_it_is_disabled"),
        ("drivers/nvme/test_controller.py", "test_the_end_is_orderly_and_leaves_no_memory"),
    ),
    "32 memory of one's own": (
        ("lab/test_vfio_dma.py", "test_memory_of_one_s_own_is_mapped_and_reached_by_the_device"),
        ("lab/test_vfio_dma.py", "test_memory_of_one_s_own_is_held_while_it_is_mapped"),
    ),
    "33 dirty pages": (("lab/test_vfio_dma.py", "test_dirty_pages_are_told_where_the_iommu_can"),),
    "34 threads on one queue": (
        (
            "drivers/nvme/test_commands.py",
            "test_a_second_thread_is_refused_in_words_and_never_gets_anothers_data",
        ),
        ("lab/test_nvme_ends.py", "test_threads_share_a_queue_and_get_their_own_data"),
    ),
    "36 life of memory": (
        ("lab/test_nvme_ends.py", "test_a_buffer_in_use_and_interrupts_after_the_end"),
        ("drivers/nvme/test_commands.py", "test_a_buffer_in_use_cannot_be_closed"),
    ),
    "37 exact width": (
        ("vfio/test_mmio.py", "test_a_store_is_one_store"),
        (
            "lab/test_driver_testdev.py",
            "test_device_counts_one_access_a_write_and_only_the_right_data",
        ),
    ),
    "38 FLR through configuration space": (
        (
            "lab/test_vfio_reach.py",
            "test_a_function_reset_by_configuration_space_leaves_all_usable",
        ),
    ),
    "40 two threads, wrong data": (
        ("lab/test_nvme_ends.py", "test_two_threads_never_get_each_others_data"),
    ),
    "43 low power": (
        ("lab/test_vfio_reach.py", "test_a_sleeping_device_is_refused_whatever_else_is_written"),
        ("lab/test_vfio_msix.py", "test_low_power_is_entered_and_left_where_the_kernel_has_it"),
    ),
    "45 Ctrl-C while waiting": (
        ("lab/test_nvme_slow.py", "test_ctrl_c_ends_a_wait_at_once_and_loses_no_completion"),
        ("drivers/nvme/test_commands.py", "test_ctrl_c_loses_nothing_that_was_taken"),
        (
            "drivers/nvme/test_interrupted.py",
            "test_ctrl_c_at_any_moment_ends_no_command_twice_and_loses_no_buffer",
        ),
    ),
    "47 shutdown longer than CAP.TO": (
        ("drivers/nvme/test_waits.py", "test_the_shutdown_is_waited_for_as_the_disk_asks"),
        ("drivers/nvme/test_waits.py", "test_a_disk_that_was_not_ready_for_the_end_is_told"),
    ),
    "49 a load on a dying controller": (
        ("lab/test_nvme_slow.py", "test_a_load_tells_its_own_error_when_the_controller_dies"),
        ("drivers/nvme/test_waits.py", "test_the_loads_own_error_is_the_one_that_is_told"),
    ),
    "50 numpy": (
        ("lab/test_vfio_dma.py", "test_memory_is_zeroed_whole_pages_and_numpy_takes_it"),
        ("drivers/nvme/test_controller.py", "test_data_that_lies_in_pieces_is_refused_in_words"),
    ),
    "51 reset during a load": (
        ("lab/test_nvme_ends.py", "test_a_load_in_another_thread_survives_resets"),
        ("drivers/nvme/test_recovery.py", "test_a_load_ends_when_the_controller_is_reset"),
    ),
    "52 two waiters on one interrupt": (
        ("lab/test_vfio_irq.py", "test_every_thread_that_waits_for_one_interrupt_is_woken"),
        ("lab/test_vfio_irq.py", "test_tasks_and_threads_that_wait_together_are_all_woken"),
    ),
    "54 infinite and odd time-outs": (
        ("lab/test_vfio_irq.py", "test_odd_time_outs_mean_what_they_say"),
        ("drivers/nvme/test_waits.py", "test_odd_time_outs_are_now_or_refused"),
    ),
    "56 all 64 queues": (
        (
            "lab/test_nvme_ends.py",
            "test_the_end_of_a_dead_controller_with_all_its_queues_is_bounded",
        ),
        (
            "vfio/test_iova.py",
            "test_places_that_a_bus_may_take_are_given_to_nobody_who_did_not_ask",
        ),
    ),
    "57 closed while awaited": (
        ("lab/test_vfio_irq.py", "test_closing_ends_every_task_that_waits"),
        ("drivers/nvme/test_waits.py", "test_closing_wakes_all_coroutines_with_an_error"),
    ),
}


# No controller of QEMU's does it: registers are played.
PLAYED = frozenset({"47 shutdown longer than CAP.TO"})


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("case", CASES)
def test_a_reported_case_has_its_tests(case: str) -> None:
    in_guests = [file for file, _ in CASES[case] if file.startswith("lab/")]
    assert in_guests or case in PLAYED
    for file, test in CASES[case]:
        assert test in names_in(file), f"{case}: {file} has no {test}"
    # In the run of every day, on every kernel and so on both of VFIO's interfaces.
    for file in in_guests:
        read = constants(TESTS / file)
        assert set(read["KERNELS"]) == set(KERNELS), file
        assert not read["PROOF"] and read["ALWAYS_ON"] is None, file


def test_all_cases_are_there() -> None:
    assert len(CASES) == 38
