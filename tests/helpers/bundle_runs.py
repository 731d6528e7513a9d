"""Running the bundle's configs as a user does, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import monai.bundle
import torch

from sam2sgp.networks import SAM2SGP, save_weights

BUNDLE = Path(__file__).parents[2] / "bundle"
CONFIGS = BUNDLE / "configs"

# What makes a training small enough for a test of its mechanics.
SMALL = {
    "weights": False,
    "image_size": 64,
    "episodes_per_epoch": 4,
    "episodes_per_step": 2,
    "images_per_episode": 4,
    "clip_length": 2,
    "max_k": 2,
    "warmup_steps": 1,
    "val_max_cases": 2,
    "val_interval": 1,
    "support_max_items": 6,
    "num_workers": 0,
    "progress": False,
}


@contextmanager
def computing_with_one_thread() -> Iterator[None]:
    """With more threads, random weights and results differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_weights(path: Path, seed: int = 0) -> Path:
    """A file of random weights of the default backbone at 64 px."""
    torch.manual_seed(seed)
    save_weights(SAM2SGP("lite", 64), path)
    return path


def run(run_id: str, *configs: str, **overrides) -> None:
    """`python -m monai.bundle run <run_id> --config_file [configs] --key value …`"""
    monai.bundle.run(
        run_id=run_id,
        config_file=[str(CONFIGS / name) for name in configs],
        meta_file=str(CONFIGS / "metadata.json"),
        bundle_root=str(BUNDLE),
        **overrides,
    )
