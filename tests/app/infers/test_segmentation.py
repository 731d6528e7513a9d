"""The infer task and batch inference: options, result parameters and files on the image's own grid."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.infers.segmentation import SegmentationTask
from lib.tasks.batch import BatchInference
from sam2sgp.data.io import read_label
from sam2sgp.errors import DataError


@pytest.fixture
def task(studio):
    made = studio(["us_000_0", "us_001_0", "us_002_0", "mr_000", "mr_001"], ["us_000_0", "us_001_0"])
    task = SegmentationTask(made.segmenter())
    task.studio = made
    return task


def run(task, name, **request):
    path, params = task({"image": str(task.studio.image(name)), "image_id": name, **request})
    content = read_label(path)
    Path(path).unlink()
    return content, params


def test_the_task_shows_what_can_be_segmented_now_and_the_options(task):
    assert task.info()["labels"] == {}
    task.segmenter.refresh()
    info = task.info()
    assert info["labels"] == {"class_1": 1, "class_2": 2, "class_3": 3}
    assert info["config"] == {
        "k": 8,
        "retrieval": ["similarity", "random"],
        "three_d_memory": True,
        "uncertainty": False,
        "save_label": False,
        "classes": ["all", "class_1", "class_2", "class_3"],
    }
    options = info["options"]["properties"]
    assert info["config"].keys() <= options.keys() and "client_id" not in options
    assert options["k"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 64}
    assert options["k"]["description"] == "Support items per class."
    task.studio.label("us_000_0").unlink()
    task.studio.label("us_001_0").unlink()
    task.segmenter.refresh()
    assert task.info()["labels"] == {}


def test_a_viewer_that_sends_the_options_back_as_they_came_gets_the_defaults(task):
    task.segmenter.refresh()
    plain, _ = run(task, "us_002_0")
    echoed, _ = run(task, "us_002_0", **task.info()["config"])
    assert np.array_equal(plain, echoed)


def test_the_parameters_tell_what_was_done(task):
    _, params = run(task, "us_002_0", uncertainty=True)
    assert params["label_names"] == {"class_1": 1, "class_2": 2, "class_3": 3}
    assert params["confidence"].keys() == params["label_names"].keys()
    assert all(value is None or 0.5 <= value <= 1 for value in params["confidence"].values())
    items = params["support"]["class_1"]
    assert {item["image"] for item in items} == {"us_000_0", "us_001_0"}
    assert all(item["slice"] is None and -1 <= item["similarity"] <= 1 for item in items)
    assert items == sorted(items, key=lambda item: -item["similarity"])
    assert params["support_items"] == 2 and params["weights"] == "embedded" and params["warnings"] == []
    assert params["scaling"] == "percentiles (a grey picture)"
    # Two patients tell nothing of how far images are from each other.
    assert params["unlike_support"] is False and params["maybe_absent"] == []
    assert set(params["latencies"]) == {"support", "pre", "infer", "write", "total"}
    unsure = params["uncertainty"]
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(unsure["map"]))))
    assert unsure["extension"] == ".png" and levels.shape == (64, 80)
    assert abs(levels.mean() / 255 - unsure["mean"]) < 0.003 and unsure["slices"] == [unsure["mean"]]


def test_a_query_that_is_scaled_otherwise_than_its_support_set_is_warned_of(task):
    path = task.studio.studies / "colour.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)).save(path)
    _, params = task({"image": str(path)})
    assert params["scaling"] == "colours (a colour image)"
    assert "but the support set by percentiles" in params["warnings"][0]


def test_a_volume_is_guided_by_slices_and_three_d_memory_can_be_switched_off(task):
    task.studio.label("us_000_0").unlink()
    task.studio.label("us_001_0").unlink()
    task.studio.approve("mr_000")
    together, params = run(task, "mr_001")
    alone, _ = run(task, "mr_001", three_d_memory=False)
    assert together.shape == alone.shape and not np.array_equal(together, alone)
    assert all(isinstance(item["slice"], int) for items in params["support"].values() for item in items)


def test_batch_inference_goes_on_after_an_image_that_fails(task):
    asked = []

    def infer(request, datastore):
        asked.append(request)
        if request["image"] == "us_001_0":
            raise DataError("us_001_0: expected an image.")
        return {"label": request["image"], "tag": request["label_tag"], "params": {"confidence": {}, "warnings": []}}

    datastore = task.segmenter.cases.datastore
    batch = BatchInference(task.segmenter.weights, task.segmenter.requests, task.studio.folder / "batch.json")
    results = batch({"model": "sam2sgp", "images": "all", "k": 2}, datastore, infer)
    assert list(results) == ["mr_000", "mr_001", "us_000_0", "us_001_0", "us_002_0"]
    assert results["us_001_0"] == {"error": "us_001_0: expected an image."}
    assert results["us_002_0"] == {"label": "us_002_0", "tag": "original", "confidence": {}, "warnings": []}
    assert all(request["save_label"] and request["label_tag"] == "original" and request["k"] == 2 for request in asked)
    unlabelled = batch({"images": "unlabeled", "max_batch_size": 2}, datastore, infer)
    assert list(unlabelled) == ["mr_000", "mr_001"]
