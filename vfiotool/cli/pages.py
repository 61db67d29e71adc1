"""Manual pages and the command reference, made from the table of commands and the declarations.

A page tells what the help tells, in roff (man(7)) and in Markdown: what a command takes is what its
own function declares, and nothing is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from typer.core import TyperArgument

from vfiotool import __version__
from vfiotool.cli import program
from vfiotool.cli.commands import COMMANDS, sections

EXIT_CODES = (
    (0, "done, or nothing to do"),
    (1, "the answer is no, or there is a difference"),
    (2, "bad usage, bad policy, bad root"),
    (3, "no such device, group, type; or a selector that names several"),
    (4, "refused: it would hurt the host"),
    (5, "the kernel refused or failed; what was done has been rolled back"),
    (6, "stuck or half done; vfiotool recover comes next"),
    (7, "not permitted"),
    (8, "this host or kernel has no such facility"),
    (70, "a fault of vfiotool's own"),
)
FILES = (
    ("/run/vfiotool", "journal, locks and what each device was bound to, until reboot"),
    ("/etc/vfiotool", "the applied policy, and the policy of vfiotool boot enable"),
    ("/var/log/vfiotool/changes.log", "every change, by whom, for vfiotool history --since"),
)
NO_SETTINGS = (
    "There is no file of settings: defaults are those that each command's help shows, the driver "
    "is the one that the kernel's modules offer for a device, and what is wanted of a host stands "
    "in a policy. A change takes no setting from its caller's environment."
)
ENVIRONMENT = (
    ("NO_COLOR", "no colours"),
    ("FORCE_COLOR", "colours in files and pipes too"),
    ("TERM", "dumb: neither colours, pages nor progress"),
    ("LC_ALL", "C or POSIX: only ASCII is printed"),
    ("COLUMNS", "the width of a terminal, instead of what it tells"),
    ("PAGER", "what long listings are shown with on a terminal; root is shown them with less"),
    ("XDG_CACHE_HOME", "where the lab keeps QEMU, kernels and guests"),
    ("XDG_RUNTIME_DIR", "where a user's servers keep their control sockets"),
)


@dataclass(frozen=True)
class Page:
    """One command as its help shows it: `rows` are (what is typed, what it means)."""

    name: str
    usage: str
    summary: str
    text: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]
    below: tuple[Page, ...] = field(default=())


def read_page(name: str) -> Page:
    """The page of a command of the table, with its subcommands."""
    whole = program.program()
    command = program.load(name)
    return _page(command, f"vfiotool {name}", whole, COMMANDS[name][2])


def _page(command: Any, name: str, parent: Any, summary: str | None = None) -> Page:
    context = command.make_context(name, [], resilient_parsing=True)
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    arguments: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None or getattr(parameter, "hidden", False):
            continue
        row = (record[0], " ".join(record[1].split()))
        (arguments if isinstance(parameter, TyperArgument) else options).append(row)
    below = tuple(
        _page(inner, f"{name} {key}", command)
        for key, inner in getattr(command, "commands", {}).items()
    )
    pieces = " ".join(command.collect_usage_pieces(context))
    return Page(
        name=name,
        usage=f"{name} {pieces}",
        summary=summary or paragraphs[0].partition(". ")[0].rstrip("."),
        text=tuple(part for part in paragraphs if part),
        arguments=tuple(arguments),
        options=tuple(options),
        examples=_examples(command.epilog or ""),
        below=below,
    )


def _examples(epilog: str) -> tuple[str, ...]:
    lines = epilog.partition("Examples:")[2].splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _global_rows() -> list[tuple[str, str]]:
    whole = program.program()
    context = whole.make_context("vfiotool", [], resilient_parsing=True)
    rows = []
    for parameter in whole.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            rows.append((record[0], " ".join(record[1].split())))
    return rows


# --- roff, man(7)


def man_pages() -> dict[str, str]:
    """Every page by its file's name: `vfiotool.1`, `vfiotool-bind.1`, ..."""
    found = {"vfiotool.1": _main_page()}
    for name in COMMANDS:
        found[f"vfiotool-{name}.1"] = _command_page(read_page(name))
    return found


def roff(text: str) -> str:
    """Text for roff: its own characters escaped, a leading dot or quote made harmless."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped


def _title(name: str) -> str:
    return f'.TH "{name.upper()}" 1 "" "vfiotool {__version__}" "vfiotool"'


def _rows(rows: Iterator[tuple[str, str]] | Any) -> Iterator[str]:
    for typed, meaning in rows:
        yield ".TP"
        yield f".B {roff(typed)}"
        yield roff(meaning) if meaning else "\\&"


def _main_page() -> str:
    lines = [_title("vfiotool"), ".SH NAME"]
    lines.append(roff("vfiotool - hand Linux devices to virtual machines and drivers (VFIO)"))
    lines += [".SH SYNOPSIS", ".B vfiotool", roff("[--root PATH] [--json] [-q] COMMAND ...")]
    lines.append(".SH DESCRIPTION")
    lines.append(
        roff(
            "Shows what can be passed through and what stands against it, detaches devices from "
            "their host drivers and gives them back, makes virtual functions, mediated and vDPA "
            "devices, applies policies, checks and prints what a hypervisor's configuration "
            "needs, and drives and serves devices from user space."
        )
    )
    for section, rows in sections():
        lines.append(f'.SH "{section.upper()}"')
        lines += _rows((f"vfiotool-{name}(1)", help) for name, help in rows)
    lines += [".SH OPTIONS", *_rows(_global_rows())]
    lines += ['.SH "EXIT STATUS"', *_rows((str(code), text) for code, text in EXIT_CODES)]
    lines += [".SH FILES", roff(NO_SETTINGS), *_rows(FILES)]
    lines += [".SH ENVIRONMENT", *_rows(ENVIRONMENT)]
    lines += _see_also(["vfiotool-why", "vfiotool-bind", "vfiotool-vm"], ["lspci(8)", "virsh(1)"])
    return "\n".join(lines) + "\n"


def _command_page(page: Page) -> str:
    name = page.name.replace(" ", "-")
    lines = [_title(name), ".SH NAME"]
    lines.append(roff(f"{name} - {page.summary[:1].lower()}{page.summary[1:].rstrip('.')}"))
    lines += [".SH SYNOPSIS"]
    leaves = list(_leaves(page))
    for number, leaf in enumerate(leaves):
        if number:
            lines.append(".br")
        lines.append(f".B {roff(leaf.name)}")
        lines.append(roff(leaf.usage.removeprefix(leaf.name).strip() or "\\&"))
    lines.append(".SH DESCRIPTION")
    lines += _paragraphs(page.text)
    if not page.below:
        lines += _parts(page)
    for leaf in leaves if page.below else ():
        lines.append(f'.SH "{leaf.name.removeprefix("vfiotool ").upper()}"')
        lines += _paragraphs(leaf.text)
        lines += _parts(leaf, ".SS")
    lines += ['.SH "EXIT STATUS"', "See", ".BR vfiotool (1)."]
    lines += _see_also(["vfiotool"], [])
    return "\n".join(lines) + "\n"


def _paragraphs(text: tuple[str, ...]) -> Iterator[str]:
    for number, part in enumerate(text):
        if number:
            yield ".PP"
        yield roff(part)


def _leaves(page: Page) -> Iterator[Page]:
    if not page.below:
        yield page
    for inner in page.below:
        yield from _leaves(inner)


def _parts(page: Page, macro: str = ".SH") -> Iterator[str]:
    for title, rows in (("Arguments", page.arguments), ("Options", page.options)):
        if rows:
            yield f"{macro} {title.upper() if macro == '.SH' else title}"
            yield from _rows(rows)
    if page.examples:
        yield f"{macro} {'EXAMPLES' if macro == '.SH' else 'Examples'}"
        yield ".nf"
        yield from (roff(line) for line in page.examples)
        yield ".fi"


def _see_also(own: list[str], others: list[str]) -> Iterator[str]:
    yield '.SH "SEE ALSO"'
    names = [*(f"{name}(1)" for name in own), *others]
    for number, name in enumerate(names):
        head, _, section = name.partition("(")
        comma = "," if number < len(names) - 1 else ""
        yield f".BR {roff(head)} ({section}{comma}"


# --- Markdown


def reference() -> str:
    """docs/commands.md: every command, its options and examples."""
    lines = [
        "# Commands",
        "",
        "Made by `python -m tests.draw_pages` from what the commands declare; `vfiotool COMMAND",
        "--help` and the manual pages say the same. The global options are taken before and after",
        "the command's name:",
        "",
        *_table(_global_rows()),
        "",
        "Exit codes:",
        "",
        *_table((str(code), text) for code, text in EXIT_CODES),
        "",
        NO_SETTINGS,
        "",
        *_table((*FILES, *ENVIRONMENT)),
    ]
    for section, rows in sections():
        lines += ["", f"## {section}"]
        for name, _ in rows:
            for leaf in _leaves(read_page(name)):
                lines += ["", *_markdown(leaf)]
    return "\n".join(lines) + "\n"


def _table(rows: Any) -> Iterator[str]:
    yield "| | |"
    yield "| --- | --- |"
    for typed, meaning in rows:
        yield f"| `{_cell(typed)}` | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return re.sub(r"\|", r"\\|", text)


def _markdown(page: Page) -> Iterator[str]:
    yield f"### {page.name}"
    yield ""
    yield f"`{page.usage}`"
    for part in page.text:
        yield ""
        yield part
    rows = [*page.arguments, *page.options]
    if rows:
        yield ""
        yield from _table(rows)
    if page.examples:
        yield ""
        yield "```sh"
        yield from page.examples
        yield "```"
