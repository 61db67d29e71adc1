"""qemu-storage-daemon's command line, as QEMU's qtests write it, served by `vfiotool serve`.

For QTEST_QEMU_STORAGE_DAEMON_BINARY. Each export is one `serve vhost-user-blk` on the listening
socket that the test hands over, as the daemon's export of a raw image is.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Wanted:
    """One export: the listening socket's descriptor, the image and the number of queues."""

    fd: int
    image: str
    queues: int

    def command(self) -> list[str]:
        serve = [sys.executable, "-m", "vfiotool", "serve", "vhost-user-blk", "--fd", str(self.fd)]
        return [*serve, "--blk-file", self.image, "--queues", str(self.queues)]


def parse(arguments: list[str]) -> list[Wanted]:
    """What is to be exported. Raises SystemExit for what has no counterpart here."""
    images: dict[str, str] = {}
    found = []
    for option, text in zip(arguments[::2], arguments[1::2], strict=True):
        pairs = dict(item.split("=", 1) for item in text.split(","))
        if option == "--blockdev" and pairs.pop("driver") == "file":
            images[pairs.pop("node-name")] = pairs.pop("filename")
        elif option == "--export" and (pairs.pop("type"), pairs.pop("addr.type")) == (
            "vhost-user-blk",
            "fd",
        ):
            image = images[pairs.pop("node-name")]
            found.append(Wanted(int(pairs.pop("addr.str")), image, int(pairs.pop("num-queues"))))
            if pairs.pop("writable") != "on":
                sys.exit(f"not served here: {text}")
            del pairs["id"]
        if pairs:
            sys.exit(f"not served here: {option} {text}")
    return found


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM; 0 if every server ended with 0."""
    running: list[subprocess.Popen[bytes]] = []
    told = False

    def end(*_: object) -> None:
        nonlocal told
        told = True
        for process in running:
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    for export in parse(arguments):
        running.append(subprocess.Popen(export.command(), pass_fds=[export.fd]))
    if told:
        end()
    return max(abs(process.wait()) for process in running)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
