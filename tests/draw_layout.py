"""Draws the package's import graph, made from the code: `python -m tests.draw_layout [FILE]`.

A box is a package, at its level; an arrow says that some file of the upper one imports from the
lower one. Arrows that another path implies are left out, so that the picture stays readable: the
rules themselves are held by `test_layout.py` for every single import.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

from tests.layout import DEVICE_COLUMN, HOST_COLUMN, ROOT, Tree, package_of

PICTURE = ROOT / "docs" / "import-graph.svg"
BOX_WIDTH, BOX_HEIGHT, ROW, GAP = 150, 46, 84, 24
COLUMN_WIDTH = 3 * (BOX_WIDTH + GAP)
MARGIN = 20
# Beside the two columns; only the command line imports it.
ASIDE = (("lab",),)


def package_arrows(tree: Tree) -> dict[str, set[str]]:
    """Which package imports from which, without the whole's own `__init__` and `__main__`."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for item in tree.imports:
        source, target = package_of(item.module), package_of(item.target)
        if source and target and source != target:
            arrows[source].add(target)
    return arrows


def without_implied(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer path stands for."""

    def reach(start: str) -> set[str]:
        found: set[str] = set()
        pending = list(arrows.get(start, ()))
        while pending:
            package = pending.pop()
            if package not in found:
                found.add(package)
                pending += arrows.get(package, ())
        return found

    return {
        source: {
            target
            for target in targets
            if not any(target in reach(other) for other in targets - {target})
        }
        for source, targets in arrows.items()
    }


def places(present: set[str]) -> dict[str, tuple[int, int]]:
    """The upper left corner of each package's box: the command line on top, errors at the foot."""
    found: dict[str, tuple[int, int]] = {}
    height = len(HOST_COLUMN) - 1
    for left, column in ((0, HOST_COLUMN), (COLUMN_WIDTH, DEVICE_COLUMN), (COLUMN_WIDTH, ASIDE)):
        for level, names in enumerate(column):
            row = height - level if column is not ASIDE else 2
            here = [name for name in names if name in present and name not in found]
            for number, name in enumerate(here):
                x = left + MARGIN + number * (BOX_WIDTH + GAP)
                found[name] = (x, MARGIN + row * ROW)
    return found


def draw(tree: Tree) -> str:
    """The picture as SVG; the same tree gives the same text."""
    arrows = package_arrows(tree)
    present = {package_of(module) for module in tree.modules} - {""}
    at = places(present)
    files: dict[str, int] = defaultdict(int)
    for module in tree.modules:
        files[package_of(module)] += 1
    width = max(x for x, _ in at.values()) + BOX_WIDTH + MARGIN
    height = len(HOST_COLUMN) * ROW + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="14">',
        "<title>vfiotool's packages and their imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#667"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for source, targets in sorted(without_implied(arrows).items()):
        for target in sorted(targets):
            (x1, y1), (x2, y2) = at[source], at[target]
            parts.append(
                f'<path d="M{x1 + BOX_WIDTH // 2} {y1 + BOX_HEIGHT} L{x2 + BOX_WIDTH // 2} {y2}"'
                ' stroke="#667" fill="none" marker-end="url(#tip)"/>'
            )
    for name, (x, y) in sorted(at.items()):
        parts.append(
            f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"'
            ' fill="#eef2f8" stroke="#345"/>'
            f'<text x="{x + BOX_WIDTH // 2}" y="{y + 28}" text-anchor="middle">'
            f"{escape(name)}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE).write_text(draw(Tree()))
