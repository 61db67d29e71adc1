"""The NVMe driver's own tests, with the model over vfio-user in the place of the fake in process.

The tests are those of tests/drivers/nvme, run here with this module's fixtures; those that look
into the fake itself stay there (`INSIDE_THE_FAKE`).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.fakes.nvme_model import ServedNvme
from vfiotool.drivers.nvme import Controller, IoQueue, Namespace, health

pytestmark = pytest.mark.slow

MODULES = ("commands", "facilities", "recovery", "waits", "controller")
# What each does that only the fake can: its gate, its pins, its name, its own methods.
INSIDE_THE_FAKE = {
    "test_an_event_ends_no_other_admin_command": "sets the number of queues as a feature",
    "test_a_second_thread_is_refused_in_words_and_never_gets_anothers_data": "its name",
    "test_rings_and_window_are_kept_until_the_queue_is_closed": "its pins",
    "test_a_poll_ends_when_memory_decode_is_turned_off": "its gate",
    "test_a_queue_of_its_own_for_each_vector": "its sets of interrupts",
    "test_threads_share_a_queue": "its name",
    "test_closing_a_shared_queue_tells_those_who_wait_and_gives_the_queue_back": "its name",
    "test_metadata_and_protection_are_in_the_command": "replaces its I/O commands",
    "test_bring_up_follows_the_specification": "sets a register before",
    "test_a_controller_that_does_not_come_up_is_named": "its identity",
    "test_other_devices_and_metadata_are_refused": "its class code",
    "test_a_queue_that_is_half_made_is_unmade": "the commands it lists",
    "test_a_completion_of_before_the_reset_ends_nothing_after_it": "completes by hand",
    "test_a_load_that_a_reset_takes_the_doorbells_from_tells_the_reset": "its gate",
}

for _module in MODULES:
    _found = import_module(f"tests.drivers.nvme.test_{_module}")
    for _name, _test in vars(_found).items():
        if (
            _name.startswith("test_")
            and "fake" in getattr(_test, "__code__", compile("", "", "exec")).co_varnames
            and _name not in INSIDE_THE_FAKE
        ):
            globals()[_name] = _test


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(health, "_LOOK_S", 0.02)
    monkeypatch.setattr("vfiotool.drivers.nvme.controller._DRAIN_S", 0.1)


@pytest.fixture
def fake() -> Iterator[Any]:
    with ServedNvme() as served:
        yield served


@pytest.fixture
def controller(fake: Any) -> Controller:
    return Controller(fake)


@pytest.fixture
def disk(controller: Controller) -> Namespace:
    return controller.namespace(1)


@pytest.fixture
def queue(controller: Controller) -> IoQueue:
    return controller.create_queue()


def test_the_tests_that_stay_behind_are_there() -> None:
    names = {
        name for one in MODULES for name in vars(import_module(f"tests.drivers.nvme.test_{one}"))
    }
    assert set(INSIDE_THE_FAKE) <= names
