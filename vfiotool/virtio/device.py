"""A virtio device as a Python class: any device type, served to drivers by vfiotool's own engine.

    class Dice(VirtioDevice):
        id = 4                                    # entropy, section 5.4

        def handle(self, queue, requests):
            for request in requests:
                request.complete(request.write(os.urandom(request.room)))

The class says what its device is and answers requests; rings, recovery after a crash, the log of
written pages and everything that a driver may get wrong are the engine's. `host.serve` runs one.
Section numbers are those of Virtual I/O Device 1.2.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_origin, get_type_hints

from vfiotool.errors import UsageError, described

if TYPE_CHECKING:
    from vfiotool.native.direct import QueueRequest

# Types of a configuration field: little-endian numbers; bytes of a fixed length by BytesOf.
U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
Mac = Annotated[bytes, "6s"]
# What vhost-user can carry of a configuration space.
CONFIG_BYTES = 256


class VirtioConfig:
    """A device's configuration space: subclass it as a dataclass whose fields are U8 to U64, or
    Annotated[bytes, "6s"] and the like, in the order of the specification, without gaps.

    Setting a field of a device that is served tells its driver. `writable` names the fields that
    the driver may write.
    """

    writable: ClassVar[frozenset[str]] = frozenset()
    _changed: Callable[[], None] | None = None

    @classmethod
    def layout(cls) -> dict[str, tuple[int, struct.Struct]]:
        """The offset and format of each field."""
        found: dict[str, tuple[int, struct.Struct]] = {}
        offset = 0
        try:
            hints = get_type_hints(cls, include_extras=True)
        except Exception as error:
            raise UsageError(f"{cls.__name__}'s annotations: {described(error)}") from error
        for name, hint in hints.items():
            if name.startswith("_") or name == "writable" or get_origin(hint) is ClassVar:
                continue
            marks = getattr(hint, "__metadata__", ())
            if not marks or not isinstance(marks[0], str):
                raise UsageError(f"{cls.__name__}.{name}: not one of U8, U16, U32, U64, or bytes")
            try:
                form = struct.Struct("<" + marks[0])
            except (struct.error, UnicodeError) as error:
                raise UsageError(f"{cls.__name__}.{name}: {marks[0][:20]!r}: {error}") from error
            found[name] = offset, form
            offset += form.size
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        served = self._changed is not None and not name.startswith("_")
        if served and (known := self.layout().get(name)) is not None:
            # Here it is whose fault it is; a driver that asks would be told of it otherwise.
            self._packed(name, known[1], value)
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        if self._changed is not None and served and value != before:
            self._changed()

    def pack(self) -> bytes:
        """The configuration space as the driver sees it. Raises UsageError, which names the field,
        for a value that does not fit."""
        return b"".join(
            self._packed(name, form, getattr(self, name, None))
            for name, (_, form) in self.layout().items()
        )

    def _packed(self, name: str, form: struct.Struct, value: Any) -> bytes:
        try:
            data = form.pack(value)
        except struct.error as error:
            what = f"{type(self).__name__}.{name} is {value!r}"
            raise UsageError(f"{what}: {error}") from error
        if isinstance(value, bytes) and len(value) != form.size:
            what = f"{type(self).__name__}.{name} has {len(value)} bytes"
            raise UsageError(f"{what}: not {form.size}")
        return data

    def wrote(self, offset: int, data: bytes) -> list[str]:
        """Take what the driver wrote; returns the fields. Raises UsageError for other places."""
        for name, (at, form) in self.layout().items():
            if at == offset and form.size == len(data) and name in self.writable:
                super().__setattr__(name, form.unpack(data)[0])
                return [name]
        raise UsageError(f"{len(data)} bytes at {offset} of the configuration cannot be written")


class VirtioDevice:
    """A virtio device. Subclasses set the class attributes and answer `handle`.

    Everything is called in one asyncio loop, so nothing needs a lock; what takes long belongs into
    `async def handle` or an executor, whose results come back by `loop.call_soon_threadsafe`.
    """

    id: ClassVar[int]
    """The device type (section 5): 1 net, 2 block, 3 console, 4 entropy …"""
    queues: int = 1
    """How many virtqueues it has."""
    features: int = 0
    """Feature bits of its type, without those of rings and transport, which the engine offers."""
    config: VirtioConfig | None = None
    ordered: ClassVar[bool] = True
    """A queue's next batch is handled when the one before has been; False: at once."""
    taken: ClassVar[frozenset[int]] = frozenset()
    """Queues whose requests are not handed over: the device takes them when it has something for
    them (`take`), as a network card its receive buffers. `kicked` tells of new ones."""

    negotiated: int = 0
    """The feature bits that the driver accepted."""
    _take: Callable[[int, int], list[QueueRequest]] | None = None
    """Of who serves it now."""

    def handle(self, queue: int, requests: list[QueueRequest]) -> Awaitable[None] | None:
        """Answer requests (64 at most), each by `complete`, now or later, in any order.

        May be `async def`. What it raises is reported, and the requests of the batch that are not
        complete go to `failed`.
        """
        raise NotImplementedError

    def failed(self, request: QueueRequest) -> None:
        """End a request that could not be answered; the device's type may have a status for it."""
        request.complete(0)

    def kicked(self, queue: int) -> None:
        """There may be requests in one of the queues that the device takes from."""

    def started(self, queue: int) -> None:
        """A driver has started a queue; `negotiated` is valid."""

    def stopped(self, queue: int) -> None:
        """A queue has ended; its requests must not be kept."""

    def driver_wrote(self, field: str) -> None:
        """The driver has written a field of the configuration."""

    async def open(self) -> None:
        """Before the first driver may come: in the loop that will serve."""

    async def close(self) -> None:
        """After the last driver has gone."""

    def take(self, queue: int, most: int = 64) -> list[QueueRequest]:
        """Up to `most` requests that wait in a queue; none if it does not run."""
        return [] if self._take is None else self._take(queue, most)


# Those of rings, transport and negotiation, or of no meaning yet (section 6).
_RESERVED = sum(1 << bit for bit in range(24, 50))


def check(device: VirtioDevice) -> None:
    """See that a device's attributes are what the engine relies on. Raises UsageError, which names
    the one that is not."""
    kind, queues, features = type(device).__name__, device.queues, device.features
    number = getattr(device, "id", None)
    if not isinstance(number, int) or not 0 < number <= 0xFFFF:
        raise UsageError(
            f"{kind}.id is {number!r}: not a virtio device type, such as 4 (section 5)"
        )
    if not isinstance(queues, int) or not 1 <= queues <= 256:
        raise UsageError(f"{kind}.queues is {queues!r}: not 1 to 256")
    if not isinstance(features, int) or not 0 <= features < 1 << 64:
        raise UsageError(f"{kind}.features is {features!r}: not a number of 64 bits")
    if features & _RESERVED:
        raise UsageError(f"{kind}.features is {features:#x}: bits 24 to 49 are not a device's")
    if not isinstance(device.taken, frozenset | set):
        raise UsageError(f"{kind}.taken is {device.taken!r}: not a set of queues")
    if device.config is None:
        return
    if not isinstance(device.config, VirtioConfig):
        raise UsageError(f"{kind}.config is {device.config!r}: not a VirtioConfig")
    _check_config(device.config)
    if len(device.config.pack()) > CONFIG_BYTES:
        raise UsageError(f"{kind}.config has more than {CONFIG_BYTES} bytes")


def _check_config(config: VirtioConfig) -> None:
    """See that what VirtioConfig does is not in the way of the fields, nor they of it."""
    kind = type(config)
    # A field may have taken the place of the class's own `layout`.
    fields = VirtioConfig.layout.__func__(kind)  # type: ignore[attr-defined]
    if own := sorted(fields.keys() & set(dir(VirtioConfig))):
        raise UsageError(f"{kind.__name__}.{own[0]}: a name that VirtioConfig itself has")
    if not isinstance(kind.writable, frozenset | set):
        raise UsageError(f"{kind.__name__}.writable is {kind.writable!r}: not a set of fields")
    if unknown := sorted(map(str, kind.writable - fields.keys())):
        raise UsageError(f"{kind.__name__}.writable: there is no field {unknown[0]!r}")
    try:
        config._changed = config._changed
    except Exception as error:
        raise UsageError(f"{kind.__name__} cannot be changed: {described(error)}") from error
