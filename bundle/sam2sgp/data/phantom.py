"""Phantoms: a small labelled data set of four modalities, made from nothing, for the demo and the tests.

What a phantom shows is drawn by `sam2sgp.data.phantom_scenes`; here patients become files and lists of them.

From the command line: `python -m sam2sgp.data.phantom --output_dir D [--patients 24] [--seed 0] [--size 128]`.
"""

import argparse
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.random import SeedSequence
from PIL import Image

from sam2sgp.data.phantom_scenes import (
    CLASS_NAMES,
    LOOKS,
    MIN_SLICES,
    VOLUME_LOOKS,
    check_size,
    draw_patient,
    draw_picture,
    phantom_volume,
)
from sam2sgp.errors import ConfigError, DataError, report_in_one_line
from sam2sgp.progress import Bar

PICTURES_PER_PATIENT = 4
SUPPORT_PATIENTS = 4
MIN_PATIENTS = 4

WORK_PREFIX = ".phantom-"


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    nifti = nib.Nifti1Image(array, affine)
    nifti.header.set_xyzt_units("mm")
    nifti.set_qform(affine, code=1)
    nifti.set_sform(affine, code=1)
    # nibabel would put the time into the gzip header, and the same volume would be another file each time.
    path.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=4, mtime=0))


def _write_png(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _write_patient(
    root: Path, suffix: str, look: str, index: int, seed: int, size: Sequence[int], num_slices: int
) -> list[tuple[dict, int]]:
    """Write a patient's images and labels; return their data-list entries and how many classes each image shows."""
    # What SeedSequence(seed).spawn(...)[look].spawn(...)[index] gives, whatever the number of patients and looks.
    rng = np.random.default_rng(SeedSequence(seed, spawn_key=(list(LOOKS).index(look), index)))
    patient_id = f"{look}_{index:03d}"
    if look in VOLUME_LOOKS:
        image, label, affine = phantom_volume(look, rng, size, num_slices, oblique=index % 8 == 3)
        files = {f"{patient_id}.nii.gz": (image, label)}
    else:
        patient = draw_patient(look, rng)
        pictures = range(PICTURES_PER_PATIENT)
        files = {f"{patient_id}_{number}.png": draw_picture(look, patient, rng, size) for number in pictures}
    entries = []
    for name, arrays in files.items():
        for folder, array in zip((f"images{suffix}", f"labels{suffix}"), arrays, strict=True):
            if look in VOLUME_LOOKS:
                _write_nifti(root / folder / name, array, affine)
            else:
                _write_png(root / folder / name, array)
        entry = {"image": f"images{suffix}/{name}", "label": f"labels{suffix}/{name}", "patient": patient_id}
        entries.append((entry | {"group": look, "modality": LOOKS[look]}, np.count_nonzero(np.unique(arrays[1]))))
    return entries


def _write_trial(root: Path, look: str, training: list[tuple[dict, int]], test: list[tuple[dict, int]]) -> None:
    """Copy a few training patients to support/<look> and the test images to queries/<look>."""
    support, queries = root / "support" / look, root / "queries" / look
    for folder in (support / "images", support / "labels", queries):
        folder.mkdir(parents=True)
    # One image a patient, those that show most classes: a small support set should know them all.
    best: dict[str, tuple[dict, int]] = {}
    for entry, classes in training:
        if entry["patient"] not in best or classes > best[entry["patient"]][1]:
            best[entry["patient"]] = (entry, classes)
    for entry, _ in sorted(best.values(), key=lambda item: -item[1])[:SUPPORT_PATIENTS]:
        shutil.copyfile(root / entry["image"], support / "images" / Path(entry["image"]).name)
        shutil.copyfile(root / entry["label"], support / "labels" / Path(entry["label"]).name)
    _write_json(support / "labels.json", {str(number): name for number, name in CLASS_NAMES.items()})
    for entry, _ in test:
        shutil.copyfile(root / entry["image"], queries / Path(entry["image"]).name)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def recorded_parameters(directory: str | Path) -> dict | None:
    """The parameters that a folder's phantoms were made with, or None if it isn't a phantom data set."""
    try:
        dataset = json.loads((Path(directory) / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dataset.get("phantom") if isinstance(dataset, dict) else None


def make_phantoms(
    output_dir: str | Path,
    patients_per_modality: int = 24,
    size: Sequence[int] = (128, 128),
    num_slices: int = 12,
    seed: int = 0,
    modalities: Sequence[str] = tuple(LOOKS),
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Write a labelled phantom data set as a Medical Segmentation Decathlon folder.

    A patient is a volume ("ct", "mr") or four pictures ("us", "rgb"). Patients are split 60/15/25 into `training`,
    `validation` and `test` of `dataset.json`; test files are in `imagesTs`, `labelsTs`. Each entry has `image`,
    `label`, `patient`, `group` (the look) and `modality`. For a try of inference, `support/<look>` holds
    labelled images of four training patients and `queries/<look>` the test images. The same arguments give the same
    bytes, and patient i is the same whatever the number of patients. Files appear when all are made: what a killed run
    leaves behind is removed by the next.

    Args:
        output_dir: an empty or missing folder. One that holds this very data set already is left as it is.
        patients_per_modality: at least 4.
        size: (height, width) in pixels of a slice or picture, see `phantom_picture`.
        num_slices: of a volume, at least 6.
        seed: not negative.
        modalities: looks to make, of "ct", "mr", "us", "rgb".
        force: replace a phantom data set made with other arguments, or make the same one again.
        progress: show a bar.

    Returns:
        The folder.

    Raises:
        ConfigError: an argument out of its range.
        DataError: the folder holds something else, or can't be written.

    Example:
        >>> make_phantoms("phantoms", patients_per_modality=4, modalities=("ct",))  # doctest: +SKIP
    """
    parameters = _checked_parameters(patients_per_modality, size, num_slices, seed, modalities)
    output = Path(output_dir)
    recorded = recorded_parameters(output)
    if recorded == parameters and not force:
        return output
    try:
        output.mkdir(parents=True, exist_ok=True)
        for leftover in output.glob(f"{WORK_PREFIX}*"):  # of a run that was killed
            shutil.rmtree(leftover)
        others = list(output.iterdir())
        if recorded is None and others:
            raise DataError(f"{output} isn't empty and holds no phantom data set; choose another folder.")
        if recorded is not None and not force:
            raise DataError(
                f"{output} holds phantoms of other parameters; choose another folder or replace them (--force)."
            )
        with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=output) as work:
            _write_data_set(Path(work), parameters, progress)
            _replace(others, Path(work), output)
    except OSError as error:
        raise DataError(f"Phantoms can't be written to {output}: {error}.") from error
    return output


def _replace(others: list[Path], made: Path, output: Path) -> None:
    """Put what was made in the place of the others; dataset.json goes first and comes last: it vouches for the rest."""
    for path in sorted(others, key=lambda path: path.name != "dataset.json"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in sorted(made.iterdir(), key=lambda path: path.name == "dataset.json"):
        path.rename(output / path.name)


def _checked_parameters(
    patients_per_modality: int, size: Sequence[int], num_slices: int, seed: int, modalities: Sequence[str]
) -> dict:
    """Arguments of `make_phantoms` as JSON types. Raises ConfigError for one out of its range."""
    if patients_per_modality < MIN_PATIENTS:
        raise ConfigError(f"Phantoms need at least {MIN_PATIENTS} patients a modality, not {patients_per_modality}.")
    if seed < 0:
        raise ConfigError(f"The seed of phantoms can't be negative, but it is {seed}.")
    if not modalities or len(set(modalities)) < len(modalities) or not set(modalities) <= set(LOOKS):
        raise ConfigError(f"The modalities of phantoms are a choice of {', '.join(LOOKS)}, not {list(modalities)}.")
    check_size(size)
    if num_slices < MIN_SLICES:
        raise ConfigError(f"A phantom volume needs at least {MIN_SLICES} slices, not {num_slices}.")
    return {
        "patients_per_modality": int(patients_per_modality),
        "size": [int(side) for side in size],
        "num_slices": int(num_slices),
        "seed": int(seed),
        "modalities": list(modalities),
    }


def _write_data_set(root: Path, parameters: dict, progress: bool) -> None:
    patients, looks = parameters["patients_per_modality"], parameters["modalities"]
    num_test, num_validation = round(0.25 * patients), max(1, round(0.15 * patients))
    num_training = patients - num_validation - num_test
    sections: dict[str, list] = {"training": [], "validation": [], "test": []}
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (root / folder).mkdir()
    with Bar(total=patients * len(looks), desc="phantoms", unit="patient", disable=not progress) as bar:
        for look in looks:
            made: dict[str, list] = {section: [] for section in sections}
            for index in range(patients):
                section = "training" if index < num_training else "validation"
                section = "test" if index >= patients - num_test else section
                made[section] += _write_patient(
                    root,
                    "Ts" if section == "test" else "Tr",
                    look,
                    index,
                    parameters["seed"],
                    parameters["size"],
                    parameters["num_slices"],
                )
                bar.update()
            _write_trial(root, look, made["training"], made["test"])
            for section, entries in made.items():
                sections[section] += [entry for entry, _ in entries]
    dataset = {
        "name": "sam2sgp phantoms",
        "description": "Synthetic discs, ellipses and rings in the looks of several modalities; made, not measured.",
        "modality": {"0": "/".join(LOOKS[look] for look in looks)},
        "labels": {"0": "background"} | {str(number): name for number, name in CLASS_NAMES.items()},
        "numTraining": len(sections["training"]),
        "numTest": len(sections["test"]),
        "phantom": parameters,
    }
    _write_json(root / "dataset.json", dataset | sections)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line, see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m sam2sgp.data.phantom", description="Make a phantom data set.")
    parser.add_argument("--output_dir", required=True, help="an empty or missing folder")
    parser.add_argument("--patients", type=int, default=24, help="patients per modality (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a phantom data set that is there already")
    options = parser.parse_args(arguments)
    before = recorded_parameters(options.output_dir)
    folder = make_phantoms(
        options.output_dir, options.patients, (options.size, options.size), seed=options.seed, force=options.force
    )
    if before == recorded_parameters(folder) and not options.force:
        print(f"{folder} holds these phantoms already; nothing to do.")
    else:
        print(f"Phantoms written to {folder}.")


if __name__ == "__main__":
    report_in_one_line()
    main()
