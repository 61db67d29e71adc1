"""`demo`: a driver of vfiotool's on a device, with each of its checks."""

from __future__ import annotations

from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import SELECTORS, area, examples, wants_json
from vfiotool.cli.drive.opening import (
    BackendOption,
    TokenOption,
    TraceOption,
    driver_and_device,
    opened,
)

app = area()


@app.command(
    "demo", epilog=examples("vfiotool demo 0000:05:01.0", "vfiotool demo edu 0000:05:01.0")
)
def demo(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME] DEVICE",
            help="The driver (edu, mbochs, mdpy, mtty, nvme, pci-testdev; left out: the one that "
            f"drives the device), and the device. {SELECTORS}",
            autocompletion=candidates.demos_and_devices,
        ),
    ],
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    trace: TraceOption = None,
) -> int:
    """Run a driver of vfiotool's on a device and print each check; fails when one fails."""
    from vfiotool.drivers import demo as find_demo
    from vfiotool.drivers import driver_of

    name, device = driver_and_device(words)
    if name is not None:
        find_demo(name)
    checks = []
    with opened(context, device, backend, trace, vf_token) as opened_device:
        name = name or driver_of(opened_device)
        run = find_demo(name)
        for check in run(opened_device):
            checks.append(check)
            if not wants_json(context):
                mark = ("ok  ", "green") if check.passed else ("FAIL", "bold red")
                output.write(mark, f" {check.name}: {check.detail}")
                output.flush()
        used, shown = opened_device.backend, opened_device.name
    passed = bool(checks) and all(check.passed for check in checks)
    if wants_json(context):
        output.emit(
            {
                "demo": name.replace("_", "-"),
                "device": shown,
                "backend": used,
                "passed": passed,
                "checks": [
                    {"name": check.name, "passed": check.passed, "detail": check.detail}
                    for check in checks
                ],
            }
        )
    return 0 if passed else 5
