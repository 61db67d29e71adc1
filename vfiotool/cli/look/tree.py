"""`vfiotool tree`: the way from root complexes to endpoints, with groups, drivers, VFs, mdevs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import area, examples, host_of, wants_json
from vfiotool.cli.look.node import Node, short, summary_of
from vfiotool.cli.look.roles import VERDICTS, say_unseen
from vfiotool.devices.details import DetailReader
from vfiotool.devices.inventory import Inventory, read_inventory
from vfiotool.devices.iommu import role_of
from vfiotool.devices.names import Names, read_names
from vfiotool.devices.pci import PciFunction
from vfiotool.errors import NotFound, UsageError
from vfiotool.host.host import Host
from vfiotool.usage.standing import Standings

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

# More VFs than this are told in one line.
_VFS_SHOWN = 8
_STYLES = {
    "vfio": "green",
    "host": "yellow",
    "unbound": "bright_black",
    "bridge": "bright_black",
    "mdev": "magenta",
}


app = area()


@app.command(
    "tree",
    epilog=examples("vfiotool tree", "vfiotool tree --svg host.svg", "vfiotool tree --svg - > x"),
)
def tree(
    context: typer.Context,
    svg: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Draw a picture instead; - for standard output.",
            autocompletion=candidates.files,
        ),
    ] = None,
) -> int:
    """Show the PCI tree with IOMMU groups, drivers, VFs and mediated devices.

    A group number in colour is shared by several devices, which can only be passed through
    together. Verdicts: ready (a virtual machine can open it now), available (bind makes it ready),
    blocked (why DEVICE says what stands against it). Bridges have none.
    """
    if svg == "-" and wants_json(context):
        raise UsageError("--json and the picture cannot both go to standard output")
    chosen = host_of(context)
    inventory = read_inventory(chosen)
    standings = Standings(chosen, inventory.by_address, inventory.by_group)
    roots = build(chosen, inventory, read_names(chosen), standings)
    if svg is not None:
        _save_svg(chosen, roots, svg)
    if wants_json(context):
        output.emit({"roots": [root.as_json() for root in roots]})
    elif svg is None:
        output.trees(_as_rich(root) for root in roots)
        say_unseen(standings, "tree")
    return 0


def _save_svg(host: Host, roots: list[Node], path: str) -> None:
    from vfiotool.cli.look.tree_svg import draw
    from vfiotool.host.paths import PROC_OSRELEASE

    picture = draw(roots, kernel=host.read(PROC_OSRELEASE))
    try:
        output.save(path, picture)
    except OSError as error:
        raise output.cannot("write", path, error) from error


def build(
    host: Host, inventory: Inventory, names: Names, standings: Standings | None = None
) -> list[Node]:
    """The roots of the tree in bus order, and last, if there are any, devices of no bus."""
    standings = standings or Standings(host, inventory.by_address, inventory.by_group)
    builder = _Builder(inventory, names, standings, DetailReader(host))
    for function in inventory.functions:
        builder.add_function(function)
    for mdev in inventory.mdevs:
        path = host.realpath(f"{_mdev_folder()}/{mdev.uuid}") or ""
        builder.add_mdev(mdev.uuid, mdev.type, mdev.iommu_group, path, mdev.parent)
    return list(builder.roots.values())


def _mdev_folder() -> str:
    from vfiotool.host.paths import SYS_MDEV_DEVICES

    return SYS_MDEV_DEVICES


class _Builder:
    def __init__(
        self, inventory: Inventory, names: Names, standings: Standings, reader: DetailReader
    ) -> None:
        self.standings = standings
        self.reader = reader
        self.groups = inventory.by_group
        self.names = names
        self.nodes: dict[str, Node] = {}
        self.roots: dict[str, Node] = {}

    def _parent(self, path: str, fallback: str, numa_node: int | None = None) -> Node:
        """The innermost known function on a path, else the root that the path begins with."""
        for part in reversed(path.split("/")[:-1]):
            if part in self.nodes:
                return self.nodes[part]
        found = next((part for part in path.split("/") if part.startswith("pci")), fallback)
        if found not in self.roots:
            self.roots[found] = Node("root", found, numa_node=numa_node)
        return self.roots[found]

    def add_function(self, function: PciFunction) -> None:
        known = self.names.lookup(function.vendor, function.device, class_code=function.class_code)
        role = role_of(function.driver)
        details = self.reader.read(function)
        kind = "vf" if function.physfn else "bridge" if function.is_bridge else "endpoint"
        node = Node(
            kind=kind,
            address=function.address,
            pci_id=None if function.vendor is None else f"{function.vendor}:{function.device}",
            name=known.device or known.class_name,
            driver=function.driver,
            role=role,
            number=function.vf_index,
            numa_node=function.numa_node,
            link=function.link,
            # A bridge is not passed through; what is behind it is.
            verdict=None if kind == "bridge" else self.standings.of(function).verdict,
            interfaces=details.interfaces,
            disks=details.disks,
            serial=details.serial,
        )
        node = self._grouped(node, function.iommu_group)
        parent = self.nodes.get(function.physfn or "")
        if parent is None:
            parent = self._parent(function.path, "pci", function.numa_node)
        parent.children.append(node)
        self.nodes[function.address] = node

    def add_mdev(
        self, uuid: str, kind: str | None, group: int | None, path: str, parent: str | None
    ) -> None:
        node = self._grouped(Node("mdev", uuid, name=kind, role="mdev"), group)
        node = replace(node, verdict=self._verdict(uuid))
        self._parent(path, parent or "mdev").children.append(node)

    def _verdict(self, uuid: str) -> str | None:
        """An mdev's; None if it is gone."""
        try:
            return self.standings.named(uuid).verdict
        except NotFound:
            return None

    def _grouped(self, node: Node, number: int | None) -> Node:
        group = None if number is None else self.groups.get(number)
        if group is None:
            return replace(node, group=number)
        others = sum(member.role != "bridge" for member in group.devices)
        return replace(node, group=number, viable=group.viable, shared=others > 1)


def _as_rich(root: Node) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    label = Text(output.escape_line(root.address), "bold")
    if root.numa_node is not None:
        label.append(f"  NUMA node {root.numa_node}", "not bold")
    branch = Tree(label, guide_style="bright_black")
    _grow(branch, root.children)
    return branch


def _grow(branch: Tree, children: Iterable[Node]) -> None:
    vfs = [child for child in children if child.kind == "vf"]
    for child in children:
        if child.kind != "vf" or len(vfs) <= _VFS_SHOWN:
            _grow(branch.add(_label(child)), child.children)
    if len(vfs) > _VFS_SHOWN:
        branch.add(output.escape_line(summary_of(vfs)))


def _label(node: Node) -> Text:
    from rich.text import Text

    style = _STYLES.get(node.role or "", "")
    text = Text(no_wrap=True, overflow="ellipsis")
    if node.kind == "vf":
        text.append(f"VF {'?' if node.number is None else node.number}  ", "cyan")
    text.append(output.escape_line(short(node.address)), "bold")
    if node.group is not None:
        text.append(f"  group {node.group}", "cyan" if node.shared else "")
    if node.verdict is not None:
        text.append(f"  {node.verdict}", VERDICTS[node.verdict])
    if node.kind != "mdev":
        text.append(f"  {output.escape_line(node.driver or 'no driver')}", style)
    parts = [*node.interfaces, *node.disks, *([f"serial {node.serial}"] if node.serial else [])]
    if parts:
        text.append(f"  {output.escape_line(', '.join(parts))}", "bold")
    if node.pci_id is not None:
        text.append(f"  {node.pci_id}", "bright_black")
    if node.name:
        text.append(
            f"  {output.escape_line(node.name)}", "bright_black" if node.kind == "bridge" else ""
        )
    return text
