"""Damaged files of every format through the readers: no crash, no hang, no flood of memory, no word unsaid.

    python benchmarks/fuzz_inputs.py --files 3000 --seed 0

Writes a small sound file of each format and kind, damages copies of it (bits, bytes, numbers, cut short, pieces taken
out, doubled or exchanged; most often in the header) and reads each as an image and as a label in a process of its own.
A file may be read as before, read with another result (a voxel or a header's number was changed, and nothing in an
uncompressed format would show it) or refused by a `DataError`. What fails the run, with exit code 1:

- the process dies, a file takes more than `--seconds`, or the process grows by, or one that decodes for it takes, more
  than `--megabytes`;
- an error that is no `DataError`;
- a file that was cut short, or whose check sums show the damage (PNG, gzip), and is read with another result.

Prints a row for each kind of file. `--keep FOLDER` keeps what failed.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "bundle")]

SHAPE = (6, 16, 20)
HEADER = 400
START_SECONDS = 120.0
OUTCOMES = ("same", "other result", "refused")
FAILURES = ("crash", "hang", "memory", "other error", "cut and read", "check sum")
# Files whose check sums cover all of their content.
CHECKED = (".png", ".gz")


def write_sound_files(folder: Path) -> list[Path]:
    """A file of each kind that the readers know."""
    import nibabel as nib
    import nrrd
    import SimpleITK
    from PIL import Image
    from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

    from sam2sgp.data import read_image, write_dicom_seg
    from tests.helpers.dicom_files import write_compressed, write_dicom, write_enhanced, write_series

    rng = np.random.default_rng(0)
    volume = rng.integers(0, 3, SHAPE).astype(np.uint8)
    for name in ("v.nii", "v.nii.gz"):
        nib.save(nib.Nifti1Image(volume, np.diag([1.0, 1.0, 2.5, 1.0])), folder / name)
    nib.save(nib.Nifti2Image(volume, np.eye(4)), folder / "v2.nii")
    for name in ("v.nrrd", "v.mha"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), str(folder / name), name.endswith("nrrd"))
    keys = {"Segment0_LabelValue": "1", "Segment1_LabelValue": "2", "encoding": "gzip"}
    nrrd.write(str(folder / "s.seg.nrrd"), volume, {"space directions": np.eye(3), "space": "lps", **keys})
    grey = rng.integers(0, 3, SHAPE[1:]).astype(np.uint8)
    for name in ("g.png", "g.tif", "g.bmp"):
        Image.fromarray(grey).save(folder / name)
    palette = Image.fromarray(grey, "P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    palette.save(folder / "p.png")
    Image.fromarray(rng.integers(0, 255, (*SHAPE[1:], 4)).astype(np.uint8)).save(folder / "c.png")
    Image.fromarray((grey * 9000).astype(np.uint16)).save(folder / "d.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(rng.integers(0, 255, (*SHAPE[1:], 3)).astype(np.uint8)).save(folder / "e.jpg", exif=exif)
    values = rng.integers(0, 4096, (64, 64)).astype(np.uint16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100, "BitsStored": 12, "HighBit": 11, "PixelSpacing": [1, 1]}
    write_dicom(folder / "n.dcm", values, **tags)
    for name, syntax in (("r.dcm", RLELossless), ("j.dcm", JPEG2000Lossless)):
        write_compressed(folder / name, folder / "n.dcm", syntax)
    write_dicom(folder / "b.dcm", (values >> 4).astype(np.uint8), "US")
    write_compressed(folder / "b.dcm", folder / "b.dcm", JPEGBaseline8Bit)
    write_enhanced(folder / "m.dcm", volume.astype(np.uint16), [3, 1, 4, 0, 2, 5])
    with tempfile.TemporaryDirectory() as series:
        uids = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
        source = write_series(Path(series) / "ct", volume.astype(np.uint16), **uids)
        geometry = read_image(source).geometry
        write_dicom_seg(folder / "seg.dcm", geometry.from_native(volume.T), geometry, source, {1: "a", 2: "b"})
    return sorted(folder.iterdir())


def damaged(content: bytes, rng: np.random.Generator) -> tuple[bytes, bool]:
    """A damaged copy, and whether it was only cut short."""
    data = bytearray(content)
    # Where the damage is: in the header three times of four.
    reach = min(HEADER, len(data)) if rng.random() < 0.75 else len(data)
    place = int(rng.integers(reach))
    length = int(rng.integers(1, 9))
    kind = rng.choice(["bit", "byte", "number", "text", "cut", "remove", "double", "noise"])
    if kind == "cut":
        return bytes(data[: int(rng.integers(len(data)))]), True
    if kind == "bit":
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        data[place] = int(rng.integers(256))
    elif kind == "number":
        number = int(rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
        data[place : place + 4] = number.to_bytes(4, str(rng.choice(["little", "big"])))
    elif kind == "text":
        data[place : place + length] = str(int(rng.choice([0, -1, 7, 65536, 99999999]))).encode()
    elif kind == "remove":
        del data[place : place + length]
    elif kind == "double":
        data[place:place] = data[place : place + length * 16]
    else:
        data[place : place + length] = rng.bytes(length)
    return bytes(data), False


def peak_of_children() -> float:
    """Peak memory in MB of the running processes that this one has started."""
    peaks = [0]
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return max(peaks) / 1024


def read_files(pipe) -> None:
    """The reading process: (path, True for a label) in, what came of it out."""
    import sam2sgp.data.io as reading
    from sam2sgp.errors import DataError

    warnings.simplefilter("ignore")
    # Libraries print what they make of a damaged header.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    pipe.send("ready")
    while True:
        path, label = pipe.recv()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            if label:
                answer = "read", reading.read_label(path).tobytes()
            else:
                image = reading.read_image(path)
                answer = "read", image.slices.tobytes() + image.geometry.affine.tobytes()
        except DataError as error:
            answer = "refused", str(error)
        except Exception as error:
            answer = "other error", repr(error)[:200]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        pipe.send((*answer, max(grown, peak_of_children())))


class Reader:
    """A reading process, started again where a file ends it."""

    def __init__(self, seconds: float, megabytes: float) -> None:
        self.seconds, self.megabytes = seconds, megabytes
        self.process = None
        # By the last file, in MB.
        self.taken = 0.0

    def read(self, path: Path, label: bool) -> tuple[str, object]:
        """("read", content), ("refused", message), or what failed and what is known of it."""
        if self.process is None:
            self._start()
        self.pipe.send((path, label))
        try:
            if not self.pipe.poll(self.seconds):
                self.end()
                return "hang", f"more than {self.seconds:g} s"
            outcome, detail, self.taken = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self.process = None
            return "crash", f"exit code {code}"
        return ("memory", f"{self.taken:.0f} MB") if self.taken > self.megabytes else (outcome, detail)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=read_files, args=(other,), daemon=True)
        self.process.start()
        other.close()
        if not self.pipe.poll(START_SECONDS):
            raise RuntimeError(f"the reading process did not start within {START_SECONDS:g} s")
        self.pipe.recv()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000, help="damaged files, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--megabytes", type=float, default=2048.0)
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no further file is read")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    end = time.monotonic() + 60 * options.minutes
    reader = Reader(options.seconds, options.megabytes)
    failures = []
    slowest = largest = 0.0
    with tempfile.TemporaryDirectory() as name:
        sound = write_sound_files(Path(name))
        counts = {path.name: Counter() for path in sound}
        expected = {(path, label): reader.read(path, label) for path in sound for label in (False, True)}
        for number in range(options.files):
            if time.monotonic() > end:
                print(f"Stopped after {number} files and {options.minutes:g} minutes.")
                break
            source = sound[number % len(sound)]
            content, is_cut = damaged(source.read_bytes(), rng)
            path = Path(name) / f"damaged{number}{''.join(source.suffixes)}"
            path.write_bytes(content)
            for label in (False, True):
                started = time.monotonic()
                outcome, detail = reader.read(path, label)
                slowest, largest = max(slowest, time.monotonic() - started), max(largest, reader.taken)
                if outcome == "read":
                    is_same = (outcome, detail) == expected[source, label]
                    found = "cut and read" if is_cut else "check sum" if path.suffix in CHECKED else "other result"
                    outcome = "same" if is_same else found
                counts[source.name][outcome] += 1
                if outcome in FAILURES:
                    failures.append(
                        f"{outcome}: {path.name} of {source.name} as {'label' if label else 'image'}: {detail}"
                    )
                    if options.keep:
                        options.keep.mkdir(parents=True, exist_ok=True)
                        shutil.copy(path, options.keep)
            path.unlink()
    reader.end()
    print(f"| file | {' | '.join((*OUTCOMES, *FAILURES))} |")
    print("| --- " * (1 + len(OUTCOMES) + len(FAILURES)) + "|")
    for kind, counter in counts.items():
        print(f"| {kind} | {' | '.join(str(counter[outcome]) for outcome in (*OUTCOMES, *FAILURES))} |")
    total = sum(counts.values(), Counter())
    print(f"| all | {' | '.join(str(total[outcome]) for outcome in (*OUTCOMES, *FAILURES))} |")
    print(f"Slowest file {slowest:.1f} s, largest growth or decoding process {largest:.0f} MB.")
    print(*failures, sep="\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
