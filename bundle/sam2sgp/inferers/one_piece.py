"""Classes that are one piece: of what was found of them in a volume, only the largest connected part is kept.

Most organs are one piece, and what the network finds far from them is of slices beyond their ends or of something that
looks alike. Whether a class is one is told by the labelled volumes, see `sam2sgp.support.pieces`, as nnU-Net (Isensee
et al., doi 10.1038/s41592-020-01008-z) decides on it for a whole data set. 2D images are left as they are: there it did
not pay. Measured by `benchmarks/volumes.py`, see docs/results.md.
"""

from collections.abc import Sequence

from torch import Tensor

from sam2sgp.transforms.parts import boxes_of, largest_part

# Share of what was found of a class from which on it is said that it was left out.
TOLD = 0.05


def keep_main_parts(
    pred: Tensor, values: Sequence[int], class_values: Sequence[int], probability: Tensor | None = None
) -> dict[int, float]:
    """Keep of some classes only the largest connected part; the rest becomes background, in place.

    Args:
        pred: (Z, H, W) class values, on the CPU.
        values: of the classes that are one piece.
        class_values: of the C classes.
        probability: (Z, C + 1, H, W) of background and classes; what is left out goes to the background.

    Returns:
        For each class of which something was left out, its share of what had been found.
    """
    shares = {}
    for value, box in boxes_of(pred.numpy(), max(values, default=0)).items():
        if value not in values:
            continue
        own = pred.numpy()[box]
        found = own == value
        apart = found & ~largest_part(found)
        if not apart.any():
            continue
        shares[value] = float(apart.sum() / found.sum())
        own[apart] = 0
        if probability is not None:
            columns = probability[:, 0], probability[:, 1 + list(class_values).index(value)]
            background, of_class = (column.numpy()[box] for column in columns)
            background[apart] += of_class[apart]
            of_class[apart] = 0
    return shares


def sentence(name: str, share: float) -> str | None:
    """What to tell of a class of which a share was left out, if it is worth it."""
    if share < TOLD:
        return None
    return (
        f"{share:.0%} of what was found of {name} lies apart from its largest part and was left out, because every "
        "labelled volume shows it in one piece."
    )
