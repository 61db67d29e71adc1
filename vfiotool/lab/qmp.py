"""QEMU's machine protocol, as much as hotplug and a look at the guest need.

Source: QEMU docs/interop/qmp-spec.rst and qemu-qmp-ref.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from vfiotool.errors import KernelError


class Qmp:
    """One QMP session over a connected socket."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._text = b""
        self._events: list[dict[str, Any]] = []
        self._ready = False

    def close(self) -> None:
        self._stream.close()

    def command(
        self, name: str, arguments: Mapping[str, object] | None = None, *, limit_s: float = 30.0
    ) -> Any:
        """Run `name` and return what it returns; KernelError with QEMU's words if it refuses."""
        end = time.monotonic() + limit_s
        if not self._ready:
            self._next(end)  # the greeting
            self._exchange("qmp_capabilities", {}, end)
            self._ready = True
        return self._exchange(name, arguments or {}, end)

    def wait_event(self, name: str, *, limit_s: float = 30.0, **data: object) -> dict[str, Any]:
        """The next event `name` whose data holds these items; KernelError when none comes."""
        end = time.monotonic() + limit_s
        while True:
            for event in self._events:
                found = event.get("data", {})
                if event["event"] == name and data.items() <= found.items():
                    self._events.remove(event)
                    return event
            message = self._next(end)
            if "event" in message:
                self._events.append(message)

    def device_add(self, driver: str, *, id: str, bus: str, **properties: object) -> None:
        """Plug a device in, e.g. into the empty hotplug port `rp9`; the guest notices later."""
        self.command("device_add", {"driver": driver, "id": id, "bus": bus, **properties})

    def device_del(self, id: str, *, limit_s: float = 30.0) -> None:
        """Ask the guest to let a device go, and wait until it has."""
        self.command("device_del", {"id": id})
        self.wait_event("DEVICE_DELETED", limit_s=limit_s, device=id)

    def _exchange(self, name: str, arguments: Mapping[str, object], end: float) -> Any:
        request = {"execute": name, "arguments": dict(arguments)}
        self._stream.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._next(end)
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise KernelError(f"QEMU refused {name}: {message['error']['desc']}")
            elif "return" in message:
                return message["return"]

    def _next(self, end: float) -> dict[str, Any]:
        while b"\n" not in self._text:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._stream], [], [], left)[0]:
                raise KernelError("QEMU did not answer on its control socket in time")
            data = self._stream.recv(65536)
            if not data:
                raise KernelError("QEMU closed its control socket")
            self._text += data
        line, _, self._text = self._text.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
