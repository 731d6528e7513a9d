"""Files that clients send are what their names say, and unpack to no more than they may."""

import gzip

import itk
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from lib.checks import TooLarge, UnsupportedFile
from lib.stores.door import admitted
from tests.helpers.store_files import LIMIT, tree, volume

NRRD = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: {sizes}\nencoding: raw\n{more}\n"
MHA = "ObjectType = Image\nNDims = 2\nDimSize = {sizes}\nElementType = MET_UCHAR\nElementDataFile = {file}\n"


def claimed_nifti(size) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_shape(size)
    header.set_data_dtype(np.uint8)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    return header.binaryblock + bytes(4)


def huge_png() -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.nii.gz", b"not gzip", UnsupportedFile),
        ("a.nhdr", b"NRRD0004", UnsupportedFile),
        ("a.img", bytes(400), UnsupportedFile),
        ("a.nii.gz", gzip.compress(b"no nifti" * 100), UnsupportedFile),
        ("a.nii.gz", gzip.compress(bytes(LIMIT + 1000)), UnsupportedFile),
        ("a.nii.gz", gzip.compress(claimed_nifti((2000, 2000, 1000)) + bytes(100)), TooLarge),
        ("a.nii", claimed_nifti((2000, 2000, 1000)), TooLarge),
        ("a.png", b"\x80\x04K\x01.", UnsupportedFile),
        ("a.png", huge_png(), TooLarge),
        ("a.jpg", b"GIF89a" + bytes(100), UnsupportedFile),
        ("a.dcm", b"PK\x03\x04" + bytes(300), UnsupportedFile),
        ("a.nrrd", NRRD.format(sizes="9000 9000 9000", more="").encode(), TooLarge),
        ("a.nrrd", NRRD.format(sizes="4 4 4", more="data file: /etc/passwd\n").encode(), UnsupportedFile),
        ("a.mha", MHA.format(sizes="4 4", file="/etc/passwd").encode(), UnsupportedFile),
        ("a.mhd", MHA.format(sizes="4 4", file="../x.raw").encode(), UnsupportedFile),
        ("a.pkl", b"\x80\x04K\x01.", UnsupportedFile),
        ("a.pt", b"PK\x03\x04", UnsupportedFile),
        ("a", b"x", UnsupportedFile),
    ],
    # The contents differ from run to run, since gzip notes the time.
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_contents_that_are_not_what_the_name_says_or_unpack_to_too_much_are_refused(
    store, studies, uploads, name, content, kind
):
    (uploads / name).write_bytes(content)
    before = tree(studies)
    with pytest.raises(kind):
        store.add_image("new", str(uploads / name), {})
    assert tree(studies) == before


def test_ordinary_files_of_every_kind_pass(uploads):

    array = np.arange(60, dtype=np.uint8).reshape(5, 12)
    for suffix in (".png", ".jpg", ".tif", ".bmp"):
        Image.fromarray(array).save(uploads / f"p{suffix}")
    for suffix in (".nrrd", ".mha"):
        itk.imwrite(itk.image_from_array(array), str(uploads / f"p{suffix}"))
    volume(uploads / "p.nii.gz"), volume(uploads / "p.nii")
    files = sorted(uploads.iterdir())
    assert len(files) == 8
    for path in files:
        with admitted(path, LIMIT):
            pass
        with pytest.raises(TooLarge), admitted(path, 10):
            pass
