"""The program of a decoding process: unpacks one picture or DICOM file after the other, until its input ends.

It is run by path (see `sam2sgp.data.io.decoding`, which says why and how) and imports nothing of this package, only
what decodes, so that it starts in a fraction of a second. Each message is its length in four bytes, then JSON; pixels
follow as plain bytes.

    {"kind": "picture", "path": P, "formats": [F], "seconds": S, "memory": M}
        -> {what the header says}
    {"seconds": S, "memory": M}
        -> {"size": bytes, ...} and the pixels as Pillow holds them
    {"kind": "dicom", "path": P, "seconds": S, "memory": M}
        -> {"size": bytes, "shape": [N], "dtype": T} and the values

A file that can't be decoded is answered by {"error": text}. After `S` seconds of work the kernel ends the process, and
beyond `M` bytes it gets no more memory. In place of the second message about a picture, {} says that it isn't wanted.
"""

import json
import math
import os
import re
import resource
import sys
import warnings

# Files beside this one have the names of libraries.
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))]

# Of TIFF: bits, compression, photometric interpretation, samples, planar configuration, predictor, extra samples,
# sample format.
TAGS = (258, 259, 262, 277, 284, 317, 338, 339)
BITS, DESCRIPTION, ORIENTATION, DEPTH = 258, 270, 274, 32997
# More than a file's decoding takes besides its pixels.
SPARE_SECONDS = 1


def main() -> None:
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What libraries print is not for the other side.
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while job := _received(source):
        try:
            _lift_limits()
            answer, pixels = KINDS[job["kind"]](job, source, target)
        except Exception as error:
            answer, pixels = {"error": f"{type(error).__name__}: {error}"[:300]}, b""
        _send(target, answer, pixels)


def decode_picture(job: dict, source, target) -> tuple[dict, bytes]:
    from PIL import Image

    # The other side judges sizes, by what the file can keep.
    Image.MAX_IMAGE_PIXELS = None
    _limit(job)
    # Given a path, Pillow maps uncompressed grey pixels to memory, and scrambles those of a TIFF that is to be turned.
    with open(job["path"], "rb") as file, Image.open(file, formats=job["formats"]) as image:
        arguments = image.tile[0].args if image.tile else ""
        tags = getattr(image, "tag_v2", {})
        header = {
            "format": image.format,
            "mode": image.mode,
            "width": image.width,
            "height": image.height,
            "bands": len(image.getbands()),
            "pages": pages(image, tags, os.path.getsize(job["path"])),
            "covered": covered(image),
            "stored_as": str(arguments if isinstance(arguments, str) else arguments[0]),
            "tags": {str(tag): tags[tag] for tag in TAGS if tag in tags},
        }
        _send(target, header)
        _limit(_received(source))
        if image.format == "PNG":
            # Pillow does not look at the check sums of pixels when it loads them.
            with Image.open(job["path"], formats=["PNG"]) as copy:
                copy.verify()
        image.load()
        # Known from the end of the file in PNG; a TIFF is turned by Pillow itself.
        orientation = image.getexif().get(ORIENTATION, 1) if image.format != "TIFF" else 1
        details = {"mode": image.mode, "width": image.width, "height": image.height}
        details["orientation"] = orientation if orientation in range(1, 9) else 1
        if image.palette is not None:
            details["palette"] = [image.palette.mode, list(image.palette.tobytes())]
        transparency = image.info.get("transparency")
        if isinstance(transparency, bytes | int):
            details["transparency"] = list(transparency) if isinstance(transparency, bytes) else transparency
        pixels = image.tobytes()
    return {"size": len(pixels), **details}, pixels


def pages(image, tags: dict, size: int) -> int:
    """How many pictures a file of `size` bytes holds; ImageJ, of a stack beyond 4 GB, and tifffile, where it is told to
    write one header only, tell so in a description."""
    # MPO is a JPEG with further pictures, such as thumbnails.
    found = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    # Blocks of voxels in one page, of which Pillow reads the first slice.
    if found == 1 and tags.get(DEPTH, 1) > 1:
        return tags[DEPTH]
    description, bits = str(tags.get(DESCRIPTION, "")), tags.get(BITS, 8)
    bits = bits if isinstance(bits, tuple) else (bits,)
    images = re.match(r"ImageJ=.*?^images=(\d{1,9})$", description, re.DOTALL | re.MULTILINE)
    shape = re.match(r'\{"shape": \[(\d{1,9}(?:, \d{1,9}){1,9})\]', description)
    stated = int(images[1]) if images else 0
    if shape:
        stated = math.prod(map(int, shape[1].split(", "))) // (image.width * image.height * len(bits))
    # A page that was taken out of a stack may have the stack's description.
    page = image.width * image.height * sum(bits) // 8
    return stated if found == 1 and stated > 1 and size >= stated * page else found


def covered(image) -> int:
    """Pixels for which there is data, as far as the header says; strips of a damaged TIFF may lack."""
    whole = 0, 0, image.width, image.height
    boxes = [part[1] or whole for part in image.tile] or [whole]
    return sum((right - left) * (lower - upper) for left, upper, right, lower in boxes)


def decode_dicom(job: dict, source, target) -> tuple[dict, bytes]:
    import SimpleITK

    _limit(job)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(job["path"])
    image = reader.Execute()  # kept while the view of its memory is used
    values = SimpleITK.GetArrayViewFromImage(image)
    return {"size": values.nbytes, "shape": values.shape, "dtype": values.dtype.str}, values.tobytes()


KINDS = {"picture": decode_picture, "dicom": decode_dicom}


def _lift_limits() -> None:
    """Libraries are loaded without limits."""
    for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _limit(job: dict | None) -> None:
    """Bound what comes next by `seconds` and `memory`. Raises ValueError without them."""
    if not job:
        raise ValueError("not wanted")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + job["seconds"]) + SPARE_SECONDS, resource.RLIM_INFINITY))
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + job["memory"], resource.RLIM_INFINITY))


def _received(source) -> dict | None:
    length = source.read(4)
    return json.loads(source.read(int.from_bytes(length, "big"))) if len(length) == 4 else None


def _send(target, answer: dict, pixels: bytes = b"") -> None:
    content = json.dumps(answer).encode()
    target.write(len(content).to_bytes(4, "big") + content)
    target.write(pixels)
    target.flush()


if __name__ == "__main__":
    main()
