"""What a model and our client owe each other: the cases of vfio-user, one by one."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.models.served import open_files, opened, serving
from vfiotool.drivers.edu import Edu
from vfiotool.errors import KernelError, NotFound, TimedOut, Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.models import BarSpec, Model, reads, writes
from vfiotool.models.bar import memory_bar
from vfiotool.models.dma import ClientMemory
from vfiotool.models.edu import EduModel
from vfiotool.vfio import Device, Mapping, Register, RegisterMap, Target, Trace, find, open_space


class CardRegisters(RegisterMap):
    """One register of each kind."""

    ident = Register(0x00, access="ro")
    scratch = Register(0x04)
    wide = Register(0x08, width=8)
    counter = Register(0x10, access="rc")
    go = Register(0x14, access="wo")
    byte = Register(0x18, width=1)


class Card(Model):
    """A card for the cases: registers, memory, all kinds of interrupts, DMA on demand."""

    vendor, device, class_code, revision = 0xABCD, 0x1234, 0x0B4000, 7
    subsystem = (0x1111, 0x2222)
    bars = (
        BarSpec(0, 0x2000, registers=CardRegisters),
        memory_bar(2, 1 << 16, wide=True, prefetchable=True),
        BarSpec(4, 64, ports=True),
    )
    intx, msi, msix, msix_offset = True, 4, 8, 0x1000

    def power_on(self) -> None:
        self.set(CardRegisters.ident, 0xC0FFEE)
        self.count = 0
        self.seen: list[int] = []

    @reads(CardRegisters.counter)
    def counted(self) -> int:
        self.count += 1
        return self.count

    @writes(CardRegisters.go)
    def went(self, value: int) -> None:
        self.seen.append(value)
        self.interrupt(value)


@pytest.fixture
def card() -> Iterator[Card]:
    yield Card()


@pytest.fixture
def device(card: Card) -> Iterator[Device]:
    with opened(card) as found:
        yield found


def test_the_device_says_what_it_is(device: Device) -> None:
    assert (device.vendor, device.device, device.class_code) == (0xABCD, 0x1234, 0x0B4000)
    assert device.backend == "vfio-user" and device.info.is_pci and device.info.has_reset
    config = device.config
    assert config.read8(8) == 7 and config.read32(0x2C) == 0x22221111
    assert [info.size if info else None for info in device.regions] == [
        0x2000, 0, 1 << 16, 0, 64, 0, 0, 4096, 0,
    ]  # fmt: skip
    counts = [info.count if info else 0 for info in device.irqs.infos]
    assert counts == [1, 4, 8, 0, 1]


def test_base_addresses_tell_their_size_as_the_specification_has_it(device: Device) -> None:
    config = device.config
    for offset, low in ((0x10, 0xFFFFE000), (0x18, 0xFFFF000C), (0x20, 0xFFFFFFC1)):
        before = config.read32(offset)
        config.write32(offset, 0xFFFFFFFF)
        assert config.read32(offset) == low
        config.write32(offset, before)
    config.write32(0x1C, 0xFFFFFFFF)
    assert config.read32(0x1C) == 0xFFFFFFFF  # the upper half of BAR 2
    config.write32(0x14, 0xFFFFFFFF)
    assert config.read32(0x14) == 0  # there is no BAR 1


def test_ids_cannot_be_written_and_errors_are_cleared_by_ones(device: Device) -> None:
    device.config.write32(0, 0)
    device.config.write16(6, 0xFFFF)
    assert device.vendor == 0xABCD and device.config.read16(6) == 0x10


def test_registers_have_their_kinds_and_handlers(card: Card, device: Device) -> None:
    registers = CardRegisters(device.region(0).access())
    assert registers.ident.read() == 0xC0FFEE
    device.region(0).write32(0, 1)
    assert registers.ident.read() == 0xC0FFEE, "read-only"
    registers.scratch.write(0x12345678)
    assert [device.region(0).read8(4 + n) for n in range(4)] == [0x78, 0x56, 0x34, 0x12]
    device.region(0).write16(6, 0xBEEF)
    assert registers.scratch.read() == 0xBEEF5678
    registers.wide.write(0x1122334455667788)
    assert device.region(0).read32(0xC) == 0x11223344
    assert [device.region(0).read32(0x10) for _ in range(3)] == [1, 2, 3]
    registers.go.write(3)
    assert card.seen == [3] and device.region(0).read32(0x14) == 0
    registers.byte.write(0xA5)
    assert registers.byte.read() == 0xA5
    # A bulk copy is made of aligned accesses: one of 8 covers two registers of 4.
    assert device.region(0).read_bytes(0, 8) == bytes.fromhex("eeffc000 7856efbe")


def test_memory_is_mapped_and_both_ways_see_it(card: Card, device: Device) -> None:
    region = device.region(2)
    with region.map() as mapping:
        assert mapping.size == 1 << 16
        mapping.write32(0x100, 0xFEEDFACE)
        assert region.read32(0x100) == 0xFEEDFACE
        region.write_bytes(0x8000, bytes(range(256)) * 16)
        assert bytes(mapping.read_many(0x8000, 4096, width=1)) == bytes(range(256)) * 16
        assert card.bar(2).load(0x100, 4) == 0xFEEDFACE
    with pytest.raises(UsageError, match="cannot be mapped"):
        device.region(0).map()


def test_what_a_region_does_not_hold_is_refused(device: Device) -> None:
    for offset, width in ((0x2000, 4), (0x1FFE, 4)):
        with pytest.raises(UsageError):
            device.region(0).read(offset, width)
    with pytest.raises(UsageError, match="no region 1"):
        device.region(1)


def test_a_bar_whose_decode_is_off_does_not_answer(device: Device) -> None:
    mapping = device.region(2).map()
    device.set_memory_decode(False)
    with pytest.raises(KernelError, match="EIO"):
        device.region(0).read32(0)
    with pytest.raises(UsageError, match="does not decode memory"):
        mapping.read32(0)
    assert device.region(4).read32(0) == 0, "ports are another decode"
    device.set_memory_decode(True)
    assert device.region(0).read32(0) == 0xC0FFEE and mapping.read32(0) == 0


@pytest.mark.parametrize("twin", [True, False], ids=["twin socket", "one socket"])
@pytest.mark.parametrize("shared", [True, False], ids=["by descriptor", "by messages"])
def test_dma_moves_every_byte(twin: bool, shared: bool) -> None:
    model = Card()
    with opened(model, twin=twin) as device:
        device.set_bus_master(True)
        size = 3 * 4096 if not shared else (1 << 20) + 4096
        own = bytearray(size)
        buffer = device.dma.alloc(size) if shared else device.dma.map(own)
        sent = os.urandom(size)
        buffer.view[:] = sent
        assert model.dma_read(buffer.iova, size) == sent
        assert model.dma_read(buffer.iova + 4095, 2) == sent[4095:4097]
        back = os.urandom(size)
        model.dma_write(buffer.iova, back)
        assert bytes(buffer.view) == back
        buffer.close()
        with pytest.raises(Exception, match="fault at"):
            model.dma_read(buffer.iova, 1)


def test_dma_crosses_mappings_and_keeps_to_their_rights(card: Card, device: Device) -> None:
    device.set_bus_master(True)
    memory = bytearray(os.urandom(4096))
    first = device.dma.alloc(4096, iova=0x10000)
    last = device.dma.alloc(4096, iova=0x12000, write=False)
    first.view[:] = b"a" * 4096
    last.view[:] = b"z" * 4096
    with pytest.raises(Exception, match="fault at 0x11000"):
        card.dma_read(0x10FFF, 4)
    middle = device.dma.alloc(4096, iova=0x11000)
    middle.view[:] = memory
    assert card.dma_read(0x10FFF, 4098) == b"a" + memory + b"z"
    with pytest.raises(Exception, match="fault at 0x12000"):
        card.dma_write(0x12000, b"x")
    device.set_bus_master(False)
    with pytest.raises(Exception, match="Bus Master"):
        card.dma_read(0x10000, 1)


def test_an_unmap_waits_for_the_transfer_and_ends_it() -> None:
    model = Card()
    with opened(model) as device:
        device.set_bus_master(True)
        stop, faults, wrong = threading.Event(), [0], [0]

        def transfer() -> None:
            while not stop.is_set():
                try:
                    if model.dma_read(0x40000, 65536) != b"\x5a" * 65536:
                        wrong[0] += 1
                except Exception:
                    faults[0] += 1

        thread = threading.Thread(target=transfer)
        thread.start()
        for _ in range(100):
            buffer = device.dma.alloc(65536, iova=0x40000)
            # Filled before it is mapped would be better; until then zeros are seen.
            buffer.view[:] = b"\x5a" * 65536
            buffer.close()
        stop.set()
        thread.join()
        assert faults[0] > 0 and device.dma.buffers == {}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(1e-3)


def test_message_interrupts_arrive_one_for_one(card: Card, device: Device) -> None:
    go = CardRegisters(device.region(0).access()).go
    with device.irqs.msix(8) as vectors:
        go.write(5)
        assert vectors[5].wait(0.0) == 0, "MSI-X is DMA: bus mastering is off"
        device.set_bus_master(True)
        for vector in (5, 5, 0, 7):
            go.write(vector)
        assert [vectors[n].wait(0.05) for n in (5, 0, 7, 1)] == [2, 1, 1, 0]
        vectors[3].trigger()
        assert vectors[3].wait(5) == 1
        with pytest.raises(Unsupported, match="cannot be masked"):
            vectors[3].mask()
    go.write(5)
    with device.irqs.msi(2) as few:
        few.add(2)
        go.write(3)
        assert few[3].wait(5) == 1
    with pytest.raises(UsageError, match="has 4 msi"):
        device.irqs.msi(5)


def test_the_pin_is_masked_by_firing_and_fires_again_while_asserted(
    card: Card, device: Device
) -> None:
    pin = device.irqs.intx()
    card.interrupt()
    card.interrupt()
    assert pin.wait(5) == 1 and pin.wait(0) == 0
    pin.unmask()
    assert pin.wait(5) == 1, "it is still asserted"
    card.deassert()
    pin.unmask()
    assert pin.wait(0) == 0
    pin.mask()
    card.interrupt()
    assert pin.wait(0) == 0
    pin.unmask()
    assert pin.wait(5) == 1


def test_a_reset_is_one_for_registers_and_interrupts_stay(card: Card, device: Device) -> None:
    registers = CardRegisters(device.region(0).access())
    device.config.write32(0x10, 0xFE000000)
    registers.scratch.write(9)
    device.set_bus_master(True)
    vectors = device.irqs.msix(2)
    device.reset()
    assert registers.scratch.read() == 0 and registers.ident.read() == 0xC0FFEE
    assert device.config.read32(0x10) == 0xFE000000, "base addresses are restored"
    assert not device.bus_master
    device.set_bus_master(True)
    registers.go.write(1)
    assert vectors[1].wait(5) == 1


def test_function_level_reset_through_configuration_space(card: Card, device: Device) -> None:
    express = card.config.capabilities[0x10]
    registers = CardRegisters(device.region(0).access())
    registers.scratch.write(9)
    device.config.write16(express + 8, 0x8000)
    device.set_memory_decode(True)
    assert registers.scratch.read() == 0
    assert device.config.read16(express + 8) & 0x8000 == 0


def test_a_device_without_a_reset_says_so() -> None:
    with opened(EduModel()) as device:
        assert not device.info.has_reset
        with pytest.raises(Unsupported, match="no reset"):
            device.reset()


def test_clients_come_in_turn_and_find_the_device_as_it_was() -> None:
    files = open_files()
    model = EduModel()
    with serving(model) as server:
        before = open_files()
        for turn in range(5):
            with Device.open(server.name) as device:
                registers = Edu(device).registers
                assert registers.liveness.read() == (~turn & 0xFFFFFFFF if turn else 0xFFFFFFFF)
                registers.liveness.write(turn + 1)
            wait_for(lambda: server.session is None)
            assert model.memory is None and not model.signals.uses(1)
            assert open_files() == before
        assert server.sessions == 5
    assert open_files() == files


def test_a_client_that_vanishes_leaves_nothing(card: Card) -> None:
    with serving(card) as server:
        before = open_files()
        device = Device.open(server.name)
        device.set_bus_master(True)
        buffer = device.dma.alloc(4096)
        device.irqs.msix(4)
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        assert card.dma_read(buffer.iova, 4) == bytes(4), "a child's end is not the client's"
        calls = device.attachment.calls
        calls.channel.end("killed")  # type: ignore[union-attr]
        wait_for(lambda: server.session is None)
        with pytest.raises(Exception, match="nobody is there"):
            card.dma_read(buffer.iova, 4)
        with pytest.raises(KernelError, match="has ended"):
            device.region(0).read32(0)
        with pytest.raises(KernelError):
            device.close()
        assert open_files() == before


def test_a_server_that_goes_is_a_device_that_is_gone(card: Card) -> None:
    with serving(card) as server:
        device = Device.open(server.name)
        mapping = device.region(2).map()
        server.drop_client()
        with pytest.raises(KernelError, match="has ended"):
            device.region(0).read32(0)
        mapping.check()
        assert "gone" in (device.unreachable or "")
        with pytest.raises(UsageError, match="gone"):
            mapping.read32(0)
        with pytest.raises(KernelError):
            device.close()


def test_a_device_is_opened_once_and_a_dead_socket_is_explained(card: Card) -> None:
    with (
        serving(card) as server,
        Device.open(server.name),
        pytest.raises(KernelError, match="EBUSY"),
    ):
        Device.open(server.name)
    with pytest.raises(NotFound, match="no such socket"):
        Device.open("vfio-user:/nowhere/at/all.sock")
    with pytest.raises(UsageError, match="names no socket"):
        Device.open("vfio-user:")
    with pytest.raises(UsageError, match="over type1"):
        Device.open("vfio-user:/x", backend="type1")
    card_in_slot = Target("0000:01:00.0", "pci", "", None, None, None, None, noiommu=False)
    with pytest.raises(UsageError, match="over vfio-user"):
        open_space(card_in_slot, "vfio-user")


def test_two_devices_share_an_address_space() -> None:
    first, second = Card(), Card()
    with (
        serving(first) as one,
        serving(second) as two,
        open_space(find(one.name, Host.local())) as space,
    ):
        a = Device.open(one.name, space=space)
        memory = a.dma.alloc(4096)
        b = Device.open(two.name, space=space)
        assert a.dma is b.dma
        memory.view[:4] = b"both"
        for device, model in ((a, first), (b, second)):
            device.set_bus_master(True)
            assert model.dma_read(memory.iova, 4) == b"both"
        late = b.dma.alloc(4096)
        late.view[:4] = b"late"
        assert first.dma_read(late.iova, 4) == b"late"


def test_what_is_mapped_is_mapped_once_and_unmapped_whole(device: Device) -> None:
    space = device.space
    device.dma.alloc(8192, iova=0x20000)
    with pytest.raises(UsageError, match="something is mapped"):
        space.map(0x1000, 0x21000, 4096, read=True, write=True)
    with pytest.raises(UsageError, match="cut a mapping"):
        space.unmap(0x20000, 4096)
    assert space.unmap(0x90000, 4096) == 0
    many = device.dma.alloc_many(20, 4096)
    assert len({one.iova for one in many}) == 20


def test_a_range_is_unmapped_with_all_that_is_in_it_and_nothing_in_part() -> None:
    """QEMU unmaps the whole address space in large ranges when a guest's IOMMU changes a domain."""
    memory = ClientMemory(None)  # type: ignore[arg-type]
    for iova in (0x10000, 0x20000, 0x40000):
        assert memory.map(3, 0, iova, 0x2000, []) == 0
    assert memory.unmap(0x11000, 0x20000) == errno.EINVAL, "it would cut the first one"
    assert memory.unmap(0x10000, 0x11000) == errno.EINVAL, "and this the second"
    assert len(memory) == 3
    assert memory.unmap(0, 1 << 18) == 0 and len(memory) == 1
    assert memory.unmap(0, 1 << 18) == errno.ENOENT
    assert memory.unmap(0, 1 << 39) == 0 and len(memory) == 0
    assert memory.map(3, 0, 0x10000, 0x1000, []) == 0, "what was mapped before is not in the way"


def test_a_slow_and_a_mute_device_and_how_long_is_waited(card: Card) -> None:
    with opened(card) as device:
        card.faults.delay_s = 0.05
        begun = time.monotonic()
        assert device.region(0).read32(0) == 0xC0FFEE
        assert time.monotonic() - begun >= 0.05
        card.faults.delay_s = 0.0
        device.attachment.calls.channel.set_limit(0.1)  # type: ignore[union-attr]
        card.faults.mute = True
        with pytest.raises(TimedOut, match=r"0\.1 s"):
            device.region(0).read32(0)
        card.faults.mute = False
        assert device.region(0).read32(0) == 0xC0FFEE, "a late answer is nobody's"


def test_faults_of_cards(card: Card) -> None:
    with opened(card) as device:
        card.faults.lie = lambda region, offset, width, value: value ^ 0xFF if not offset else value
        assert device.region(0).read32(0) == 0xC0FFEE ^ 0xFF
        card.faults.lie = None
        card.faults.set("reset-fails")
        with pytest.raises(KernelError, match="EIO"):
            device.reset()
        card.faults.set("reset-nothing")
        CardRegisters(device.region(0)).scratch.write(4)
        device.reset()
        assert CardRegisters(device.region(0)).scratch.read() == 4, "it does not reset"
        card.faults.set("d3-gone")
        power = card.config.capabilities[1] + 4
        device.config.write16(power, 3)
        with pytest.raises(KernelError, match="EIO"):
            device.region(0).read32(0)
        device.config.write16(power, 0)
        assert device.vendor == 0xFFFF and device.region(0).read32(0) == 0xFFFFFFFF
    with pytest.raises(UsageError, match="not a fault"):
        card.faults.set("nonsense")


def test_a_reset_that_hangs_is_waited_for_with_a_limit() -> None:
    card = Card()
    with serving(card) as server:
        device = Device.open(server.name)
        device.attachment.calls.channel.set_limit(0.1)  # type: ignore[union-attr]
        card.faults.set("reset-hangs")
        with pytest.raises(TimedOut):
            device.reset()
        card.faults.released.set()
        device.close()


def test_a_function_that_does_not_come_back_from_its_reset_is_all_ones_until_it_does() -> None:
    card = Card()
    with serving(card) as server, Device.open(server.name) as device:
        CardRegisters(device.region(0)).scratch.write(4)
        card.faults.set("reset-lost")
        device.reset()
        assert device.vendor == 0xFFFF and device.region(0).read32(0) == 0xFFFFFFFF
        card.faults.reset = "none"
        assert device.vendor == Card.vendor
        device.set_memory_decode(True)
        assert CardRegisters(device.region(0)).scratch.read() == 0, "the reset is over"


def test_every_access_is_traced(card: Card, tmp_path: object) -> None:
    import io

    out = io.StringIO()
    with serving(card) as server, Device.open(server.name, trace=Trace(out)) as device:
        device.region(0).read32(0)
        pin = device.irqs.intx()
        pin.trigger()
        assert pin.wait(5) == 1
        pin.unmask()
        assert isinstance(device.region(2).map(), Mapping)
    assert '"value": 12648430' in out.getvalue() and '"event": "irq"' in out.getvalue()
