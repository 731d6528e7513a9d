"""Support items segmented like queries, each guided by other patients: by them a support set tells what results of the
network are worth.

In: an encoded support bank. Out: what the network finds in its items, and what is learned of that, by group.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sam2sgp.support.bank import Retrieved, SupportBank
from sam2sgp.support.sampler import SupportSampler

Lesson = TypeVar("Lesson")


class Judgement(NamedTuple):
    """What was found in an item, (C,) each, or in n items, (n, C) each.

    evidence: for the classes, see `sam2sgp.inferers.object_gate`. size: pixels of the class in the item. found: pixels
    found. score: object score. overlap: pixels found that are of the class.
    """

    evidence: Tensor
    size: Tensor
    found: Tensor
    score: Tensor
    overlap: Tensor


# (number of an item, what guides it) -> judgement of it.
Judge = Callable[[int, list[Retrieved]], Judgement]


class ItemsAsQueries:
    """Judges items of an encoded bank, and remembers it as long as they are guided by the same items.

    Args:
        bank: the support bank. sampler: chooses the items that guide an item as a query.
    """

    def __init__(self, bank: SupportBank, sampler: SupportSampler) -> None:
        self.bank = bank
        self.sampler = sampler
        self.forget()

    def forget(self) -> None:
        """Forget what was found, because the network has changed."""
        self._version: int | None = None
        self._judged: dict[int, Judgement] = {}
        # Judgements by what they depend on: of this version of the bank, and of the one before.
        self._known: dict[tuple, Judgement] = {}
        self._known_before: dict[tuple, Judgement] = {}

    @property
    def judged(self) -> dict[int, Judgement]:
        """What is known of items of the bank as it is now, by number."""
        return self._judged if self._version == self.bank.version else {}

    def __call__(self, judge: Judge, numbers: Sequence[int]) -> Judgement:
        """Judgements of some items, on the CPU."""
        bank = self.bank
        if self._version != bank.version:
            self._version = bank.version
            self._known, self._known_before = {}, self._known
            self._judged = {}
        found = []
        for number in numbers:
            retrieved = bank.retrieve_for(number, self.sampler)
            guides = ((entry.value, *(bank.items[i].content for i in entry.index[0])) for entry in retrieved)
            key = bank.items[number].content, tuple(bank.class_values), *guides
            known = self._known.get(key) or self._known_before.get(key)
            self._known[key] = known or Judgement(*(values.cpu() for values in judge(number, retrieved)))
            self._judged[number] = self._known[key]
            found.append(self._known[key])
        return Judgement(*map(torch.stack, zip(*found, strict=True)))


class TaughtByItems(ABC, Generic[Lesson]):
    """What the items of an encoded bank teach, by group; learned again when the bank has changed.

    Args:
        items: the bank's items as queries; several lessons may share them.
    """

    def __init__(self, items: ItemsAsQueries) -> None:
        self.items = items
        self.bank = items.bank
        self.sampler = items.sampler
        self.forget()

    def forget(self) -> None:
        """Forget what was learned, because the network has changed."""
        self.items.forget()
        self._learned: dict[str | None, Lesson] = {}
        self._groups: set[str] = set()
        self._version: int | None = None

    def __call__(self, judge: Judge, group: str | None = None) -> Lesson:
        """What was learned.

        Args:
            judge: segments an item as a query.
            group: where the bank holds items of this group with a class, only those of this group teach.
        """
        bank = self.bank
        if self._version != bank.version:
            self._version, self._learned = bank.version, {}
            self._groups = {item.group for item in bank.items if item.info.holds}
        group = group if group in self._groups else None
        if group not in self._learned:
            members = [number for number, item in enumerate(bank.items) if group is None or item.group == group]
            self._learned[group] = self._learn(judge, members)
        return self._learned[group]

    @abstractmethod
    def _learn(self, judge: Judge, members: list[int]) -> Lesson:
        """What some of the items teach; `members` are their numbers."""
