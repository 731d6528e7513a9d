"""The bundle as the Model Zoo asks for it: metadata, network format, required ids, and configs that agree."""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out
from monailabel.tasks.infer.bundle import BundleInferTask

from sam2sgp.errors import ConfigError, cause_of
from sam2sgp.networks import SAM2SGP, load_weights, save_weights
from tests.helpers.bundle_runs import BUNDLE, CONFIGS, SMALL, computing_with_one_thread, random_weights, run
from tests.helpers.pairs import write_set
from tests.helpers.torchrun import TORCHRUN, bundle_command, finish

BACKBONES = ["nano", "lite", "tiny", "small", "base_plus", "large"]

EVALUATION = {"model_file", "report_figures", "mirror", "evaluating"}
ADAPTATION = {"adapt_seconds", "adapt_steps", "adapt_seed", "adapt_dir", "adapter", "job"}
TASKS = {
    "synthetic_probability",
    "superpixel_probability",
    "threshold_probability",
    "label_operation_probability",
    "region_probability",
    "crop_probability",
}
REHEARSAL = TASKS | {f"train::dataset::{name}" for name in ("size", "fewest_patients", "shares")}
PRETRAINING = TASKS | {
    "held_out",
    "frozen_levels",
    "trunk_rate",
    "decay_steps",
    "total_steps",
    "prepared_size",
    "related",
    "collection_options",
    "val_episodes_per_group",
    "validate::prepare_batch",
}

TENSOR_KEYS = {
    "type": {"type": "string"},
    "format": {"type": "string"},
    "modality": {"type": "string"},
    "num_channels": {"type": "integer", "minimum": 1},
    "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
    "dtype": {"type": "string"},
    "value_range": {"type": "array"},
    "is_patch_data": {"type": "boolean"},
    "channel_def": {"type": "object"},
}
TENSORS = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {"type": "object", "required": list(TENSOR_KEYS), "properties": TENSOR_KEYS},
}
TEXT = {"type": "string", "minLength": 1}
VERSION = {"type": "string", "pattern": r"^\d+\.\d+\.\d+"}
# The rules of the bundle specification (mandatory keys and tensor format specifiers), as a JSON schema.
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "version": VERSION,
        "monai_version": VERSION,
        "pytorch_version": VERSION,
        "numpy_version": VERSION,
        "required_packages_version": {"type": "object", "additionalProperties": VERSION},
        "changelog": {"type": "object", "additionalProperties": TEXT},
        "task": TEXT,
        "description": TEXT,
        "authors": TEXT,
        "copyright": TEXT,
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
    "required": [
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
}


def config(name: str) -> dict:
    return json.loads((CONFIGS / name).read_text())


def test_metadata_fits_the_rules_of_the_bundle_specification(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    digest = hashlib.sha256(schema.read_bytes()).hexdigest()
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema), hash_val=digest, hash_type="sha256")


def test_metadata_versions_are_those_that_are_tested():
    exact = dict(
        line.split("==") for line in (BUNDLE.parent / "constraints.txt").read_text().splitlines() if "==" in line
    )
    metadata = config("metadata.json")
    assert metadata["pytorch_version"] == exact["torch"]
    assert metadata["monai_version"] == exact["monai"]
    assert metadata["numpy_version"] == exact["numpy"]
    for package, version in metadata["required_packages_version"].items():
        assert version == {name.lower(): value for name, value in exact.items()}[package], package
    needed = (BUNDLE.parent / "requirements-core.txt").read_text()
    names = {name.lower() for name in re.findall(r"^([A-Za-z][\w-]*)", needed, re.MULTILINE)}
    assert set(metadata["required_packages_version"]) == names - {"torch", "monai", "numpy"}


def test_the_inputs_of_the_metadata_are_arguments_of_the_network():
    inputs = config("metadata.json")["network_data_format"]["inputs"]
    assert list(inputs) == ["image", "support_image", "support_label"]
    assert set(inputs) <= set(inspect.signature(SAM2SGP.forward).parameters)


@pytest.mark.parametrize("name", ["train.json", "inference.json"])
def test_network_takes_and_gives_what_the_metadata_says(name):
    verify_net_in_out(
        net_id="network_def", meta_file=str(CONFIGS / "metadata.json"), config_file=str(CONFIGS / name), device="cpu"
    )


@pytest.mark.parametrize("name, kind", [("train.json", "training"), ("inference.json", "inference")])
def test_required_and_optional_properties_are_there(name, kind, phantoms, tmp_path):
    support, queries = phantoms / "support" / "rgb", phantoms / "queries" / "rgb"
    workflow = ConfigWorkflow(
        config_file=str(CONFIGS / name),
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=str(CONFIGS / "logging.conf"),
        workflow_type=kind,
        bundle_root=str(BUNDLE),
        dataset_dir=str(queries if kind == "inference" else phantoms),
        **({"support_dir": str(support)} if kind == "inference" else {}),
        output_dir=str(tmp_path),
        progress=False,
    )
    workflow.initialize()
    assert not workflow.check_properties()


@pytest.mark.parametrize("name, ids", [("train.json", ["training", "run"]), ("inference.json", ["inferring", "run"])])
def test_run_ids(name, ids):
    assert set(ids) <= set(config(name))


def test_inference_has_the_settings_of_training():
    """Both files state them because each must work by itself; they may not drift apart."""
    train, inference = config("train.json"), config("inference.json")
    own = {"dataset_dir", "support_dir", "support_max_items", "report_figures", "imports", "initialize", "run"}
    own |= {"network"}
    shared = (set(train) & set(inference)) - own
    assert {"backbone", "image_size", "pmg", "pma", "k", "ct_window", "slice_axis", "retrieval"} <= shared
    for key in shared - {"class_names", "support_data", "support_bank", "network_def"}:
        assert train[key] == inference[key], key
    of_training = {"checkpoint", "gradient_checkpointing"}
    network = {key: value for key, value in train["network_def"].items() if key not in of_training}
    assert network == inference["network_def"]


@pytest.mark.parametrize(
    "overlay",
    [
        *("evaluate.json", "export.json", "federated.json", "finetune.json", "multi_gpu_train.json", "pretrain.json"),
        *(f"backbones/{b}.json" for b in BACKBONES),
    ],
)
def test_overlays_only_set_ids_that_train_json_has_or_that_they_add_on_purpose(overlay):
    parser = ConfigParser(config("train.json"))
    added = {
        "evaluate.json": EVALUATION | ADAPTATION,
        "export.json": {"model_file", "export_file", "exporting"},
        "federated.json": {"federated_rounds", "post_weight_filters"},
        "finetune.json": {"model_file"} | REHEARSAL,
        "pretrain.json": PRETRAINING,
        "multi_gpu_train.json": {
            *("train::padded_steps", "validate::sampler", "validate::dataloader::sampler", "finalize"),
        },
    }.get(overlay, set())
    for key in config(overlay):
        assert key in added or key in parser, key


@pytest.mark.parametrize("name, base", [("inference", "inference"), ("evaluate", "train")])
def test_overlays_for_several_processes_set_ids_that_are_there_and_are_alike(name, base):
    overlay, parser = config(f"multi_gpu_{name}.json"), ConfigParser(config(f"{base}.json"))
    assert overlay.pop("finalize") and all(key in parser for key in overlay)
    other = config("multi_gpu_inference.json")
    assert {key: overlay[key] for key in other if key not in ("initialize", "finalize")}.items() <= other.items()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_overlay_names_its_backbone_and_a_possible_size(backbone):
    overlay = config(f"backbones/{backbone}.json")
    assert overlay["backbone"] == backbone
    assert overlay["image_size"] % 32 == 0
    assert (overlay["lora"] is None) == (backbone in ("nano", "lite"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=lambda path: path.stem)
def test_configs_are_written_in_one_style(path):
    text = path.read_text()
    assert text.endswith("}\n") and not re.search(r"[ \t]\n|\t", text)
    assert all(len(line) - len(line.lstrip()) in range(0, 40, 4) for line in text.splitlines())
    # Expressions stand one a line; plain values of a list stand together where they fit.
    lists = re.findall(r"^( *)(.*)\[\n([^\[\]{}$]*)\n *\]", text, re.MULTILINE)
    joined = [indent + before + "[" + " ".join(inner.split()) + "]," for indent, before, inner in lists]
    assert [line for line in joined if len(line) <= 120] == []


def test_every_switch_of_the_method_is_a_key_of_the_config():
    train = config("train.json")
    pma = ("pma::box", "pma::attention", "pma::dense")
    for switch in ("lora", "pmg::prior", "pmg::regression", *pma, "refinement", "region_below", "retrieval"):
        parser = ConfigParser(train)
        assert switch in parser
    parser = ConfigParser(train)
    parser["pma::box"] = False
    parser["pmg::prior"] = False
    network = parser.get_parsed_content("network_def")
    assert network.prior is None and network.uses_box is False and network.uses_attention is True


@pytest.mark.parametrize("overlay", [None, "pretrain.json"])
def test_what_a_training_starts_from_is_the_value_of_a_key_in_whatever_order_keys_are_read(overlay, tmp_path):
    save_weights(SAM2SGP("nano", 64), tmp_path / "start.pt")
    parser = ConfigParser(config("train.json"))
    parser.update(config(overlay) if overlay else {})
    settings = {"device": torch.device("cpu"), "backbone": "nano", "image_size": 64}
    parser.update({**settings, "weights": str(tmp_path / "start.pt")})
    saved = torch.load(tmp_path / "start.pt")
    averaged = parser.get_parsed_content("moving_average").module.state_dict()
    assert all(torch.equal(averaged[key], value) for key, value in saved.items())
    start = parser.get_parsed_content("start")
    assert start is parser.get_parsed_content("network") is parser.get_parsed_content("network_def")
    # Nor does any expression take a value only for having been made.
    text = "".join(path.read_text() for path in CONFIGS.rglob("*.json"))
    assert re.findall(r"\$@[\w:]+ and ", text) == []


def test_optimizer_gets_the_trainable_parameters_only():
    parser = ConfigParser(config("train.json"))
    parser["device"] = torch.device("cpu")
    parser["weights"] = None
    parser["freeze_encoder"] = True
    parser["lora"] = {"r": 2, "alpha": 4}
    optimizer = parser.get_parsed_content("optimizer")
    network = parser.get_parsed_content("network")
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in network.parameters() if p.requires_grad}
    assert not any(id(p) in in_optimizer for p in network.prompt_encoder.parameters())


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_monai_loads_the_network_with_the_embedded_weights():
    network = monai.bundle.load(name=BUNDLE.name, bundle_dir=str(BUNDLE.parent), workflow_type="inference")
    expected = SAM2SGP("lite", 256)
    load_weights(expected, BUNDLE / "models" / "model.pt")
    first, second = network.state_dict(), expected.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_a_workflow_takes_the_zoos_overrides_and_leaves_the_process_as_it_was(phantoms, tmp_path):
    hook = sys.excepthook
    pictures = sorted((phantoms / "queries" / "rgb").glob("*.png"))[:2]
    settings = {"output_dir": str(tmp_path / "out"), "progress": False, "image_size": 64, "report_figures": 0}
    settings |= {"model_file": str(random_weights(tmp_path / "random.pt")), "support_max_items": 6}
    workflow = monai.bundle.create_workflow(
        config_file=str(CONFIGS / "inference.json"),
        bundle_root=str(BUNDLE),
        workflow_type="infer",
        support_dir=str(phantoms / "support" / "rgb"),
        dataset_dir=str(phantoms / "queries" / "rgb"),
        **settings,
        **{"dataset#data": [{"image": str(path)} for path in pictures]},
    )
    workflow.run()
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {path.name for path in pictures}
    labelled = phantoms / "support" / "rgb"
    pairs = [
        {"image": str(path), "label": str(labelled / "labels" / path.name)}
        for path in sorted((labelled / "images").iterdir())
    ]
    workflow = monai.bundle.create_workflow(
        config_file=str(CONFIGS / "train.json"),
        bundle_root=str(BUNDLE),
        workflow_type="train",
        dataset_dir=str(phantoms),
        **{
            **SMALL,
            "max_epochs": 1,
            "val_interval": 9,
            "output_dir": str(tmp_path / "run"),
            "ckpt_dir": str(tmp_path / "kept"),
        },
        **{"train#dataset#data": pairs},
    )
    workflow.run()
    trainer = workflow.parser.get_parsed_content("train::trainer")
    assert 0 <= trainer.state.metrics["train_mean_dice"] <= 1
    assert [case["image"] for case in trainer.data_loader.dataset.data] == [pair["image"] for pair in pairs]
    assert (tmp_path / "kept" / "last.pt").is_file() and not (tmp_path / "run" / "last.pt").exists()
    assert sys.excepthook is hook


def test_monai_labels_generic_app_is_refused_in_a_sentence_when_it_starts(caplog):
    with pytest.raises(RuntimeError) as raised:
        BundleInferTask(str(BUNDLE), {})
    assert isinstance(cause_of(raised.value), ConfigError)
    assert "expected the app of this bundle, found the generic monaibundle app" in str(cause_of(raised.value))


def test_what_the_zoo_fetches_with_a_bundle_is_all_there_and_small():
    assert "Apache License" in (BUNDLE / "LICENSE").read_text()
    assert list(BUNDLE.glob("large_files*")) == []
    assert (BUNDLE / "models" / "large_files.yml").is_file()


def test_a_copy_of_the_bundle_runs_by_itself_from_another_folder(phantoms, tmp_path):
    copy, elsewhere = tmp_path / "copied", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(BUNDLE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "models", "eval"))
    torch.manual_seed(0)
    save_weights(SAM2SGP("lite", 64), copy / "models" / "model.pt")
    for picture in sorted((phantoms / "queries" / "rgb").glob("*.png"))[:2]:
        shutil.copy(picture, elsewhere)
    # Without the package of this environment.
    known = [str(copy), *(folder for folder in sys.path if folder.endswith("site-packages"))]
    command = [sys.executable, "-S", "-v", "-m", "monai.bundle", "run", "--bundle_root", str(copy)]
    command += ["--config_file", str(copy / "configs" / "inference.json")]
    settings = {"support_dir": phantoms / "support" / "rgb", "dataset_dir": "."}
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [*command, *words, "--image_size", "64"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(known)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(copy / "sam2sgp" / "networks" / "sam2_sgp.py") in done.stderr
    assert (copy / "eval" / "summary.csv").is_file() and (copy / "eval" / "report.html").is_file()


@pytest.mark.slow
def test_training_over_two_processes_has_the_gradients_of_one_that_accumulates(tmp_path):
    """Five episodes, two in a step and process: a whole step, and one with an episode for only one process."""
    torch.manual_seed(0)
    save_weights(SAM2SGP("lite", 64), tmp_path / "start.pt")
    data = write_set(tmp_path / "set", 8)
    settings = {**SMALL, "max_epochs": 1, "episodes_per_epoch": 5, "dataset_dir": str(data)}
    settings |= {"weights": str(tmp_path / "start.pt"), "warmup_steps": 0}
    # Of a plain gradient step, what the weights change by is the gradient; a short one, because rounding grows with it.
    settings["optimizer"] = {"_target_": "torch.optim.SGD", "params": "@trainable", "lr": 0.01}
    two, one = tmp_path / "two", tmp_path / "one"
    words = {key: value for key, value in settings.items() if key != "progress"}
    finish([*TORCHRUN, *bundle_command("training", "train.json", "multi_gpu_train.json", output_dir=two, **words)])
    with computing_with_one_thread():
        run("training", "train.json", output_dir=str(one), accumulation_steps=2, **settings)
    start = torch.load(tmp_path / "start.pt", weights_only=True)
    saved = [torch.load(folder / "last.pt", weights_only=True) for folder in (one, two)]
    assert [part["iteration"] for part in saved] == [3, 2]
    alone, shared = ({name: value - start[name] for name, value in part["network"].items()} for part in saved)
    total = torch.cat([value.flatten() for value in alone.values()]).norm()
    difference = torch.cat([(alone[name] - shared[name]).flatten() for name in alone]).norm()
    assert total > 1e-4 and difference < 1e-2 * total, f"{difference / total:.2e} of {total:.2e}"
    load_weights(SAM2SGP("lite", 64), two / "model.pt")
