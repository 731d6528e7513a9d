"""Options of a run: a mistake is one sentence before any work, and `--help` lists them."""

import json
import re
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from sam2sgp.errors import ConfigError, cause_of
from sam2sgp.options import ALL, check, check_places, help_text
from tests.helpers.bundle_runs import CONFIGS, run

INFERENCE = ("inference.json",)
EVALUATION = ("train.json", "evaluate.json")
RUNS = [
    INFERENCE,
    (*INFERENCE, "multi_gpu_inference.json"),
    (*INFERENCE, "backbones/tiny.json"),
    ("train.json",),
    ("train.json", "backbones/small.json"),
    ("train.json", "finetune.json"),
    ("train.json", "pretrain.json"),
    ("train.json", "federated.json"),
    ("train.json", "multi_gpu_train.json"),
    EVALUATION,
    (*EVALUATION, "multi_gpu_evaluate.json"),
]


def merged(files, **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in files])
    parser.update(pairs=overrides)
    return parser


@pytest.mark.parametrize("files", RUNS, ids=" ".join)
def test_the_shipped_configs_are_sound_and_all_their_settings_are_described(files):
    parser = merged(files)
    check(parser)
    plain = {name for name, value in parser.config.items() if not isinstance(value, str | list | dict)}
    assert plain - {"_meta_"} <= ALL.keys()
    assert help_text(parser.config).count("\n  --") >= 40


def test_every_described_setting_is_in_some_config_and_every_documented_one_is_described():
    content = "".join(path.read_text() for path in CONFIGS.rglob("*.json"))
    idle = {"lora::dropout"}
    assert [name for name in ALL if name not in idle and f'"{name.split("::")[-1]}"' not in content] == []
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| (`[a-z_:]+`(?:, `[a-z_:]+`)*) \| [^|]* \| ", page, re.MULTILINE)
    documented = {name for names in rows for name in re.findall("`([a-z_:]+)`", names)}
    settings = documented & {name for path in CONFIGS.rglob("*.json") for name in json.loads(path.read_text())}
    assert len(settings) > 40 and settings <= ALL.keys()


@pytest.mark.parametrize(
    ("files", "overrides", "message"),
    [
        (INFERENCE, {"object_gate": "false"}, "--object_gate: expected True or False, found 'false'. Write False"),
        (EVALUATION, {"resume": "no"}, "--resume: expected True or False, found 'no'. Write False"),
        (INFERENCE, {"K": 3}, "--K: .*did you mean --k?"),
        (("train.json",), {"max_epoch": 3}, "--max_epoch: .*did you mean --max_epochs?"),
        (INFERENCE, {"patient-pattern": "x"}, "did you mean --patient_pattern?"),
        (INFERENCE, {"pma::bx": False}, "--pma::bx: .*did you mean --pma::box?"),
        (INFERENCE, {"pma#bx": False}, "did you mean --pma::box?"),
        (INFERENCE, {"attention": False}, "did you mean --pma::attention?"),
        (INFERENCE, {"max_epochs": 3}, "--max_epochs: .*found one of training"),
        (INFERENCE, {"k": "8"}, "--k: expected a whole number of at least 1, found '8'"),
        (INFERENCE, {"k": -3}, "--k: expected a whole number of at least 1, found -3"),
        (INFERENCE, {"adapt_seconds": -1}, "--adapt_seconds: expected a number of at least 0, found -1"),
        (INFERENCE, {"adapt_seconds": float("inf")}, "--adapt_seconds: expected a number of at least 0, found inf"),
        (INFERENCE, {"support_seed": -1}, "--support_seed: expected a whole number from 0 to 4294967295, found -1"),
        (INFERENCE, {"support_max_items": 0}, "--support_max_items: expected a whole number of at least 1, or None"),
        (INFERENCE, {"image_size": 100}, "--image_size: expected a positive multiple of 32, found 100"),
        (INFERENCE, {"ct_window": [240, -160]}, "--ct_window: expected a list of two numbers, the lower first"),
        (INFERENCE, {"percentiles": [0.5, 101]}, "--percentiles: expected a list of two numbers from 0 to 100"),
        (("train.json",), {"split": [0.7, -0.1, 0.4]}, "--split: expected a list of three numbers of at least 0"),
        (("train.json",), {"max_epochs": 0}, "--max_epochs: expected a whole number of at least 1, found 0"),
        (("train.json", "pretrain.json"), {"decay_steps": 0}, "--decay_steps: expected a whole number of at least 1"),
        (("train.json",), {"min_k": 6}, "--min_k: expected at most max_k, found 6, which is more than 5"),
        (INFERENCE, {"k": True}, "--k: expected a whole number of at least 1, found True"),
        (INFERENCE, {"lora": "None"}, "--lora: .*Write None, with a capital letter"),
        (INFERENCE, {"retrieval": "similar"}, "--retrieval: expected similarity or random.*Did you mean similarity?"),
        (INFERENCE, {"precision": "FP16"}, "--precision: .*Did you mean fp16?"),
        (INFERENCE, {"dataset::dta": 1}, "--dataset::dta: .*QueryDataset has no such argument; did you mean .*::data?"),
        (("train.json",), {"train::dataset::settings::group_sise": 1}, "did you mean --.*::group_size?"),
        (INFERENCE, {"inferer::settings::batch_size": "8"}, "::batch_size: expected a whole number, found '8'"),
        (INFERENCE, {"inferer::settings::object_gate": "no"}, "::object_gate: expected True or False, found 'no'"),
        (INFERENCE, {"evaluator::probability": 1}, "--evaluator::probability: expected True or False, found 1"),
        (("train.json",), {"optimizer::lr": "fast"}, "--optimizer::lr: expected a number, found 'fast'"),
        (("train.json",), {"weights": True}, "--weights: expected a path, or None, or False, found True"),
        (("train.json",), {"weights": 0}, "--weights: expected a path, or None, or False, found 0"),
        (("train.json",), {"clip_probability": 40}, "--clip_probability: expected a number from 0 to 1, found 40"),
        (INFERENCE, {"ct_window": [-100, "high"]}, "--ct_window: expected a list of two numbers, .*, found"),
        (INFERENCE, {"val_batch_size": 0}, "--val_batch_size: expected a whole number of at least 1, found 0"),
        (INFERENCE, {"region_below": 70}, "--region_below: expected a number from 0 to 1, found 70"),
        (INFERENCE, {"slice_axis": 3}, "--slice_axis: expected auto, 0, 1 or 2, found 3"),
        (INFERENCE, {"slice_axis": True}, "--slice_axis: expected auto, 0, 1 or 2, found True"),
    ],
)
def test_a_mistake_is_told_with_what_was_meant(files, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(merged(files, **overrides))


@pytest.mark.parametrize(
    ("files", "overrides"),
    [
        (INFERENCE, {"pma::box": False, "ct_window": [-100, 200], "modality": "CT", "device": "cpu"}),
        (INFERENCE, {"k": "$2 * 3", "progress": "@resume", "dataset#data": [], "support_max_items": 4}),
        (("train.json",), {"weights": False, "train#dataset#data": [], "lora": {"r": 4, "alpha": 8}}),
        (("train.json",), {"mine": 3, "max_epochs": "$@mine"}),
        (INFERENCE, {"only_this": ["$print('mine')"]}),
    ],
)
def test_what_can_work_is_let_through(files, overrides):
    check(merged(files, **overrides))


@pytest.mark.parametrize(
    ("files", "name", "hint"),
    [
        (("train.json",), "trian::x", "did you mean --train::x?"),
        (("train.json",), "train::optimzer::lr", "did you mean --optimizer::lr?"),
        (EVALUATION, "validate::dataste::dta", "did you mean --validate::dataset::data?"),
        (INFERENCE, "handler::0::max_figure", "did you mean --handlers::0::max_figures?"),
        (INFERENCE, "k::x", "found no group 'k' in it; --help"),
    ],
)
def test_an_id_below_a_group_that_is_not_there_is_told_the_nearest_one(files, name, hint):
    config = merged(files).config
    with pytest.raises(ConfigError, match=f"--{name}: expected .*{re.escape(hint)}"):
        check_places(config, ["pma::box", "k", name])


def test_a_run_checks_its_options_before_any_work_and_lists_them_for_help(tmp_path, capsys):
    arguments = {"dataset_dir": str(tmp_path / "none"), "support_dir": str(tmp_path / "none")}
    with pytest.raises(Exception) as caught:
        run("inferring", "inference.json", objectgate=False, **arguments)
    assert str(cause_of(caught.value)).startswith("--objectgate: expected an option of this run")
    with pytest.raises(SystemExit) as ended:
        run("evaluating", *EVALUATION, help=True)
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert re.search(r"--retrieval +which items.*; similarity\s+or random \[similarity\]", shown.replace("'", ""))
    assert re.search(r"--object_gate +a class with too little evidence .* \[True\]", shown)
    assert re.search(r"^Segmenting$", shown, re.MULTILINE) and "--max_epochs" in shown


def test_configs_are_written_in_one_style():
    """Steps of four spaces, and a newline at the end."""
    files = sorted(CONFIGS.rglob("*.json"))
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        assert text.endswith("}\n") and "\t" not in text, path
        indents = {len(line) - len(line.lstrip(" ")) for line in text.splitlines() if line.strip()}
        assert all(indent % 4 == 0 for indent in indents), path
