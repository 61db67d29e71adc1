"""The README's way of a disk to a virtual machine that boots twice, command by command."""

from __future__ import annotations

import re

from tests.lab import tour

MACHINE = "full"
KERNELS = ("6.12",)
PROOF = "long: a guest within a guest starts twice"
LIMIT_S = 7200.0


def test_each_command_prints_what_the_readme_shows_and_the_disk_boots_twice() -> None:
    printed = {}
    wrong = []
    for step in tour.section("A disk for a virtual machine"):
        text = tour.run(step.command)
        printed[step.command] = text
        wrong += [words] if (words := tour.differs(step, text)) is not None else []
    assert not wrong, "\n\n".join(wrong)
    (digest,) = (text.split()[0] for line, text in printed.items() if "sha256sum" in line)
    (ran,) = (text for line, text in printed.items() if " vm run " in line)
    assert re.findall(r"^start (\d) +booted", ran, re.MULTILINE) == ["1", "2"], ran
    assert ran.count(f"sha256 {digest[:16]}") == 2, ran
    assert re.search(r"^ +0000:03:00\.0 +ready", ran, re.MULTILINE), ran
