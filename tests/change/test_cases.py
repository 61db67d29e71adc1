"""Every shared case on the fake kernel; tests/lab/test_cases.py holds it against real ones."""

from __future__ import annotations

import pytest

from tests.change.cases import CASES, run
from tests.change.changing import EDU, furnished, run_folder
from tests.fakes.kernel import FakeKernel
from vfiotool.change.journal import Journal


@pytest.mark.parametrize("name", CASES)
def test_a_failed_or_undone_case_leaves_nothing_open(name: str) -> None:
    kernel = furnished()
    with run_folder() as folder:
        journal = Journal(kernel.host(), folder)
        results = run(kernel.host(), journal, CASES[name])
        assert len(results) == len(CASES[name])
        assert all(record.outcome is not None for record in journal.history())


def test_the_fake_kernel_refuses_what_it_does_not_model() -> None:
    kernel = FakeKernel()
    kernel.add_function(EDU, "1234:11e8")
    kernel._put(f"/sys/devices/pci0000:00/{EDU}/reset", b"")
    with pytest.raises(AssertionError, match="does not model"):
        kernel.host().write_attribute(f"/sys/bus/pci/devices/{EDU}/reset", "1")
