"""Eventfds as interrupts arrive on them, and traces: without any device."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.fakes.strikes import struck
from vfiotool.errors import UsageError
from vfiotool.native.library import Eventfd, eventfd
from vfiotool.vfio.trace import Trace, differences, load


@pytest.fixture
def event() -> Iterator[Eventfd]:
    made = Eventfd(eventfd())
    yield made
    made._close()


def fire(event: Eventfd, times: int = 1) -> None:
    os.write(event.descriptor, times.to_bytes(8, "little"))


def test_firings_add_up_and_are_taken_once(event: Eventfd) -> None:
    fire(event, 3)
    fire(event, 2)
    assert event.wait(None) == 5
    assert event.wait(0.0) == 0


def test_a_wait_ends_at_its_deadline_also_after_a_signal(event: Eventfd) -> None:
    caught: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda number, frame: caught.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        begin = time.monotonic()
        assert event.wait(0.1) == 0
        assert time.monotonic() - begin >= 0.1
        assert caught == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, old)


def test_a_wait_without_limit_is_ended_by_an_exception_from_a_signal(event: Eventfd) -> None:
    with pytest.raises(KeyboardInterrupt), struck(0.02):
        event.wait(None)


def test_another_thread_runs_while_one_waits(event: Eventfd) -> None:
    thread = threading.Timer(0.02, fire, (event,))
    thread.start()
    assert event.wait(10.0) == 1
    thread.join()
    thread = threading.Timer(0.0, fire, (event,))
    thread.start()
    assert event.wait(10.0, spin_s=0.001) == 1
    thread.join()


def test_eventfds_are_closed_on_exec_and_refused_once_closed() -> None:
    event = Eventfd(eventfd())
    number = event.descriptor
    assert not os.get_inheritable(number)
    event._close()
    event._close()
    assert event.descriptor == -1
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)
    with pytest.raises(UsageError, match="the interrupt: is off"):
        event.wait(0.0)


def test_closing_wakes_whoever_waits_with_an_error(event: Eventfd) -> None:
    said: list[str] = []

    def wait() -> None:
        try:
            event.wait(None)
        except UsageError as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    state = f"/proc/self/task/{thread.native_id}/wchan"
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with open(state) as wchan:
            if "poll" in wchan.read():
                break
    event._close()
    thread.join(5.0)
    assert said == ["the interrupt: is off"]
    assert event.descriptor == -1


def test_a_child_does_not_take_the_parent_s_interrupts(event: Eventfd) -> None:
    fire(event)
    child = os.fork()
    if child == 0:
        try:
            event.wait(0.0)
        except UsageError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert event.wait(0.0) == 1


@pytest.mark.parametrize("arguments", [("1",), (1.0, 2.0), (float("nan"),)])
def test_timeouts_are_seconds(event: Eventfd, arguments: tuple[object, ...]) -> None:
    with pytest.raises((TypeError, UsageError)):
        event.wait(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no argument"):
        event.wait(patience=1)  # type: ignore[call-arg]
    assert event.wait(timeout_s=-1.0) == 0


def recorded(*values: int) -> list[dict[str, object]]:
    output = io.StringIO()
    trace = Trace(output)
    trace.device = "0000:00:01.0"
    for value in values:
        trace.record("read", region=0, offset=4, width=4, value=value)
    return list(load(output.getvalue().splitlines()))


def test_a_trace_is_one_json_object_a_line_with_time_and_device() -> None:
    output = io.StringIO()
    trace = Trace(output)
    trace.record("dma-map", iova=0x1000, size=4096, read=True, write=False)
    line = json.loads(output.getvalue())
    assert line.pop("t") >= 0
    assert line == {
        "device": "", "event": "dma-map", "iova": 4096, "size": 4096, "read": True, "write": False,
    }  # fmt: skip


def test_differences_ignore_time_and_name_what_changed() -> None:
    assert differences(recorded(1, 2), recorded(1, 2)) == []
    assert differences(recorded(1, 2), recorded(1, 3)) == ["event 2 (read): value 2 -> 3"]
    assert differences(recorded(1), recorded(1, 2)) == ["1 events before, 2 now"]


def test_of_a_poll_only_the_bits_waited_for_are_compared() -> None:
    event = {"event": "poll", "mask": 1, "wanted": 0}
    assert differences([{**event, "value": 0}], [{**event, "value": 6}]) == []
    assert differences([{**event, "value": 0}], [{**event, "value": 7}]) == [
        "event 1 (poll): value 0 -> 1"
    ]


@pytest.mark.parametrize("text", ["{", "[1]", '{"t": 1}', "null"])
def test_a_line_that_is_no_event_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="line 2 of the trace"):
        list(load(['{"event": "reset"}', text]))
