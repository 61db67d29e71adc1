"""The tree as a picture: cards in columns from root complex to endpoint, groups outlined.

Plain SVG 1.1 without scripts, fonts or links, so that any viewer, browser or ticket shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape as xml_escape

from vfiotool.cli.look.node import Node, short, summary_of
from vfiotool.cli.style import escape_line

_ROOT_W, _CARD_W, _CARD_H = 132, 304, 46
_GAP_X, _GAP_Y = 46, 17
_MARGIN, _HEAD, _FOOT = 28, 64, 52
_VFS_SHOWN = 4
_NAME_LETTERS = 32
_SANS = "system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
_MONO = "ui-monospace, 'SF Mono', 'DejaVu Sans Mono', Menlo, Consolas, monospace"
# role: (edge, fill, text of the legend)
_ROLES = {
    "vfio": ("#1a7f37", "#e6f6ea", "on a VFIO driver"),
    "host": ("#b35900", "#fff3e0", "on a host driver"),
    "unbound": ("#6e7781", "#ffffff", "no driver"),
    "bridge": ("#8c959f", "#f3f4f6", "bridge, not in the way"),
    "mdev": ("#8250df", "#f3ecff", "mediated device"),
}
_GROUPS = ("#0969da", "#bf3989", "#1b7c83", "#9a6700", "#8250df", "#cf222e")


_TITLE = "PCI devices and IOMMU groups"


@dataclass
class _Card:
    """A node's place: column and row of the grid; `lines` are its texts."""

    node: Node
    column: int
    row: int
    title: str
    subtitle: str

    @property
    def x(self) -> int:
        return _left(self.column)

    @property
    def width(self) -> int:
        return _ROOT_W if self.column == 0 else _CARD_W

    @property
    def y(self) -> int:
        return _HEAD + _MARGIN + self.row * (_CARD_H + _GAP_Y)


def _left(column: int) -> int:
    return _MARGIN + (0 if column == 0 else _ROOT_W - _CARD_W + column * (_CARD_W + _GAP_X))


def draw(roots: Iterable[Node], kernel: str | None = None) -> str:
    """An SVG document of the tree. Texts are escaped: names come from devices."""
    cards: list[_Card] = []
    edges: list[tuple[_Card, _Card]] = []
    row = 0
    for root in roots:
        row = _place(root, 0, row, cards, edges)
    columns = max((card.column for card in cards), default=0) + 1
    width = max(_left(columns) - _GAP_X + _MARGIN, 760)
    height = _HEAD + 2 * _MARGIN + row * (_CARD_H + _GAP_Y) - _GAP_Y + _FOOT
    shared = sorted({c.node.group for c in cards if c.node.shared and c.node.group is not None})
    colours = {group: _GROUPS[index % len(_GROUPS)] for index, group in enumerate(shared)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="{_SANS}" role="img">',
        f"<title>{_TITLE}</title>",
        f"<desc>{xml_escape(escape_line(_subtitle(cards, kernel)))}</desc>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_heading(cards, kernel),
        *(_outline(group, colours[group], cards) for group in shared),
        *(_edge(above, below) for above, below in edges),
        *(line for card in cards for line in _draw_card(card, colours)),
        *_legend(cards, height - _FOOT + 14),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _place(
    node: Node, column: int, row: int, cards: list[_Card], edges: list[tuple[_Card, _Card]]
) -> int:
    """Give a node and what is below it their places; returns the first free row after them."""
    card = _Card(node, column, row, *_texts(node))
    cards.append(card)
    next_row = row
    vfs = [child for child in node.children if child.kind == "vf"]
    children = list(node.children)
    if len(vfs) > _VFS_SHOWN:
        head, _, rest = summary_of(vfs).partition(": ")
        children = [child for child in children if child.kind != "vf"]
        children.append(Node("vfs", head, name=rest, role=vfs[0].role))
    for child in children:
        first = len(cards)
        next_row = _place(child, column + 1, next_row, cards, edges)
        edges.append((card, cards[first]))
    return max(next_row, row + 1)


def _texts(node: Node) -> tuple[str, str]:
    if node.kind == "root":
        numa = "" if node.numa_node is None else f"NUMA node {node.numa_node}"
        return node.address, numa
    if node.kind == "vfs":
        return node.address, node.name or ""
    title = short(node.address)
    if node.kind == "vf":
        title = f"VF {'?' if node.number is None else node.number} · {title}"
    if node.kind == "mdev":
        return title, node.name or ""
    # The id tells more than the end of a long name.
    name = node.name or "device"
    name = name if len(name) <= _NAME_LETTERS else name[: _NAME_LETTERS - 1].rstrip() + "…"
    return title, f"{name} [{node.pci_id or '????:????'}]"


def _draw_card(card: _Card, colours: dict[int, str]) -> Iterator[str]:
    node = card.node
    edge, fill, _ = _ROLES.get(node.role or "", ("#24292f", "#24292f", ""))
    root = node.kind == "root"
    dashed = ' stroke-dasharray="5 3"' if node.kind in ("vf", "vfs") else ""
    yield (
        f'<rect x="{card.x}" y="{card.y}" width="{card.width}" height="{_CARD_H}" rx="7" '
        f'fill="{fill}" stroke="{edge}" stroke-width="1.2"{dashed}/>'
    )
    if not root:
        yield (
            f'<path d="M{card.x + 7} {card.y} h-0 a7 7 0 0 0 -7 7 v{_CARD_H - 14} '
            f'a7 7 0 0 0 7 7 z" fill="{edge}"/>'
        )
    x = card.x + 17.0
    ink = "#ffffff" if root else "#1f2328"
    size = 10.0 if node.kind == "mdev" else 13.0
    baseline = card.y + (19 if card.subtitle else 28)
    yield _text(x, baseline, card.title, size, ink, mono=True, bold=True, room=card.width - 28)
    room = card.width - 26.0
    yield _text(x, card.y + 36, card.subtitle, 11, "#ffffff" if root else "#57606a", room=room)
    right = card.x + card.width - 10.0
    if node.group is not None and node.kind != "vfs":
        # A UUID takes the whole line.
        yield from _chip(node.group, right, card.y + (24 if node.kind == "mdev" else 7), colours)
        right -= _chip_width(node.group) + 7
    if node.kind in ("endpoint", "vf", "bridge"):
        driver = node.driver or "no driver"
        room = right - x - 8.2 * len(card.title)
        yield _text(right, card.y + 19, driver, 11, edge, anchor="end", room=room, bold=True)


def _chip_width(group: int) -> int:
    return 7 * len(f"group {group}") + 10


def _chip(group: int, right: float, top: int, colours: dict[int, str]) -> Iterator[str]:
    """The group's number in a pill; filled where the group is shared."""
    colour = colours.get(group, "#57606a")
    wide = _chip_width(group)
    yield (
        f'<rect x="{right - wide:g}" y="{top}" width="{wide}" height="16" rx="8" '
        f'fill="{colour if group in colours else "#ffffff"}" stroke="{colour}"/>'
    )
    ink = "#ffffff" if group in colours else colour
    middle = right - wide / 2
    yield _text(middle, top + 12, f"group {group}", 10.5, ink, anchor="middle", room=wide)


def _text(
    x: float,
    y: float,
    text: str,
    size: float,
    colour: str,
    *,
    room: float,
    mono: bool = False,
    bold: bool = False,
    anchor: str = "start",
) -> str:
    """A line of text, cut to `room` pixels by the mean width of a letter."""
    letters = max(int(room / (size * (0.62 if mono else 0.56))), 3)
    text = escape_line(text)
    if len(text) > letters:
        text = text[: letters - 1] + "…"
    family = f' font-family="{_MONO}"' if mono else ""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" '
        f'text-anchor="{anchor}"{family}{weight}>{xml_escape(text)}</text>'
    )


def _edge(above: _Card, below: _Card) -> str:
    """From the right of a bridge to the left of what is behind it, round one corner."""
    x1, y1 = above.x + above.width, above.y + _CARD_H / 2
    x2, y2 = below.x, below.y + _CARD_H / 2
    middle = x1 + _GAP_X / 2
    if y1 == y2:
        path = f"M{x1} {y1:g} H{x2}"
    else:
        path = f"M{x1} {y1:g} H{middle:g} V{y2 - 8:g} q0 8 8 8 H{x2}"
    return f'<path d="{path}" fill="none" stroke="#8c959f" stroke-width="1.3"/>'


def _outline(group: int, colour: str, cards: list[_Card]) -> str:
    """A band behind the members of a shared group: one for each run of neighbouring cards."""
    members = [card for card in cards if card.node.group == group]
    rects = []
    for run in _runs(members, cards):
        left, top = min(card.x for card in run) - 9, min(card.y for card in run) - 6
        right = max(card.x for card in run) + _CARD_W + 9
        bottom = max(card.y for card in run) + _CARD_H + 6
        rects.append(
            f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" rx="12" '
            f'fill="{colour}" fill-opacity="0.10" stroke="{colour}" stroke-width="1.4" '
            'stroke-dasharray="7 4"/>'
        )
    return "\n".join(rects)


def _runs(members: list[_Card], cards: list[_Card]) -> list[list[_Card]]:
    """All members in one rectangle if no other card lies in it, else one rectangle a column's run.

    Members that are one above the other without a foreign card between stay together.
    """
    inside = [
        card
        for card in cards
        if min(m.column for m in members) <= card.column <= max(m.column for m in members)
        and min(m.row for m in members) <= card.row <= max(m.row for m in members)
    ]
    if all(card.node.group == members[0].node.group for card in inside):
        return [members]
    runs: list[list[_Card]] = []
    for column in sorted({card.column for card in members}):
        here = sorted((card for card in members if card.column == column), key=lambda c: c.row)
        runs.append(here[:1])
        for above, below in pairwise(here):
            between = (c for c in cards if c.column == column and above.row < c.row < below.row)
            if any(between):
                runs.append([below])
            else:
                runs[-1].append(below)
    return runs


def _subtitle(cards: list[_Card], kernel: str | None) -> str:
    functions = sum(card.node.kind in ("endpoint", "bridge", "vf") for card in cards)
    groups = {card.node.group for card in cards if card.node.group is not None}
    where = "" if kernel is None else f" · Linux {kernel}"
    told = f"{len(groups)} IOMMU groups" if groups else "no IOMMU groups"
    return f"{functions} PCI functions · {told}{where}"


def _heading(cards: list[_Card], kernel: str | None) -> Iterator[str]:
    yield _text(_MARGIN, 40, _TITLE, 20, "#1f2328", bold=True, room=600)
    yield _text(_MARGIN, 62, _subtitle(cards, kernel), 12.5, "#57606a", room=700)


def _legend(cards: list[_Card], y: int) -> Iterator[str]:
    present = {card.node.role for card in cards}
    x: float = _MARGIN
    for role, (edge, fill, meaning) in _ROLES.items():
        if role not in present:
            continue
        yield (
            f'<rect x="{x:g}" y="{y}" width="16" height="16" rx="4" fill="{fill}" '
            f'stroke="{edge}" stroke-width="1.4"/>'
        )
        yield _text(x + 23, y + 12.5, meaning, 12, "#57606a", room=200)
        x += 46 + 6.2 * len(meaning)
    if any(card.node.shared for card in cards):
        yield (
            f'<rect x="{x:g}" y="{y}" width="22" height="16" rx="5" fill="{_GROUPS[0]}" '
            f'fill-opacity="0.10" stroke="{_GROUPS[0]}" stroke-dasharray="5 3"/>'
        )
        yield _text(x + 29, y + 12.5, "one group: passed through together", 12, "#57606a", room=260)
