"""Support banks of simple phantoms on noise: discs, bright or dark (class 1), and checkered squares (class 2)."""

from types import SimpleNamespace

import torch
from torch import Tensor

from sam2sgp.support import SupportBank
from sam2sgp.transforms.array import Letterbox

SIZE = 64


def phantom(number: int, values: tuple[int, ...] = (1,), patient: str | None = None) -> dict:
    """A prepared case of one image with an object of each class."""
    generator = torch.Generator().manual_seed(number)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    image = 0.5 + 0.1 * torch.randn(SIZE, SIZE, generator=generator)
    label = torch.zeros(SIZE, SIZE, dtype=torch.long)
    for value in values:
        y, x, radius = (
            torch.rand(3, generator=generator) * torch.tensor([24, 24, 6]) + torch.tensor([20, 20, 7])
        ).tolist()
        if value == 1:
            inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            image[inside] += 0.3 if torch.rand((), generator=generator) < 0.5 else -0.3
        else:
            inside = ((rows - y).abs() < radius) & ((columns - x).abs() < radius)
            image[inside] += (0.4 * ((rows // 2 + columns // 2) % 2) - 0.2)[inside]
        label[inside] = value
    return case(f"case{number}", image.clamp(0, 1)[None, None], label[None], patient or f"p{number}")


def volume(number: int, slices: int = 8) -> dict:
    """A prepared case of a volume: a bright disc on all slices but the first two and the last two."""
    generator = torch.Generator().manual_seed(number)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    image = 0.4 + 0.1 * torch.randn(slices, SIZE, SIZE, generator=generator)
    y, x = (torch.rand(2, generator=generator) * 24 + 20).tolist()
    inside = ((rows - y) ** 2 + (columns - x) ** 2 < 100) & (torch.arange(slices) % (slices - 2) > 1)[:, None, None]
    image[inside] += 0.4
    return case(f"volume{number}", image.clamp(0, 1)[:, None], inside.long(), f"p{number}")


def case(name: str, image: Tensor, label: Tensor, patient: str) -> dict:
    """A prepared case of slices (Z, C, S, S) and class maps (Z, S, S) of the network's size."""
    return {
        "name": name,
        "image": image,
        "image_full": image,
        "label": label,
        "label_full": label,
        "letterbox": Letterbox.of(tuple(label.shape[1:]), label.shape[-1]),
        "geometry": SimpleNamespace(spacing=None, slice_axis=2),
        "patient": patient,
        "group": "a",
    }


def bank(cases: list[dict]) -> SupportBank:
    names = {value: f"class_{value}" for case in cases for value in case["label"].unique().tolist() if value}
    return SupportBank(cases, lambda case: case, names, progress=False)


def queries(values: tuple[int, ...] = (1,)) -> tuple[Tensor, Tensor]:
    """Images (8, 1, S, S) that no bank of small numbers holds, and their labels (8, S, S)."""
    cases = [phantom(1000 + number, values) for number in range(8)]
    return torch.cat([case["image"] for case in cases]), torch.cat([case["label"] for case in cases])


def bright_discs() -> list[dict]:
    """Phantoms whose objects are what is white."""
    cases = [phantom(number) for number in range(8)]
    for case in cases:
        case["image"] = case["image_full"] = torch.where(case["label"][:, None] > 0, 1.0, 0.6 * case["image"])
    return cases
