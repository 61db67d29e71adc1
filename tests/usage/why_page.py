"""The table of blocker kinds in docs/why.md, written from the one in the code.

`python -m tests.usage.why_page` writes it anew.
"""

from __future__ import annotations

from pathlib import Path

from vfiotool.usage.blocker import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "why.md"
_HEAD = "| kind | what it says | where it is seen |\n| --- | --- | --- |\n"


def with_kinds(page: str) -> str:
    """The page with the table as the code has it now."""
    before, _, rest = page.partition(_HEAD)
    lines = rest.splitlines(keepends=True)
    after = next(n for n, line in enumerate(lines) if not line.startswith("|"))
    rows = "".join(f"| `{kind.name}` | {kind.says} | {kind.seen} |\n" for kind in KINDS.values())
    return before + _HEAD + rows + "".join(lines[after:])


if __name__ == "__main__":
    PAGE.write_text(with_kinds(PAGE.read_text()))
