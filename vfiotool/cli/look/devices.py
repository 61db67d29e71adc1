"""`vfiotool devices`: every function with all that is known of it, without typer's start-up."""

from __future__ import annotations

import sys

from vfiotool.cli.halves import in_halves
from vfiotool.devices.as_json import FunctionWriter
from vfiotool.devices.details import DetailReader
from vfiotool.devices.names import read_names
from vfiotool.devices.pci import Address, list_addresses
from vfiotool.errors import NotFound
from vfiotool.host.host import Host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def run_devices(host: Host, selectors: Sequence[str], as_json: bool) -> int:
    """Print the functions that the selectors name, or all, and return the exit code.

    Raises as `selector.resolve_all`; a selector that names several functions lists them all.
    """
    chosen = _select(host, selectors) if selectors else list_addresses(host)
    if as_json:
        _print_json(host, chosen)
    else:
        from vfiotool.cli.look.show import print_devices

        print_devices(host, chosen)
    return 0


def _select(host: Host, selectors: Sequence[str]) -> list[str]:
    """The functions that the selectors name, each once, in the order of the selectors."""
    from vfiotool.devices.selector import resolve_all

    found = [name for text in selectors for name in resolve_all(host, text)]
    for name in found:
        if not Address.is_address(name):
            hint = f"vfiotool show {name}"
            raise NotFound(f"{name} is no PCI function", hint=hint, device=name)
    return list(dict.fromkeys(found))


def _print_json(host: Host, chosen: Sequence[str]) -> None:
    """The contract's `devices` object, one function a line: `jq` and `diff` both like that."""
    from vfiotool.usage.standing import Standings

    reader, writer, standings = (
        DetailReader(host),
        FunctionWriter(read_names(host)),
        Standings(host),
    )

    def read(addresses: Sequence[str]) -> str:
        return ",\n".join(
            writer.text(function, details, standings.of(function).as_json())
            for function, details in reader.read_all(addresses)
        )

    sys.stdout.write('{"format_version": "1.0", "devices": [')
    separator = "\n"
    for text in in_halves(host, chosen, read):
        if text:
            sys.stdout.write(separator + text)
            separator = ",\n"
    sys.stdout.write("\n]}\n")
