"""What DICOM headers say of how images were acquired: queries unlike all that may guide them, and sets of two units."""

import logging

import numpy as np
import pytest

from sam2sgp.data.io import write_label
from sam2sgp.data.io.images import read_image
from sam2sgp.inferers.case import prepare_case
from sam2sgp.support import SupportBank, TensorStore
from sam2sgp.transforms.acquired import Acquired, mixed_units, other_than
from tests.helpers.dicom_files import write_series
from tests.helpers.pairs import preprocessing

CT, MR, PET = Acquired("CT"), Acquired("MR"), Acquired("PT", "BQML")


@pytest.mark.parametrize(
    ("own", "support", "told"),
    [
        (CT, [MR, MR], "says CT, but those of all labelled images say MR"),
        (PET, [CT, MR], "says PT, but those of all labelled images say CT and MR"),
        (PET, [Acquired("PT", "GML")], "in BQML, but those of all labelled images are in GML"),
        (CT, [CT, MR], None),
        (CT, [MR, Acquired()], None),
        (Acquired(), [MR], None),
        (CT, [], None),
        (Acquired("DX"), [Acquired("CR")], None),
        (Acquired("OT"), [MR], None),
        (PET, [PET, Acquired("PT", "GML")], None),
        (PET, [Acquired("PT")], None),
    ],
)
def test_a_query_is_told_of_where_all_labelled_images_are_known_to_be_of_another_kind(own, support, told):
    found = list(other_than(own, support))
    assert [told in sentence for sentence in found] == ([True] if told else [])


def test_a_set_of_two_units_is_told_of():
    assert mixed_units([PET, PET, CT, Acquired("PT", "GML")]).startswith(
        "The values of 2 images are in BQML, of 1 in GML:"
    )
    assert mixed_units([PET, PET, CT]) is None


def labelled(folder, name: str, modality: str, units: str | None = None) -> dict:
    """A series with a label."""
    volume = np.random.default_rng(len(name)).integers(0, 999, (4, 24, 24)).astype(np.uint16)
    source = write_series(folder / name, volume, intercept=0.0, modality=modality, Units=units)
    geometry = read_image(source).geometry
    label = np.zeros(geometry.shape, np.uint8)
    label[:, 6:18, 6:18] = 1
    write_label(folder / f"{name}.nii.gz", label, geometry)
    return {
        "name": name,
        "image": str(source),
        "label": str(folder / f"{name}.nii.gz"),
        "patient": name,
        "group": "a",
    }


def test_headers_are_compared_where_the_support_set_is_read_and_where_a_query_is(tmp_path, caplog):
    cases = [labelled(tmp_path, f"pet{number}", "PT", units) for number, units in enumerate(("BQML", "GML", "GML"))]
    mr = labelled(tmp_path, "mr", "MR")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            bank = SupportBank(cases, preprocessing(), store=TensorStore(tmp_path / "cache"), progress=False)
        told = f"{tmp_path}: The values of 2 images are in GML, of 1 in BQML:"
        assert [sentence.startswith(told) for sentence in bank.warnings] == [True]
        assert bank.warnings[0] in caplog.messages
    query = prepare_case({key: mr[key] for key in ("name", "image", "group")}, preprocessing(), bank)
    [sentence] = query["warnings"]
    assert sentence.startswith("Its DICOM header says MR, but those of all labelled images say PT: expect a poor")
    bank.reconcile([*cases, mr])
    assert not prepare_case({key: mr[key] for key in ("name", "image", "group")}, preprocessing(), bank)["warnings"]
    own_units = SupportBank(cases[1:], preprocessing(), progress=False)
    [sentence] = prepare_case(cases[0] | {"label": None}, preprocessing(), own_units)["warnings"]
    assert sentence.startswith("Its values are in BQML, but those of all labelled images are in GML")
