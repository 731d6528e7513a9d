"""Training, evaluation, inference and the app make the same of an image: scaling, pixels and geometry."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.bundle import ConfigParser
from PIL import Image

from sam2sgp.data import load_datalist, read_image, write_label
from sam2sgp.data.io import image_stem, output_suffix
from tests.helpers.bundle_runs import BUNDLE, CONFIGS
from tests.helpers.dicom_files import write_dicom, write_series

RNG = np.random.default_rng(0)
SHAPE = (6, 40, 48)


def ct() -> np.ndarray:
    """(Z, Y, X) in HU: air around tissue."""
    volume = RNG.normal(-1000, 10, SHAPE)
    volume[:, 8:32, 8:40] = RNG.normal(40, 15, (6, 24, 32))
    return volume.round().astype(np.int16)


def mr() -> np.ndarray:
    return RNG.normal(300, 60, SHAPE).round().astype(np.int16)


def nifti(path: Path, volume: np.ndarray, unit: str = "mm") -> None:
    image = nib.Nifti1Image(volume.T, np.diag([0.8, 0.8, 2.5, 1.0]))
    image.set_qform(np.diag([-0.8, -0.8, 2.5, 1.0]), code=1)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)


def itk(path: Path, volume: np.ndarray) -> None:
    image = SimpleITK.GetImageFromArray(volume)
    image.SetSpacing((0.8, 0.8, 2.5))
    SimpleITK.WriteImage(image, str(path))


def picture(path: Path, array: np.ndarray, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(array).save(path, **({"exif": exif} if path.suffix == ".jpg" else {}))


def grey(dtype: type = np.uint8, scale: int = 1) -> np.ndarray:
    return (scale * RNG.integers(0, 255, SHAPE[1:])).astype(dtype)


INPUTS = {
    "ct.nii.gz": nifti,
    "mr.nii": lambda path, _: nifti(path, mr()),
    "mr_low.nii.gz": lambda path, _: nifti(path, np.where(np.arange(mr().size).reshape(SHAPE) == 3, -501, mr())),
    "microns.nii.gz": lambda path, _: nifti(path, mr(), "micron"),
    "ct.nrrd": itk,
    "mr.mha": lambda path, _: itk(path, mr()),
    "ct_series": lambda path, volume: write_series(path, (volume + 1024).astype(np.uint16)),
    "mr_series": lambda path, _: write_series(path, mr().astype(np.uint16), Modality="MR", intercept=0.0),
    "xray.dcm": lambda path, _: write_dicom(path, grey(np.uint16, 9), "DX", PhotometricInterpretation="MONOCHROME1"),
    "grey.png": lambda path, _: picture(path, grey()),
    "deep.png": lambda path, _: picture(path, grey(np.uint16, 200)),
    "colour.tif": lambda path, _: picture(path, np.stack([grey()] * 3, -1)),
    "turned.jpg": lambda path, _: picture(path, np.stack([grey(), grey(), grey()], -1), orientation=6),
    "grey.bmp": lambda path, _: picture(path, grey()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A labelled set of one image of each kind."""
    root = tmp_path_factory.mktemp("agreement") / "set"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for name, write in INPUTS.items():
        path = root / "images" / (name if "." not in name else f"{name.replace('.', '_', 1)}.{name.split('.', 1)[1]}")
        write(path, ct())
        geometry = read_image(path).geometry
        label = np.zeros(geometry.shape, np.uint8)
        label[:, 10:20, 12:22] = 1
        write_label(root / "labels" / (image_stem(path) + output_suffix(geometry)), label, geometry)
    return root


def parser(folder: Path, output: Path, *configs: str) -> ConfigParser:
    made = ConfigParser()
    made.read_config([str(CONFIGS / name) for name in configs])
    places = {"bundle_root": str(BUNDLE), "dataset_dir": str(folder), "support_dir": str(folder)}
    settings = {"image_size": 64, "progress": False, "segment_labelled": True}
    made.update({**places, "output_dir": str(output), **settings})
    return made


def test_each_input_is_the_same_to_training_evaluation_inference_and_the_app(folder, studio, tmp_path):
    cases = load_datalist(folder)
    assert len(cases) == len(INPUTS)
    inference = parser(folder, tmp_path / "a", "inference.json").get_parsed_content("dataset")
    evaluation = parser(folder, tmp_path / "b", "train.json", "evaluate.json")
    evaluation["validate::dataset::data"] = cases
    evaluation = evaluation.get_parsed_content("validate::dataset")
    training = parser(folder, tmp_path / "c", "train.json")
    training.update({"train_data": cases, "cache_dir": str(tmp_path / "cache")})
    training = training.get_parsed_content("train::dataset")
    trained = {case["name"]: training.cache[case] for case in training.data}
    segmenter = studio([]).segmenter(support_dir=str(folder))
    for number, case in enumerate(cases):
        name, query = case["name"], inference[number]
        assert "error" not in query, query
        others = {"evaluation": evaluation[number], "app": segmenter.prepare(case["image"], name)}
        for way, other in others.items():
            assert torch.equal(query["image"], other["image"]), (name, way)
            assert query["scaling"] == other["scaling"] and query["letterbox"] == other["letterbox"], (name, way)
            assert query["geometry"].shape == other["geometry"].shape
            assert np.array_equal(query["geometry"].affine, other["geometry"].affine), (name, way)
        assert trained[name].scaling.kind == query["scaling"].kind, name
        assert np.abs(np.asarray(trained[name].image, np.float32) - query["image"].numpy()).max() < 1e-3, name
        assert trained[name].valid == (*query["letterbox"].offset, *query["letterbox"].inner), name
        stated = "CT window" if name.startswith("ct") else "colour" if name in ("turned_jpg", "colour_tif") else "perc"
        assert stated in str(query["scaling"]), (name, str(query["scaling"]))
