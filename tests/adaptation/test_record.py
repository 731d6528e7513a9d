"""What is said of an adaptation, and that it is read as it was written."""

import pytest

from sam2sgp.adaptation.judging import Choice
from sam2sgp.adaptation.patient_groups import PatientGroups
from sam2sgp.adaptation.plan import Plan
from sam2sgp.adaptation.record import AdaptationRecord

GAINED = Choice(8, 0.5, 0.7, 0.65, 0.15, 0.02, 0.8)
KEPT = Choice(4, 0.6, 0.55, 0.6, 0.0, 0.0, 0.0)


def record(**choices: Choice) -> AdaptationRecord:
    groups = PatientGroups(("p1", "p2", "p2"), "patients")
    return AdaptationRecord(
        3, groups, ["p1", "p2", "p2"], Plan(224, False), 90, [88, 90, 89], 3, choices, 58.2, {"seed": 1}, {"a": "f00"}
    )


def test_a_record_is_read_as_it_was_written():
    written = record(liver=GAINED, cyst=KEPT)
    assert AdaptationRecord.of_json(written.to_json()) == written
    assert AdaptationRecord.of_json(AdaptationRecord(1, written.groups, ["p1"]).to_json()).plan is None


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"groups": {"owner": [], "by": ""}}'])
def test_another_text_is_no_record(text):
    with pytest.raises((ValueError, KeyError, TypeError)):
        AdaptationRecord.of_json(text)


def test_one_share_makes_the_result_another():
    assert record(liver=GAINED, cyst=KEPT).is_adapted
    assert not record(cyst=KEPT).is_adapted and not record().is_adapted


def test_it_tells_gain_and_thin_evidence_of_each_class():
    text = str(record(liver=GAINED, cyst=KEPT))
    assert text.startswith("Adapted for 58 s: 3 correctors, 90 steps on whole images at 224 px. 3 labelled images")
    assert "liver, on 8 groups never seen: Dice 0.500 before, 0.650 after (gain 0.150 ± 0.020)" in text
    assert "share is 0.80." in text
    assert "cyst, on 4 groups never seen: Dice 0.600 before, 0.550 by the correctors; no clear gain" in text
    assert text.count("The evidence is thin") == 1 and text.endswith("The evidence is thin: 4 groups.")


def test_it_tells_too_few_groups_from_too_little_time():
    text = str(record())
    assert text.startswith("Not adapted: 3 labelled images") and text.endswith("Give it more seconds.")
    assert "when 3 of them were judged" in text and "thin" not in text
    few = str(AdaptationRecord(2, PatientGroups(("p1", "p2"), "patients"), ["p1", "p2"]))
    assert "The evidence is thin: at least 3 groups" in few and "seconds" not in few
