"""Classes that are one piece: what is found apart from the largest part of a volume is left out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sam2sgp.inferers import CaseSegmenter, InferenceSettings, SupportSetInferer
from sam2sgp.inferers.one_piece import keep_main_parts, sentence
from sam2sgp.networks import ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.support import SupportBank, SupportSampler
from tests.helpers.banks import case
from tests.helpers.stubs import SIZE, StubNetwork


class Bright(StubNetwork):
    """Finds the class where the image is bright."""

    def segment(self, features: ImageFeatures, support: SupportMemory) -> SGPOutput:
        batch, classes = support.tokens.shape[:2]
        logits = (10 * features.embedding.mean(1, keepdim=True) - 5).expand(-1, classes, -1, -1).contiguous()
        numbers = torch.ones(batch, classes)
        return SGPOutput(logits, logits, torch.zeros(batch, classes, 4), numbers, numbers)


def volume(name: str, label: Tensor) -> dict:
    """A prepared case (Z, S, S) that is bright where it is labelled."""
    image = (label > 0).float()[:, None].expand(-1, 3, -1, -1).contiguous()
    return case(name, image, label, name)


def blocks(*places: tuple[slice, slice]) -> Tensor:
    """(6, S, S) with class 1 on some slices and rows."""
    label = torch.zeros(6, SIZE, SIZE, dtype=torch.long)
    for slices, rows in places:
        label[slices, rows, :4] = 1
    return label


ONE = blocks((slice(1, 4), slice(0, 3)))
# A large part of 48 voxels and a small one of 12.
TWO = blocks((slice(0, 4), slice(0, 3)), (slice(5, 6), slice(5, 8)))


def segmenter(labels: list[Tensor], **settings) -> CaseSegmenter:
    support = SupportBank(
        [volume(f"p{number}", label) for number, label in enumerate(labels)], lambda case: case, progress=False
    )
    given = {"region_below": 0.0, "object_gate": False, "volume_memory": None} | settings
    return CaseSegmenter(
        Bright().eval(), SupportSetInferer(support, InferenceSettings(SupportSampler(k=1), **given)), probability=True
    )


def query(label: Tensor) -> dict:
    made = volume("query", label)
    del made["label"]
    return made


def test_only_the_largest_part_is_kept_where_every_labelled_volume_is_one_piece():
    own = segmenter([ONE] * 3)
    result = own.segment(query(TWO))
    assert int((result.pred == 1).sum()) == 48 and not result.pred[5].any()
    assert torch.equal(result.probability.argmax(1), result.pred.long())
    assert torch.allclose(result.probability.float().sum(1), torch.ones(()), atol=1e-2)
    assert result.warnings == [sentence("class_1", 12 / 60)] and "20%" in result.warnings[0]
    off = replace(own, inferer=replace(own.inferer, settings=replace(own.inferer.settings, one_piece=False)))
    result = off.segment(query(TWO))
    assert torch.equal(result.pred.long(), TWO) and result.warnings == []


def test_the_main_slice_is_one_of_what_is_kept_and_the_pseudo_mask_is_of_it():
    # The small part has the largest area on one slice.
    label = blocks((slice(0, 4), slice(0, 3)), (slice(5, 6), slice(2, 8)))
    label[2, 3, :2] = 1
    own = segmenter([ONE] * 3)
    result = own.segment(query(label))
    assert result.main == 2 and torch.equal(result.pseudo.long(), label[2])
    off = replace(own, inferer=replace(own.inferer, settings=replace(own.inferer.settings, one_piece=False)))
    result = off.segment(query(label))
    assert result.main == 5 and torch.equal(result.pseudo.long(), label[5])
    truth = torch.zeros_like(label)
    truth[4] = 1
    assert own.segment(query(label) | {"label": truth, "source": "query"}).main == 4


@pytest.mark.parametrize("labels", [[ONE, ONE, TWO], [ONE, ONE]])
def test_all_is_kept_where_a_labelled_volume_has_more_parts_or_there_are_few(labels):
    assert torch.equal(segmenter(labels).segment(query(TWO)).pred.long(), TWO)


def test_a_labelled_volume_does_not_tell_of_itself():
    own = segmenter([ONE] * 3)
    of_labelled = query(TWO) | {"patient": "p0"}
    assert torch.equal(own.segment(of_labelled).pred.long(), TWO)


def test_single_images_are_left_as_they_are():
    own = segmenter([ONE] * 3)
    assert torch.equal(own.segment(query(TWO.amax(0, keepdim=True))).pred.long(), TWO.amax(0, keepdim=True))


def test_little_that_is_left_out_is_not_told():
    pred = TWO.to(torch.uint8).clone()
    pred[5, 6:] = 0
    assert keep_main_parts(pred, [1], [1]) == {1: 4 / 52} and int(pred.sum()) == 48
    assert keep_main_parts(pred, [1], [1]) == {} and sentence("liver", 0.04) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_other_classes_stay_as_they_are_whatever_their_values(dtype):
    pred = (255 * TWO).to(dtype)
    pred[0, 6:, 6:] = pred[5, 0, 0] = 254
    before, probability = pred.clone(), torch.zeros(6, 3, SIZE, SIZE)
    probability[:, 2] = 1.0
    assert keep_main_parts(pred, [255], [254, 255], probability) == {255: 12 / 60}
    changed = pred != before
    assert int(changed.sum()) == 12 and not pred[changed].any()
    assert probability.sum((0, 2, 3)).tolist() == [12.0, 0.0, 6 * SIZE * SIZE - 12]
    assert keep_main_parts(pred, [], [254, 255]) == {}
