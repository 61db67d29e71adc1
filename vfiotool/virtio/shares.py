"""Who may do how much: the groups of an exports file, and the shares of its exports in them."""

from __future__ import annotations

from collections.abc import Iterable

from vfiotool.native.limits import UNLIMITED, Level, LimitGroup, LimitShare, Rate
from vfiotool.virtio.exports import GroupSettings


class Groups:
    """The groups that exports name. One that no table defines limits nothing. Close it when no
    share is set any more."""

    def __init__(self) -> None:
        self._groups: dict[str, LimitGroup] = {}
        self.rates: dict[str, Rate] = {}

    def follow(self, wanted: Iterable[GroupSettings]) -> None:
        """Change the groups' limits to these; those that are not named limit nothing any more."""
        rates = {group.name: group.rate for group in wanted}
        for name in self._groups.keys() | rates.keys():
            self.set(name, rates.get(name, UNLIMITED))

    def set(self, name: str, rate: Rate) -> None:
        if name not in self._groups:
            self._groups[name] = LimitGroup(rate)
        elif self.rates[name] != rate:
            self._groups[name].set(rate)
        self.rates[name] = rate

    def apply(self, share: LimitShare, rate: Rate, weight: int, group: str | None) -> None:
        """Limit a share by its own rate and, if it is in a group, by the group's."""
        if group is not None and group not in self._groups:
            self.set(group, UNLIMITED)
        found = None if group is None else self._groups[group]
        share.set(rate, weight=weight, group=found)

    def levels(self, now: int) -> dict[str, Level]:
        """What each group has taken and not earned yet."""
        return {name: group.level(now=now) for name, group in self._groups.items()}

    def set_levels(self, levels: dict[str, Level], now: int) -> None:
        """Have groups go on from what they had at `now`; those that are not here are left out."""
        for name, level in levels.items():
            if name in self._groups:
                self._groups[name].set_level(level, now=now)

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        self._groups.clear()
        self.rates.clear()
