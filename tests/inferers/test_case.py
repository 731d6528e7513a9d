"""From a case to its result, as evaluation, server and Python do it."""

import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose

from sam2sgp.engines import QueryEvaluator
from sam2sgp.errors import DataError
from sam2sgp.inferers import CaseSegmenter, InferenceSettings, SupportSetInferer
from sam2sgp.inferers.case import prepare_case
from sam2sgp.support import SupportBank, SupportSampler
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd
from tests.helpers.bundle_runs import computing_with_one_thread
from tests.helpers.pairs import SIZE, bank, network, write_set


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> CaseSegmenter:
    support = bank(write_set(tmp_path_factory.mktemp("case") / "set", 3))
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2), region_below=0.0))
    with computing_with_one_thread():
        steps = [LoadCased(), ScaleIntensityByModalityd("image"), FitToSquared("image", size=SIZE)]
        yield CaseSegmenter(network(), inferer, Compose(steps))


def test_a_result_is_on_the_cases_own_grid_with_what_guided_it(segmenter):
    case = dict(segmenter.inferer.bank.data[0])
    steps: list[int] = []
    prepared = segmenter.prepare(case)
    result = segmenter.segment(prepared, steps.append)
    assert result.pred.shape == prepared["label"].shape and result.pred.dtype == torch.uint8
    assert sum(steps) == segmenter.work(prepared) == 2
    values = segmenter.inferer.bank.class_values
    assert result.confidence.keys() == set(values) and result.seconds > 0
    # Its own patient's items never guide.
    assert result.support[1][0].tolist() in ([[1, 2]], [[2, 1]]) and result.support[2][0].tolist() == [[1]]
    assert all(index.shape == similarity.shape for index, similarity in result.support.values())
    assert set(result.truth_index.unique().tolist()) <= set(range(len(values) + 1))
    lookup = torch.tensor([0, *values])
    assert torch.equal(lookup[result.pred_index.long()], result.pred.long())
    assert torch.equal(lookup[result.truth_index.long()], prepared["label"])
    assert result.probability is None and "probability" not in result.entries()


def test_a_variant_keeps_maps_and_takes_the_own_patient(segmenter):
    case = dict(segmenter.inferer.bank.data[0])
    del case["label"]
    variant = replace(segmenter, exclude_own_patient=False, probability=True, uncertainty=True)
    result = variant.segment(variant.prepare(case))
    slices, rows, columns = result.pred.shape
    classes = len(segmenter.inferer.bank.class_values)
    assert result.probability.shape == (slices, classes + 1, rows, columns)
    assert result.uncertainty.shape == result.pred.shape and 0 <= float(result.uncertainty.min())
    assert result.pred_index is None and result.truth_index is None
    assert any(0 in index for index, _ in result.support.values())
    best = torch.tensor([0, *segmenter.inferer.bank.class_values])[result.probability.argmax(1)]
    assert torch.equal(best, result.pred.long())


def test_an_evaluator_says_the_same(segmenter):
    case = dict(segmenter.inferer.bank.data[1])
    evaluator = QueryEvaluator(torch.device("cpu"), [], segmenter.network, epoch_length=1, inferer=segmenter.inferer)
    found, result = evaluator.segment(segmenter.prepare(case)), segmenter.segment(segmenter.prepare(case))
    assert torch.equal(found["pred"], result.pred) and found["confidence"] == pytest.approx(
        result.confidence, nan_ok=True
    )
    assert evaluator.share_done == 1.0 and "image_full" not in found and found["name"] == case["name"]


def test_a_file_that_cannot_be_read_and_an_undeclared_value_are_told(segmenter, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="broken.png"):
        segmenter.prepare({"name": "broken", "image": str(tmp_path / "broken.png")})
    prepared = segmenter.prepare(dict(segmenter.inferer.bank.data[0]))
    prepared["label"] = torch.from_numpy(np.full(prepared["label"].shape, 77))
    with pytest.raises(DataError, match="77"):
        segmenter.segment(prepared)


@pytest.mark.parametrize("query, planes", [((1.0, 1.0, 3.0), None), ((3.0, 1.0, 1.0), "sagittal slices.*axial ones")])
def test_a_volume_that_is_cut_otherwise_than_the_support_set_is_said(tmp_path, query, planes):
    """By its voxel sizes a volume is cut into axial or into sagittal slices, which look nothing alike."""
    rng = np.random.default_rng(0)
    cases = []
    for number, sizes in enumerate([(1.0, 1.0, 3.0), (1.0, 1.0, 1.0), query]):
        image = rng.normal(size=(12, 12, 12)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[3:9, 3:9, 3:9] = 1
        affine = np.diag([*sizes, 1.0])
        paths = {key: tmp_path / f"{number}_{key}.nii" for key in ("image", "label")}
        for path, values in zip(paths.values(), (image, label), strict=True):
            nib.save(nib.Nifti1Image(values, affine), path)
        cases.append(
            {"name": str(number), "patient": str(number), "group": "a"} | {k: str(v) for k, v in paths.items()}
        )
    transform = Compose([LoadCased(), ScaleIntensityByModalityd("image"), FitToSquared(size=16)])
    support = SupportBank(cases[:2], transform, progress=False)
    assert support.sliced_along() == support.sliced_along("a") == support.sliced_along("b") == {2}
    told = prepare_case(cases[2], transform, support)["warnings"]
    assert len(told) == bool(planes) and all(re.search(planes, sentence) for sentence in told)
