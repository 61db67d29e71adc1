"""How long planning takes: a policy of 1,000 rules on a laid-out host of 4,096 functions.

    python -m tests.bench.bench_plan [--functions 4096] [--rules 1000] [--runs 5] [--folder FOLDER]

The library's call (read the policy, read the host, plan) in a process of its own for each run,
and the whole command `vfiotool --root … plan --json`; wall time, processor time, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vfiotool.devices.pci import list_addresses, read_identity
from vfiotool.host.host import Host
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy


def write_policy(root: str, rules: int) -> str:
    """Rules for the first endpoints that are on a host driver or none, by address and id."""
    host = Host.at(root)
    lines = ["version = 1\n"]
    for address in list_addresses(host):
        found = read_identity(host, address)
        if found is None or found.is_bridge:
            continue
        if host.read(f"/sys/bus/pci/devices/{address}/sriov_numvfs") not in (None, "0"):
            continue
        lines.append(
            f'[[device]]\nmatch = {{ address = "{address}", id = "{found.vendor}:{found.device}" }}'
            f'\nexpect = {{ count = 1 }}\ndriver = "vfio-pci"\ngroup = "whole"\n'
        )
        if len(lines) > rules:
            break
    return "\n".join(lines)


def plan_once(root: str, path: str) -> dict[str, float]:
    """In this process: read policy and host, plan; what it cost."""
    begun, used = time.perf_counter(), time.process_time()
    policy = parse_policy(Path(path).read_text(), path)
    parsed = time.perf_counter()
    facts = read_policy_facts(Host.at(root), policy)
    read = time.perf_counter()
    plan = plan_policy(policy, facts)
    done = time.perf_counter()
    return {
        "policy_s": parsed - begun,
        "host_s": read - parsed,
        "plan_s": done - read,
        "wall_s": done - begun,
        "processor_s": time.process_time() - used,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps": len(plan.steps),
    }


def run_command(command: list[str]) -> tuple[float, float, float]:
    """Wall and processor seconds and the peak in MiB of a whole process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--functions", type=int, default=4096)
    parser.add_argument("--rules", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(plan_once(*options.once)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = os.path.join(folder, "host")
        lay_out = [sys.executable, "-m", "tests.bench.bighost", root, str(options.functions)]
        subprocess.run(lay_out, check=True)
        path = os.path.join(folder, "policy.toml")
        Path(path).write_text(write_policy(root, options.rules))
        runs = []
        for _ in range(options.runs):
            command = [sys.executable, "-m", __spec__.name, "--once", root, path]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout))
        print(f"{options.rules} rules, {options.functions} functions, {runs[0]['steps']} steps")
        for key in ("policy_s", "host_s", "plan_s", "wall_s", "processor_s", "peak_mib"):
            print(f"  {key:12} {statistics.median(run[key] for run in runs):8.3f}")
        command = [sys.executable, "-m", "vfiotool", "--root", root, "plan", path, "--json"]
        found = [run_command(command) for _ in range(options.runs)]
        wall, spent, peak = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"  the command: {wall:.3f} s wall, {spent:.3f} s of processor, peak {peak:.1f} MiB")


if __name__ == "__main__":
    main()
