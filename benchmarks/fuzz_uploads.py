"""Damaged files of every format through the app's door and the readers behind it, and what becomes of them.

    python benchmarks/fuzz_uploads.py --files 20000 --seed 0

Sound files of `tests/helpers/uploads.py` are changed at random: bits, bytes, numbers, lines of text headers, pieces
cut out, doubled or taken from another file; packed ones also inside. Each goes through the same steps as an upload:
`lib.stores.door` (or, for archives, a session), then reading as an image or as a label, decoders in their own process.
A canary file lies beside the uploads, and its content is put into no upload: an image that has it was read from
elsewhere.

Counted are files that were read, files that were refused, by status, and decoders that crashed or took too long. An
error of another type than the app answers with 4xx ends the run, and so does a crash of this process.

Printed is also what a decoder's process costs once it runs: the time for a picture beyond that of the same codec in
this process.
"""

import argparse
import gzip
import logging
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "apps" / "sam2sgp")]

from lib.stores.door import admitted  # noqa: E402
from lib.stores.sessions import ConfinedSessions  # noqa: E402
from sam2sgp.data.io import read_image, read_label  # noqa: E402
from sam2sgp.data.io.decoding import decode_picture  # noqa: E402
from sam2sgp.errors import DataError  # noqa: E402
from tests.helpers.uploads import picture, sound_files  # noqa: E402

LIMIT = 256 << 20
ARCHIVES = (".zip", ".tar.gz")
CANARY = b"\xca\x7a" * 4000
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62)
WORDS = (
    b"0",
    b"-1",
    b"1e9",
    b"nan",
    b"99999",
    b"4294967296",
    b"LIST",
    b"canary.raw",
    b"/etc/passwd",
    b"\t",
    b":",
    b" ",
)
TITLES = ("format", "files", "read", "415", "422", "other 4xx", "decoder crashed", "too long", "slowest")


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """A file with one to eight changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        # Headers are at the front.
        longest = len(data) if rng.random() < 0.75 else min(len(data), 400)
        at = rng.randrange(max(longest, 1))
        kind = rng.choice((0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 2:
            size = rng.choice((2, 4, 8))
            number = rng.choice(NUMBERS) % (1 << 8 * size)
            data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 3:
            del data[at : at + rng.choice((1, 2, 16, 1 << 20))]
        elif kind == 4:
            data[at:at] = data[at : at + rng.choice((1, 8, 64, 1024))]
        elif kind == 5:
            start = rng.randrange(max(len(other), 1))
            data[at : at + 64] = other[start : start + rng.choice((4, 64, 2000))]
        elif kind == 6:
            lines = bytes(data).split(b"\n")
            line = rng.randrange(len(lines))
            words = lines[line].split(b" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[line] = b" ".join(words)
            data = bytearray(b"\n".join(lines))
        else:
            lines = bytes(data).split(b"\n")
            lines.insert(rng.randrange(min(len(lines), 20)), rng.choice(lines[:20]))
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def changed(name: str, files: dict[str, bytes], rng: random.Random) -> bytes:
    content, other = files[name], files[rng.choice(list(files))]
    if name.endswith(".gz") and rng.random() < 0.7:
        return gzip.compress(mutated(gzip.decompress(content), other, rng), 1)
    return mutated(content, other, rng)


def tried(path: Path, sessions: ConfinedSessions, as_label: bool) -> np.ndarray:
    """The voxels of an upload. Raises DataError."""
    if path.name.endswith(ARCHIVES) and not path.name.endswith(".nii.gz"):
        session_id, session = sessions.add_session(str(path), uncompress=True)
        try:
            return read_image(session.image).slices
        finally:
            sessions.remove_session(session_id)
    with admitted(path, LIMIT, label=as_label) as content:
        return read_label(content) if as_label else read_image(content).slices


def outcome(path: Path, sessions: ConfinedSessions, as_label: bool) -> str:
    try:
        voxels = tried(path, sessions, as_label)
    except DataError as error:
        text = str(error)
        if "decoding it crashes" in text:
            return "decoder crashed"
        if "decoding it takes too long" in text:
            return "too long"
        status = str(getattr(error, "status", 422))
        return status if status in TITLES else "other 4xx"
    stored = (
        voxels.astype(np.uint16, copy=False) if voxels.dtype.kind == "i" else np.clip(voxels, 0, 65535).astype("u2")
    )
    if (stored == int.from_bytes(CANARY[:2], "little")).mean() > 0.5:
        raise AssertionError(f"{path}: the canary was read.")
    return "read"


def cost_of_decoders(folder: Path, turns: int = 100) -> str:
    """How many milliseconds more a picture takes than with the same codec in this process."""
    pixels = random.Random(0).randbytes(16) * (1 << 16)
    path, costs = folder / "picture.png", {}
    for edge in (256, 1024):
        grey = np.frombuffer(pixels, np.uint8)[: edge * edge].reshape(edge, edge)
        path.write_bytes(picture(grey, "PNG"))
        own, others = [], []
        for _ in range(turns):
            started = time.perf_counter()
            with Image.open(path) as image:
                np.asarray(image)
            own.append(time.perf_counter() - started)
            started = time.perf_counter()
            np.asarray(decode_picture(path).image)
            others.append(time.perf_counter() - started)
        costs[edge] = [theirs - mine for theirs, mine in zip(others, own, strict=True)]
    told = (
        f"{statistics.median(found) * 1000:.1f} ms (95 %: {sorted(found)[int(0.95 * turns)] * 1000:.1f} ms) for "
        f"{edge} x {edge} pixels"
        for edge, found in costs.items()
    )
    return f"A decoder's process, once it runs, costs {', '.join(told)}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where the last file is left, to see what a crash came from")
    options = parser.parse_args(arguments)
    rng, files = random.Random(options.seed), sound_files()
    found: dict[str, Counter] = defaultdict(Counter)
    slowest: dict[str, float] = defaultdict(float)
    warnings.simplefilter("ignore")
    # nibabel and pydicom tell of each oddity of a header.
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "canary.raw").write_bytes(CANARY)
        sessions = ConfinedSessions(str(Path(temporary, "sessions")), 3600, LIMIT)
        for name, content in files.items():
            path = folder / name
            path.write_bytes(content)
            if outcome(path, sessions, False) != "read":
                raise AssertionError(f"{name}: expected a sound file to be read.")
        cost = cost_of_decoders(folder)
        before, decoder = peak_memory(psutil.Process()), 0
        for _ in tqdm(range(options.files), mininterval=10):
            name = rng.choice(list(files))
            path = folder / f"last{name[name.index('.') :]}"
            path.write_bytes(changed(name, files, rng))
            started = time.monotonic()
            kind = name[name.index(".") + 1 :] if not name.endswith(".dcm") else name
            found[kind][outcome(path, sessions, rng.random() < 0.3)] += 1
            slowest[kind] = max(slowest[kind], time.monotonic() - started)
            decoder = max(decoder, *(peak_memory(child) for child in psutil.Process().children()), 0)
            path.unlink(missing_ok=True)
    print(f"{options.files} files, seed {options.seed}; {platform.processor() or platform.machine()}, {date.today()}\n")
    print("| " + " | ".join(TITLES) + " |\n|" + " --- |" * len(TITLES))
    for kind in [*sorted(found), "all"]:
        counts = found[kind] if kind != "all" else sum(found.values(), Counter())
        seconds = slowest[kind] if kind != "all" else max(slowest.values())
        cells = [kind, counts.total(), *(counts[title] for title in TITLES[2:-1]), f"{seconds:.2f} s"]
        print("| " + " | ".join(map(str, cells)) + " |")
    own = peak_memory(psutil.Process())
    print(f"\n{cost}")
    print(f"Peak memory: this process {own} MB, {own - before} MB of it for files; a decoder {decoder} MB.")


def peak_memory(process: psutil.Process) -> int:
    """In MB; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10 if "VmHWM:" in status else 0


if __name__ == "__main__":
    main()
