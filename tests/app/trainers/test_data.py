"""The halves of a fine-tuning, and what tells whether one can go on."""

import pytest

from lib.trainers.data import digest, halve
from sam2sgp.errors import DataError
from tests.helpers.labelled import some


def test_patients_are_halved_and_stay_in_their_half_as_labels_come_and_go():
    half_of = halve(some(24, 12), {})
    assert len(half_of) == 12 and sum(half_of.values()) == 6
    left = {patient: half for patient, half in half_of.items() if patient not in ("p1", "p2", "p3")}
    grown = halve([case for case in some(30, 15) if case["patient"] not in ("p1", "p2", "p3")], half_of)
    assert left.items() <= grown.items() and len(grown) == 12 and sum(grown.values()) == 6
    assert halve(list(reversed(some(24, 12))), {}) == half_of
    assert set(halve(some(4, 4), {}).values()) == {0, 1}


def test_a_half_that_lost_its_labels_is_named_until_it_has_new_ones():
    known = {"p0": 0, "p1": 0, "p2": 0, "p3": 0, "p4": 1, "p5": 1}
    with pytest.raises(DataError, match="4 patients, 2 in each half of those .* trained on, found 5 of 5"):
        halve(some(5, 5), known)
    assert halve([*some(5, 5), {"patient": "new"}], known)["new"] == 1


def test_the_digest_follows_label_content_and_not_where_files_are(tmp_path):
    def made(folder, content):
        folder.mkdir()
        (folder / "image").write_bytes(b"12")
        (folder / "label").write_bytes(content)
        case = {"name": "a", "patient": "p", "image": str(folder / "image"), "label": str(folder / "label")}
        return digest([case], {"p": 0}), digest([case], {"p": 1})

    one, same, other = (made(tmp_path / name, content) for name, content in zip("abc", (b"x", b"x", b"y"), strict=True))
    assert one == same and one[0] != other[0] and one[0] != one[1]
