"""An adaptation to the approved labels, published with the weights, while labels come and go.

    <version>/adaptation.json, correctors.safetensors    as `sam2sgp.adaptation.store` writes them
    <version>/adapted_to.json                            what it was made for, see `AdaptedTo`

It counts as long as the support set has the classes that it was made for: correctors know no others.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.serving.published_weights import Version
from sam2sgp.adaptation import Adaptation, store
from sam2sgp.adaptation.support_adaptation import VERSION
from sam2sgp.errors import WeightsError
from sam2sgp.files import write_text
from sam2sgp.networks import SAM2SGP
from sam2sgp.support import SupportBank

ADAPTED_TO = "adapted_to.json"
FILES = (ADAPTED_TO, store.RECORD, store.CORRECTORS)
AGAIN = "Run the training `adapt` again."
NAMED = 5


@dataclass(frozen=True)
class AdaptedTo:
    """The support set that an adaptation was made for.

    classes: names by value, which JSON has as text. preprocessing: hash of the bank's. groups: of each support item, by
    its content. cases: names of the labelled images. method: version of the adaptation that was made.
    """

    classes: dict[str, str]
    preprocessing: str
    groups: dict[str, str]
    cases: list[str]
    method: int

    @classmethod
    def of(cls, bank: SupportBank, owners: list[str]) -> "AdaptedTo":
        """A bank, and the group of each of its items."""
        groups = {item.content: owner for item, owner in zip(bank.items, owners, strict=True)}
        cases = sorted({item.case["name"] for item in bank.items})
        return cls(_classes(bank), bank.settings, groups, cases, VERSION)

    @classmethod
    def read(cls, version: Version) -> "AdaptedTo":
        """That of the adaptation published with weights.

        Raises:
            WeightsError: it can't be read.
        """
        folder = version.path.parent
        try:
            return cls(**json.loads((folder / ADAPTED_TO).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(folder, str(error)) from error

    def obstacle(self, bank: SupportBank) -> str | None:
        """Why an adaptation that was made for this can't be used with a bank, in a sentence; None: it can."""
        if self.method != VERSION:
            return f"The adaptation is not used: another release of the app made it by another method. {AGAIN}"
        classes = _classes(bank)
        if classes.keys() != self.classes.keys():
            known, found = (", ".join(names.values()) or "none" for names in (self.classes, classes))
            return (
                f"The adaptation is not used: it was made for the classes {known}, and the approved labels have "
                f"{found}. {AGAIN}"
            )
        if bank.settings != self.preprocessing:
            return f"The adaptation is not used: it was made for images that are prepared by other settings. {AGAIN}"
        return None

    def changed(self, bank: SupportBank) -> tuple[str, ...]:
        """Names of the labelled images that are not any more, with image and label, what was learned from.

        One that a bank with a limit of items has no room for counts as unchanged.
        """
        contents: dict[str, set[str]] = {}
        for item in bank.items:
            contents.setdefault(item.case["name"], set()).add(item.content)
        known = {case["name"] for case in bank.data}

        def is_same(name: str) -> bool:
            if name in contents:
                return not contents[name].isdisjoint(self.groups)
            return name in known and bank.catalogue.rules.max_items is not None

        return tuple(name for name in self.cases if not is_same(name))


@dataclass(frozen=True)
class Standing:
    """How an adaptation stands to the approved labels as they are now.

    labels: how many it learned from. changed: names of those that were corrected or removed since. later: how many came
    since. obstacle: why it is not used, None: it is.
    """

    labels: int
    changed: tuple[str, ...]
    later: int
    obstacle: str | None

    @property
    def outdated(self) -> str | None:
        """That it goes on deciding by labels that are not what they were, in a sentence; None: it doesn't."""
        if not self.changed:
            return None
        more = len(self.changed) - NAMED
        names = ", ".join(self.changed[:NAMED]) + (f" and {more} more" if more > 0 else "")
        return (
            f"Of the {_labels(self.labels)} that the adaptation learned from, {len(self.changed)} "
            f"{'was' if len(self.changed) == 1 else 'were'} corrected or removed since ({names}), and it goes on "
            f"deciding by what they were. {AGAIN}"
        )

    def told(self) -> dict[str, Any]:
        """For people and programs, as JSON types; `text` says all of it."""
        later = f" {_labels(self.later)} came later, from which it has not learned." if self.later else ""
        return {
            "labels": self.labels,
            "changed": list(self.changed),
            "later": self.later,
            "used": self.obstacle is None,
            "text": self.obstacle or self.outdated or f"Adapted to {_labels(self.labels)}.{later}",
        }


def _labels(number: int) -> str:
    return f"{number} label" if number == 1 else f"{number} labels"


@dataclass(frozen=True)
class ServedAdaptation:
    """An adaptation for the bank as it is now; what `SupportSetInferer` takes.

    adaptation: None where another release made it by another method; there is an `obstacle` then.
    """

    adaptation: Adaptation | None
    made_for: AdaptedTo
    bank: SupportBank

    @classmethod
    def of(cls, version: Version, network: SAM2SGP, bank: SupportBank) -> "ServedAdaptation | None":
        """The adaptation published with weights; None where there is none.

        Raises:
            WeightsError: its files can't be read.
        """
        if not is_adapted(version):
            return None
        folder, made_for = version.path.parent, AdaptedTo.read(version)
        if made_for.method != VERSION:
            return cls(None, made_for, bank)
        try:
            found = store.load(folder, network, len(made_for.classes))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise _damaged(folder, str(error)) from error
        if found is None:
            raise _damaged(folder, "correctors or their record are missing or damaged")
        record, correctors = found
        return cls(Adaptation(correctors, record), made_for, bank)

    @property
    def obstacle(self) -> str | None:
        """Why the bank can't be adapted any more, in a sentence; None: it is."""
        return self.made_for.obstacle(self.bank)

    def standing(self) -> Standing:
        """How it stands to the bank as it is now."""
        learned = set(self.made_for.cases)
        later = {item.case["name"] for item in self.bank.items} - learned
        return Standing(len(learned), self.made_for.changed(self.bank), len(later), self.obstacle)

    def has_learned_from(self, name: str, patient: str | None) -> bool:
        """Whether it learned from a label of an image, which may not be approved any more, or of its patient.

        Args:
            name: of the image as a case.
            patient: whose own labels must not be used; None: there is none.
        """
        return patient in self.bank.patients or name in self.made_for.cases

    @property
    def owners(self) -> list[str]:
        """The group of each item of the bank; an item that came later is its patient's."""
        return [self.made_for.groups.get(item.content, item.patient) for item in self.bank.items]

    def average(self, logits: Tensor, images: Tensor, pixel: tuple[float, float], distance: Tensor) -> Tensor:
        """See `Adaptation.average`."""
        return self._usable.average(logits, images, pixel, distance)

    def refuse(self, patient: str | None, bank: SupportBank) -> None:
        """See `Adaptation.refuse`."""
        self._usable.refuse(patient, bank)

    def content(self) -> list:
        """As JSON types what decides its results."""
        return self._usable.content()

    @property
    def _usable(self) -> Adaptation:
        assert self.adaptation is not None, "with an obstacle it is not used"
        return self.adaptation


def is_adapted(version: Version) -> bool:
    """Whether weights were published with an adaptation."""
    return version.path.with_name(ADAPTED_TO).is_file()


def gain_of(version: Version, bank: SupportBank) -> float:
    """What the adaptation published with weights gains in mean Dice; 0 where none is used with a bank.

    Raises:
        WeightsError: what it was made for can't be read.
    """
    if not is_adapted(version) or AdaptedTo.read(version).obstacle(bank):
        return 0.0
    return version.metrics["dice"] - version.metrics["dice_before"]


def write_adaptation(folder: Path, adaptation: Adaptation, bank: SupportBank) -> dict[str, Path]:
    """Write the files to publish with the weights, by their names.

    Args:
        folder: where; empty.
        adaptation: with correctors.
        bank: that it was made for.

    Raises:
        OSError: they can't be written.
    """
    store.save(folder, adaptation.record, adaptation.correctors)
    write_text(folder / ADAPTED_TO, json.dumps(asdict(AdaptedTo.of(bank, adaptation.owners))))
    return {name: folder / name for name in FILES}


def _classes(bank: SupportBank) -> dict[str, str]:
    return {str(value): bank.class_names[value] for value in bank.class_values}


def _damaged(folder: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"{folder}: expected the adaptation that was published with these weights, found files that can't be read "
        f"({reason}); restore the folder, or delete active.json to use the embedded weights."
    )
