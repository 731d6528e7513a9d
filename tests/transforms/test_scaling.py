"""How intensities are scaled: by what is stated, else like the support set, else by shares of the voxels."""

import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sam2sgp.data import load_datalist
from sam2sgp.data.io import read_image
from sam2sgp.engines import QueryDataset
from sam2sgp.episodes import EpisodeDataset, EpisodeSettings
from sam2sgp.transforms import Scaling, SupportScaling, choose_scaling, scale_intensity
from sam2sgp.transforms.scaling import hounsfield_evidence, is_ct
from tests.helpers.dicom_files import write_series
from tests.helpers.pairs import bank, preprocessing

CT, COLOUR, PERCENTILES = (Scaling(kind, "a test") for kind in ("ct", "colour", "percentiles"))
CT_SET, MR_SET = (SupportScaling(volumes=frozenset({kind})) for kind in ("ct", "percentiles"))
RNG = np.random.default_rng(0)


def ct(air: float = 0.4, shape=(6, 1, 40, 40)) -> torch.Tensor:
    """Air, fat and soft tissue, in HU."""
    kinds = RNG.choice(3, shape, p=[air, (1 - air) / 3, (1 - air) * 2 / 3])
    return torch.tensor(np.array([-1000.0, -80.0, 50.0])[kinds] + RNG.normal(0, 12, shape), dtype=torch.float32)


def mr(shape=(6, 1, 40, 40)) -> torch.Tensor:
    """Noise and tissue, in the units of the scanner."""
    return torch.tensor(RNG.choice([30.0, 600.0, 1000.0], shape) + RNG.normal(0, 8, shape), dtype=torch.float32)


def with_one_voxel(image: torch.Tensor, value: float) -> torch.Tensor:
    image = image.clone()
    image[0, 0, 0, 0] = value
    return image


@pytest.mark.parametrize(
    ("image", "evidence"),
    [
        (ct(), "hu"),
        (with_one_voxel(ct(), -32768), "hu"),
        (torch.cat([ct(air=0), torch.full((2, 1, 40, 40), -3024.0)]), "open"),
        (torch.cat([ct(), torch.full((2, 1, 40, 40), -3024.0)]), "hu"),
        (ct(air=0), "open"),
        (ct(air=1) + 300, "open"),
        (ct() + 1024, "stored"),
        (mr(), "positive"),
        (with_one_voxel(mr(), -501), "positive"),
        (mr() - 2000, "below"),
        ((mr() - 500) / 300, "narrow"),
        (torch.zeros(1, 1, 1, 1), "narrow"),
    ],
)
def test_voxels_are_judged_by_their_shares(image, evidence):
    assert hounsfield_evidence(image) == evidence


@pytest.mark.parametrize("change", [lambda image: with_one_voxel(image, -501), lambda image: image - 2000])
@pytest.mark.parametrize("support", [None, MR_SET])
def test_low_values_alone_make_no_ct_of_an_mr(change, support):
    image = mr()
    expected = scale_intensity(image, choose_scaling(image, support=support))
    changed = change(image)
    chosen = choose_scaling(changed, support=support)
    assert chosen.kind == "percentiles" and not chosen.warnings
    torch.testing.assert_close(scale_intensity(changed, chosen)[1:], expected[1:], atol=2e-3, rtol=0)


def test_a_ct_without_air_is_scaled_like_its_support_set():
    image = ct(air=0)
    assert choose_scaling(image).kind == "percentiles"
    chosen = choose_scaling(image, support=CT_SET)
    assert chosen.kind == "ct" and not chosen.warnings and str(chosen) == "CT window (like the support set)"


@pytest.mark.parametrize("stated", [{"support": CT_SET}, {"modality": "CT", "stated_by": "datalist"}])
def test_a_ct_stored_too_high_is_moved_and_warned_of(stated):
    image = ct()
    chosen = choose_scaling(image + 1024, **stated)
    assert chosen.kind == "ct" and chosen.offset == -1024 and "1024 too high" in chosen.warnings[0]
    torch.testing.assert_close(scale_intensity(image + 1024, chosen), scale_intensity(image, CT), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("image", "arguments", "kind", "warning"),
    [
        (mr(), {"support": CT_SET}, "percentiles", "hardly a value below 0"),
        (mr() - 2000, {"support": CT_SET}, "percentiles", "below those of air"),
        (ct() / 1000, {"modality": "CT"}, "percentiles", "range of its values is too small"),
        (mr() - 2000, {"modality": "CT"}, "ct", "below those of air"),
        ((ct() + 1000).clip(0, 4095) / 16, {"modality": "CT"}, "ct", "hardly a value below 0"),
        (ct(), {"support": MR_SET}, "percentiles", "look like Hounsfield units"),
        (ct(), {"modality": "CT", "support": MR_SET}, "ct", "but the support set by percentiles"),
        (mr(), {"modality": "MR", "support": CT_SET}, "percentiles", "but the support set by CT window"),
        (mr().abs(), {"is_rgb": True, "support": MR_SET}, "colour", "but the support set by percentiles"),
        (mr(), {"modality": "MR", "support": MR_SET}, "percentiles", None),
        (ct(), {"modality": "CT", "support": CT_SET}, "ct", None),
        (ct(), {"modality": "CT", "support": SupportScaling()}, "ct", None),
        (mr(), {"is_picture": True, "modality": "CT"}, "percentiles", None),
    ],
)
def test_what_disagrees_is_warned_of(image, arguments, kind, warning):
    chosen = choose_scaling(image, **arguments)
    assert chosen.kind == kind
    assert (warning in " ".join(chosen.warnings)) if warning else not chosen.warnings


@pytest.mark.parametrize("text", ["CT", "ct", "CECT", "CT scan", "Computed Tomography", "CT abdomen"])
def test_names_of_ct(text):
    assert is_ct(text) is True


@pytest.mark.parametrize(("text", "told"), [("MR", False), ("T1", False), ("US", False), ("OT", None), ("", None)])
def test_names_of_others_and_names_that_say_nothing(text, told):
    assert is_ct(text) is told and is_ct("PET/CT") is None and is_ct(None) is None


def write_pair(folder: Path, name: str, image: torch.Tensor) -> None:
    array = image[:, 0].numpy().transpose(2, 1, 0)
    label = np.zeros(array.shape, np.uint8)
    label[10:20, 10:20] = 1
    for kind, values in (("images", np.round(array).astype(np.int16)), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, np.diag([1.0, 1, 3, 1])), folder / kind / f"{name}.nii")


@pytest.fixture
def mixed_ct_set(tmp_path):
    """Three CTs and one of them without air."""
    for number in range(3):
        write_pair(tmp_path / "set", f"ct{number}", ct())
    write_pair(tmp_path / "set", "inside", ct(air=0))
    return tmp_path / "set"


@pytest.mark.parametrize("cached", [False, True])
def test_a_support_set_is_scaled_alike_and_said_so(mixed_ct_set, tmp_path, caplog, cached):
    caplog.set_level(logging.INFO)
    made = bank(mixed_ct_set, tmp_path / "cache" if cached else None)
    assert made.scaling() == CT_SET
    inside = next(item for item in made.items if item.id.startswith("inside"))
    expected = scale_intensity(torch.tensor(read_image(mixed_ct_set / "images/inside.nii").slices), CT)
    assert float(inside.image.float().mean()) == pytest.approx(float(expected[inside.slice].mean()), abs=0.01)
    (said,) = [record.message for record in caplog.records if "scaling" in record.message]
    assert said.startswith("Support set, scaling: 3 by CT window (air and tissue in Hounsfield units); 1 by CT window")
    if cached:
        again = bank(mixed_ct_set, tmp_path / "cache")
        assert [item.content for item in again.items] == [item.content for item in made.items]


def test_training_and_queries_are_scaled_as_the_support_set_is(mixed_ct_set, tmp_path):
    cases = load_datalist(mixed_ct_set)
    settings = EpisodeSettings(clip_probability=0.0)
    data = EpisodeDataset(cases, preprocessing(), str(tmp_path / "cache"), 1, settings, progress=False)
    assert [data.cache[case].scaling.kind for case in data.data] == ["ct"] * 4
    queries = QueryDataset(cases, preprocessing(), bank(mixed_ct_set))
    prepared = [queries[number] for number in range(4)]
    assert [str(case["scaling"]) for case in prepared] == ["CT window (like the support set)"] * 4
    for number, case in enumerate(prepared):
        trained = torch.tensor(np.asarray(data.cache[data.data[number]].image, dtype=np.float32))
        torch.testing.assert_close(trained, case["image"], atol=1e-3, rtol=0)


def test_what_is_stated_comes_from_the_list_the_header_or_the_setting(tmp_path):
    write_pair(tmp_path / "set", "a", ct(air=0))
    pair = {"image": "set/images/a.nii", "label": "set/labels/a.nii"}
    scalings = {}
    for name, content in {"none": {}, "listed": {"modality": {"0": "CT"}}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"training": [pair], **content}))
        scalings[name] = preprocessing()(load_datalist(tmp_path / f"{name}.json")[0])["scaling"]
    set_by_run = preprocessing()
    set_by_run.transforms[1].modality = "CT"
    scalings["setting"] = set_by_run(load_datalist(tmp_path / "none.json")[0])["scaling"]
    series = write_series(tmp_path / "series", np.full((3, 16, 16), 40, np.int16) + np.arange(48).reshape(3, 1, 16))
    load, scale, _ = set_by_run.transforms
    scale.modality = "MR"
    scalings["header"] = scale(load({"image": str(series)}))["scaling"]
    assert {name: str(scaling) for name, scaling in scalings.items()} == {
        "none": "percentiles (no modality is stated, and the voxels don't look like CT)",
        "listed": "CT window (datalist: CT)",
        "setting": "CT window (setting: CT)",
        "header": "CT window (DICOM header: CT)",
    }


def test_ct_window_maps_its_bounds_to_zero_and_one():
    values = torch.tensor([-1000.0, -160.0, 40.0, 240.0, 3000.0]).reshape(1, 1, 1, 5)
    out = scale_intensity(values, CT, ct_window=(-160, 240))
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_percentiles_ignore_outliers():
    values = torch.linspace(0, 100, 10_000).reshape(1, 1, 100, 100).clone()
    values[0, 0, 0, 0] = 1e6
    out = scale_intensity(values, PERCENTILES, percentiles=(0.5, 99.5))
    assert out.min() == 0 and out.max() == 1
    assert out[0, 0, 50, 50] == pytest.approx(0.5, abs=0.02)


def test_scaling_is_over_the_whole_volume_so_that_slices_keep_their_relation():
    values = torch.zeros(2, 1, 10, 10)
    values[0, 0, :5], values[1, 0, :5] = 1.0, 2.0
    out = scale_intensity(values, PERCENTILES, percentiles=(0, 100))
    assert out[0].max() == pytest.approx(0.5) and out[1].max() == pytest.approx(1.0)


def test_colours_keep_their_hue_and_sixteen_bits_their_range():
    colour = torch.tensor([255.0, 51.0, 0.0]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(scale_intensity(colour, COLOUR).flatten(), torch.tensor([1.0, 0.2, 0.0]))
    torch.testing.assert_close(scale_intensity(colour * 257, COLOUR).flatten(), torch.tensor([1.0, 0.2, 0.0]))


@pytest.mark.parametrize("value", [0.0, -1024.0, 7.5])
def test_constant_images_become_zero(value):
    assert torch.equal(scale_intensity(torch.full((2, 1, 8, 8), value), PERCENTILES), torch.zeros(2, 1, 8, 8))


def test_a_tiny_bright_object_survives_percentiles():
    values = torch.zeros(1, 1, 100, 100)
    values[0, 0, 3, 3] = 50.0
    assert scale_intensity(values, PERCENTILES).max() == 1
