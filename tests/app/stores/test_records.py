"""What may be stored about images and labels, and how much of a bad record can be used."""

import json

import pytest

from lib.checks import RequestError
from lib.stores.records import BadRecord, ImageRecord, LabelRecord, checked, of_prediction, readable

CLASSES = [{"name": "liver", "idx": 1}, {"name": "tumour", "idx": 2, "color": [1, 0, 0]}]


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"label_info": CLASSES, "client_id": "slicer", "params": {"k": 4, "classes": ["liver"]}, "ts": 1700000000},
        {"note": "checked twice", "opened": [1, 2.5, None, {"by": "Ä"}], "model": "sam2sgp"},
    ],
)
def test_what_viewers_send_is_kept_as_it_is(record):
    assert checked(LabelRecord, record, "label") == record
    assert readable(LabelRecord, record) == (record, [])


BAD = {
    "time as text": {"ts": "x"},
    "time as list": {"ts": [1]},
    "time as bool": {"ts": True},
    "time before all": {"ts": -1},
    "time after all": {"ts": 10**30},
    "name as object": {"name": {"a": 1}},
    "model as number": {"model": 7},
    "parameters as pairs": {"params": [["bundle_path", "/x"]]},
    "classes as object": {"label_info": {"liver": 1}},
    "classes as text": {"label_info": "liver"},
    "user as list": {"user": ["a"]},
    "deep": {"a": nested(197)},
    "deeper than the stack": {"a": nested(20_000)},
    "no number": {"a": {"b": float("nan")}},
    "half a letter": {"a": "\ud800"},
    "a number of 5000 digits": {"a": 10**5000},
    "a number of 64 bits": {"a": 1 << 63},
    "long": {"a": "x" * 300_000},
    "long in all": {f"a{n}": "x" * 30_000 for n in range(10)},
    "a long key": {"k" * 300: 1},
    "a number as key": {7: 1},
}


@pytest.mark.parametrize("case", BAD)
def test_what_could_break_a_reader_is_refused_and_nothing_else_of_it_is_lost(case):
    record = BAD[case]
    with pytest.raises(BadRecord, match="label of A: ") as caught:
        checked(LabelRecord, record, "label of A")
    assert caught.value.status == 422 and len(str(caught.value)) < 1100 and "\n" not in str(caught.value)
    kept, faults = readable(LabelRecord, {"note": "kept", "label_info": CLASSES, **record})
    assert kept["note"] == "kept" and len(faults) >= 1
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    assert "label_info" in record or kept["label_info"] == CLASSES


@pytest.mark.parametrize("record", [None, [], "x", 3])
def test_a_record_is_an_object(record):
    assert readable(ImageRecord, record)[0] == {}
    if record is None:
        assert checked(ImageRecord, record, "image") == {}
    else:
        with pytest.raises(BadRecord):
            checked(ImageRecord, record, "image")


def test_of_a_label_only_classes_that_can_be_read_are_kept():
    entries = [*CLASSES, "x", {"idx": "3", "name": "text"}, {"idx": True}, {"idx": -1}, nested(3), {"name": "none"}]
    assert checked(LabelRecord, {"label_info": entries}, "label")["label_info"] == CLASSES
    with pytest.raises(RequestError, match="class names"):
        checked(LabelRecord, {"label_info": [{"idx": 1, "name": "a\tb"}]}, "label")
    kept, faults = readable(LabelRecord, {"label_info": [*entries, {"idx": 1, "name": "a\tb"}]})
    assert kept["label_info"] == CLASSES and faults == ["label_info: expected classes, found 7 entries that are none"]


def test_tags_of_an_image_that_are_read_are_text():
    with pytest.raises(BadRecord, match="PatientID"):
        checked(ImageRecord, {"PatientID": {"a": 1}, "Modality": "CT"}, "image")
    assert readable(ImageRecord, {"PatientID": {"a": 1}, "Modality": "CT"})[0] == {"Modality": "CT"}


def test_the_record_of_a_prediction_of_many_classes_can_be_stored():
    items = [{"item": "a" * 64, "image": f"case_{n}", "slice": n, "similarity": 0.5, "slices": 3} for n in range(100)]
    names = {f"class_{value}": value for value in range(1, 101)}
    params = {"label_names": names, "support": dict.fromkeys(names, items), "uncertainty": {"map": "x" * 10**6}}
    record = checked(LabelRecord, of_prediction("sam2sgp", params), "label")
    assert record["label_info"][0] == {"name": "class_1", "idx": 1} and "uncertainty" not in record["params"]
    assert len(record["params"]["support"]["class_7"]) == 10
