"""`completion`, `help`, `version`: about the program itself."""

from __future__ import annotations

from typing import Annotated

import typer

from vfiotool import __version__
from vfiotool.cli import candidates, completing, output, program
from vfiotool.cli.commands import COMMANDS
from vfiotool.cli.context import area, examples
from vfiotool.cli.globals import Globals

app = area()


@app.command(
    "completion",
    epilog=examples(
        "vfiotool completion bash > /etc/bash_completion.d/vfiotool",
        "source <(vfiotool completion zsh)",
        "vfiotool completion fish > ~/.config/fish/completions/vfiotool.fish",
    ),
)
def completion(
    shell: Annotated[
        str,
        typer.Argument(
            metavar="bash|zsh|fish",
            help="The shell.",
            autocompletion=candidates.words(*completing.SHELLS),
        ),
    ],
) -> int:
    """Print the script that makes a shell complete vfiotool's commands, options and devices."""
    output.text(completing.script(shell))
    return 0


@app.command("help", epilog=examples("vfiotool help bind", "vfiotool help vf set"))
def show_help(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND…", help="A command.", autocompletion=candidates.words(*COMMANDS)
        ),
    ] = None,
) -> int:
    """Show the help of a command, or of the whole program: as COMMAND --help."""
    return program.run([*(words or ()), "--help"], Globals())


@app.command("version")
def version() -> int:
    """Print the version."""
    output.write(f"vfiotool {__version__}")
    return 0
