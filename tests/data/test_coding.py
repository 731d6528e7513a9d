"""Values of labels that only several files together show to be wrong."""

import logging
import re
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
from monai.transforms import Compose
from PIL import Image

from sam2sgp.data import load_datalist
from sam2sgp.data.coding import LabelCoding
from sam2sgp.episodes import EpisodeDataset, EpisodeSettings
from sam2sgp.errors import DataError
from sam2sgp.support import SupportBank
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd


@pytest.fixture
def mixed(tmp_path):
    """A data folder whose first label is 0 and 1, and whose second is 0 and 255."""
    for number, value in enumerate((1, 255)):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
            array = np.zeros((8, 8, 2), np.uint8)
            array[2:6, 2:6] = value
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / folder / f"c{number}.nii.gz")
    return tmp_path


def test_masks_of_1_and_of_255_in_one_data_set_are_refused_with_both_names(mixed):
    data = load_datalist(mixed)
    transform = Compose([LoadCased(), ScaleIntensityByModalityd(), FitToSquared(size=16)])
    with pytest.raises(DataError, match="c1.nii.gz.*found 255 here and 1 in .*c0.nii.gz"):
        SupportBank(data, transform, progress=False)
    with pytest.raises(DataError, match="c1.nii.gz.*found 255 here and 1 in .*c0.nii.gz"):
        EpisodeDataset(data, transform, mixed / "cache", 1, EpisodeSettings(clip_probability=0.0), progress=False)
    bank = SupportBank(data, transform, {1: "liver", 255: "lesion"}, progress=False)
    assert bank.class_values == [1, 255]


def test_255_beside_few_classes_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        coding = LabelCoding()
        coding.check("a.nii.gz", [0, 1, 2, 255])
        coding.check("b.nii.gz", [0, 1, 255])
        LabelCoding({1: "liver", 255: "lesion"}).check("c.nii.gz", [0, 1, 255])
        LabelCoding().check("d.nii.gz", [0, 200, 255])
    assert [record.getMessage()[:30] for record in caplog.records] == ["a.nii.gz: value 255 beside 1, "]


def test_a_class_that_nnunet_leaves_out_is_said_once(caplog):
    coding = LabelCoding({1: "liver", 2: "ignore"})
    with caplog.at_level(logging.WARNING):
        coding.check("a.nii.gz", [0, 1])
        assert not caplog.records
        coding.check("b.nii.gz", [0, 1, 2])
        coding.check("c.nii.gz", [0, 2])
    [record] = caplog.records
    assert record.getMessage().startswith("b.nii.gz: value 2 is declared as 'ignore', nnU-Net's word")
    caplog.clear()
    coding.check("d.nii.gz", [0, 1, 255])
    assert [record.getMessage()[:27] for record in caplog.records] == ["d.nii.gz: value 255 beside "]


def test_a_colour_that_palettes_number_differently_is_refused(tmp_path):
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)

    def saved(name: str, *colours: tuple[int, int, int]) -> Path:
        picture = Image.fromarray(np.arange(3, dtype=np.uint8)[None].repeat(4, 0), "P")
        picture.putpalette([0, 0, 0, *sum(colours, ())])
        picture.save(tmp_path / name)
        return tmp_path / name

    coding = LabelCoding()
    coding.check(saved("a.png", red, green), [0, 1, 2])
    # The same numbers in other colours contradict nothing, nor do colours that are not used.
    coding.check(saved("b.png", red, blue), [0, 1, 2])
    coding.check(saved("c.png", green, red), [0])
    with pytest.raises(DataError, match="d.png.*found 1 for .0, 255, 0. here and 2 in .*a.png"):
        coding.check(saved("d.png", green, red), [0, 1, 2])
    # Values of one colour in the same palette say nothing about the others.
    coding = LabelCoding()
    coding.check(saved("e.png", red, red), [0, 1, 2])
    coding.check(saved("f.png", green, red), [0, 1, 2])


def slicer(path: Path, **names: int) -> str:
    """As 3D Slicer writes it: one segment for each name, with its value."""
    fields = {}
    for number, (name, value) in enumerate(names.items()):
        fields |= {f"Segment{number}_Name": name.replace("_", " "), f"Segment{number}_LabelValue": str(value)}
    nrrd.write(str(path), np.zeros((4, 5, 6), np.uint8), {"encoding": "raw", **fields})
    return str(path)


def test_segments_of_one_name_and_different_values_are_refused(tmp_path):
    """3D Slicer numbers the segments of each file in the order in which they were added."""
    first = slicer(tmp_path / "a.seg.nrrd", Liver=1, Tumour=2)
    coding = LabelCoding()
    coding.check(first, [0, 1, 2])
    coding.check(slicer(tmp_path / "b.seg.nrrd", Tumour=3, liver=1), [0, 1])
    swapped = slicer(tmp_path / "c.seg.nrrd", tumour=1, Liver=2)
    with pytest.raises(DataError, match="c.seg.nrrd.*'tumour' in all labels, found 1 here and 2 in .*a.seg.nrrd"):
        coding.check(swapped, [0, 1])
    with pytest.raises(DataError, match="'Liver' in all labels, found 2 here and 1 in dataset.json or labels.json"):
        LabelCoding({1: "liver"}).check(swapped, [0, 2])
    # Names that say nothing, and one that two segments have.
    coding.check(slicer(tmp_path / "d.seg.nrrd", Segment_1=2, Segment_2=1), [0, 1, 2])
    coding.check(slicer(tmp_path / "e.seg.nrrd", Segment_1=1, Segment_2=2), [0, 1, 2])


def test_a_value_that_segments_of_two_names_have_is_said_once(tmp_path, caplog):
    coding = LabelCoding()
    with caplog.at_level(logging.WARNING):
        for name in ("Liver", "Liver", "Spleen", "Kidney"):
            coding.check(slicer(tmp_path / f"{name}.seg.nrrd", **{name: 1}), [0, 1])
    [record] = caplog.records
    assert re.search(r"value 1 is the segment 'Spleen' here and 'Liver' in .*Liver.seg.nrrd", record.getMessage())


def test_one_name_of_two_values_is_said_once_whatever_its_case(tmp_path, caplog):
    path = slicer(tmp_path / "a.seg.nrrd", RING=1, ring=2, Disc=3, Segment_1=4, segment_1=5)
    with caplog.at_level(logging.WARNING):
        coding = LabelCoding()
        coding.check(path, [0, 1, 3, 4, 5])
        assert not caplog.records, "where one of them is empty, nothing is taken for two"
        for _ in range(2):
            coding.check(path, [0, 1, 2, 3, 4, 5])
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{path}: values 1 and 2 have one name, upper and lower case aside ('RING' and 'ring')")
    assert coding.warnings == [told]


def test_one_name_that_is_declared_for_two_values_is_said_and_no_segment_is_held_against_it(tmp_path, caplog):
    coding = LabelCoding({1: "Ring", 2: "ring", 3: "disc"})
    coding.check(slicer(tmp_path / "a.seg.nrrd", ring=1), [0, 1])
    assert [told.split(" (")[0] for told in coding.warnings] == [
        "dataset.json or labels.json: values 1 and 2 have one name, upper and lower case aside"
    ]


def test_values_are_named_by_what_is_declared_and_by_segments(tmp_path):
    coding = LabelCoding({1: "liver", 2: "class_2"})
    assert coding.named == {1}
    coding.check(slicer(tmp_path / "a.seg.nrrd", Tumour=4, Segment_5=5, Cyst=6), [0, 4, 5])
    assert coding.named == {1, 4}
