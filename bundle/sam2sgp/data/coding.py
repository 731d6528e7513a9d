"""Which numbers label files use for the same thing: what only a look at several files shows."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sam2sgp.data.io import is_binary_255, png_palette, segment_names
from sam2sgp.errors import DataError

logger = logging.getLogger(__name__)

OBJECT, WHITE = 1, 255
# Beside classes up to this value, 255 is more often a mark for pixels to ignore than a class.
FEW_CLASSES = 32
IGNORE = "ignore"
DECLARATIONS = "dataset.json or labels.json"
# Names that programs give segments by themselves.
UNNAMED = re.compile(r"(?:segment|label|class)?[ _-]*\d*")


def are_binary_255(cases: Iterable[Mapping], class_values: Sequence[int]) -> bool:
    """Whether results of labelled cases are coded as 0 and 255 where they are pictures: they have one class, 1, and one
    of their labels is coded so."""
    return class_values == [OBJECT] and any(is_binary_255(case["label"]) for case in cases)


class LabelCoding:
    """Looks at the labels of one data set, one after the other, for values that can't all be classes.

    Args:
        declared: class names by value; a declared value is a class.

    Attributes:
        warnings: what it has warned of.
    """

    def __init__(self, declared: Mapping[int, str] | None = None) -> None:
        self.declared = declared or {}
        self.warnings: list[str] = []
        self._only: dict[int, str] = {}
        self._warned_of: set[str | int] = set()
        # The value that each colour has in palettes, and a label in which it does.
        self._coloured: dict[tuple[int, int, int], tuple[int, str]] = {}
        # The value of each name, in lower case, and where that is said.
        used = Counter(name.casefold() for name in self.declared.values())
        self._named = {
            name.casefold(): (value, DECLARATIONS)
            for value, name in self.declared.items()
            if used[name.casefold()] == 1
        }
        # The name of each value, and a label that uses it.
        self._names: dict[int, tuple[str, str]] = {}

    def check(self, path: str | os.PathLike, values: Iterable[int]) -> None:
        """Look at one more label and the values that it holds.

        Warns once of a 255 beside a few other classes, of a class that is called "ignore", of a value that segments of
        different names have, and of one name, upper and lower case aside, that two values have.

        Raises:
            DataError: one label holds only 1 and another only 255: one of them is a mask as programs for pictures write
                it, and they would become two classes. Or the palettes of two labels give one colour to two values, or
                two segmentations, or one and what is declared, give segments of one name different values.
        """
        held = {int(value) for value in values if value}
        self._check_alike(DECLARATIONS, self.declared)
        # Cases may hold tensors in place of files.
        if isinstance(path, str | os.PathLike) and Path(path).is_file():
            self._check_colours(Path(path), held)
            self._check_names(Path(path), held)
        if WHITE in held and len(held) > 1 and max(held - {WHITE}) <= FEW_CLASSES and WHITE not in self.declared:
            if WHITE not in self._warned_of:
                others = ", ".join(str(value) for value in sorted(held - {WHITE}))
                self._warn(
                    f"{path}: value 255 beside {others} often marks pixels to ignore; it is taken as a class of its "
                    "own here. Set such pixels to 0, or declare the class in dataset.json or labels.json."
                )
            self._warned_of.add(WHITE)
        ignored = next((value for value in sorted(held) if self.declared.get(value, "").lower() == IGNORE), None)
        if ignored is not None and IGNORE not in self._warned_of:
            self._warn(
                f"{path}: value {ignored} is declared as {self.declared[ignored]!r}, nnU-Net's word for pixels to "
                "leave out; it is taken as a class of its own here. Set such pixels to 0, or give the class another "
                "name."
            )
            self._warned_of.add(IGNORE)
        if len(held) != 1 or {OBJECT, WHITE} <= self.declared.keys():
            return
        value = held.pop()
        self._only.setdefault(value, str(path))
        if OBJECT in self._only and WHITE in self._only:
            raise DataError(
                f"{path}: expected one value for the object in all labels, found {value} here and "
                f"{OBJECT if value == WHITE else WHITE} in {self._only[OBJECT if value == WHITE else WHITE]}; store "
                "all labels as 0 and 1, or declare both classes in dataset.json or labels.json."
            )

    @property
    def named(self) -> set[int]:
        """Values of which what was seen so far says what they are: declared ones, and those of named segments."""
        declared = {value for value, name in self.declared.items() if not UNNAMED.fullmatch(name.strip().casefold())}
        return declared | self._names.keys()

    def _warn(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self.warnings.append(sentence)

    def _check_names(self, path: Path, held: set[int]) -> None:
        """Programs number the segments of each segmentation on their own, in the order in which they were added."""
        names = {value: name.strip() for value, name in segment_names(path).items()}
        self._check_alike(str(path), {value: names[value] for value in sorted(held & names.keys())})
        used = Counter(name.casefold() for name in names.values())
        for value in sorted(held & names.keys()):
            name = names[value].casefold()
            if UNNAMED.fullmatch(name) or used[name] > 1:
                continue
            other, where = self._named.setdefault(name, (value, str(path)))
            if other != value:
                raise DataError(
                    f"{path}: expected one class value for the segment {names[value]!r} in all labels, found {value} "
                    f"here and {other} in {where}; number the segments alike in all files (in 3D Slicer by one colour "
                    "table, when they are exported as labelmaps)."
                )
            first, where = self._names.setdefault(value, (names[value], str(path)))
            if first.casefold() != name and f"name of {value}" not in self._warned_of:
                self._warn(
                    f"{path}: value {value} is the segment {names[value]!r} here and {first!r} in {where}; it is taken "
                    "as one class. If these are two, number the segments alike in all files."
                )
                self._warned_of.add(f"name of {value}")

    def _check_alike(self, where: str, names: Mapping[int, str]) -> None:
        first: dict[str, int] = {}
        for value, name in names.items():
            key = name.strip().casefold()
            other = first.setdefault(key, value)
            if other != value and not UNNAMED.fullmatch(key) and f"alike {key}" not in self._warned_of:
                self._warn(
                    f"{where}: values {other} and {value} have one name, upper and lower case aside ({names[other]!r} "
                    f"and {name!r}); they are taken as two classes. Give both one value if they are one class, or one "
                    "of them another name."
                )
                self._warned_of.add(f"alike {key}")

    def _check_colours(self, path: Path, held: set[int]) -> None:
        """Programs that reduce a coloured mask to a palette number the colours of each picture on their own."""
        palette = dict(enumerate(png_palette(path)))
        used = Counter(palette.get(value) for value in held | {0})
        for value in sorted(held & palette.keys()):
            colour = palette[value]
            if used[colour] > 1:
                continue
            other, where = self._coloured.setdefault(colour, (value, str(path)))
            if other != value:
                raise DataError(
                    f"{path}: expected one class value for a colour in the palettes of all labels, found {value} for "
                    f"{colour} here and {other} in {where}; store the class values as grey."
                )
