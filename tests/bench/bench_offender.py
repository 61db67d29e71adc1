"""What one tenant that breaks the rules again and again costs the others of its server.

    python -m tests.bench.bench_offender [--seconds S] [--rounds N] [--ways WAY…]

Eight clients (tenants.c) read from disks in memory, on one server with one thread, beside a
process that connects to another of its disks, does one thing wrong, and connects again. Its own
work, and the server's for it, take processor time from the clients as any program's do; so the same
process is set against another server beside them in turn. What the clients have with it on their
server, of what they have with it on the other one, is what it costs to share a server with it.

`message`: a message of no known kind. `ring`: an index that runs ahead of its ring. `interrupt`: a
call descriptor that is full, and made to block once the queue runs.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.bench.bench_vhost_blk import running
from tests.bench.bench_vhost_tenants import BESIDE, connected, exports_file
from tests.virtio.frontend import Closed, Frontend

WAYS = ("message", "ring", "interrupt")
FULL = (1 << 64) - 2


def offend(path: str, way: str) -> None:
    """One connection's worth of it."""
    front = Frontend(path, memory=2 << 20)
    front.socket.settimeout(5.0)
    ring = front.rings[0]
    try:
        if way == "message":
            front.send(9999)
        else:
            front.up()
        if way == "interrupt":
            with suppress(BlockingIOError):
                os.eventfd_read(ring.call)
            os.eventfd_write(ring.call, FULL)
            fcntl.fcntl(ring.call, fcntl.F_SETFL, 0)
            front.put(ring, 0, [(0x10_0000, 16, False), (0x10_0000, 1, True)])
            front.add(ring, 0)
        elif way == "ring":
            front.words[(ring.at + 0x1002) // 2] = 30_000
            os.eventfd_write(ring.kick, 1)
        # The server's end of it is waited for: no more is asked of it at once than it can do.
        with suppress(Closed):
            front.ask(1)
            front.stop()
    finally:
        front.close()


def keep_offending(path: str, way: str) -> None:
    done = 0
    try:
        while True:
            with suppress(OSError, AssertionError, Closed, struct.error):
                offend(path, way)
            done += 1
            sys.stdout.write(f"{done}\n")
            sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        return


@contextmanager
def offender(path: str, way: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.bench.bench_offender", "--offend", path, way]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            said.seek(0)
            print(f"    {len(said.readlines())} connections")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--poll-us", type=int, default=0)
    parser.add_argument("--offend", nargs=2, metavar=("SOCKET", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.offend:
        keep_offending(*given.offend)
        return
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pids = {}
        for name in ("here", "elsewhere"):
            folder = place / name
            folder.mkdir()
            command = [sys.executable, "-m", "vfiotool", "serve", "exports"]
            command += [str(exports_file(folder, BESIDE + 1)), "--poll-us", str(given.poll_us)]
            command += ["--control-path", str(folder / "control")]
            served = running(command, dict(os.environ), folder / f"ours{BESIDE}")
            pids[name] = stack.enter_context(served)
        clients = connected("ours", place / "here", pids["here"], BESIDE)
        tenants, _ = stack.enter_context(clients)
        tenants.window(0.2)
        for way in given.ways:
            kept, totals = [], {"here": [], "elsewhere": []}
            for number in range(given.rounds):
                names = ("here", "elsewhere") if number % 2 else ("elsewhere", "here")
                for name in names:
                    with offender(f"{place}/{name}/ours{BESIDE}", way):
                        tenants.window(0.3)
                        totals[name].append(tenants.window(given.seconds).total)
                kept.append(totals["here"][-1] / totals["elsewhere"][-1])
            here, elsewhere = (statistics.median(totals[name]) for name in totals)
            print(
                f"  {way:<9} {here:6.1f} kIOPS beside it, {elsewhere:6.1f} with it elsewhere:"
                f" they keep {statistics.median(kept):.2f} ({min(kept):.2f} to {max(kept):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
