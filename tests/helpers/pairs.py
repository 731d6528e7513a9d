"""Small support sets as files: pictures and a volume with squares, and banks of them."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose
from torch import Tensor

from sam2sgp.data import load_datalist
from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.networks import SAM2SGP
from sam2sgp.support import SupportBank, SupportSampler, TensorStore
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd

SIZE = 64
NAMES = {1: "square", 2: "bar"}
# Cases of the set that most tests make.
COUNT = 6


def write_case(folder: Path, name: str, seed: int, shift: int = 0) -> None:
    """One uncompressed 2D NIfTI image with its label, both a minute old; a label of another shift has equal size."""
    generator = np.random.default_rng(seed)
    y, x = (generator.integers(6, 20, 2) + shift) % 24
    label = np.zeros((48, 48, 1), np.uint8)
    label[y : y + 16, x : x + 16] = 1
    if seed % 2:
        label[40:44, 4:44] = 2
    image = generator.random((48, 48, 1), np.float32) + label
    for kind, array in (("images", image), ("labels", label)):
        path = folder / kind / f"{name}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
        age(path)


def age(path: Path, seconds: float = 60) -> None:
    """Set a file's time stamp into the past, where it is trusted."""
    then = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


def write_set(folder: Path, count: int) -> Path:
    for number in range(count):
        write_case(folder, f"case{number}", number)
    return folder


def preprocessing() -> Compose:
    return Compose([LoadCased(), ScaleIntensityByModalityd("image"), FitToSquared(("image", "label"), size=SIZE)])


def bank(folder: Path, cache: Path | None = None, megabytes: float = 64, **arguments) -> SupportBank:
    return bank_of(load_datalist(folder), cache, megabytes, **arguments)


def bank_of(cases: list[dict], cache: Path | None = None, megabytes: float = 64, **arguments) -> SupportBank:
    arguments = {"transform": preprocessing(), "class_names": NAMES, "progress": False} | arguments
    return SupportBank(cases, store=None if cache is None else TensorStore(cache, megabytes), **arguments)


def network(seed: int = 0) -> SAM2SGP:
    torch.manual_seed(seed)
    return SAM2SGP("nano", SIZE).eval()


def query(seed: int = 99, count: int = 3) -> Tensor:
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def segment(support: SupportBank, net: SAM2SGP, image: Tensor | None = None) -> Tensor:
    """Logits of queries, with the second pass in regions and tiles."""
    image = query() if image is None else image
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=3), region_below=1.0))
    logits = inferer(image, net)
    return inferer.at_own_pixels(logits, image, net)


class Counter:
    """Wraps a function and counts its calls."""

    def __init__(self, function) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        return self.function(*arguments, **keywords)


def encode_to(folder: str, cache: str) -> None:
    """What a process does that fills a cache folder."""
    torch.set_num_threads(1)
    support = bank(Path(folder), Path(cache))
    net = network()
    support.encode(net)
    for column in range(len(support.class_values)):
        support.region_support(net, net.encode(query().expand(-1, 3, -1, -1)), SupportSampler(k=1), column)


class CountedPreprocessing(Compose):
    """Counts the cases read. Its key is that of what it counts for."""

    def __init__(self) -> None:
        super().__init__(preprocessing().transforms)
        self.calls = 0

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        return super().__call__(*arguments, **keywords)


def files(cache: Path, layer: str = "encoded") -> list[Path]:
    """Finished files of a layer."""
    return sorted((cache / layer).glob("*/*.safetensors"))


def fresh(folder: Path, net: SAM2SGP) -> torch.Tensor:
    return segment(bank(folder), net)


def data(folder: Path) -> list[dict]:
    return load_datalist(folder)


def spoil(folder: Path, name: str) -> None:
    """Cut a label off in the middle."""
    path = folder / "labels" / f"{name}.nii"
    path.write_bytes(path.read_bytes()[:400])
    age(path)


def embedding_of(folder: Path, net: SAM2SGP) -> Tensor:
    support = bank(folder)
    support.encode(net)
    return support.embedding
