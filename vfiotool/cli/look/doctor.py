"""`doctor`: is this host ready, what is missing, and the commands that put it right."""

from __future__ import annotations

from vfiotool.cli import output as render
from vfiotool.cli.declare import Commands, Context


def register(app: Commands) -> None:
    """Add this area's command."""
    app.command(
        help="Examine the host: IOMMU, modules, limits, conflicts; exit 1 on a blocker.",
        short_help="Examine the host: IOMMU, modules, limits, conflicts.",
    )(doctor)


def doctor(context: Context) -> int:
    from vfiotool.devices.inventory import read_inventory
    from vfiotool.doctor.examine import examine

    host = render.host(context)
    diagnosis = examine(host, read_inventory(host))
    if render.state(context).json:
        render.emit(diagnosis.as_json())
        return 0 if diagnosis.ready else 1
    lines = [f"{diagnosis.distribution}: {'ready' if diagnosis.ready else 'not ready'}"]
    for finding in diagnosis.for_people():
        lines.append(f"{finding.severity:8} {finding.summary}")
        if finding.severity == "ok":
            continue
        lines.append(f"         evidence: {finding.evidence}")
        lines += [f"         fix: {command}" for command in finding.remedy]
        if finding.page is not None:
            lines.append(f"         docs: {finding.page}")
    print(render.escape("\n".join(lines)))
    return 0 if diagnosis.ready else 1
