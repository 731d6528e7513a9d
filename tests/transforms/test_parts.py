"""Connected parts of masks of whole volumes."""

import tracemalloc

import numpy as np
import pytest

from sam2sgp.transforms import parts
from sam2sgp.transforms.parts import is_sparse, largest_part, main_shares


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
    assert main_shares(classes, 255) == {3: pytest.approx(27 / 35, abs=1e-4), 9: 0.5}
    assert list(main_shares(classes, 8)) == [3]
    assert main_shares(np.zeros((2, 3, 3), np.uint8), 255) == {}


def test_of_a_long_volume_little_is_held_next_to_it(monkeypatch):
    """Of 1000 slices of 512 x 512 pixels one array of eight bytes a voxel is 2 GiB."""
    monkeypatch.setattr(parts, "COUNTED_AT_A_TIME", 1 << 12)
    classes = np.ones((64, 64, 64), np.int64)
    classes[32] = 0
    classes[40:, :2] = 255
    tracemalloc.start()
    try:
        shares = main_shares(classes, 255)
        kept = largest_part(classes == 1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert shares == {1: pytest.approx(32 / 62.25, abs=1e-4), 255: 1.0} and kept.sum() == 32 * 64 * 64
    assert most < 7 * classes.size


def test_single_slices_of_something_wide_tell_a_sparse_label():
    organ = np.zeros((9, 20, 20), np.uint8)
    organ[2, 4:14, 4:14] = organ[6, 4:14, 4:14] = 3
    assert is_sparse(organ, None) and is_sparse(organ, (5.0, 1.0, 1.0)) and is_sparse(organ[:4], (5.0, 1.0, 1.0))
    # As flat as it is wide, in thick slices; neighbours; a single slice; nothing.
    assert not is_sparse(organ, (6.0, 1.0, 1.0))
    organ[3, 0, 0] = 1
    assert not is_sparse(organ, None)
    assert not is_sparse(organ[2:4], None) and not is_sparse(np.zeros((4, 5, 5), np.uint8), None)
