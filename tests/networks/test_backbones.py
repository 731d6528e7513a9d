"""The backbones, and their equality with the `sam2` package's own model when all parts of SGP are off."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import normalize

from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP, build_sam2

PLAIN = {"pmg": {"prior": False}, "pma": {"box": False, "attention": False, "dense": False}}
BOX_ONLY = {"pmg": {"prior": False}, "pma": {"box": True, "attention": False, "dense": False}}


@pytest.fixture(scope="module")
def pair(tiny_checkpoint, sam2_reference):
    """Our network with a plain box-prompted second decoder, and the reference, at 128 px."""
    return SAM2SGP("tiny", 128, tiny_checkpoint, **BOX_ONLY, memory_pool=1).eval(), sam2_reference(128)


def images(count, size, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sam2_features(model, image):
    """SAM2's features of images in [0, 1], normalised as its predictors do."""
    return model.forward_image(normalize(image, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]))


def circles(size):
    """(2, 1, size, size): a disc, and an empty mask."""
    grid = torch.linspace(-1, 1, size)
    disc = ((grid[:, None] - 0.2) ** 2 + grid**2 < 0.3).float()
    return torch.stack([disc, torch.zeros(size, size)])[:, None]


def sam2_decode(model, embedding, high_res, points):
    """SAM2's single mask with its scores, before it overwrites masks of absent objects."""
    sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=None)
    mask, iou, _, score = model.sam_mask_decoder(
        image_embeddings=embedding,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
        repeat_image=False,
        high_res_features=high_res,
    )
    return mask, iou[:, 0], score[:, 0]


@pytest.mark.parametrize("size", [256, 512, pytest.param(1024, marks=pytest.mark.slow)])
@torch.inference_mode()
def test_features_and_logits_equal_sam2s_own_when_sgp_is_off(tiny_checkpoint, sam2_reference, size):
    model, network = sam2_reference(size), SAM2SGP("tiny", size, tiny_checkpoint, **PLAIN).eval()
    image = images(1, size)
    expected, found = sam2_features(model, image), network.encode(image)

    torch.testing.assert_close(found.embedding, expected["vision_features"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.embedding, expected["backbone_fpn"][-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.position, expected["vision_pos_enc"][-1], rtol=0, atol=1e-5)
    projected = network._share(found.high_res, "pmg")
    for ours, theirs in zip(projected, expected["backbone_fpn"][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert expected["vision_features"].std() > 0.01

    no_point = (torch.zeros(1, 1, 2), -torch.ones(1, 1, dtype=torch.int32))
    embedding = expected["vision_features"] + model.no_mem_embed.reshape(1, -1, 1, 1)
    mask, iou, score = sam2_decode(model, embedding, expected["backbone_fpn"][:2], no_point)
    output = network.segment(found, None)
    enlarged = F.interpolate(mask, (size, size), mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.logits, enlarged, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.pseudo_logits, output.logits)
    torch.testing.assert_close(output.iou[0], iou, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.object_score[0], score, rtol=0, atol=1e-5)


def sam2_memory(model, image, masks):
    """Tokens and positions that SAM2 makes of one image and given masks, as its `_use_mask_as_output` scales them."""
    out = sam2_features(model, image)
    features, sizes = model._prepare_backbone_features(out)[1::2]
    logits = masks * 20 - 10
    present = masks.flatten(1).any(1, keepdim=True).float() * 20 - 10
    features = [feature.expand(-1, len(masks), -1) for feature in features]
    return model._encode_new_memory(features, sizes, logits, present, is_mask_from_pts=True)


@torch.inference_mode()
def test_support_memory_equals_sam2s_memory_of_given_masks(pair, monkeypatch):
    network, model = pair
    monkeypatch.setattr(model, "binarize_mask_from_pts_for_mem_enc", True)
    image, masks = images(1, 128), circles(128)
    tokens, _ = sam2_memory(model, image, masks)
    memory = network.encode_support(network.encode(image), masks.transpose(0, 1))
    torch.testing.assert_close(memory.tokens[0], tokens.flatten(2), rtol=0, atol=1e-5)
    inverted = network.encode_support(network.encode(image), 1 - masks.transpose(0, 1))
    assert (inverted.tokens - memory.tokens).abs().max() > 0.1


@torch.inference_mode()
def test_memory_attention_over_support_equals_sam2s_over_conditioning_frames(pair, monkeypatch):
    network, model = pair
    monkeypatch.setattr(model, "binarize_mask_from_pts_for_mem_enc", True)
    monkeypatch.setattr(model, "use_obj_ptrs_in_encoder", False)
    query, support, mask = images(1, 128), images(2, 128, seed=1), circles(128)[:1]
    frames = {}
    for index, image in enumerate(support):
        tokens, position = sam2_memory(model, image[None], mask)
        frames[index] = {"maskmem_features": tokens, "maskmem_pos_enc": position}
    _, features, positions, sizes = model._prepare_backbone_features(sam2_features(model, query))
    expected = model._prepare_memory_conditioned_features(
        frame_idx=9,
        is_init_cond_frame=False,
        current_vision_feats=features[-1:],
        current_vision_pos_embeds=positions[-1:],
        feat_sizes=sizes[-1:],
        output_dict={"cond_frame_outputs": frames, "non_cond_frame_outputs": {}},
        num_frames=10,
    )
    memory = network.encode_support(network.encode(support), mask.expand(2, 1, -1, -1))
    found = network._condition(network.encode(query), memory.select(torch.tensor([[[0, 1]]])), classes=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_box_prompt_equals_sam2s_own(pair):
    network, model = pair
    image, box = images(1, 128), torch.tensor([[20.0, 30.0, 90.0, 100.0]])
    features = network.encode(image)
    pseudo = torch.zeros(1, 1, 32, 32)
    found = network.guide(features.embedding, network._no_mask(8), features.high_res, pseudo, box)
    out = sam2_features(model, image)
    points = (box.reshape(1, 2, 2), torch.tensor([[2, 3]], dtype=torch.int32))
    expected = sam2_decode(model, out["vision_features"], out["backbone_fpn"][:2], points)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    other = network.guide(features.embedding, network._no_mask(8), features.high_res, pseudo, box / 2)
    assert (other[0] - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("nano", 64),
        ("nano", 96),
        ("nano", 160),
        ("lite", 64),
        ("lite", 96),
        ("tiny", 96),
        ("small", 64),
        ("base_plus", 64),
        pytest.param("large", 64, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_every_backbone_takes_any_multiple_of_32(name, size):
    network = SAM2SGP(name, size).eval()
    mask = torch.zeros(2, 1, size, size)
    mask[:, :, size // 4 : size // 2] = 1
    logits = network(images(1, size), images(2, size, seed=1), mask)
    assert logits.shape == (1, 1, size, size)
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("size", [100, 0, -32])
def test_another_size_is_an_error(size):
    with pytest.raises(ConfigError, match=f"image_size is {size}: expected a positive multiple of 32"):
        build_sam2("nano", size)


def test_an_unknown_backbone_is_an_error():
    with pytest.raises(ConfigError, match="'huge'.*nano, lite, tiny, small, base_plus, large"):
        build_sam2("huge", 64)
