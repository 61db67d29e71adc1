"""The mtty driver through mediated devices: serial loops, interrupts, two ports."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab.vfio_guest import BACKENDS, mdev
from vfiotool.cli.main import main
from vfiotool.drivers import demo
from vfiotool.drivers.mtty import FIFO_BYTES, SerialPort
from vfiotool.errors import NotFound, Unsupported, UsageError
from vfiotool.vfio import Device

MACHINE = "mdev"
KERNELS = ("6.1", "6.12", "iommufd")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def two_ports() -> Iterator[str]:
    with mdev("mtty", "mtty-2") as name:
        yield name


def test_what_is_written_is_read_back_from_each_port_alone(backend: str, two_ports: str) -> None:
    with Device.open(two_ports, backend=backend) as device:
        first, second = SerialPort(device, 0), SerialPort(device, 1)
        first.send(b"to the first")
        second.send(bytes(range(240, 240 + FIFO_BYTES)))
        assert first.receive() == b"to the first"
        assert second.receive() == bytes(range(240, 240 + FIFO_BYTES))
        assert not first.pending and not second.pending


def test_more_than_the_fifo_takes_is_refused_before_it_is_lost(
    backend: str, two_ports: str
) -> None:
    with Device.open(two_ports, backend=backend) as device:
        port = SerialPort(device)
        with pytest.raises(UsageError, match="FIFO takes 15"):
            port.send(bytes(16))
        assert port.receive() == b""


def test_demo_passes_on_both_ports_and_on_a_single_one(backend: str, two_ports: str) -> None:
    with Device.open(two_ports, backend=backend) as device:
        checks = list(demo("mtty")(device))
    assert len(checks) == 6
    assert [check for check in checks if not check.passed] == []
    with mdev("mtty", "mtty-1") as single, Device.open(single, backend=backend) as device:
        checks = list(demo("mtty")(device))
        assert device.regions[1] is not None and device.regions[1].size == 0
    assert len(checks) == 3
    assert [check for check in checks if not check.passed] == []


def test_intx_stays_masked_until_it_is_unmasked(
    backend: str, two_ports: str, lab_kernel: str
) -> None:
    if lab_kernel == "6.1":
        pytest.skip("the mtty sample of Linux 6.1 claims to mask INTx and does not")
    with Device.open(two_ports, backend=backend) as device:
        port = SerialPort(device)
        pin = device.irqs.intx()
        port.registers.interrupt_enable.set(received=1)
        port.send(b"a")
        assert pin.wait(5.0) == 1
        assert port.receive() == b"a"
        port.send(b"b")
        assert pin.wait(0.2) == 0
        assert port.receive() == b"b"
        pin.unmask()
        port.send(b"c")
        assert pin.wait(5.0) == 1


def test_an_mdev_has_no_msix_and_one_kind_of_interrupt_at_a_time(
    backend: str, two_ports: str
) -> None:
    with Device.open(two_ports, backend=backend) as device:
        with pytest.raises(Unsupported, match="has no msix"):
            device.irqs.msix()
        with device.irqs.msi(), pytest.raises(UsageError, match="one kind at a time"):
            device.irqs.intx()
        device.irqs.intx()


def test_device_commands_reach_the_serial_port(
    backend: str, two_ports: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        assert main(["device", *arguments, "--backend", backend]) == 0
        return capsys.readouterr().out

    run("write", two_ports, "0", "7", "0x5a", "--width", "1")
    told = json.loads(run("read", two_ports, "bar0", "7", "--width", "1", "--json"))
    assert told == {
        "format_version": "1.0",
        "device": two_ports,
        "region": 0,
        "offset": 7,
        "width": 1,
        "values": [0x5A],
    }
    info = json.loads(run("info", two_ports, "--json"))
    assert info["backend"] == backend
    assert info["reset"] is False
    # Linux 6.1's sample tells of a REQ interrupt as well.
    assert [(irq["name"], irq["count"]) for irq in info["irqs"]][:2] == [("intx", 1), ("msi", 1)]


def test_an_absent_uuid_is_not_found() -> None:
    with pytest.raises(NotFound):
        Device.open("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
