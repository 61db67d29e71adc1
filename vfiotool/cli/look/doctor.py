"""`doctor`: is this host ready, what is missing, and the commands that put it right."""

from __future__ import annotations

import typer

from vfiotool.cli import output
from vfiotool.cli.context import area, examples, host_of, wants_json

app = area()
_STYLES = {"blocker": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


@app.command("doctor", epilog=examples("vfiotool doctor", "vfiotool --root snapshot.gz doctor"))
def doctor(context: typer.Context) -> int:
    """Examine the host: IOMMU, kernel, modules, limits, conflicts.

    Exit code 1 if something stands against passthrough.
    """
    from vfiotool.devices.inventory import read_inventory
    from vfiotool.doctor.examine import examine

    chosen = host_of(context)
    diagnosis = examine(chosen, read_inventory(chosen))
    if wants_json(context):
        output.emit(diagnosis.as_json())
        return 0 if diagnosis.ready else 1
    answer = ("ready", "bold green") if diagnosis.ready else ("not ready", "bold red")
    output.write((diagnosis.distribution, "bold"), ": ", answer)
    for finding in diagnosis.for_people():
        style = _STYLES.get(finding.severity, "")
        output.write((f"{finding.severity:8}", style), f" {finding.summary}")
        if finding.severity == "ok":
            continue
        output.write((f"         evidence: {finding.evidence}", "dim"))
        for command in finding.remedy:
            output.write("         fix: ", (command, "cyan"))
        if finding.page is not None:
            output.write((f"         docs: {finding.page}", "dim"))
    return 0 if diagnosis.ready else 1
