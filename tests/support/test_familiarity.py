"""How far queries are from the support images, and which are told to be unlike them."""

import math

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from sam2sgp.data.phantom_scenes import phantom_picture, phantom_volume
from sam2sgp.networks import load_weights
from sam2sgp.support.familiarity import UNLIKE, Familiarity, case_distance, is_unlike, trust
from sam2sgp.transforms import to_three_channels
from sam2sgp.transforms.array import Letterbox
from tests.helpers.bundle_runs import BUNDLE, CONFIGS


def circle(*degrees: float) -> Tensor:
    """Embeddings (N, 2) on a circle."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_distances_are_measured_by_those_between_patients():
    # Two images each of three patients, 20 degrees apart.
    familiarity = Familiarity.of(circle(0, 1, 20, 21, 40, 41), ["a", "a", "b", "b", "c", "c"])
    near, usual, far = familiarity(circle(10, -19.5, 120)).tolist()
    assert near < 0.4 and usual == pytest.approx(1, abs=0.1) and far > 10
    # An image of patient c is near only to his own images.
    assert familiarity(circle(41))[0] < 0.01 and familiarity(circle(41), "c")[0] > 0.9


def test_two_patients_tell_nothing():
    distance = Familiarity.of(circle(0, 1, 20), ["a", "a", "b"])(circle(180))
    assert distance.isnan().all() and trust(distance).tolist() == [1] and not is_unlike(float(distance))
    assert Familiarity.of(torch.zeros(0, 0), [])(circle(180)).isnan().all()
    three = Familiarity.of(circle(0, 20, 40), ["a", "a", "a"])
    assert three(circle(0), "a").isnan().all()


def test_trust_falls_smoothly():
    found = trust(torch.tensor([0.0, 1.0, 1.2, UNLIKE, 1.8, 5.0])).tolist()
    assert found[:2] == [1, 1] and found[3] == pytest.approx(0.5) and found[-1] == 0
    assert found == sorted(found, reverse=True)


def test_slices_without_a_finding_do_not_count_unless_there_are_no_others():
    distance = torch.tensor([9.0, 1.0, 1.2, 1.1, 9.0])
    assert case_distance(distance, torch.tensor([0, 5, 5, 5, 0])) == pytest.approx(1.1)
    assert case_distance(distance, torch.zeros(5)) == pytest.approx(1.2)
    assert math.isnan(case_distance(torch.full((2,), torch.nan), torch.zeros(2)))


@pytest.fixture(scope="module")
def embed():
    """Retrieval embeddings (N, D) of slices (H, W) in [0, 1] by the embedded weights."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser["bundle_root"] = str(BUNDLE)
    parser["device"] = "cpu"
    network = parser.get_parsed_content("network").eval()
    load_weights(network, parser.get_parsed_content("model_file"))

    @torch.no_grad()
    def embedding(slices: list[np.ndarray]) -> Tensor:
        images = [torch.from_numpy(np.asarray(values, np.float32))[None, None] for values in slices]
        fitted = [Letterbox.of(tuple(image.shape[-2:]), network.image_size).apply(image) for image in images]
        return network.retrieval_embedding(network.encode(to_three_channels(torch.cat(fitted))))

    return embedding


@pytest.fixture(scope="module")
def kinds(embed) -> dict[str, Tensor]:
    """Embeddings (14, D) of patients, by kind of image."""
    generators = [np.random.default_rng(seed) for seed in range(14)]
    ct = [((phantom_volume("ct", rng)[0][..., 6].T + 160.0) / 400).clip(0, 1) for rng in generators]
    return {"ct": embed(ct), "us": embed([phantom_picture("us", rng)[0] / 255 for rng in generators])}


@pytest.mark.parametrize("support, query", [("ct", "us"), ("us", "ct")])
def test_another_kind_of_image_is_unlike_the_support_set_and_another_patient_is_not(kinds, support, query):
    familiarity = Familiarity.of(kinds[support][:8], list("abcdefgh"))
    own, other = familiarity(kinds[support][8:]), familiarity(kinds[query][8:])
    assert not any(map(is_unlike, own.tolist())) and trust(own).mean() > 0.9
    assert sum(map(is_unlike, other.tolist())) >= 5
