"""Records of finished cases."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from sam2sgp.engines.case_records import CaseRecords, _bank_content, settings_of_run
from sam2sgp.errors import DataError
from sam2sgp.transforms import cache_keys
from tests.helpers.bundle_runs import BUNDLE, CONFIGS
from tests.helpers.pairs import bank, write_set

FAST = {"image_size": 64, "k": 2, "region_below": 0, "report_figures": 1, "progress": False}

# Another value of each setting that decides a result, and the settings that don't.
OTHER = {
    "precision": "bf16",
    "lora": {"r": 2, "alpha": 4},
    "pmg": {"prior": True, "regression": False},
    "refinement": False,
    "memory_pool": 2,
    "pma": {"box": False, "attention": True, "dense": False},
    "retrieval": "random",
    "k": 1,
    "slices_per_class": 1,
    "support_max_items": 2,
    "slice_axis": 1,
    "modality": "MR",
    "ct_window": [-100.0, 300.0],
    "percentiles": [1.0, 99.0],
    "patient_pattern": "^.",
    "val_batch_size": 3,
    "region_below": 0.4,
    "three_d_memory": False,
    "memory_frames": 1,
    "object_gate": False,
    "one_piece": False,
    "mirror": True,
    "dicom_seg": True,
    "save_probability": True,
    "save_uncertainty": True,
    "save_overlay": True,
    "save_coloured": True,
    "image_size": 96,
}


OF_NETWORK = {"lora", "pmg", "refinement", "pma", "image_size", "memory_pool"}


# Folders, and what acts through the content of something: the support set, the weights, an adaptation.
NOT_DECIDING = {
    *("bundle_root", "dataset_dir", "support_dir", "output_dir", "model_file", "device", "progress", "resume"),
    *("support_cache_dir", "support_cache_mb", "adapt_seconds", "adapt_steps", "adapt_seed", "adapt_dir"),
    *("report_figures", "segment_labelled", "backbone", "freeze_encoder", "support_seed"),
    "displayable_configs",
}


def test_waiting_for_another_process_has_an_end_and_older_results_do_not_count(tmp_path):
    case = {"name": "case7", "image": str(tmp_path / "case7.png")}
    records = CaseRecords(tmp_path)
    records.run = "before"
    records.save_error(case, "old")
    records.run = "now"
    with pytest.raises(DataError, match="case7"):
        records.wait(case, 0)
    records.save_error(case, "new")
    assert records.wait(case, 0)["error"] == "new"


@pytest.fixture(scope="module")
def key_of(tmp_path_factory):
    """The hash of what decides the results of a run with some settings."""
    folder = write_set(tmp_path_factory.mktemp("keys") / "set", 2)
    for kind in ("images", "labels"):
        nib.save(nib.Nifti1Image(np.ones((16, 16, 4), np.uint8), np.diag([1, 1, 5, 1])), folder / kind / "volume.nii")
    known = {}

    def key(**settings) -> str:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "inference.json"))
        folders = {"support_dir": folder, "dataset_dir": folder, "output_dir": folder.parent}
        parser.update(
            {"bundle_root": str(BUNDLE), "segment_labelled": True, **FAST}
            | {name: str(path) for name, path in folders.items()}
        )
        parser.update(settings)
        if not OF_NETWORK & settings.keys():
            parser["network"] = known.get("network") or parser["network"]
        torch.manual_seed(0)
        evaluator = parser.get_parsed_content("evaluator")
        known.setdefault("network", evaluator.network)
        return settings_of_run(evaluator)

    return key


def test_every_setting_is_known_to_decide_a_result_or_not():
    config = json.loads((CONFIGS / "inference.json").read_text())
    derived = {key for key, value in config.items() if "@" in json.dumps(value) or key in ("imports", "initialize")}
    assert set(config) - derived - NOT_DECIDING == set(OTHER)


def test_every_setting_that_decides_a_result_is_part_of_its_key(key_of):
    same = key_of()
    assert same == key_of(progress=True, support_cache_mb=1, report_figures=0, resume=False)
    keys = {name: key_of(**{name: value}) for name, value in OTHER.items()}
    assert [name for name, key in keys.items() if key == same] == []
    assert len(set(keys.values())) == len(OTHER)


def test_what_older_readers_gave_is_segmented_again(key_of, monkeypatch):
    before = key_of()
    monkeypatch.setattr(cache_keys, "READERS_VERSION", cache_keys.READERS_VERSION + 1)
    assert key_of() != before


def test_a_labelled_image_without_an_object_counts_where_queries_are_scaled_like_it(tmp_path):
    folder = write_set(tmp_path / "set", 2)
    before = bank(folder)
    ct = np.full((32, 32, 6), -1000, np.int16)
    ct[8:24, 8:24] = np.random.default_rng(0).integers(-50, 150, (16, 16, 6))
    for kind, array in (("images", ct), ("labels", np.zeros(ct.shape, np.uint8))):
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / kind / "empty.nii")
    after = bank(folder)
    assert [item.content for item in after.items][: len(before)] == [item.content for item in before.items]
    assert after.scaling() != before.scaling() and _bank_content(after) != _bank_content(before)
    assert _bank_content(bank(folder)) == _bank_content(after)
