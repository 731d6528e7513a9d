"""By the app's ways in (an upload, a session, an archive's series, a label) files give what the bundle reads.

The kinds are those whose values or places are easily misread; that the bundle reads them right is tested in
`tests/data/io`, with values from other libraries.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image

from lib.checks import RequestError
from lib.stores.dicomweb import DicomWebDatastore
from lib.stores.folder import ConfinedDatastore
from lib.stores.sessions import ConfinedSessions
from sam2sgp.data import read_image, read_label
from sam2sgp.errors import DataError
from tests.helpers.archives import fake_archive, series_entry
from tests.helpers.dicom_files import item, write_dicom, write_enhanced, write_object, write_series
from tests.helpers.uploads import crashing_dicom

RNG = np.random.default_rng(0)
LIMIT = 1 << 20
SHAPE = (5, 12, 16)
VALUES = RNG.integers(0, 2000, SHAPE).astype(np.uint16)
GREY = RNG.integers(0, 255, SHAPE[1:]).astype(np.uint8)
MASK = (GREY > 99).astype(np.uint8)


def two_forms(path: Path, array: np.ndarray | None = None) -> None:
    image = nib.Nifti1Image(VALUES.T.astype(np.int16) if array is None else array, None)
    image.header.set_qform(np.diag([-1.5, -1.5, 3.0, 1.0]), code=1)
    image.header.set_sform(nib.affines.from_matvec(np.diag([-1.5, -1.5, 3.0]), [10, 20, 30]), code=2)
    nib.save(image, path)


def turned(path: Path, orientation: int = 6) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(GREY).save(path, exif=exif)


def twelve_bits(path: Path) -> None:
    write_dicom(path, (VALUES[0] | 0xF000), "MR", BitsStored=12, HighBit=11, PixelRepresentation=1)


def without_preamble(path: Path) -> None:
    write_dicom(path, VALUES[0], "MR")
    path.write_bytes(path.read_bytes()[132:])


def without_meta(path: Path) -> None:
    """Not even the file meta information."""
    dataset = pydicom.dcmread(write_dicom(path, VALUES[0], "MR"))
    bare = pydicom.Dataset({element.tag: element for element in dataset})
    bare.is_little_endian, bare.is_implicit_VR = True, False
    pydicom.dcmwrite(path, bare)


def lookup_table(path: Path) -> None:
    table = item(
        LUTDescriptor=[256, 0, 16], ModalityLUTType="US", LUTData=(np.arange(256)[::-1] * 9).astype("<u2").tobytes()
    )
    write_dicom(path, GREY, "DX", ModalityLUTSequence=table)


def ultrasound(path: Path) -> None:
    region = {"RegionSpatialFormat": 1, "PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3}
    region |= {"PhysicalDeltaX": 0.02, "PhysicalDeltaY": 0.03}
    write_dicom(path, GREY, "US", SequenceOfUltrasoundRegions=item(**region))


def mixed_series(path: Path) -> None:
    """Rounded positions, a slice twice, and a report beside the slices, whose names are no names of files."""
    write_series(path, VALUES, spacing=(0.8333, 0.7, 0.7))
    files = sorted(path.iterdir())
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient = [round(float(value), 1) for value in dataset.ImagePositionPatient]
        dataset.save_as(file)
    (path / "copy.dcm").write_bytes(files[0].read_bytes())
    write_object(path / "report.dcm", "1.2.840.10008.5.1.4.1.1.88.11", "SR")


IMAGES: dict[str, Callable[[Path], object]] = {
    "two_forms.nii.gz": two_forms,
    "time.nii.gz": lambda path: nib.save(nib.Nifti1Image(np.zeros((4, 5, 3, 2), np.int16), np.eye(4)), path),
    "flat.nii": lambda path: nib.save(nib.Nifti1Image(GREY[..., None, None], np.diag([0.5, 0.6, 3, 1])), path),
    "unknown.nrrd": lambda path: nrrd.write(str(path), VALUES, {"spacings": [1.0, np.nan, 2.0]}),
    "centimetres.nrrd": lambda path: nrrd.write(
        str(path), VALUES, {"space": "LPS", "space directions": np.eye(3), "space units": ["cm"] * 3}
    ),
    "turned.jpg": turned,
    "turned.tif": turned,
    "signed.tif": lambda path: tifffile.imwrite(path, GREY.view(np.int8)),
    "double.tif": lambda path: tifffile.imwrite(path, GREY.astype(np.float64)),
    "channels.tif": lambda path: tifffile.imwrite(path, np.stack([GREY] * 2, -1), photometric="minisblack"),
    "pages.tif": lambda path: tifffile.imwrite(path, VALUES),
    "signed.dcm": twelve_bits,
    "bare.dcm": without_preamble,
    "bare_elements.dcm": without_meta,
    "lut.dcm": lookup_table,
    "inverse.dcm": lambda path: write_dicom(path, VALUES[0], "DX", PresentationLUTShape="INVERSE"),
    "ultrasound.dcm": ultrasound,
    "deep.dcm": lambda path: write_dicom(path, np.stack([VALUES[0]] * 3, -1), "US"),
    "enhanced.dcm": lambda path: write_enhanced(path, VALUES, [2, 0, 4, 1, 3], slopes=[1.0, 2.0, 1.0, 3.0, 1.0]),
    "broken.dcm": lambda path: path.write_bytes(crashing_dicom()),
    "contours.dcm": lambda path: write_object(path, "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"),
    "mixed_series": mixed_series,
    "gap_series": lambda path: write_series(path, VALUES, skip=(2,)),
}
# Of folders, the app's `/datastore/image` takes none.
REFUSED = {
    "time.nii.gz",
    "centimetres.nrrd",
    "double.tif",
    "channels.tif",
    "pages.tif",
    "broken.dcm",
    "contours.dcm",
    "gap_series",
}


def same(found: Path | str, expected: Path) -> None:
    found, expected = read_image(found), read_image(expected)
    assert np.array_equal(found.slices, expected.slices)
    assert np.array_equal(found.geometry.affine, expected.geometry.affine)
    assert found.geometry.spacing == expected.geometry.spacing and found.geometry.flips == expected.geometry.flips
    assert (found.modality, found.is_rgb) == (expected.modality, expected.is_rgb)


def by_upload(source: Path, folder: Path) -> str:
    (folder / "studies").mkdir()
    store = ConfinedDatastore(str(folder / "studies"), folder / "state", LIMIT)
    return store.get_image_uri(store.add_image("x", str(source), {}))


def by_session(source: Path, folder: Path) -> str:
    sessions = ConfinedSessions(str(folder / "sessions"), 3600, LIMIT)
    with zipfile.ZipFile(folder / "sent.zip", "w") as archive:
        for file in source.iterdir() if source.is_dir() else [source]:
            archive.write(file, f"{source.name}/{file.name}" if source.is_dir() else file.name)
    session_id, _ = sessions.add_session(str(folder / "sent.zip"), uncompress=True)
    return sessions.get_session(session_id).image


def by_archive(source: Path, folder: Path) -> str:
    with fake_archive() as fake:
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        fake.files = [file.read_bytes() for file in files]
        held = {pydicom.dcmread(file, stop_before_pixels=True, force=True).SOPInstanceUID for file in files}
        fake.series = [series_entry("1.5", instances=len(held))]
        datastore = DicomWebDatastore(fake.address, folder / "archive", LIMIT, expiry=0.0, silence=10.0, patience=10.0)
        return datastore.get_image_uri("1.5")


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_by_every_way_in_what_the_bundle_reads(tmp_path, name):
    source = tmp_path / name
    IMAGES[name](source)
    ways = [by_session] + [by_upload] * source.is_file()
    # A file without preamble can't be sent as DICOMweb's media type.
    ways += [by_archive] * (not name.startswith("bare") and (source.is_dir() or source.suffix == ".dcm"))
    for way in ways:
        folder = tmp_path / way.__name__
        folder.mkdir()
        if name not in REFUSED:
            same(way(source, folder), source)
            continue
        with pytest.raises((DataError, RequestError)) as refused:
            read_image(way(source, folder))
        assert "\n" not in str(refused.value) and "expected" in str(refused.value), (way, str(refused.value))
    if name in REFUSED:
        with pytest.raises(DataError):
            read_image(source)


def palette(path: Path) -> None:
    picture = Image.fromarray(1 - MASK, "P")
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(path)


def in_alpha(path: Path) -> None:
    Image.fromarray(np.stack([GREY * 0, GREY * 0, GREY * 0, 255 * MASK], -1)).save(path)


def cropped(path: Path) -> None:
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag([1.5, 1.5, 3.0]),
        "space origin": [3.0, 4.5, 3.0],
        "Segment0_LabelValue": "1",
    }
    nrrd.write(str(path), np.ones((3, 4, 2), np.uint8), header)


LABELS: dict[str, tuple[str, Callable[[Path], object], bool]] = {
    "palette.png": ("picture.png", palette, True),
    "alpha.png": ("picture.png", in_alpha, True),
    "mask_255.png": ("picture.png", lambda path: Image.fromarray(255 * MASK).save(path), True),
    "mask_65535.png": ("picture.png", lambda path: Image.fromarray(MASK.astype(np.uint16) * 65535).save(path), True),
    "grey_as_rgb.png": ("picture.png", lambda path: Image.fromarray(np.stack([MASK] * 3, -1)).save(path), True),
    "jpeg_before.png": ("picture.png", lambda path: Image.fromarray(MASK * (253 + MASK + GREY % 2)).save(path), False),
    "inverting.tif": ("picture.png", lambda path: tifffile.imwrite(path, MASK, photometric="miniswhite"), False),
    "red.png": ("picture.png", lambda path: Image.fromarray(np.stack([MASK, GREY, GREY], -1)).save(path), False),
    "other_form.nii.gz": ("volume.nii.gz", lambda path: two_forms(path, (VALUES.T > 999).astype(np.uint8)), True),
    "floats.nii.gz": ("volume.nii.gz", lambda path: two_forms(path, (VALUES.T > 999).astype(np.float64)), True),
    "spacing.nii.gz": (
        "volume.nii.gz",
        lambda path: nib.save(nib.Nifti1Image(MASK[None].repeat(5, 0).T, np.diag([2, 2, 3, 1])), path),
        False,
    ),
    "negative.nii.gz": ("volume.nii.gz", lambda path: two_forms(path, -(VALUES.T > 999).astype(np.int16)), False),
    "beyond.nii.gz": ("volume.nii.gz", lambda path: two_forms(path, 70000 * (VALUES.T > 999).astype(np.int32)), False),
    "cropped.seg.nrrd": ("placed.nii.gz", cropped, True),
    "contours.dcm": (
        "volume.nii.gz", lambda path: write_object(path, "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"), False
    ),
}  # fmt: skip
LABELLED = {
    "picture.png": lambda path: Image.fromarray(GREY).save(path),
    "volume.nii.gz": two_forms,
    "placed.nii.gz": lambda path: nib.save(
        nib.Nifti1Image(VALUES.T.astype(np.int16), np.diag([-1.5, -1.5, 3.0, 1.0])), path
    ),
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> ConfinedDatastore:
    """A studies folder with the images of `LABELLED`."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "studies").mkdir()
    for name, write in LABELLED.items():
        write(folder / "studies" / name)
    return ConfinedDatastore(str(folder / "studies"), folder / "state", LIMIT)


@pytest.mark.parametrize("name", LABELS)
def test_a_label_that_is_sent_is_kept_as_the_bundle_reads_it_or_refused_by_both(labelled, tmp_path, name):
    image, write, is_read = LABELS[name]
    write(tmp_path / name)
    image_id = image.partition(".")[0]
    geometry = read_image(labelled.get_image_uri(image_id)).geometry
    if not is_read:
        with pytest.raises(DataError):
            read_label(tmp_path / name, geometry)
        with pytest.raises((DataError, RequestError), match="expected") as refused:
            labelled.save_label(image_id, str(tmp_path / name), "final", {})
        assert str(tmp_path) not in str(refused.value)
        return
    labelled.save_label(image_id, str(tmp_path / name), "final", {})
    kept = read_label(labelled.get_label_uri(image_id, "final"), geometry)
    assert kept.any() and np.array_equal(kept, read_label(tmp_path / name, geometry))
