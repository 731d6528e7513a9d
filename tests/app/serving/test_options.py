"""What requests may hold: declared names, checked values, and nothing of another shape."""

import json

import pytest
from pydantic import ValidationError

from lib.checks import RequestError
from lib.serving.options import (
    AllTrainParams,
    BatchParams,
    InferParams,
    LabelNotes,
    LabelParams,
    Notes,
    SampleParams,
    ScoringParams,
    TrainParams,
    parse_object,
    sentence,
)

SLICER = {"result_extension": ".nrrd", "result_dtype": "uint8", "client_id": "user-xyz"}
OHIF = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, "restore_label_idx": False}
MONAI_LABELS_BATCH = {
    "device": "cuda",
    "multi_gpu": True,
    "gpus": "all",
    "logging": "WARNING",
    "save_label": True,
    "label_tag": "original",
    "max_workers": 1,
    "max_batch_size": 0,
}
EVIL = "/tmp/evil"


@pytest.mark.parametrize(
    "options", [InferParams, BatchParams, TrainParams, AllTrainParams, SampleParams, ScoringParams]
)
@pytest.mark.parametrize(
    "body",
    [
        {"bundle_path": EVIL},
        [["bundle_path", EVIL]],
        [[["bundle_path", EVIL]]],
        {"finetune": {"bundle_path": EVIL}},
        {"finetune": [["bundle_path", EVIL]]},
        {"finetune": {"finetune": [["bundle_path", EVIL]]}},
        {"scores": [["bundle_path", EVIL]]},
        {"sam2sgp": {"bundle_path": EVIL}},
        {"session": {"path": "/etc"}},
        {"image": "/etc/passwd"},
        {"tracking": EVIL},
        {"config": {"_target_": "os.system"}},
        {"": EVIL},
        "bundle_path",
    ],
)
def test_no_shape_of_a_foreign_option_is_taken(options, body):
    with pytest.raises(ValidationError) as caught:
        options.model_validate(body)
    text = sentence(caught.value.errors())
    assert ": expected" in text and "\n" not in text


def test_what_the_shipped_clients_send_is_taken_and_only_what_is_used_goes_on():
    assert InferParams(**SLICER).given() == InferParams(**OHIF).given() == {"result_extension": ".nrrd"}
    given = BatchParams(**MONAI_LABELS_BATCH).given()
    assert given == {"device": "cuda", "save_label": True, "label_tag": "original", "max_batch_size": 0}
    panel = {"action": "train", "max_epochs": 3, "learning_rate": 0.001, "device": "cpu"}
    assert AllTrainParams(finetune=panel, client_id=None).finetune.given() == panel
    label = {"label_info": [{"name": "liver", "idx": 1}]}
    assert LabelParams(**label, client_id="user-xyz").given() == label


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (TrainParams, {"device": "cuda:$(id)"}),
        (TrainParams, {"max_epochs": 10**9}),
        (TrainParams, {"learning_rate": float("inf")}),
        (InferParams, {"k": True}),
        (InferParams, {"classes": ["x" * 2000]}),
        (InferParams, {"result_extension": "/../../x.nii.gz"}),
        (InferParams, {"client_id": {"a": 1}}),
        (BatchParams, {"images": "some"}),
        (BatchParams, {"images": [1]}),
        (BatchParams, {"images": {"a": 1}}),
        (LabelParams, {"label_info": [["idx", 1]]}),
        (LabelParams, {"label_info": {"idx": 1}}),
        (LabelParams, {"ts": "x"}),
        (Notes, {"nested": [1]}),
        (Notes, {"x" * 65: 1}),
        (Notes, {"long": "x" * 2000}),
        (Notes, {str(number): number for number in range(65)}),
        (Notes, {"path": "/etc/passwd"}),
        (LabelNotes, {"ts": "x"}),
    ],
)
def test_values_of_another_type_or_size_are_refused(options, body):
    with pytest.raises(ValidationError) as caught:
        options.model_validate(body)
    assert len(sentence(caught.value.errors())) < 300


def test_label_tags_and_class_names_keep_their_own_sentence():
    with pytest.raises(RequestError, match="label tag"):
        InferParams(label_tag="../../x")
    with pytest.raises(RequestError, match="label_info: expected class names"):
        LabelParams(label_info=[{"idx": 1, "name": "a\n"}])


def test_a_task_sees_the_declared_options_of_its_request_only():
    request = {"k": "3", "bundle_path": EVIL, "image": "A", "session": {}, "gpus": "0"}
    assert InferParams.of_request(request).given() == {"k": 3}
    with pytest.raises(RequestError, match="^k: expected a whole number"):
        InferParams.of_request({"k": [[1]]})


def test_empty_texts_are_empty_objects():
    assert parse_object("", "params") == parse_object("null", "params") == parse_object(" {} ", "params") == {}


def test_a_body_with_many_mistakes_is_one_mistake():
    """Telling 50,000 of them takes the server seconds in which nobody else is answered."""
    with pytest.raises(RequestError, match="at most 1024 names in a JSON object, found 50000"):
        parse_object(json.dumps(dict.fromkeys(map(str, range(50_000)), 1)), "body")
    with pytest.raises(ValidationError) as caught:
        BatchParams.model_validate({"images": [0] * 50_000})
    assert len(caught.value.errors()) < 5
