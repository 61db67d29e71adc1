"""Functions that nothing hangs on are judged without asking each facility about them: the answers
have to be those of the whole survey, on every host that is kept here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.usage.test_unseen import FailingTree, quiet_host
from vfiotool.devices.pci import PciFunction, list_addresses, read_functions
from vfiotool.host.host import Host
from vfiotool.snapshot.load import open_root
from vfiotool.usage import survey
from vfiotool.usage.blocker import Usage
from vfiotool.usage.sight import Sight

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
HOSTS = sorted((*(FIXTURES / "hosts").iterdir(), *(FIXTURES / "field").glob("*/*.txt")))


def usages(host: Host, functions: tuple[PciFunction, ...]) -> dict[str, Usage]:
    sight = Sight(host, {function.address: function for function in functions})
    return {item.address: survey.look(sight, item.address, item) for item in functions}


@pytest.mark.parametrize("path", HOSTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_short_way_and_the_whole_survey_agree(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = open_root(str(path))
    functions = read_functions(host, list_addresses(host), links=False)
    short = usages(host, functions)
    monkeypatch.setattr(survey, "may_be_used", lambda *_: True)
    whole = usages(host, functions)
    for address, usage in whole.items():
        # What was not looked at of a function that has no part in it may be missing, not more.
        assert set(short[address].unknown) == set(usage.unknown), address
        assert set(short[address].blockers) == set(usage.blockers), address


def test_a_driver_that_could_not_be_read_is_not_absent() -> None:
    small = quiet_host()
    tree = FailingTree(small)
    address = next(iter(list_addresses(Host(tree, live=True, name="live"))))
    tree.failing = ("readlink", f"/sys/bus/pci/devices/{address}/driver")
    host = Host(tree, live=True, name="live")
    (function,) = read_functions(host, [address])
    assert function.unread == ("driver",)
    found = usages(host, (function,))[address]
    assert "unseen" in {blocker.kind for blocker in found.blockers}
