"""Class values that may be none."""

from sam2sgp.data.odd_values import CountedLabel, odd_values


def counted(*labels: dict[int, int], seen: set[int] | None = None) -> list[CountedLabel]:
    """Labels `0.png`, `1.png`, … with so many pixels of each value."""
    return [
        CountedLabel(f"{number}.png", pixels, pixels if seen is None else seen) for number, pixels in enumerate(labels)
    ]


def told(*labels: dict[int, int], named: tuple[int, ...] = (), seen: set[int] | None = None) -> list[str]:
    return list(odd_values(counted(*labels, seen=seen), named))


def test_a_value_of_one_label_only_is_told_with_file_pixels_and_remedy():
    [sentence] = told({1: 500}, {1: 400, 7: 90, 255: 60}, {1: 500}, {})
    assert sentence.startswith(
        "1.png: each of the values 7 (90 pixels), 255 (60 pixels) is in none of the other 2 labels with a class, "
        "and is taken as a class of its own. If this is no class, set such pixels to 0"
    )


def test_a_value_that_is_named_or_that_two_labels_have_is_none_to_tell_of():
    assert not told({1: 500}, {1: 400, 7: 90}, {1: 500}, named=(7,))
    assert not told({1: 500}, {1: 400, 7: 90}, {1: 500, 7: 90})


def test_few_labels_or_labels_of_one_class_each_show_nothing_unusual():
    assert not told({1: 500}, {1: 400, 7: 90})
    assert not told({1: 500}, {2: 400}, {3: 90}, {4: 90})
    assert not told({1: 500, 2: 90}, {1: 400, 3: 90}, {1: 400}, {1: 400}, {1: 400})
    assert len(told({1: 500, 2: 90}, {1: 400, 3: 90}, *[{1: 400}] * 6)) == 2


def test_a_few_pixels_of_a_value_are_told_wherever_they_are():
    [sentence] = told({1: 5000, 3: 4, 4: 1}, {1: 6000, 3: 2}, {1: 6000})
    assert sentence.startswith(
        "0.png and 1 more: each of the values 3 (at most 4 pixels), 4 (at most 1 pixel) has few pixels in every label"
    )
    assert "resized" in sentence and "set such pixels to 0" in sentence
    [sentence] = told({1: 5000, 3: 4})
    assert sentence.startswith("0.png: value 3 (4 pixels) has few pixels in every label that holds it")
    assert not told({1: 5000, 3: 4}, named=(3,))
    assert not told({1: 9000, 3: 65}), "enough for a small object"
    assert told({1: 65_000, 3: 65}), "but not in a picture of many pixels"
    assert not told({1: 300, 3: 4}), "the others are not much larger"


def test_of_many_values_the_first_are_listed():
    [sentence] = told({1: 900_000} | {value: 2 for value in range(10, 70)})
    assert "14 (2 pixels) and 55 more has few" in sentence and "15 (" not in sentence


def test_hardly_a_pixel_of_a_class_that_is_large_elsewhere_is_told_of_named_ones_too():
    [sentence] = told({1: 500}, {1: 400}, {1: 600}, {1: 3}, named=(1,))
    assert sentence.startswith("3.png: value 1 (3 pixels) is hardly there, while most other labels have 500 pixels")
    assert not told({1: 500}, {1: 400}, {1: 600}, {1: 9}, named=(1,))
    assert not told({1: 500}, {1: 400}, {1: 3}, named=(1,))


def test_a_class_too_small_for_the_network_is_told_of_named_ones_too():
    [sentence] = told({1: 500, 2: 12}, {1: 500, 2: 7}, named=(1, 2), seen={1})
    assert sentence.startswith("0.png and 1 more: value 2 (at most 12 pixels) is too small to be seen")
