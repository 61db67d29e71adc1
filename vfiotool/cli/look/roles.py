"""What a group's member means for an operator, in the words and colours of every listing."""

from __future__ import annotations

from vfiotool.cli import output
from vfiotool.devices.iommu import IommuGroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfiotool.usage.standing import Standings

# The words for `host` name what stands in the way of passthrough.
ROLES = {
    "vfio": "on a VFIO driver",
    "unbound": "no driver",
    "bridge": "not in the way",
    "host": "on a host driver",
    "mdev": "mediated device",
}
VERDICTS = {"ready": "green", "available": "cyan", "blocked": "yellow"}
STYLES = {"vfio": "green", "unbound": "", "bridge": "dim", "host": "yellow", "mdev": "cyan"}


def say_unseen(standings: Standings, command: str) -> None:
    """Once a listing: that some verdicts are for want of sight, and who sees more."""
    if standings.unseen:
        output.warn(
            f"{standings.unseen} of these are blocked only because who uses them cannot be seen "
            f"without root: sudo vfiotool {command}"
        )


def print_group(group: IommuGroup | None, of: str | None = None) -> None:
    """A device's group: its members with their roles, and the addresses that it reserves.

    `of` is a device that can be bound: where it alone keeps the group from being viable, that is
    said.
    """
    if group is None:
        output.write(("in no IOMMU group", "yellow"))
        return
    state = ("viable", "green") if group.viable else ("not viable", "yellow")
    if {member.address for member in group.devices if member.role == "host"} == {of}:
        state = (f"viable once {of} is bound to a VFIO driver", "green")
    output.write((f"group {group.id}", "bold"), f"  {group.type or '-'}  ", state)
    width = max((len(member.address) for member in group.devices), default=0)
    for member in group.devices:
        what = ROLES[member.role]
        text = f"  {member.address:<{width}}  {member.driver or '-'} ({what})"
        output.write((text, STYLES[member.role]))
    for region in group.reserved_regions:
        output.write((f"  reserved {region.start:#x}-{region.end:#x} {region.type}", "dim"))
