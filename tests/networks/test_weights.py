"""Weights are saved and loaded whole or not at all, and every error says what to change."""

from pathlib import Path

import pytest
import torch

from sam2sgp.errors import WeightsError
from sam2sgp.networks import (
    SAM2SGP,
    load_weights,
    save_weights,
)

NO_PMA = {"box": False, "attention": False, "dense": False}


@pytest.fixture(scope="module")
def nano_file(tmp_path_factory):
    torch.manual_seed(3)
    network = SAM2SGP("nano", 64)
    path = tmp_path_factory.mktemp("nano") / "model.pt"
    save_weights(network, path)
    return path


def test_saved_weights_load_at_any_image_size(nano_file, tmp_path):
    network = SAM2SGP("nano", 160)
    load_weights(network, nano_file)
    state = torch.load(nano_file, weights_only=True)
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("wrapper", ["model", "network"])
def test_half_precision_and_wrapped_weights_load(nano_file, tmp_path, wrapper):
    state = {key: value.half() for key, value in torch.load(nano_file, weights_only=True).items()}
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "half.pt")
    network = SAM2SGP("nano", 64)
    load_weights(network, tmp_path / "half.pt")
    for key, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].float())


def test_weights_are_saved_as_they_are(tmp_path):
    network = SAM2SGP("nano", 64).half()
    save_weights(network, tmp_path / "new" / "model.pt")
    state = torch.load(tmp_path / "new" / "model.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}


def test_failed_saving_keeps_the_old_file(nano_file, tmp_path, monkeypatch):
    def fails(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    target = tmp_path / "model.pt"
    target.write_bytes(nano_file.read_bytes())
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(WeightsError, match=r"model\.pt: can't be written \(No space left"):
        save_weights(SAM2SGP("nano", 64), target)
    assert target.read_bytes() == nano_file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    ("file", "network", "message"),
    [
        ({"backbone": "tiny"}, {}, r"backbone tiny, the network nano: use configs/backbones/tiny\.json"),
        (
            {"lora": {"r": 2, "alpha": 2}},
            {},
            r"LoRA of rank 2, the network no LoRA: set `lora` to rank 2, or merge it by `sam2sgp export --fine-tune`",
        ),
        ({"lora": {"r": 2, "alpha": 2}}, {"lora": {"r": 4, "alpha": 2}}, "LoRA of rank 2, the network LoRA of rank 4"),
        ({"pmg": {"prior": False}}, {}, "no support prior, unlike the network: set `pmg.prior` to false"),
        ({}, {"pmg": {"prior": False}}, "a support prior, unlike the network: set `pmg.prior` to true"),
        ({"pma": NO_PMA}, {}, r"no second decoder, the network one: switch `pma` .* all off"),
        ({}, {"pma": NO_PMA}, r"a second decoder, the network none: switch `pma` .* on"),
        ({"pma": {"attention": False}}, {}, "no attention guidance, unlike the network: set `pma.attention` to false"),
        ({}, {"pma": {"attention": False}}, "set `pma.attention` to true"),
    ],
)
def test_weights_of_other_settings_say_what_to_change(tmp_path, file, network, message):
    save_weights(SAM2SGP(**{"backbone": "nano", "image_size": 64} | file), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=message) as error:
        load_weights(SAM2SGP(**{"backbone": "nano", "image_size": 64} | network), tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in str(error.value)
    assert "the first: " in str(error.value)
    assert ("backbone" in str(error.value).split("The file has")[1]) == ("backbone" in file)


def test_a_checkpoint_is_recognised_where_network_weights_are_expected(tiny_checkpoint):
    with pytest.raises(
        WeightsError, match=r"SAM 2 checkpoint: give it as `checkpoint`, with configs/backbones/tiny\.json"
    ):
        load_weights(SAM2SGP("nano", 64), tiny_checkpoint)


@pytest.mark.parametrize("length", [0, 100, -100])
def test_a_truncated_file_is_an_error(nano_file, tmp_path, length):
    path = tmp_path / "model.pt"
    path.write_bytes(nano_file.read_bytes()[:length])
    with pytest.raises(WeightsError, match=r"model\.pt: can't be read as weights"):
        load_weights(SAM2SGP("nano", 64), path)


def test_files_without_weights_are_errors(tmp_path):
    network = SAM2SGP("nano", 64)
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(network, tmp_path / "model.pt")
    torch.save([torch.zeros(2)], tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="expected a state dict"):
        load_weights(network, tmp_path / "model.pt")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="can't be read"):
        load_weights(network, tmp_path / "model.safetensors")
