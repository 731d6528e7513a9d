"""What needs a look first in a run, and its histograms."""

from sam2sgp.evaluation import case_metrics
from sam2sgp.report.overview import histograms, looks
from tests.helpers.drawn import square_map


def test_dice_decides_the_order_of_an_evaluation():
    truth, prediction = square_map(1)[None], square_map(1, 12)[None]
    rows = [{"case": name, **row} for name in "ab" for row in case_metrics(prediction, truth, {1: "liver"})]
    found = looks(rows)
    assert [look.reasons for look in found] == [[], []]
    (worse, better) = looks(
        [
            {"case": name, "class_name": "x", "dice": dice, "predicted_size": 5.0}
            for name, dice in (("a", 0.9), ("b", 0.3))
        ]
    )
    assert (worse.name, worse.reasons, better.reasons) == ("b", ["Dice 0.30"], [])
    assert (worse.dice, better.dice) == (0.3, 0.9)


def test_a_small_find_is_told_only_where_no_truth_says_that_it_is_right():
    rows = [{"case": str(n), "class_name": "x", "predicted_size": size} for n, size in enumerate([100.0] * 5 + [2.0])]
    assert looks(rows)[0].reasons == ["tiny x"]
    assert [look.reasons for look in looks([row | {"dice": 0.9} for row in rows])] == [[]] * 6


def test_histograms_count_every_case_and_mark_the_median(tmp_path):
    rows = [
        {"case": str(n), "class_name": "x", "mean_confidence": value, "size": 10.0 * value, "size_unit": "mm2"}
        for n, value in enumerate([0.1, 0.9, 0.91, 0.99, 1.0])
    ]
    confidence, size = histograms(rows)
    assert (confidence.title, confidence.number, confidence.median) == ("Confidence", 5, 0.91)
    assert confidence.counts[2] == 1 and confidence.counts[18:] == (2, 2)
    assert (size.high, size.unit, size.number) == (10.0, "mm2", 5)
    assert histograms(rows[:2]) == []


def test_a_size_is_tiny_beside_sizes_of_its_own_unit_only():
    sizes = [("ml", 10 + number) for number in range(6)] + [("px", 900 + number) for number in range(6)] + [("px", 20)]
    rows = [
        {"case": f"{size} {unit}", "class_name": "liver", "size": size, "size_unit": unit, "mean_confidence": 0.99}
        for unit, size in sizes
    ]
    assert {look.name: look.reasons for look in looks(rows) if look.reasons} == {"20 px": ["tiny liver"]}
