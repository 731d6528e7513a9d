"""Labels of the support set that those of all other patients contradict, such as one of another image.

In: support items that were segmented like queries, each guided by other patients, for what they teach of the gate and
the signs of classes; so nothing is computed for it. Out: sentences. Of a large support set only some items are looked
at so; `sam2sgp check` looks at all.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from sam2sgp.evaluation.far_below import far_below
from sam2sgp.inferers.items_as_queries import ItemsAsQueries

# A label whose outlines lie on edges of the image is of this image, though it may be of another object than what is
# found. Of six public data sets of pictures, most labels that were put to another image fit worse than this, and about
# nine of ten fit better on their own.
NO_EDGES = 0.62
# What is found elsewhere is an object that the label may have missed only if it is about as large: up to so many times.
LIKE_SIZE = 4.0


def doubted_labels(items: ItemsAsQueries) -> Iterator[str]:
    """Of the items judged so far, the cases whose labels hardly overlap what is found in them, and lie on no edges
    either, while others do well."""
    bank = items.bank
    # Of a volume, all its slices together.
    of_case: dict[str, list[Tensor]] = defaultdict(list)
    about = {}
    for number, judged in items.judged.items():
        item = bank.items[number]
        of_case[item.source].append(torch.stack([judged.overlap, judged.size, judged.found]))
        about[item.source] = item
    cases = [(about[source], torch.stack(counts).sum(0)) for source, counts in of_case.items()]
    for column, value in enumerate(bank.class_values):
        held = [(item, *counts[:, column].tolist()) for item, counts in cases if counts[1, column]]
        dice = [2 * overlap / (size + found) for _, overlap, size, found in held]
        for place in far_below(dice):
            item, _, size, found = held[place]
            is_like = size <= LIKE_SIZE * found and found <= LIKE_SIZE * size
            if is_like and item.edge_fit is not None and item.edge_fit < NO_EDGES:
                yield (
                    f"{item.case['name']}: what the labels of other patients find of {bank.class_names[value]} in it "
                    f"is somewhere else than its label (Dice {dice[place]:.2f}; most labels have above 0.7): see "
                    "whether the label is of this image."
                )
