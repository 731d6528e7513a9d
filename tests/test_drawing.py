"""Pictures have the right colours in the right places."""

import numpy as np
import pytest
import torch

from sam2sgp.drawing import class_colour, draw_overlay, montage, spread_slices, to_display
from tests.helpers.drawn import GREY, plain, square_map


@pytest.mark.parametrize(
    ("image", "first", "last"),
    [
        (np.array([[0.0, 1.0]]), 0, 255),
        (torch.tensor([[[0.0, 0.5]]]), 0, 128),
        (np.array([[-1000.0, 240.0]]), 0, 255),  # HU
        (np.array([[7, 42]], dtype=np.uint8), 7, 42),
        (np.array([[100.0, 900.0]]), 0, 255),
        (np.array([[np.nan, 1.0]]), 0, 255),
        (np.array([[5.0, 5.0]]), 0, 0),
        (np.stack([np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])]), 0, 255),
    ],
)
def test_grey_images_become_grey_pictures(image, first, last):
    picture = to_display(image)
    assert picture.shape == (1, 2, 3) and picture.dtype == np.uint8
    assert (picture[0, 0] == first).all() and (picture[0, 1] == last).all()


def test_colours_stay():
    colours = np.array([10, 200, 30], dtype=np.uint8)
    assert to_display(colours[:, None, None])[0, 0].tolist() == [10, 200, 30]
    assert to_display(np.append(colours, 255)[:, None, None].astype(np.uint8))[0, 0].tolist() == [10, 200, 30]
    assert to_display(colours[:, None, None].astype(np.float32))[0, 0].tolist() == [10, 200, 30]
    assert to_display(colours[:, None, None].astype(np.uint16) * 257)[0, 0].tolist() == [10, 200, 30]


def test_impossible_image_is_refused():
    with pytest.raises(ValueError, match="found shape"):
        to_display(np.zeros(4))


def test_class_colours_are_distinct_for_many_classes():
    assert len({class_colour(value) for value in range(1, 22)}) == 21


def test_contour_has_the_class_colour_at_the_masks_edge_and_a_light_fill_inside():
    picture = draw_overlay(plain(), square_map(2), scale=4)
    assert picture.shape == (160, 160, 3)
    row = picture[80]
    for edge in (39, 40, 119, 120):  # the mask covers pixels 10..29, that is 40..119
        assert tuple(row[edge]) == class_colour(2)
    assert (row[30] == GREY).all() and (row[130] == GREY).all()
    assert not (row[80] == GREY).all() and np.abs(row[80].astype(int) - GREY).max() < 60


def test_masks_and_colours_may_be_given_by_class():
    by_class = draw_overlay(plain(), {2: square_map(2) == 2}, scale=4)
    np.testing.assert_array_equal(by_class, draw_overlay(plain(), square_map(2), scale=4))
    red = draw_overlay(plain(), square_map(2), colours={2: (255, 0, 0)}, scale=4)
    assert tuple(red[80, 40]) == (255, 0, 0)


def test_truth_is_dashed_white_and_lets_the_masks_contour_show():
    edge = (slice(45, 115), slice(39, 41))  # along the left side of the square
    truth = draw_overlay(plain(), truth=square_map(), scale=4)
    white, ground = ((truth[edge] == level).all((1, 2)) for level in (255, GREY))
    assert 0.3 < white.mean() < 0.7 and ground.mean() > 0.1
    mask = draw_overlay(plain(), square_map(), scale=4)
    both = draw_overlay(plain(), square_map(), truth=square_map(), scale=4)
    assert (mask[edge] == class_colour(1)).all()
    assert (both[edge] == 255).all((1, 2)).mean() > 0.3
    assert (both[edge] == class_colour(1)).all((1, 2)).mean() > 0.1


def test_of_a_thin_truth_only_what_was_missed_is_drawn():
    truth = np.zeros((40, 40), np.uint8)
    truth[19:21, 5:35] = 1
    found = truth.copy()
    found[:, 20:] = 0
    mask, both = (draw_overlay(plain(), found, truth=shown, scale=2) for shown in (None, truth))
    np.testing.assert_array_equal(both[:, :40], mask[:, :40])
    assert (both[38:42, 42:70] == 255).all() and (both == 255).all(-1).sum() <= 4 * 30
    # A square of the same class is outlined.
    thick = draw_overlay(plain(), truth=square_map(), scale=2)
    assert (thick == 255).all(-1).any() and tuple(thick[40, 40]) == (GREY, GREY, GREY)


def test_box_is_drawn_where_it_is_and_not_if_there_is_none():
    boxed = draw_overlay(plain(), box={1: (10, 5, 30, 35)}, scale=4)
    colour = np.array(class_colour(1))
    drawn = np.argwhere((boxed == colour).all(-1))
    assert drawn.min(0).tolist() == [20, 40] and drawn.max(0).tolist() == [139, 119]
    np.testing.assert_array_equal(draw_overlay(plain(), box={1: (-1, -1, -1, -1)}, scale=1), plain())


def test_overlays_fit_the_report_and_keep_the_aspect():
    assert draw_overlay(plain(50, 100)).shape == (160, 320, 3)
    dot = np.zeros((2000, 1000), dtype=np.uint8)
    dot[1000, 500] = 1
    small = draw_overlay(plain(2000, 1000), dot)
    assert small.shape == (320, 160, 3)
    assert (small == class_colour(1)).all(-1).any(), "a mask of one pixel is lost"


def test_image_is_not_changed():
    image = plain()
    draw_overlay(image, square_map(), truth=square_map(), box={1: (1, 1, 5, 5)}, scale=1)
    np.testing.assert_array_equal(image, plain())


def test_montage_takes_slices_that_hold_something_with_both_ends():
    prediction, truth = np.zeros((40, 16, 16), dtype=np.uint8), np.zeros((40, 16, 16), dtype=np.uint8)
    prediction[10:30, 4:8, 4:8] = 1
    truth[31, 4:8, 4:8] = 1
    chosen = spread_slices(prediction, truth)
    assert len(chosen) == 9 and chosen[0] == 10 and chosen[-1] == 31 and chosen == sorted(set(chosen))
    assert spread_slices(prediction[10:14]) == [0, 1, 2, 3]
    assert spread_slices(np.zeros((3, 4, 4))) == [0, 1, 2]
    picture = montage(np.zeros((40, 3, 16, 16), dtype=np.float32), prediction, truth)
    assert picture.shape == (639, 639, 3)
    assert montage(np.zeros((5, 16, 8), dtype=np.float32), prediction[10:15, :, :8]).shape == (426, 318, 3)
