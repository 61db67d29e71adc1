"""Completing command lines: what a shell asks (`vfiotool _complete`), and the scripts that ask."""

from __future__ import annotations

from collections.abc import Sequence

from typer._click.shell_completion import _resolve_context, _resolve_incomplete

from vfiotool.cli import output, program
from vfiotool.cli.globals import Globals
from vfiotool.errors import UsageError

# bash takes a word apart at colons and equal signs: what is before the last one stays as it is.
_BASH = """\
_vfiotool() {
    local line=${COMP_LINE:0:COMP_POINT} incomplete="" prefix="" candidate rest
    local -a typed
    read -ra typed <<< "$line"
    if [[ $line != *[[:space:]] ]]; then
        incomplete=${typed[-1]}
        unset 'typed[-1]'
    fi
    [[ $COMP_WORDBREAKS == *:* ]] && prefix=${incomplete%"${incomplete##*[:=]}"}
    COMPREPLY=()
    while IFS=$'\\t' read -r candidate rest; do
        COMPREPLY+=("${candidate#"$prefix"}")
    done < <("${typed[0]}" _complete "$incomplete" "${typed[@]:1}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[:/=] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _vfiotool vfiotool
"""
_ZSH = """\
#compdef vfiotool
_vfiotool() {
    local -a found open
    local value help
    while IFS=$'\\t' read -r value help; do
        if [[ $value == *[:/=] ]]; then
            open+=("${value//:/\\\\:}${help:+:$help}")
        else
            found+=("${value//:/\\\\:}${help:+:$help}")
        fi
    done < <("${words[1]}" _complete "${words[CURRENT]}" "${(@)words[2,CURRENT-1]}" 2>/dev/null)
    (( ${#found} )) && _describe -V vfiotool found
    (( ${#open} )) && _describe -V vfiotool open -S ''
    (( ${#found} || ${#open} ))
}
# Loaded from fpath this file is the function's first call; sourced it only declares it.
if [[ ${funcstack[1]} == _vfiotool ]]; then
    _vfiotool "$@"
else
    compdef _vfiotool vfiotool
fi
"""
_FISH = """\
function _vfiotool
    set -l typed (commandline -opc)
    set -l current (commandline -ct)
    $typed[1] _complete "$current" $typed[2..-1] 2>/dev/null
end
complete -c vfiotool -f -a '(_vfiotool)'
"""
SHELLS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str) -> str:
    """The completion script of a shell. Raises UsageError for one that there is none for."""
    found = SHELLS.get(shell)
    if found is None:
        raise UsageError(
            f"there is no completion for {shell[:40]!r}", hint=f"one of {', '.join(SHELLS)}"
        )
    return found


def complete(incomplete: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """What may stand for `incomplete` after `words` (without the program's name), with a few words
    on each."""
    whole = program.program()
    context = _resolve_context(whole, {"obj": Globals()}, "vfiotool", list(words))
    what, rest = _resolve_incomplete(context, list(words), incomplete)
    found = [(item.value, item.help or "") for item in what.shell_complete(context, rest)]
    # `--root=` stays before what completes it.
    before = incomplete[: len(incomplete) - len(rest)] if incomplete.endswith(rest) else ""
    return [(before + value, help) for value, help in found]


def main(arguments: Sequence[str]) -> int:
    """Print a candidate a line, its description behind a tab: what the scripts read."""
    incomplete, *words = arguments or ("",)
    try:
        found = complete(incomplete, words)
    except Exception:
        # A line that is wrong so far has no candidates, and a prompt is no place to say why.
        return 1
    for value, help in found:
        line = output.escape_line(help)
        output.forward(f"{output.escape_line(value)}\t{line}\n".encode())
    return 0
