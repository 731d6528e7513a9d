"""Compressed pixels, unpacked in processes of their own, which may crash, hang or grow without harm to this one.

The codecs of JPEG, JPEG-LS, JPEG 2000, PNG and TIFF are programs in C and C++ whose input comes from anywhere: a file
of 2 kB may end the process that decodes it, keep it busy for a quarter of an hour, or make it ask for gigabytes. So
they run in `decoder.py`: `decode_picture` by Pillow, `decode_dicom` by GDCM. What that process sends back is sizes, a
few numbers and plain pixels, checked here and never unpickled. What is only numbers behind a header (NIfTI, NRRD,
MetaImage, uncompressed DICOM) is read in this process, by numpy and zlib, as is RLE, which pydicom unpacks in Python.

A decoding process gets as much memory as the header promises, some times over, and a time that grows with the file. If
it breaks a limit or ends, the file at hand gets a `DataError`, and the next file a new process.

Any thread of any process may call these functions, and they wait for one another only while all processes are at work.
The first call in a process starts one, in a tenth of a second; it stays for the next calls and ends with its parent,
however that ends. A forked child starts its own.
"""

import atexit
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sam2sgp.data.io import jpeg
from sam2sgp.data.io.formats import PICTURE_FORMATS
from sam2sgp.data.io.limits import check_memory, check_ratio
from sam2sgp.data.io.picture_blocks import TIFF, check_blocks
from sam2sgp.errors import DataError, FormatError

PROGRAM = Path(__file__).with_name("decoder.py")
MOST_PROCESSES = max(1, min(4, os.cpu_count() or 1))
# A codec's own time for a file: so long, and as much more for each MiB of it.
SECONDS, SECONDS_PER_MB = 4.0, 2.0
# It may wait for others' work in between.
WALL_PER_SECOND = 2.0
# Memory for the codec itself, and for as many copies of values of so many bytes: decoded, converted, sent.
SPARE_MEMORY, COPIES, LARGEST_VALUE = 256 << 20, 4, 8
LONGEST_MESSAGE = 1 << 20
FORMATS = tuple(dict.fromkeys(PICTURE_FORMATS.values()))
JPEG_FORMATS = ("JPEG", "MPO")
DTYPES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<f8")
# What libraries put around their sentence: where in their source and in memory it is, which is nobody's business.
NOISE = re.compile(r"Exception thrown in \S+ \S+: |\S+\.(?:cxx|hxx|txx|cpp|h|c):\d+:\s*|\(?\b0x[0-9a-fA-F]+\b\)?")
# Tags of TIFF.
BITS, ORIENTATION = 258, 274


class DecodingError(DataError):
    """A file's pixels can't be decoded."""


@dataclass(frozen=True)
class Picture:
    """A picture as decoded.

    Attributes:
        image: with pixels, palette, transparency and `format` as Pillow's own of the file, and of a TIFF the `tag_v2`
            that say how pixels are stored. Its EXIF data hold the orientation only.
        pages: of a TIFF.
        stored_as: Pillow's name for how pixels are stored in the file, such as "L;4".
    """

    image: Image.Image
    pages: int
    stored_as: str


def decode_picture(
    path: str | os.PathLike, label: bool = False, formats: Sequence[str] = FORMATS, limit: int | None = None
) -> Picture:
    """Decode a picture file.

    Args:
        path: of the file.
        label: a class map, which may have shrunk more than an image can.
        formats: of which it must be one, whatever its name.
        limit: bytes that it may take as float32; see `sam2sgp.data.io.limits`.

    Raises:
        DataError: another content, damaged, too large, or its decoding crashes or takes too long.
    """
    check_blocks(path)
    picture = _decoded(path, label, formats, limit)
    if picture.image.format in JPEG_FORMATS:
        _check_jpeg(path, picture.image, limit)
    return picture


def _decoded(path: str | os.PathLike, label: bool, formats: Sequence[str], limit: int | None) -> Picture:
    seconds = _seconds(os.path.getsize(path))
    with _decoding(path) as decoder:
        header, values = _judged_header(decoder, path, label, formats, limit)
        answer = decoder.ask({"seconds": seconds, "memory": SPARE_MEMORY + COPIES * LARGEST_VALUE * values}, seconds)
        if not 0 <= answer["size"] <= LARGEST_VALUE * values:
            raise ValueError(f"{answer['size']} bytes of pixels")
        image = _rebuilt(answer, decoder.receive(answer["size"], seconds))
        image.format, image.tag_v2 = str(header["format"]), _tags(header)
        return Picture(image, _whole(header["pages"]), str(header["stored_as"]))


def decode_dicom(path: str | os.PathLike, shape: Sequence[int], channels: int) -> np.ndarray:
    """The values of a DICOM file as GDCM gives them: rescaled, MONOCHROME1 inverted, colours as RGB.

    Args:
        path: of the file.
        shape: (frames, rows, columns), as its header says.
        channels: values per pixel at most.

    Returns:
        (frames, rows, columns, C), of the smallest type that holds the values.

    Raises:
        DataError: damaged, of another size, or its decoding crashes or takes too long.
    """
    size = os.path.getsize(path)
    seconds = _seconds(size)
    values = int(np.prod(shape)) * channels
    memory = SPARE_MEMORY + COPIES * LARGEST_VALUE * values
    with _decoding(path) as decoder:
        answer = decoder.ask({"kind": "dicom", "path": str(path), "seconds": seconds, "memory": memory}, seconds)
        if answer["dtype"] not in DTYPES:
            raise ValueError(f"values of type {answer['dtype']}")
        dtype = np.dtype(answer["dtype"])
        found = int(np.prod([_whole(length) for length in answer["shape"]]))
        if found > values or found * dtype.itemsize != answer["size"] or found % int(np.prod(shape)):
            raise ValueError(f"{answer['shape']} values where its header says {tuple(shape)}")
        pixels = decoder.receive(answer["size"], seconds)
        return np.frombuffer(pixels, dtype).reshape(*shape, -1)


def start() -> None:
    """Start a decoding process if there is none, so that the first file needn't wait for it."""
    with _pool.take():
        pass


def restarts() -> int:
    """How many decoding processes of this process had to be given up so far: they crashed, hung or grew too large."""
    return _pool.given_up


def _judged_header(
    decoder: "_Decoder", path: str | os.PathLike, label: bool, formats: Sequence[str], limit: int | None
) -> tuple[dict, int]:
    """What a picture's header says, and how many values it promises. Raises as `decode_picture` does."""
    job = {"kind": "picture", "path": str(path), "formats": list(formats), "seconds": SECONDS, "memory": SPARE_MEMORY}
    try:
        header = decoder.ask(job, SECONDS)
    except _Told as error:
        if "TIFF" in formats and _is_tiff(path):
            raise DataError(
                f"{path}: expected a TIFF of 8 or 16 bits or float32, grey or RGB, found another kind of pixels or "
                "compression, or a damaged header; convert it, such as to an uncompressed TIFF of 16 bits or to PNG."
            ) from error
        raise FormatError(
            f"{path}: expected a picture ({', '.join(formats)}), found another content ({error}); export it again."
        ) from error
    height, width, bands = (_whole(header[key]) for key in ("height", "width", "bands"))
    values = height * width * bands
    try:
        found = _whole(header["covered"])
        if found < height * width:
            raise _failed(path, f"only {found} of its {height} x {width} pixels are stored")
        check_memory(path, (height, width), bands, limit)
        if not label:
            bits = _tags(header).get(BITS, (8,))
            check_ratio(
                path, values * max(8, *(bits if isinstance(bits, tuple) else (bits,))) // 8, os.path.getsize(path)
            )
    except DataError:
        # It is left undecoded.
        with suppress(_Told):
            decoder.ask({}, SECONDS)
        raise
    return header, values


def _check_jpeg(path: str | os.PathLike, image: Image.Image, limit: int | None) -> None:
    """Raise DataError for a JPEG whose damage shows, though it can be decoded."""
    with tempfile.TemporaryDirectory(prefix="sam2sgp-") as folder:
        copy = Path(folder, "copy.jpg")

        def decode(streams: list[bytes]) -> np.ndarray | None:
            copy.write_bytes(streams[0])
            try:
                return np.asarray(_decoded(copy, True, JPEG_FORMATS, limit).image)[None]
            except DataError:
                return None

        if fault := jpeg.damage([Path(path).read_bytes()], np.asarray(image)[None], decode):
            raise _failed(path, fault)


def _is_tiff(path: str | os.PathLike) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in TIFF


def _tags(header: dict) -> dict[int, int | tuple[int, ...]]:
    return {
        int(tag): tuple(map(_whole, value)) if isinstance(value, list) else _whole(value)
        for tag, value in header["tags"].items()
    }


class _Told(Exception):
    """A decoding process says that a file can't be decoded."""


class _Decoder:
    """One decoding process, used by one thread at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )

    def tell(self, message: dict) -> None:
        content = json.dumps(message).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(len(content).to_bytes(4, "big") + content)

    def ask(self, message: dict, seconds: float) -> dict:
        """The answer to a message. Raises _Told for one that tells of an error, and what `receive` raises."""
        self.tell(message)
        length = int.from_bytes(self.receive(4, seconds), "big")
        if length > LONGEST_MESSAGE:
            raise ValueError(f"a message of {length} bytes")
        answer = json.loads(self.receive(length, seconds))
        if "error" in answer:
            raise _Told(" ".join(NOISE.sub("", str(answer["error"])).split()))
        return answer

    def receive(self, size: int, seconds: float) -> bytearray:
        """So many bytes. Raises TimeoutError or EOFError."""
        content = bytearray(size)
        left = memoryview(content)
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN | select.POLLHUP)
        end = time.monotonic() + seconds * WALL_PER_SECOND
        while left:
            if not poll.poll(max(end - time.monotonic(), 0) * 1000):
                raise TimeoutError()
            count = os.readv(pipe, [left])
            if not count:
                raise EOFError()
            left = left[count:]
        return content

    def end(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()


class _Pool:
    """The decoding processes of this process."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(MOST_PROCESSES)
        self._idle: list[_Decoder] = []
        self._lock = threading.Lock()
        self.given_up = 0

    @contextmanager
    def take(self) -> Iterator[_Decoder]:
        """A decoding process for the length of the block; it is ended if the block leaves it in the middle of a job."""
        with self._free:
            decoder = self._idle_one() or _Decoder()
            is_well = False
            try:
                yield decoder
                is_well = True
            except (DataError, _Told):
                is_well = True
                raise
            finally:
                if is_well:
                    self._idle.append(decoder)
                else:
                    self._give_up(decoder)

    def _idle_one(self) -> _Decoder | None:
        while self._idle:
            with suppress(IndexError):
                decoder = self._idle.pop()
                if decoder.process.poll() is None:
                    return decoder
                self._give_up(decoder)
        return None

    def _give_up(self, decoder: _Decoder) -> None:
        with self._lock:
            self.given_up += 1
        decoder.end()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().end()


_pool = _Pool()


def _forget_pool() -> None:
    """In a forked child: its parent's processes are not its own."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_forget_pool)
atexit.register(lambda: _pool.close())


@contextmanager
def _decoding(path: str | os.PathLike) -> Iterator[_Decoder]:
    """A decoding process for one file; what goes wrong with it becomes a sentence about the file."""
    try:
        with _pool.take() as decoder:
            yield decoder
    except _Told as error:
        raise _failed(path, f"decoding it fails ({error})") from error
    except TimeoutError as error:
        raise _failed(path, "decoding it takes too long") from error
    except (EOFError, ConnectionError) as error:
        raise _failed(path, "decoding it crashes or takes too much time or memory") from error
    except (KeyError, TypeError, ValueError) as error:
        raise _failed(path, f"decoding it gives nonsense ({error})") from error


def _failed(path: str | os.PathLike, found: str) -> DecodingError:
    return DecodingError(f"{path}: expected a readable image, found that {found}; copy or export it again.")


def _seconds(size: int) -> float:
    """That decoding a file of `size` bytes may work."""
    return SECONDS + SECONDS_PER_MB * size / (1 << 20)


def _whole(value: object) -> int:
    """A number that a decoding process sent. Raises ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise ValueError(f"{value!r} as a number")
    return value


def _rebuilt(answer: dict, pixels: bytearray) -> Image.Image:
    image = Image.frombuffer(answer["mode"], (_whole(answer["width"]), _whole(answer["height"])), pixels)
    if "palette" in answer:
        mode, colours = answer["palette"]
        image.putpalette(bytes(colours), mode)
    if "transparency" in answer:
        transparency = answer["transparency"]
        image.info["transparency"] = bytes(transparency) if isinstance(transparency, list) else _whole(transparency)
    exif = Image.Exif()
    exif[ORIENTATION] = _whole(answer["orientation"])
    image.info["exif"] = exif.tobytes()
    return image
