"""Fine-tuning through the bundle: the overlay finetune.json on train.json."""

import json

import pytest
import torch
from monai.bundle import ConfigParser

from sam2sgp.episodes import PretrainingDataset
from sam2sgp.networks import SAM2SGP, load_weights, merge_lora
from tests.helpers.bundle_runs import BUNDLE, CONFIGS, SMALL, run

EMBEDDED = BUNDLE / "models" / "model.pt"


def test_finetuning_changes_adapters_and_heads_and_leaves_the_encoder_as_it_is(phantoms, tmp_path):
    settings = {key: value for key, value in SMALL.items() if key != "weights"}
    settings |= {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), "max_epochs": 1, "learning_rate": 1e-3}
    run("training", "train.json", "finetune.json", **settings)
    lora = json.loads((CONFIGS / "finetune.json").read_text())["lora"]

    before = SAM2SGP("lite", 64, lora=lora)
    load_weights(before, EMBEDDED)
    after = SAM2SGP("lite", 64, lora=lora)
    load_weights(after, tmp_path / "model.pt")
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    frozen = ("image_encoder.", "prompt_encoder.")
    assert {name for name in changed if name.startswith(frozen)} >= {
        name for name in before.state_dict() if ".lora_B." in name
    }
    assert all(".lora_" in name for name in changed if name.startswith(frozen))
    assert any(name.startswith("pmg_decoder.") for name in changed)
    assert any(name.startswith("refinement.") for name in changed)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == lora["r"]

    image, mask = torch.rand(2, 3, 64, 64), (torch.rand(2, 1, 64, 64) > 0.5).float()
    plain = SAM2SGP("lite", 64)
    with torch.no_grad():
        expected = after.eval()(image, support_image=image, support_label=mask)
        merge_lora(after)
        plain.load_state_dict(after.state_dict())
        assert torch.allclose(plain.eval()(image, support_image=image, support_label=mask), expected, atol=1e-3)


def test_finetuning_rehearses_tasks_of_pretraining_and_leaves_the_support_set_as_it_is(phantoms, tmp_path):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.json", "finetune.json")])
    parser.update({**SMALL, "dataset_dir": str(phantoms), "output_dir": str(tmp_path), "model_file": str(EMBEDDED)})
    data = parser.get_parsed_content("train::dataset")
    assert isinstance(data, PretrainingDataset) and data.fewest_patients == 2
    assert sum(data.share_of_kind[:3]) == pytest.approx(0.35) and data.shares.region_probability == 0.25
    side = parser.get_parsed_content("image_size")
    assert data[0]["image"].shape[-2:] == (side, side)
    assert parser.get_parsed_content("support_bank").items[0].image.shape[-2:] == (side, side)


def test_finetuning_repeats_no_value_of_train_json():
    overlay, train = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("finetune", "train"))
    assert [key for key, value in overlay.items() if key in train and train[key] == value] == []
