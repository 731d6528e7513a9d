"""What each way to be faster changes in the result, on real data: Dice against the plain path.

    python benchmarks/agreement.py hc18=DIR cxr_lungs=DIR --image_size 256

The plain path is the embedded lite network in single precision with SAM2's own memory attention module, as published.
Against it stand: `attention` (ours: classes shared up to the first memory, what every run uses), `memory_pool 2`
without any training with it, and `bf16`. Support items are of the first patients, queries of the others. A query and
class counts where either result shows something.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Compose
from torch import Tensor

from sam2sgp.data import load_datalist
from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.networks import SAM2SGP, load_weights
from sam2sgp.networks import sam2_sgp as network_module
from sam2sgp.support import ItemRules, SupportBank, SupportSampler
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd

WEIGHTS = Path(__file__).resolve().parents[1] / "bundle" / "models" / "model.pt"
KEYS = ["image", "label"]
SUPPORT_PATIENTS = 8
PLAIN = "plain"
VARIANTS: dict[str, dict] = {
    PLAIN: {},
    "attention": {},
    "memory_pool 2": {"memory_pool": 2},
    "bf16": {"precision": "bf16"},
}


def sam2s_own(attention, embedding, position, memory, memory_position, pool) -> Tensor:
    """`attend_to_memory` by SAM2's module as it is, each class by itself."""
    batch, classes = memory.shape[:2]
    if pool != 1:
        raise ValueError("SAM2's module knows memory only on the embedding's grid.")
    current, current_position = (
        values.repeat_interleave(classes, 0).flatten(2).permute(2, 0, 1) for values in (embedding, position)
    )
    tokens, encoding = (
        values.permute(2, 4, 0, 1, 3).flatten(2, 3).flatten(0, 1) for values in (memory, memory_position)
    )
    attended = attention(current, tokens, current_position, encoding)
    return attended.permute(1, 2, 0).unflatten(2, embedding.shape[-2:])


def segment(data: list[dict], variant: str, size: int, queries: int, k: int) -> list[Tensor]:
    """Masks (C, S, S) of the middle slice of each query."""
    settings = dict(VARIANTS[variant])
    precision = settings.pop("precision", "fp32")
    network = SAM2SGP("lite", size, **settings).eval()
    load_weights(network, WEIGHTS)
    prepare = Compose([LoadCased(KEYS), ScaleIntensityByModalityd("image"), FitToSquared(KEYS, size=size)])
    names = sorted({case["patient"] for case in data})[:SUPPORT_PATIENTS]
    first: dict[str, dict] = {}
    for case in data:
        first.setdefault(case["patient"], case)
    others = [case for case in data if case["patient"] not in names]
    bank = SupportBank([first[name] for name in names], prepare, rules=ItemRules(slices_per_class=2), progress=False)
    inferer = SupportSetInferer(bank, InferenceSettings(SupportSampler(k=k), batch_size=1, precision=precision))
    masks = []
    for case in others[:: max(1, len(others) // queries)][:queries]:
        image = prepare(case)["image"]
        masks.append(inferer(image[len(image) // 2][None], network)[0] > 0)
    return masks


def dice(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    values = []
    for one, other in zip(found, expected, strict=True):
        both, sizes = (one & other).flatten(1).sum(1), (one.flatten(1).sum(1) + other.flatten(1).sum(1))
        values += (2 * both / sizes)[sizes > 0].tolist()
    return values


def with_sams_module(work: Callable) -> list[Tensor]:
    own = network_module.attend_to_memory
    network_module.attend_to_memory = sam2s_own
    try:
        return work()
    finally:
        network_module.attend_to_memory = own


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("data", nargs="*", metavar="NAME=DIR", help="labelled folders")
    arguments.add_argument("--image_size", type=int, default=256)
    arguments.add_argument("--queries", type=int, default=8, help="of each data set")
    arguments.add_argument("--k", type=int, default=4)
    arguments.add_argument("--variants", nargs="+", choices=list(VARIANTS)[1:], default=list(VARIANTS)[1:])
    options = arguments.parse_args()
    if not options.data:
        print("Nothing to measure: name labelled folders, as in hc18=/data/hc18.")
    print("| data | px | variant | masks | mean Dice against plain | lowest |\n| --- | --- | --- | --- | --- | --- |")
    for entry in options.data:
        name, _, folder = entry.partition("=")
        data = load_datalist(folder)
        settings = (options.image_size, options.queries, options.k)
        expected = with_sams_module(lambda data=data, settings=settings: segment(data, PLAIN, *settings))
        for variant in options.variants:
            values = dice(segment(data, variant, *settings), expected)
            row = f"{len(values)} | {np.mean(values):.5f} | {np.min(values):.5f}"
            print(f"| {name} | {options.image_size} | {variant} | {row} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
