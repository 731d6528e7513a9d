"""The mask decoder's attention is drawn to the pseudo-mask."""

import torch

from sam2sgp.networks.mask_decoder import _attend
from tests.helpers.small_network import network


def test_guidance_draws_attention_to_the_pseudo_mask(images):
    """A very strong bias makes the tokens attend to the pseudo-mask only: what is outside no longer matters."""
    net = network(pma={"box": False, "attention": True, "dense": False})
    net.pma_decoder.strength.data.fill_(1e4)
    features = net.encode(images)
    side = features.embedding.shape[-1]
    guidance = torch.zeros(5, 1, side, side)
    guidance[..., 2:4, 2:4] = 1
    attention = net.pma_decoder.decoder.transformer.layers[0].cross_attn_token_to_image
    tokens, keys = torch.rand(5, 6, 96), features.embedding.flatten(2).transpose(1, 2)
    bias = net.pma_decoder.strength[0] * guidance.flatten(1)[:, None, None]
    inside = guidance.flatten(1) > 0
    changed = torch.where(inside[..., None], keys, torch.rand_like(keys))
    with_bias = [_attend(attention, tokens, k, k, bias) for k in (keys, changed)]
    without = [_attend(attention, tokens, k, k, None) for k in (keys, changed)]
    torch.testing.assert_close(*with_bias)
    assert (without[0] - without[1]).abs().max() > 1e-3


def test_without_guidance_a_guided_decoder_gives_what_sam2s_own_gives(images):
    net = network()
    features = net.encode(images)
    position, sparse = net.prompt_encoder.get_dense_pe(), torch.rand(5, 2, features.embedding.shape[1])
    high_res = net._share(features.high_res, "pma")
    dense = torch.zeros_like(features.embedding)
    with torch.no_grad():
        mask, iou, score = net.pma_decoder(features.embedding, position, sparse, dense, high_res)
        masks, ious, _, scores = net.pma_decoder.decoder.predict_masks(
            features.embedding, position, sparse, dense, repeat_image=False, high_res_features=list(high_res)
        )
    torch.testing.assert_close(mask, masks[:, :1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou, ious[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score, scores[:, 0], atol=1e-4, rtol=1e-4)


def test_heads_that_are_never_run_are_not_trained():
    net = network()
    for decoder in (net.pmg_decoder, net.pma_decoder):
        trained = {name for name, parameter in decoder.decoder.named_parameters() if parameter.requires_grad}
        assert any(name.startswith("output_hypernetworks_mlps.0.") for name in trained)
        assert not any(name.startswith("output_hypernetworks_mlps.1.") for name in trained)
        assert any(name.startswith("iou_prediction_head.") for name in trained) == decoder.scores
