"""Labels that lie turned or mirrored on their images are found out by all of them together, and right ones are not."""

import logging

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose

from sam2sgp.data import load_datalist
from sam2sgp.support import SupportBank, TensorStore
from sam2sgp.support.turned import AS_STORED, REVERSED, TURNS, edge_fits, how_turned
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd

SIDE = 48


def scene(seed: int, slices: int = 1, height: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Image (Z, 1, H, W) and labels (Z, H, W) of a bright ellipse off the middle, which grows slice by slice."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, SIDE))
    place = rng.uniform(10, 14), rng.uniform(26, 32)
    distance = ((rows - place[0]) / 5) ** 2 + ((columns - place[1]) / 10) ** 2
    labels = np.stack([distance < 1 + index / slices for index in range(slices)]).astype(np.uint8)
    return (labels * 60 + rng.normal(0, 10, labels.shape))[:, None].astype(np.float32), labels


@pytest.mark.parametrize("slices", [1, 4])
def test_labels_as_they_should_be_are_not_taken_for_turned(slices):
    fits = [edge_fits(*scene(seed, slices)) for seed in range(4)]
    assert all(fit[AS_STORED] > 0.85 and fit[AS_STORED] == max(fit.values()) for fit in fits)
    assert how_turned(fits) is None


@pytest.mark.parametrize("turn", [turn for turn in TURNS if turn != AS_STORED])
def test_labels_that_are_all_turned_alike_are_found_out_with_the_turn_that_undoes_it(turn):
    fits = []
    for seed in range(3):
        image, labels = scene(seed)
        fits.append(edge_fits(image, TURNS[turn](labels[0])[None]))
    undone = {"turned by 90 degrees": "turned by 270 degrees", "turned by 270 degrees": "turned by 90 degrees"}
    assert how_turned(fits) == undone.get(turn, turn)
    assert how_turned(fits[:2]) is None
    # One of five that is right leaves it clear, one of four does not.
    right = edge_fits(*scene(9))
    assert how_turned([*fits, right]) is None
    assert how_turned([*fits, fits[0], right]) == undone.get(turn, turn)


def test_slices_in_the_reverse_order_are_found_out():
    fits = []
    for seed in range(3):
        image, labels = scene(seed, slices=6)
        labels[:4] = 0
        fits.append(edge_fits(image * (np.arange(6) >= 4)[:, None, None, None], labels[::-1]))
    assert how_turned(fits) == REVERSED


def test_rows_and_columns_of_other_lengths_are_not_exchanged_and_an_empty_label_says_nothing():
    fit = edge_fits(*scene(0, height=40))
    assert set(fit) == {turn for turn in TURNS if "exchanged" not in turn and "90" not in turn and "270" not in turn}
    image, labels = scene(0)
    assert edge_fits(image, labels * 0) == {}
    assert how_turned([{}, {}, {}]) is None


def test_a_few_labels_that_lie_on_no_edges_do_not_seem_turned_because_they_lie_on_less_than_elsewhere():
    def fit(stored: float, turned: float) -> dict[str, float]:
        return {AS_STORED: stored, "mirrored left to right": turned}

    assert how_turned([fit(0.45, 0.57), fit(0.5, 0.58), fit(0.48, 0.62)]) is None
    assert how_turned([fit(0.45, 0.67), fit(0.5, 0.68), fit(0.48, 0.72)]) == "mirrored left to right"


def test_a_bank_says_so_each_time_that_it_is_made(tmp_path, caplog):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for seed in range(3):
        image, labels = scene(seed, slices=4)
        for folder, array in (("images", image[:, 0]), ("labels", labels.swapaxes(1, 2))):
            place = np.diag([1.0, 1.0, 4.0, 1.0])
            nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), place), tmp_path / folder / f"c{seed}.nii.gz")
    transform = Compose([LoadCased(), ScaleIntensityByModalityd(), FitToSquared(size=16)])
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            store = TensorStore(tmp_path / "cache")
            bank = SupportBank(load_datalist(tmp_path), transform, store=store, progress=False)
        told = f"{tmp_path}/labels: the outlines of the labels fit the images clearly better with rows and columns "
        assert [text[: len(told)] for text in bank.warnings] == [told]
        assert [record.getMessage() for record in caplog.records] == bank.warnings
        bank.reconcile(bank.data)
        assert len(caplog.records) == 1
