"""An adaptation to the approved labels, published with the weights, while labels come and go.

    <version>/adaptation.json, correctors.safetensors    as `sam2sgp.adaptation.store` writes them
    <version>/adapted_to.json                            what it was made for, see `AdaptedTo`

It counts as long as the support set has the classes that it was made for: correctors know no others.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
        folder = version.path.parent
        try:
            made_for = AdaptedTo(**json.loads((folder / ADAPTED_TO).read_text(encoding="utf-8")))
            if made_for.method != VERSION:
                return cls(None, made_for, bank)
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
        if self.adaptation is None:
            return (
                "The adaptation is not used: another release of the app made it by another method. Run the training "
                "`adapt` again."
            )
        classes = _classes(self.bank)
        if classes.keys() != self.made_for.classes.keys():
            known, found = (", ".join(names.values()) or "none" for names in (self.made_for.classes, classes))
            return (
                f"The adaptation is not used: it was made for the classes {known}, and the approved labels have "
                f"{found}. Run the training `adapt` again."
            )
        if self.bank.settings != self.made_for.preprocessing:
            return (
                "The adaptation is not used: it was made for images that are prepared by other settings. Run the "
                "training `adapt` again."
            )
        return None

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


def gain_of(version: Version) -> float:
    """What the adaptation published with weights gains in mean Dice; 0 where there is none."""
    return version.metrics["dice"] - version.metrics["dice_before"] if is_adapted(version) else 0.0


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
