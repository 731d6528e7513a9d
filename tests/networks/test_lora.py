"""LoRA covers q and v of every Hiera block, over their full width, and nothing else; it saves, loads and merges."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.networks import SAM2SGP, load_lora, load_weights, merge_lora, save_lora, save_weights

LORA = {"r": 4, "alpha": 8}

FRESH_PROCESS = """
import sys, torch
from sam2sgp.networks import SAM2SGP, load_lora, load_weights
network = SAM2SGP("nano", 64, lora={"r": 4, "alpha": 8}).eval()
load_weights(network, sys.argv[1])
load_lora(network.image_encoder.trunk, sys.argv[2])
with torch.inference_mode():
    torch.save(network.encode(torch.load(sys.argv[3], weights_only=True)).embedding, sys.argv[4])
"""


def adapters(network):
    return {name: p for name, p in network.image_encoder.trunk.named_parameters() if ".lora_" in name}


def train_adapters(network, seed=0):
    """Stand-in for training: random B, which starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(network).items():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05, generator=generator)


def embed(network, size):
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return network.eval().encode(image).embedding


@pytest.fixture
def trained():
    network = SAM2SGP("nano", 64, lora=LORA)
    train_adapters(network)
    return network


def test_lora_changes_q_and_v_of_every_block_over_their_full_width_and_never_k(tiny_checkpoint):
    network = SAM2SGP("tiny", 96, tiny_checkpoint, lora=LORA)
    train_adapters(network)
    original = torch.load(tiny_checkpoint, weights_only=True)["model"]
    merge_lora(network)
    blocks = network.image_encoder.trunk.blocks
    assert len(blocks) == 12
    assert sum(block.dim != block.dim_out for block in blocks) == 3
    for index, block in enumerate(blocks):
        fused = original[f"image_encoder.trunk.blocks.{index}.attn.qkv.weight"]
        qkv = block.attn.qkv
        assert fused.shape == (3 * block.dim_out, block.dim)
        delta = torch.cat([qkv.q.weight, qkv.k.weight, qkv.v.weight]).detach() - fused
        q, k, v = delta.split(block.dim_out)
        assert not k.any()
        for part in (q, v):
            assert part.any(0).all() and part.any(1).all()


def test_only_the_adapters_of_q_and_v_are_trained_in_the_trunk():
    network = SAM2SGP("tiny", 96, lora=LORA)
    trained = {name for name, p in network.image_encoder.trunk.named_parameters() if p.requires_grad}
    assert trained == {
        f"base_model.model.blocks.{block}.attn.qkv.{part}.lora_{matrix}.default.weight"
        for block in range(12)
        for part in "qv"
        for matrix in "AB"
    }


def test_gradients_reach_every_adapter():
    network = SAM2SGP("nano", 64, lora=LORA)
    train_adapters(network)
    network.encode(torch.rand(1, 3, 64, 64)).embedding.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters(network).values())


def test_untrained_lora_leaves_the_output_as_it_is(tiny_checkpoint):
    plain = embed(SAM2SGP("tiny", 96, tiny_checkpoint), 96)
    network = SAM2SGP("tiny", 96, tiny_checkpoint, lora=LORA)
    assert torch.equal(embed(network, 96), plain)
    train_adapters(network)
    assert (embed(network, 96) - plain).abs().max() > 1e-3


def test_merged_network_computes_the_same_and_is_built_as_without_lora(tiny_checkpoint):
    network = SAM2SGP("tiny", 96, tiny_checkpoint, lora=LORA)
    train_adapters(network)
    before = embed(network, 96)
    merge_lora(network)
    torch.testing.assert_close(embed(network, 96), before, rtol=0, atol=1e-5)
    plain = SAM2SGP("tiny", 96)
    assert type(network.image_encoder.trunk) is type(plain.image_encoder.trunk)
    plain.load_state_dict(network.state_dict())
    merge_lora(network)
    assert torch.equal(embed(network, 96), embed(plain, 96))


def test_adapters_survive_saving_and_loading_in_a_fresh_process(trained, tmp_path):
    expected = embed(trained, 64)
    base = SAM2SGP("nano", 64)
    save_lora(trained, tmp_path / "lora")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.save(image, tmp_path / "image.pt")
    merged = {k.replace(".base_layer", "").replace("base_model.model.", ""): v for k, v in trained.state_dict().items()}
    base.load_state_dict({k: v for k, v in merged.items() if ".lora_" not in k})
    save_weights(base, tmp_path / "base.pt")
    assert (embed(base, 64) - expected).abs().max() > 1e-3
    files = [str(tmp_path / name) for name in ("base.pt", "lora", "image.pt", "result.pt")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *files], check=True, env=environment)
    torch.testing.assert_close(torch.load(files[3], weights_only=True), expected, rtol=0, atol=1e-5)


def test_saved_adapter_is_peft_format_and_names_no_path(trained, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "notes.txt").write_text("kept")
    save_lora(trained, folder)
    train_adapters(trained, seed=2)
    save_lora(trained, folder)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["base_model_name_or_path"] is None
    other = SAM2SGP("nano", 64, lora=LORA)
    load_lora(other.image_encoder.trunk, folder)
    for name, value in adapters(trained).items():
        assert torch.equal(adapters(other)[name], value)


@pytest.mark.parametrize(
    ("backbone", "lora", "message"),
    [
        ("nano", {"r": 2, "alpha": 8}, r"r = 4, alpha = 8\).*lora_A"),
        ("nano", {"r": 4, "alpha": 16}, r"r = 4, alpha = 8\).*alpha, which is 16 here"),
        ("tiny", LORA, r"does not fit.*blocks\.10\."),
    ],
)
def test_adapter_of_another_network_is_an_error(trained, tmp_path, backbone, lora, message):
    save_lora(trained, tmp_path)
    with pytest.raises(WeightsError, match=message):
        load_lora(SAM2SGP(backbone, 64, lora=lora).image_encoder.trunk, tmp_path)


def test_half_an_adapter_is_an_error(trained, tmp_path):
    save_lora(trained, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="can't be read"):
        load_lora(trained.image_encoder.trunk, tmp_path)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors is missing"):
        load_lora(trained.image_encoder.trunk, tmp_path)


def test_saving_adapters_of_a_network_without_lora_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no LoRA adapters"):
        save_lora(SAM2SGP("nano", 64), tmp_path)


def test_weights_without_lora_start_a_network_with_lora(trained, tmp_path):
    base = SAM2SGP("nano", 64)
    save_weights(base, tmp_path / "base.pt")
    load_weights(trained, tmp_path / "base.pt")
    torch.testing.assert_close(embed(trained, 64), embed(base, 64), rtol=0, atol=1e-6)
    assert all(p.any() for name, p in adapters(trained).items() if ".lora_A." in name)


def test_weights_without_lora_are_still_checked_when_loaded_with_lora(trained, tmp_path):
    state = SAM2SGP("nano", 64).state_dict()
    del state["image_encoder.trunk.blocks.2.attn.qkv.q.weight"]
    torch.save(state, tmp_path / "base.pt")
    with pytest.raises(WeightsError, match=r"1 differences.*blocks\.2\.attn\.qkv\.q\.base_layer\.weight is missing"):
        load_weights(trained, tmp_path / "base.pt")


def test_whole_network_with_lora_survives_saving(trained, tmp_path):
    save_weights(trained, tmp_path / "model.pt")
    other = SAM2SGP("nano", 64, lora=LORA)
    load_weights(other, tmp_path / "model.pt")
    assert torch.equal(embed(other, 64), embed(trained, 64))
