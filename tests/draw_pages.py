"""Write what docs/ has from the code (man, completions, commands.md, api.md).

`python -m tests.draw_pages`
"""

from __future__ import annotations

from pathlib import Path

from tests import draw_api
from vfiotool.cli.completing import SHELLS
from vfiotool.cli.pages import man_pages, reference

ROOT = Path(__file__).resolve().parent.parent
# As each shell looks for it in its folder of completions.
FILES = {"bash": "vfiotool", "zsh": "_vfiotool", "fish": "vfiotool.fish"}


def texts() -> dict[Path, str]:
    """Every generated file below docs/ with its text."""
    found = {ROOT / "docs" / "man" / name: text for name, text in man_pages().items()}
    for shell, name in FILES.items():
        found[ROOT / "docs" / "completions" / name] = SHELLS[shell]
    found[ROOT / "docs" / "commands.md"] = reference()
    found[ROOT / "docs" / "api.md"] = draw_api.reference()
    return found


def main() -> None:
    wanted = texts()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for folder in ("man", "completions"):
        for path in (ROOT / "docs" / folder).iterdir():
            if path not in wanted:
                path.unlink()


if __name__ == "__main__":
    main()
