"""What was painted, as voxel changes of a label."""

import numpy as np
import pytest

from lib.checks import BadLabel
from lib.http.corrections import Correction, SliceChange, corrected, tags_seen


def test_runs_must_be_in_order_and_stay_in_their_slice():
    labels = np.zeros((2, 3, 4), np.uint8)
    painted = corrected(labels, [SliceChange(slice=1, runs=[2, 3, 1, 5, 7, 2])], {1, 2})
    assert painted[1].reshape(-1).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2] and not labels.any()
    turned = np.zeros((4, 3, 2), np.uint16).T
    painted = corrected(turned, [SliceChange(slice=0, runs=[3, 2, 1])], {1})
    assert np.flatnonzero(painted).tolist() == [3, 4]
    for runs in ([2, 0, 1], [11, 2, 1], [3, 2, 1, 4, 1, 1], [3, 1, 1, 0, 1, 1], [0, 1, 3]):
        with pytest.raises(BadLabel):
            corrected(labels, [SliceChange(slice=0, runs=runs)], {1, 2})


def test_each_label_that_a_correction_is_about_has_its_state():
    shown = {"image": "a", "image_seen": "1", "shape": [1, 2, 3], "classes": [], "changes": []}
    made = lambda **more: tags_seen(Correction(**shown, **more))  # noqa: E731
    assert made(label_tag="original", seen="s", save_as="draft", replaces="") == {"draft": "", "original": "s"}
    assert made(label_tag="", seen="", save_as="final", replaces="f") == {"final": "f"}
    assert made(label_tag="draft", seen="s", save_as="draft", replaces="s") == {"draft": "s"}
