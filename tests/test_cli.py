"""The `sam2sgp` command does what the run of the bundle behind it does, with short options and relative paths."""

import csv
import os
import subprocess
import sys
import warnings
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import torch
from monai.utils import optional_import
from PIL import Image
from typer.testing import CliRunner

from sam2sgp import cli
from sam2sgp.engines import evaluator
from sam2sgp.errors import DataError, WeightsError
from sam2sgp.networks import SAM2SGP, load_weights, save_weights
from tests.helpers.bundle_runs import random_weights, run

SMALL = ["--image_size", "64", "--progress", "False"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights") / "random.pt")


def call(*words, code=0):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_segment_gives_the_label_maps_of_the_bundles_run(phantoms, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(phantoms)
    output = call("segment", "-s", "support/rgb", "-q", "queries/rgb", "-o", tmp_path / "short", "-w", weights, *SMALL)
    assert "Done in" in output and str(tmp_path / "short") in output
    run(
        "inferring",
        "inference.json",
        support_dir=str(phantoms / "support" / "rgb"),
        dataset_dir=str(phantoms / "queries" / "rgb"),
        output_dir=str(tmp_path / "long"),
        model_file=str(weights),
        image_size=64,
        progress=False,
    )
    names = sorted(path.name for path in (tmp_path / "long").glob("*.png"))
    assert names and names == sorted(path.name for path in (tmp_path / "short").glob("*.png"))
    for name in names:
        first, second = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("short", "long"))
        assert np.array_equal(first, second), name
    assert (tmp_path / "short" / "report.html").is_file()


def test_check_tells_the_dice_of_left_out_patients(phantoms, weights, tmp_path):
    output = call("check", phantoms / "support" / "us", "-w", weights, "-o", tmp_path, *SMALL)
    with (tmp_path / "evaluation" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["class_name"] == "disc" and row["dice"]]
    mean = sum(float(row["dice"]) for row in rows) / len(rows)
    median = np.median([float(row["dice"]) for row in rows])
    assert f"disc: mean {mean:.3f}, median {median:.3f}" in output and f"({len(rows)} images)" in output
    worst = min(rows, key=lambda row: (float(row["dice"]), row["case"]))
    assert f"worst {float(worst['dice']):.3f} of {worst['case']} (" in output and f"{tmp_path}/evaluation" in output
    assert {row["case"] for row in rows} <= {path.stem for path in (phantoms / "support" / "us" / "images").iterdir()}


def test_check_names_labels_far_below_all_others(tmp_path, monkeypatch):
    def measured(run_id, configs, settings, kept):
        rows = [("a", "disc", 0.9), ("b", "disc", 0.8), ("c", "disc", 0.02), ("d", "disc", 0.9), ("e", "disc", 0.85)]
        rows += [("a", "ring", 0.4), ("b", "ring", 0.0), ("f", "disc", None)]
        # Something was found where the label is empty.
        rows = [(*row, 50) for row in rows] + [("g", "disc", 0.0, 0)]
        (Path(settings["output_dir"]) / "evaluation").mkdir()
        with (Path(settings["output_dir"]) / "evaluation" / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("case", "class_name", "dice", "truth_voxels"), *rows])

    monkeypatch.setattr(cli, "_run", measured)
    output = call("check", tmp_path, "-o", tmp_path)
    assert output.count("Far below all others") == 1
    assert "Far below all others, so see whether the label is of its image: c." in output


def test_check_names_no_file_that_is_gone_afterwards(phantoms, weights):
    output = call("check", phantoms / "support" / "us", "-w", weights, *SMALL)
    assert "disc: mean" in output and "With --output FOLDER" in output
    assert "sam2sgp-check-" not in output


@pytest.mark.parametrize("all_fail, kept", [(False, True), (False, False), (True, False)])
def test_check_tells_the_dice_of_what_was_segmented_before_what_failed(
    phantoms, weights, tmp_path, monkeypatch, all_fail, kept
):
    """Labels that can't be used refuse the whole run, because they are the support set; a volume that no longer fits
    into memory, or a file that is gone in the meantime, is one image that fails."""
    names = sorted(path.stem for path in (phantoms / "support" / "us" / "images").iterdir())
    lost = names if all_fail else names[1:2]
    prepared = evaluator.prepare_case

    def prepare(case, *arguments):
        if case["name"] in lost:
            raise DataError(f"{case['image']}: expected an image, found no file.")
        return prepared(case, *arguments)

    monkeypatch.setattr(evaluator, "prepare_case", prepare)
    words = ["check", phantoms / "support" / "us", "-w", weights, *SMALL, *(["-o", tmp_path] if kept else [])]
    output = call(*words, code=1)
    told, _, failed = output.partition(f"error: {len(lost)} of {len(names)} images failed:\n")
    assert ("disc: mean" in told) == ("Dice of each" in told) == (not all_fail)
    assert [line.split(":")[0].strip() for line in failed.splitlines()] == lost
    assert "found no file." in failed and "sam2sgp-check-" not in output
    assert ("Report: " in told) == kept and (tmp_path / "evaluation" / "report.html").is_file() == kept


def test_a_command_says_nothing_of_the_engines_and_libraries_behind_it(phantoms, weights, tmp_path):
    program = [sys.executable, "-c", "from sam2sgp.cli import app; app()"]
    words = ["check", phantoms / "support" / "us", "-w", weights, "-o", tmp_path, *SMALL]
    done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Loading PyTorch and MONAI") and "sam2sgp.engines.results: Results: " in done.stdout
    for word in ("monai.bundle", "model_file:", "ignite", "Warning"):
        assert word not in done.stdout + done.stderr, word


def test_settings_may_follow_and_a_misspelt_one_is_one_line(phantoms, weights, tmp_path):
    words = ["segment", "-s", phantoms / "support/rgb", "-q", phantoms / "queries/rgb", "-o", tmp_path, "-w", weights]
    output = call(*words, "--objct-gate", "False", code=1)
    assert "error: --objct_gate" in output and "did you mean --object_gate?" in output
    nested = call(*words, "--dtaset::data", "[]", code=1)
    assert "error: --dtaset::data: expected an option" in nested and "did you mean --dataset::data?" in nested
    assert "Traceback" not in output + nested and not any(tmp_path.iterdir())
    assert cli._more(["--ct_window", "[-1000, 400]", "--object-gate=True", "--modality", "CT"]) == {
        "ct_window": [-1000, 400],
        "object_gate": True,
        "modality": "CT",
    }
    assert "expected a value behind --k2" in call(*words, "--k2", code=2)
    assert "expected one of base_plus" in call(*words, "--backbone", "tyni", code=2)


def test_train_starts_the_training_with_the_overlays_in_order(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "_run", lambda run_id, configs, settings: seen.update(locals()))
    monkeypatch.chdir(tmp_path)
    call("train", "-d", "data", "-o", "out", "--fine-tune", "--epochs", 3, "--backbone", "tiny", "--no-resume")
    assert seen["run_id"] == "training"
    assert seen["configs"] == ["train.json", "backbones/tiny.json", "finetune.json"]
    assert seen["settings"] == {
        "dataset_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "resume": False,
        "max_epochs": 3,
    }


@pytest.mark.parametrize("words", [[], ["--fine-tune"]])
def test_export_writes_weights_that_segment_takes_as_they_are(tmp_path, words):
    """Those of a fine-tuning are taken by the plain network only after that, because LoRA is merged."""
    torch.manual_seed(0)
    trained = SAM2SGP("lite", 64, lora={"r": 8, "alpha": 16} if words else None)
    for name, value in trained.state_dict().items():
        if ".lora_B." in name:
            torch.nn.init.normal_(value, std=0.05)
    save_weights(trained, tmp_path / "model.pt")
    plain = SAM2SGP("lite", 64)
    if words:
        with pytest.raises(WeightsError, match="sam2sgp export --fine-tune"):
            load_weights(plain, tmp_path / "model.pt")
    output = call("export", "-w", tmp_path / "model.pt", "-o", tmp_path / "network.pt", *words, "--image_size", 64)
    assert f": {tmp_path / 'network.pt'}" in output
    assert (tmp_path / "network.pt").stat().st_size < 0.55 * (tmp_path / "model.pt").stat().st_size
    load_weights(plain, tmp_path / "network.pt")
    image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 20:40] = 1
    with torch.no_grad():
        first, second = (
            network.eval()(image, support_image=image, support_label=mask).sigmoid() for network in (trained, plain)
        )
    assert torch.allclose(first, second, atol=0.02) and first.std() > 0
    assert "no such file" in call("export", "-w", tmp_path / "absent.pt", "-o", tmp_path / "x.pt", code=1)


def test_export_does_not_write_over_the_weights_that_it_reads(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"trained")
    (tmp_path / "link.pt").symlink_to("model.pt")
    for output in ("model.pt", "link.pt"):
        assert "found the same" in call("export", "-w", tmp_path / "model.pt", "-o", tmp_path / output, code=1)
    assert (tmp_path / "model.pt").read_bytes() == b"trained"


def test_evaluate_without_weights_says_at_once_where_they_come_from(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "_run", lambda run_id, configs, settings: started.append(settings))
    told = call("evaluate", "-d", tmp_path, "-o", tmp_path, code=1)
    assert f"error: {tmp_path / 'model.pt'}: expected" in told and "sam2sgp check" in told and not started
    call("evaluate", "-d", tmp_path, "-o", tmp_path, "-w", "own.pt")
    call("evaluate", "-d", tmp_path, "-o", tmp_path, "--ckpt_dir", tmp_path / "run")
    (tmp_path / "model.pt").touch()
    call("evaluate", "-d", tmp_path, "-o", tmp_path)
    assert len(started) == 3


def test_segment_passes_what_is_asked_for(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "_run", lambda run_id, configs, settings: seen.update(settings))
    call("segment", "-s", tmp_path, "-q", tmp_path, "-o", tmp_path / "out", "--labelled", "--overlay")
    assert seen["segment_labelled"] and seen["save_overlay"] and not seen["save_coloured"] and "mirror" not in seen
    call("segment", "-s", tmp_path, "-q", tmp_path, "-o", tmp_path / "out", "--mirror")
    assert seen["mirror"] is True
    call("segment", "-s", tmp_path, "-q", tmp_path, "-o", tmp_path / "out", "--no-mirror")
    assert seen["mirror"] is False


def test_the_packages_own_configs_are_run_without_a_warning_that_they_can_run_code(monkeypatch, recwarn):
    def warn(**_):
        warnings.warn("parsing config_file ['inference.json']: any value in it …", UserWarning, stacklevel=1)

    monkeypatch.setattr(monai.bundle, "run", warn)
    cli._run("inferring", ["inference.json"], {})
    assert not recwarn.list


def test_serve_passes_settings_and_paths_with_spaces(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.os, "execv", lambda program, command: seen.extend(command))
    file = tmp_path / "my settings.toml"
    call("serve", tmp_path / "my studies", "--settings", file, "--port", 8123, "--conf", "ct_window=[-100, 300]")
    assert seen[1:3] == [str(cli.APP / "manage.py"), "serve"]
    expected = ["--studies", tmp_path / "my studies", "--settings", file, "--port", 8123, "--conf", "ct_window"]
    assert seen[3:] == [*map(str, expected), "[-100, 300]"]
    assert "expected NAME=VALUE" in call("serve", tmp_path, "--conf", "k", code=2)


def test_a_folder_that_the_user_may_not_enter_is_left(tmp_path, monkeypatch):
    """A service's user is in root's folder by `runuser`, and there MONAI Label's start would fail."""
    seen = []
    monkeypatch.setattr(cli.os, "execv", lambda program, command: seen.append((Path.cwd(), command[3:])))
    monkeypatch.chdir(tmp_path)
    for may_enter, folder in ((True, tmp_path), (False, Path("/"))):
        monkeypatch.setattr(cli.os, "access", lambda path, mode, answer=may_enter: answer)
        call("backup", "--studies", "studies", "--output", "x.tar")
        assert seen.pop() == (folder, ["--output", str(tmp_path / "x.tar"), "--studies", str(tmp_path / "studies")])


def test_a_package_that_is_missing_is_told_in_one_line(tmp_path, monkeypatch):
    absent, _ = optional_import("absent", descriptor="Please install absent before using AbsentHandler.")

    def fail(**_):
        try:
            absent.Client()
        except Exception as error:
            raise RuntimeError("Failed to instantiate a component") from error

    monkeypatch.setattr(monai.bundle, "run", fail)
    told = call("segment", "-s", tmp_path, "-q", tmp_path, "-o", tmp_path / "out", code=1)
    assert told.startswith("error: Please install absent before using AbsentHandler.") and told.count("\n") == 1
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert "expected MONAI Label, found that it is not installed" in call("serve", tmp_path, code=1)


def test_completion_and_help_do_not_wait_for_torch():
    program = (
        "import sys; from sam2sgp.cli import app\ntry: app(prog_name='sam2sgp')\nfinally: print('torch' in sys.modules)"
    )
    asked = {"_SAM2SGP_COMPLETE": "complete_bash", "COMP_WORDS": "sam2sgp segment --sup", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["--support", "False"], done.stderr


def test_doctor_names_versions_and_the_licence_of_the_weights():
    output = call("doctor")
    assert "torch 2." in output and "non-commercial" in output and "SHA-256" in output
