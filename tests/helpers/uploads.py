"""Small files of every kind that a client may send, whole: {name: bytes}."""

import gzip
import io
import struct
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pillow_jpls  # noqa: F401 - registers JPEG-LS with Pillow
import pydicom
import SimpleITK
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from tests.helpers.dicom_files import write_dicom, write_series

SIZE = (16, 12, 3)
GREY = (np.indices((32, 24)).sum(0) * 4).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
VOLUME = (np.indices(SIZE).sum(0) * 20 - 100).astype(np.int16)
NRRD = """NRRD0004
type: short
dimension: 3
space: left-posterior-superior
sizes: {sizes}
space directions: (1,0,0) (0,1,0) (0,0,2)
kinds: domain domain domain
endian: little
encoding: {encoding}
space origin: (0,0,0)
{more}
"""
META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = {packed}
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 1 1 2
DimSize = {sizes}
{more}ElementType = {kind}
ElementDataFile = {file}
"""


def nrrd(sizes="16 12 3", encoding="raw", more="", data: bytes | None = None) -> bytes:
    data = VOLUME.tobytes("F") if data is None else data
    return NRRD.format(sizes=sizes, encoding=encoding, more=f"{more}\n" * bool(more)).encode() + data


def metaimage(
    sizes="16 12 3", packed=False, more="", file="LOCAL", data: bytes | None = None, kind="MET_SHORT"
) -> bytes:
    data = VOLUME.tobytes("F") if data is None else data
    return META.format(sizes=sizes, packed=packed, more=more, kind=kind, file=file).encode() + data


def nifti(array: np.ndarray = VOLUME, kind: type = nib.Nifti1Image) -> bytes:
    return kind(array, np.diag([1.0, 1.0, 2.0, 1.0])).to_bytes()


def picture(array: np.ndarray, suffix: str, **options) -> bytes:
    target = io.BytesIO()
    Image.fromarray(array).save(target, suffix, **options)
    return target.getvalue()


def dicom(pixels: np.ndarray = GREY, syntax: str | None = None, codec: str | None = None, **tags) -> bytes:
    """A file, in a transfer syntax whose pixels Pillow encodes as `codec`, or as pydicom does."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_dicom(Path(folder, "a.dcm"), pixels, "US", **tags)
        if syntax:
            dataset = pydicom.dcmread(path)
            if syntax == RLELossless:
                dataset.compress(RLELossless)
            elif codec:
                options = {"no_jp2": True} if codec == "JPEG2000" else {}
                dataset.PixelData = encapsulate([picture(pixels, codec, **options)])
                dataset["PixelData"].VR = "OB"
                dataset.PhotometricInterpretation = "YBR_FULL_422" if pixels.ndim == 3 else "MONOCHROME2"
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.is_implicit_VR = syntax == ImplicitVRLittleEndian
            dataset.is_little_endian = syntax != ExplicitVRBigEndian
            dataset.save_as(path, write_like_original=False)
        return path.read_bytes()


def dicom_by_gdcm(compressor: str) -> bytes:
    """JPEG (lossless) and JPEG2000, of 16 bits."""
    with tempfile.TemporaryDirectory() as folder:
        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
        writer.SetFileName(str(Path(folder, "a.dcm")))
        writer.Execute(SimpleITK.GetImageFromArray(GREY[None].astype(np.int16) * 3))
        return Path(folder, "a.dcm").read_bytes()


def crashing_dicom(**tags) -> bytes:
    """JPEG-LS whose own header says that it has no columns: its decoder dies of that (GDCM 3.0)."""
    content = dicom(GREY, JPEGLSLossless, "JPEG-LS", **tags)
    columns = content.index(b"\xff\xf7\x00\x0b") + 7
    return content[:columns] + b"\0\0" + content[columns + 2 :]


def zipped(*members: tuple[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return target.getvalue()


def tarred(*members: tuple[str, bytes], mode: str = "w:gz") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


def sound_files() -> dict[str, bytes]:
    """{name: content}, of which the end of the name is the suffix."""
    with tempfile.TemporaryDirectory() as folder:
        series = write_series(Path(folder, "s"), VOLUME.T.copy())
        slices = [(f"series/{path.name}", path.read_bytes()) for path in sorted(series.iterdir())]
    palette = Image.fromarray(GREY // 64, "P")
    palette.putpalette([0, 0, 0, 90, 0, 0, 0, 90, 0, 0, 0, 90])
    indexed = io.BytesIO()
    palette.save(indexed, "PNG")
    segments = "Segment0_ID:=Segment_1\nSegment0_Name:=liver\nSegment0_LabelValue:=1"
    return {
        "raw.nrrd": nrrd(),
        "gzip.nrrd": nrrd(encoding="gzip", data=gzip.compress(VOLUME.tobytes("F"))),
        "named.seg.nrrd": nrrd(encoding="gzip", more=segments, data=gzip.compress(VOLUME.tobytes("F"))),
        "raw.mha": metaimage(),
        "zlib.mha": metaimage(packed=True, data=zlib.compress(VOLUME.tobytes("F"))),
        "colour.mha": metaimage(
            "24 32 1", False, "ElementNumberOfChannels = 3\n", data=COLOUR.tobytes(), kind="MET_UCHAR"
        ),
        "local.mhd": metaimage(),
        "one.nii": nifti(),
        "one.nii.gz": gzip.compress(nifti()),
        "two.nii.gz": gzip.compress(nifti(kind=nib.Nifti2Image)),
        "grey.png": picture(GREY, "PNG"),
        "deep.png": picture(GREY.astype(np.uint16) * 200, "PNG"),
        "colour.png": picture(COLOUR, "PNG"),
        "alpha.png": picture(np.concatenate([COLOUR, GREY[..., None]], -1), "PNG"),
        "palette.png": indexed.getvalue(),
        "grey.jpg": picture(GREY, "JPEG"),
        "progressive.jpg": picture(COLOUR, "JPEG", progressive=True),
        "raw.tif": picture(GREY, "TIFF"),
        "lzw.tif": picture(COLOUR, "TIFF", compression="tiff_lzw"),
        "deflate.tif": picture(GREY.astype(np.uint16), "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": picture(COLOUR, "TIFF", compression="jpeg"),
        "grey.bmp": picture(GREY, "BMP"),
        "colour.bmp": picture(COLOUR, "BMP"),
        "explicit.dcm": dicom(GREY.astype(np.int16)),
        "implicit.dcm": dicom(syntax=ImplicitVRLittleEndian),
        "rle.dcm": dicom(syntax=RLELossless),
        "jpeg.dcm": dicom(syntax=JPEGBaseline8Bit, codec="JPEG"),
        "colour_jpeg.dcm": dicom(COLOUR, JPEGBaseline8Bit, "JPEG"),
        "lossless_jpeg.dcm": dicom_by_gdcm("JPEG"),
        "jpeg_2000.dcm": dicom(syntax=JPEG2000Lossless, codec="JPEG2000"),
        "deep_jpeg_2000.dcm": dicom_by_gdcm("JPEG2000"),
        "jpeg_ls.dcm": dicom(syntax=JPEGLSLossless, codec="JPEG-LS"),
        "series.zip": zipped(*slices),
        "series.tar.gz": tarred(*slices),
        "one.zip": zipped(("a.nii.gz", gzip.compress(nifti()))),
    }


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def with_dims(*dims: int) -> bytes:
    content = bytearray(nifti())
    content[40:56] = np.array([len(dims), *dims, *[1] * 7], "<i2")[:8].tobytes()
    return bytes(content)
