"""`demo`: a driver of vfiotool's on a device, with each of its checks."""

from __future__ import annotations

from typing import Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import DeviceArgument, area, examples, wants_json
from vfiotool.cli.drive.opening import BackendOption, TokenOption, TraceOption, opened

app = area()


@app.command("demo", epilog=examples("vfiotool demo edu 0000:05:01.0"))
def demo(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Which driver: edu, mbochs, mdpy, mtty, nvme, pci-testdev.",
            autocompletion=candidates.demos,
        ),
    ],
    device: DeviceArgument,
    backend: BackendOption = "auto",
    vf_token: TokenOption = None,
    trace: TraceOption = None,
) -> int:
    """Run a driver of vfiotool's on a device and print each check; fails when one fails."""
    from vfiotool.drivers import demo as find_demo

    run = find_demo(name.replace("-", "_"))
    checks = []
    with opened(context, device, backend, trace, vf_token) as opened_device:
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
                "demo": name,
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
