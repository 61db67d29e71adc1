"""The Ansible collection on three guests of the lab: a real ansible-core, real kernels."""

from __future__ import annotations

import base64
import json
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.fleet.test_ansible import collections, play
from tests.guests.runs import need_lab
from tests.oracles import ansible
from vfiotool.lab.guest import Guest

pytestmark = [pytest.mark.lab, pytest.mark.proof]
__all__ = ["collections"]

KERNEL = "6.12"
EDU, TESTDEV = "0000:00:01.0", "0000:00:02.0"
POLICY = f"""version = 1
[[device]]
match = {{ address = "{EDU}" }}
driver = "vfio-pci"
[[device]]
match = {{ address = "{TESTDEV}" }}
driver = "vfio-pci"
"""
# Nothing below it can be written, which shows when the second device's turn has come.
SHUT = f"cd /sys/devices/pci0000:00/{TESTDEV}; mount --bind . .; mount -o remount,bind,ro $PWD"
OPEN = f"umount /sys/devices/pci0000:00/{TESTDEV}"


class _Server(socketserver.UnixStreamServer):
    """Runs in one guest what comes, one command after another."""

    def __init__(self, path: str, guest: Guest) -> None:
        super().__init__(path, _Handler)
        self.guest = guest


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        data = base64.b64decode(request["input"])
        done = self.server.guest.exec(["sh", "-c", request["command"]], input=data, timeout_s=300)
        out, err = (base64.b64encode(text).decode() for text in (done.stdout, done.stderr))
        answer = {"code": done.exit_code, "out": out, "err": err}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


@contextmanager
def reachable(guest: Guest, path: Path) -> Iterator[str]:
    with _Server(str(path), guest) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"{path.stem} ansible_connection=lab ansible_host={path}"
        finally:
            server.shutdown()
            thread.join()


def run(guest: Guest, command: str) -> str:
    done = guest.exec(["sh", "-c", command], timeout_s=120, merge=True)
    assert done.exit_code == 0, done.text
    return done.text


def drivers(guest: Guest) -> list[str]:
    look = "; ".join(
        f"basename $(readlink /sys/bus/pci/devices/{name}/driver || echo none)"
        for name in (EDU, TESTDEV)
    )
    return run(guest, look).split()


def test_three_guests_of_which_one_fails(
    tmp_path: Path, collections: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_lab(KERNEL)
    try:
        program = ansible.get()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no ansible-core can be had here: {error}")
    monkeypatch.setattr("tests.fleet.test_ansible.PLAYBOOK", program)
    monkeypatch.setenv(
        "ANSIBLE_CONNECTION_PLUGINS", str(Path(__file__).with_name("connection_plugins"))
    )
    options = {"executable": str(Path(sys.prefix) / "bin/vfiotool"), "policy": POLICY}
    task = {"vfiotool.host.vfiotool_policy": options, "register": "result"}
    with ExitStack() as stack:
        guests = [stack.enter_context(Guest("basic", KERNEL)) for _ in range(3)]
        lines = [
            stack.enter_context(reachable(guest, tmp_path / f"host{number}"))
            for number, guest in enumerate(guests)
        ]

        def played(*words: str) -> tuple[int, dict[str, object], str]:
            for path in (tmp_path / "results").glob("*"):
                path.unlink()
            code, found = play(tmp_path, collections, [task], *words, inventory=lines)
            text = found.pop("text")
            return code, {name: result["changed"] for name, result in found.items()}, text

        every = {f"host{number}": True for number in range(3)}
        code, changed, text = played("--check", "--diff")
        assert (code, changed) == (0, every), text
        assert [drivers(guest) for guest in guests] == [["none", "none"]] * 3

        run(guests[1], SHUT)
        code, changed, text = played()
        assert (code, changed) == (2, {"host0": True, "host2": True}), text
        assert "rolled back" in text and "host1" in text, text
        bound, free = ["vfio-pci", "vfio-pci"], ["none", "none"]
        assert [drivers(guest) for guest in guests] == [bound, free, bound]

        run(guests[1], OPEN)
        code, changed, text = played()
        assert (code, changed) == (0, {"host0": False, "host1": True, "host2": False}), text
        code, changed, text = played()
        assert (code, changed) == (0, dict.fromkeys(every, False)), text
        assert [drivers(guest) for guest in guests] == [bound] * 3
