"""SAM2's mask decoder with guidance of its token-to-image attention by a pseudo-mask (paper section 3.4).

In: image embedding, prompts, the two finer FPN levels and, for guidance, a bias per image token.
Out: one mask's logits and, where asked for, SAM2's own scores of it.
"""

import torch
import torch.nn.functional as F
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

from sam2sgp.networks.rows import for_each_class


class GuidedMaskDecoder(nn.Module):
    """A mask decoder of SAM2 that accepts an additive attention bias and returns its single-mask output.

    Args:
        decoder: SAM2's mask decoder, whose layers and weights are used.
        guided: adds one learnable strength per attention layer.
        scores: whether the predicted IoU and the object score are computed (and their heads trained).
    """

    def __init__(self, decoder: MaskDecoder, guided: bool, scores: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.scores = scores
        layers = len(decoder.transformer.layers) + 1
        self.strength = nn.Parameter(torch.ones(layers)) if guided else None
        # The heads of SAM2's three ambiguity masks, and the scores where they are not asked for, are never run.
        for head in decoder.output_hypernetworks_mlps[1:]:
            head.requires_grad_(False)
        if not scores:
            decoder.iou_prediction_head.requires_grad_(False)
            decoder.pred_obj_score_head.requires_grad_(False)

    @property
    def skip_layers(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """Projections of the finest FPN level and the next one."""
        return self.decoder.conv_s0, self.decoder.conv_s1

    def forward(
        self,
        embedding: Tensor,
        position: Tensor,
        sparse: Tensor,
        dense: Tensor,
        high_res: tuple[Tensor, Tensor],
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Decode one mask per row.

        Args:
            embedding: (N, D, g, g) image embedding.
            position: (1, D, g, g) positional encoding of the prompt encoder.
            sparse: (N, P, D) prompt tokens.
            dense: (N, D, g, g) dense prompt, added to the embedding.
            high_res: FPN levels (B, D / 8, 4g, 4g) and (B, D / 4, 2g, 2g) after `skip_layers`, N a multiple of B (rows
                of one image adjacent).
            guidance: (N, 1, g, g) pseudo-mask probability in [0, 1]; ignored unless `guided`.

        Returns:
            Mask logits (N, 1, 4g, 4g); predicted IoU (N,) in [0, 1] and object score logits (N,), or None twice.
        """
        decoder = self.decoder
        rows, _, height, width = embedding.shape
        output_tokens = torch.cat(
            [decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight]
        )
        tokens = torch.cat([output_tokens.expand(rows, -1, -1), sparse], dim=1)
        biases: list[Tensor | None] = [None] * (len(decoder.transformer.layers) + 1)
        if self.strength is not None and guidance is not None:
            bias = guidance.flatten(1)[:, None, None, :]
            biases = [strength * bias for strength in self.strength]
        hidden, image = self._two_way(embedding + dense, position, tokens, biases)

        image = image.transpose(1, 2).reshape(rows, -1, height, width)
        up1, norm, act1, up2, act2 = decoder.output_upscaling
        fine, middle = high_res
        repeats = rows // fine.shape[0]
        image = act1(norm(up1(image) + for_each_class(middle, repeats)))
        image = act2(up2(image) + for_each_class(fine, repeats))
        weights = decoder.output_hypernetworks_mlps[0](hidden[:, 2])
        mask = torch.einsum("nc,nchw->nhw", weights, image)[:, None]
        if not self.scores:
            return mask, None, None
        return mask, decoder.iou_prediction_head(hidden[:, 1])[:, 0], decoder.pred_obj_score_head(hidden[:, 0])[:, 0]

    def _two_way(self, image: Tensor, position: Tensor, tokens: Tensor, biases: list[Tensor | None]):
        """SAM2's two-way transformer with a bias per layer: tokens (N, P, D) and image tokens (N, g*g, D)."""
        transformer = self.decoder.transformer
        keys = image.flatten(2).transpose(1, 2)
        key_pe = position.flatten(2).transpose(1, 2)
        queries = tokens
        for layer, bias in zip(transformer.layers, biases[:-1], strict=True):
            queries, keys = _guided_block(layer, queries, keys, tokens, key_pe, bias)
        attended = _attend(transformer.final_attn_token_to_image, queries + tokens, keys + key_pe, keys, biases[-1])
        return transformer.norm_final_attn(queries + attended), keys


def _guided_block(
    block: TwoWayAttentionBlock, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if block.skip_first_layer_pe:
        queries = block.self_attn(q=queries, k=queries, v=queries)
    else:
        located = queries + query_pe
        queries = queries + block.self_attn(q=located, k=located, v=queries)
    queries = block.norm1(queries)
    attended = _attend(block.cross_attn_token_to_image, queries + query_pe, keys + key_pe, keys, bias)
    queries = block.norm2(queries + attended)
    queries = block.norm3(queries + block.mlp(queries))
    attended = block.cross_attn_image_to_token(q=keys + key_pe, k=queries + query_pe, v=queries)
    return queries, block.norm4(keys + attended)


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention with a bias (N, 1, 1, keys) added to its logits, the same for every head and token."""
    if bias is None:
        return attention(q=q, k=k, v=v)
    query, key, value = (
        projection(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projection, x in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    return attention.out_proj(out.transpose(1, 2).flatten(2))
