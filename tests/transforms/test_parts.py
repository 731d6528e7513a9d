"""Connected parts of masks of whole volumes."""

import numpy as np
import pytest

from sam2sgp.transforms.parts import largest_part, main_shares


@pytest.fixture
def classes() -> np.ndarray:
    """Class 3: a cube of 27 voxels, one of 8 that touches it over a corner; class 9: two rows of equal size."""
    made = np.zeros((8, 10, 10), np.int64)
    made[1:4, 1:4, 1:4] = 3
    made[4:6, 4:6, 4:6] = 3
    made[7, 0, :4] = made[7, 9, :4] = 9
    return made


def test_the_largest_part_is_connected_over_faces(classes):
    kept = largest_part(classes == 3)
    assert kept.sum() == 27 and kept[1:4, 1:4, 1:4].all()
    assert np.array_equal(largest_part(kept), kept)
    assert not largest_part(np.zeros((2, 3, 3), bool)).any()


def test_the_share_of_the_largest_part_is_told_by_class(classes):
    assert main_shares(classes) == {3: pytest.approx(27 / 35, abs=1e-4), 9: 0.5}
    assert main_shares(np.zeros((2, 3, 3), np.uint8)) == {}
