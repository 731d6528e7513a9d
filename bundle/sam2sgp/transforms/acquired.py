"""What DICOM headers say of how images were acquired, and whether images go together by that.

Nothing is changed by it: the network sees what it sees. But an MR that is guided by CT, or a PET in Bq/ml by one in
SUV, gives a result like any other, so it is said.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Modalities of which the images look alike.
ALIKE = {name: "CR" for name in ("DX", "DR", "RG")} | {"RF": "XA"}
# What doesn't say how an image was made.
UNTOLD = {"OT", "SC", "SEG"}


@dataclass(frozen=True)
class Acquired:
    """modality: such as "CT", "MR" or "PT". units: of the values, such as "BQML" or "GML" (SUV) of a PET. None where
    the header doesn't say, or there is none."""

    modality: str | None = None
    units: str | None = None

    @property
    def kind(self) -> str | None:
        """The modality, one name for those whose images look alike."""
        if self.modality is None or self.modality in UNTOLD:
            return None
        return ALIKE.get(self.modality, self.modality)


def other_than(own: Acquired, support: Iterable[Acquired]) -> Iterator[str]:
    """What is to be said of a query next to all labelled images that may guide it: none is like it.

    Example:
        >>> next(other_than(Acquired("CT"), [Acquired("MR"), Acquired("MR")]))[:72]
        'Its DICOM header says CT, but those of all labelled images say MR: expec'
        >>> list(other_than(Acquired("CT"), [Acquired("MR"), Acquired()]))
        []
    """
    support = list(support)
    kinds = {other.kind for other in support}
    if own.kind and kinds and None not in kinds and own.kind not in kinds:
        yield (
            f"Its DICOM header says {own.modality}, but those of all labelled images say "
            f"{_listed(other.modality for other in support)}: expect a poor result; use labelled images of the same "
            "modality."
        )
        return
    units = {other.units for other in support}
    if own.units and units and None not in units and own.units not in units:
        yield (
            f"Its values are in {own.units}, but those of all labelled images are in {_listed(units)}: values of one "
            "number mean different things; convert all images to one unit, of PET to SUV."
        )


def mixed_units(acquired: Iterable[Acquired]) -> str | None:
    """What is to be said of a set of which some values are in one unit and some in another.

    Example:
        >>> mixed_units([Acquired("PT", "BQML"), Acquired("PT", "GML"), Acquired("PT", "GML"), Acquired()])[:66]
        'The values of 2 images are in GML, of 1 in BQML: values of one num'
    """
    counts = Counter(own.units for own in acquired if own.units)
    if len(counts) < 2:
        return None
    (most, count), *others = counts.most_common()
    listed = "".join(f", of {number} in {units}" for units, number in others)
    return (
        f"The values of {count} image{'s' if count > 1 else ''} are in {most}{listed}: values of one number mean "
        "different things; convert all images to one unit, of PET to SUV."
    )


def _listed(names: Iterable[str | None]) -> str:
    return " and ".join(sorted({name for name in names if name}))
