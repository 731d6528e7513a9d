"""Coverage of embeddings, and the choice of the next image."""

import torch
import torch.nn.functional as F

from sam2sgp.active import distances, k_centre, represent
from tests.helpers.embeddings import at


def test_distance_is_half_the_chord_to_the_nearest_labelled_image():
    found = distances(at(0, 90, 180), at(0, 30))
    expected = torch.tensor([0.0, 30.0, 75.0]).deg2rad().sin()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert distances(at(0, 90), at()).tolist() == [1.0, 1.0]


def test_k_centre_takes_the_farthest_and_counts_what_it_has_taken():
    candidates = at(10, 178, 180, 90, 5)
    assert k_centre(candidates, at(0), 3).tolist() == [2, 3, 0]


def test_k_centre_without_labels_starts_in_the_middle():
    assert k_centre(at(0, 20, 40, 60, 170), at(), 2).tolist() == [2, 4]


def test_k_centre_covers_within_twice_the_best_radius():
    """Gonzalez' bound, against all choices of three centres."""
    points = F.normalize(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    radius = float(distances(points, points[k_centre(points, points[:0], 3)]).max())
    best = min(float(distances(points, points[c]).max()) for c in torch.combinations(torch.arange(12), 3))
    assert best <= radius <= 2 * best


def test_a_representative_is_of_the_crowd_and_not_the_outlier():
    crowd = at(58, 60, 62, 64, 180)
    assert int(k_centre(crowd, at(0), 1)) == 4
    assert int(represent(crowd, at(0), 1)) in (1, 2)
    # What is covered gains nothing more: then the outlier's turn comes.
    assert int(represent(crowd, at(0), 2)[1]) == 4


def test_representation_goes_where_the_weight_is():
    two = at(60, 62, 64, 120, 122, 124)
    for side in (0, 3):
        weight = torch.full((6,), 0.1)
        weight[side : side + 3] = 1.0
        assert int(represent(two, at(0), 1, weight=weight)) in range(side, side + 3)
