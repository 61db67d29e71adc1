"""Ansible's way into a guest of the lab: the test that holds it runs the commands for us."""

from __future__ import annotations

import base64
import json
import shlex
import socket
from pathlib import Path

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: lab
short_description: a guest of vfiotool's lab
description: Commands are sent to the unix socket that is the host's address.
"""


class Connection(ConnectionBase):
    transport = "lab"
    has_pipelining = False

    def _connect(self):
        return self

    def exec_command(self, cmd, in_data=None, sudoable=True):
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        return self._run(cmd, in_data or b"")

    def put_file(self, in_path, out_path):
        super().put_file(in_path, out_path)
        self._sure(f"cat > {shlex.quote(out_path)}", Path(in_path).read_bytes())

    def fetch_file(self, in_path, out_path):
        super().fetch_file(in_path, out_path)
        Path(out_path).write_bytes(self._sure(f"cat {shlex.quote(in_path)}", b""))

    def close(self):
        pass

    def _sure(self, command, data):
        code, out, err = self._run(command, data)
        if code:
            raise AnsibleConnectionFailure(f"{command}: {err.decode(errors='replace')}")
        return out

    def _run(self, command, data):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._play_context.remote_addr)
            request = {"command": command, "input": base64.b64encode(data).decode()}
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as file:
                answer = json.loads(file.readline())
        return answer["code"], base64.b64decode(answer["out"]), base64.b64decode(answer["err"])
