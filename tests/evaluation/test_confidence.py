"""The mean confidence of a class is that of its own pixels, however the result is cut into parts."""

import numpy as np
import pytest

from sam2sgp.evaluation.confidence import LOW_CONFIDENCE, confidence_sums, is_doubtful

CLASSES = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)


def test_parts_add_up_to_the_whole():
    probability = np.linspace(0.4, 0.9, 6, dtype=np.float32).reshape(2, 3)
    whole = confidence_sums(CLASSES, probability, 4)
    parts = [confidence_sums(CLASSES[row], probability[row], 4) for row in range(2)]
    for together, *apart in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(together, sum(apart))
    np.testing.assert_allclose(whole[0][1:3] / whole[1][1:3], [0.55, 0.75], rtol=1e-6)


@pytest.mark.parametrize(("of_second", "doubtful"), [(LOW_CONFIDENCE + 0.01, False), (LOW_CONFIDENCE - 0.01, True)])
def test_one_class_of_low_confidence_makes_a_result_doubtful_and_the_background_does_not(of_second, doubtful):
    probability = np.choose(CLASSES, [0.1, 0.99, of_second])
    assert is_doubtful(CLASSES, probability, 3) is doubtful
    assert not is_doubtful(np.zeros_like(CLASSES), probability, 3)
