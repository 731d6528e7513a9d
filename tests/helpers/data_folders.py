"""Data folders of empty files, for tests."""

import json
from pathlib import Path


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def paired(root: Path, *stems: str, label_suffix: str = ".png") -> Path:
    return touch(root, *(f"images/{stem}.jpg" for stem in stems), *(f"labels/{stem}{label_suffix}" for stem in stems))


def names(cases: list[dict]) -> list[str]:
    return [case["name"] for case in cases]


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def said(cases, root: Path) -> dict[str, str]:
    """Why files of a folder are not used, by their path in it."""
    return {str(file.path.relative_to(root)): file.why for file in cases.skipped}


def nnunet(root: Path, **more) -> Path:
    touch(root, *(f"imagesTr/liver_00{n}_0000.nii.gz" for n in range(3)))
    touch(root, *(f"labelsTr/liver_00{n}.nii.gz" for n in range(3)), "imagesTs/liver_009_0000.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
    write_json(root / "dataset.json", content | more)
    return root


def write(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def pairs_in(cases: list[dict], root: Path) -> dict[str, str | None]:
    return {
        str(Path(case["image"]).relative_to(root)): str(Path(case["label"]).relative_to(root))
        if "label" in case
        else None
        for case in cases
    }
