"""Inside one of two guests at a switch: `net_guest.py NUMBER IPERF3...` exchanges data with the
other one, both ways, and lets iperf3 run both ways, with checksum and segmentation offloads and
without. Needs nothing but Python; prints what it saw as a line of JSON.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import random
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ADDRESS, PORT = "10.9.0.1", 9
SIZE = 8 << 20
WAIT_S = 600.0
# linux/sockios.h and linux/ethtool.h: transmit checksums, TCP and generic segmentation.
SIOCETHTOOL = 0x8946
OFFLOADS = {"ETHTOOL_STXCSUM": 0x17, "ETHTOOL_STSO": 0x1F, "ETHTOOL_SGSO": 0x24}


def interface() -> str:
    """The network interface that has a driver, once there is one."""
    ends = time.monotonic() + WAIT_S
    while time.monotonic() < ends:
        for path in Path("/sys/class/net").iterdir():
            if (path / "device/driver").exists():
                return path.name
        time.sleep(0.1)
    raise AssertionError("no network interface appeared")


def set_offloads(name: str, on: bool) -> None:
    # What depends on another has to go first, and come last.
    for number in OFFLOADS.values() if on else reversed(OFFLOADS.values()):
        value = ctypes.create_string_buffer(struct.pack("<II", number, on))
        request = struct.pack("16sP", name.encode(), ctypes.addressof(value))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)


def bad_checksums() -> int:
    """Segments that came with a wrong checksum (RFC 4022's InErrs has others as well)."""
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = [line.split() for line in lines if line.startswith("Tcp:")]
    return int(values[names.index("InCsumErrors")])


def connect() -> socket.socket:
    ends = time.monotonic() + WAIT_S
    while True:
        try:
            return socket.create_connection((ADDRESS, PORT), timeout=5)
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(1)


class Pair:
    """This guest and the other one, over a connection of their own."""

    def __init__(self, number: int) -> None:
        self.number = number
        if number == 1:
            self.peer, _ = socket.create_server(("", PORT)).accept()
        else:
            self.peer = connect()
        self.peer.settimeout(WAIT_S)

    def meet(self) -> None:
        """Neither goes on before the other is here."""
        self.peer.sendall(b".")
        assert self.peer.recv(1, socket.MSG_WAITALL) == b"."

    def data(self, seed: int) -> dict[str, str]:
        """Send data and take what the other sends; SHA-256 of either."""
        sent = random.Random(f"{seed} {self.number}").randbytes(SIZE)
        took = hashlib.sha256()
        for turn in (1, 2):
            if turn == self.number:
                self.peer.sendall(sent)
                continue
            left = SIZE
            while left:
                piece = self.peer.recv(min(left, 1 << 20))
                assert piece, left
                took.update(piece)
                left -= len(piece)
        return {"sent": hashlib.sha256(sent).hexdigest(), "taken": took.hexdigest()}

    def iperf(self, command: list[str], *options: str) -> dict[str, Any]:
        """What iperf3 says in JSON; the server is the first guest."""
        if self.number == 1:
            line = [*command, "--server", "--one-off", "--json"]
            with subprocess.Popen(line, stdout=subprocess.PIPE) as server:
                while not listening(5201):
                    assert server.poll() is None
                    time.sleep(0.1)
                self.meet()
                output, _ = server.communicate(timeout=WAIT_S)
                assert server.returncode == 0, output
        else:
            self.meet()
            line = [*command, "--client", ADDRESS, "--json", "--time", "5", *options]
            output = subprocess.run(line, stdout=subprocess.PIPE, timeout=WAIT_S).stdout
        report: dict[str, Any] = json.loads(output)
        assert "error" not in report, report["error"]
        return {key: report["end"][key] for key in ("sum_sent", "sum_received")}


def listening(port: int) -> bool:
    """Whether somebody listens at a TCP port (proc(5): state 0A)."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        if (path := Path("/proc/net", name)).exists()
        for line in path.read_text().splitlines()[1:]
    ]
    return any(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in lines)


def main(number: int, iperf3: list[str]) -> None:
    name = interface()
    subprocess.run(["ip", "address", "add", f"10.9.0.{number}/24", "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    pair = Pair(number)
    seen: dict[str, Any] = {}
    for turn, offloads in enumerate((True, False)):
        set_offloads(name, offloads)
        pair.meet()
        seen["offloads" if offloads else "plain"] = {
            "data": pair.data(turn),
            "there": pair.iperf(iperf3),
            "back": pair.iperf(iperf3, "--reverse"),
            "data after": pair.data(turn + 10),
        }
    seen["bad checksums"] = bad_checksums()
    pair.meet()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
