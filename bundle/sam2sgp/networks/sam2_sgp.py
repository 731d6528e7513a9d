"""SAM2-SGP: SAM2 whose prompt is a support set (arXiv 2506.19658).

    image ─ FE ─ features ─┬─ PMG: memory attention over the support, prior, decoder ─ pseudo-mask ─┐
    support pairs ─ FE ─ memory encoder ─┘                                                          │
                           └─ PMA: box, attention guidance, dense prompt ─ second decoder ──────────┴─ logits

Everything that depends only on a support item (`encode_support`) or only on an image (`encode`) is a method of its
own, so that callers can cache it. Classes are a batch dimension from the support memory on: the encoder runs once per
image whatever their number.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam2sgp.errors import ConfigError
from sam2sgp.networks.backbones import Backbone, build_sam2, checkpoint_blocks
from sam2sgp.networks.backbones import backbone as backbone_definition
from sam2sgp.networks.checkpoints import load_sam2_checkpoint
from sam2sgp.networks.features import ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.networks.hiera import take_position_encoding
from sam2sgp.networks.lite import IMAGENET_MEAN as LITE_MEAN
from sam2sgp.networks.lite import IMAGENET_STD as LITE_STD
from sam2sgp.networks.lora import add_lora, split_qkv
from sam2sgp.networks.mask_decoder import GuidedMaskDecoder
from sam2sgp.networks.memory_attention import attend_to_memory, check_layout
from sam2sgp.networks.refinement import Refinement
from sam2sgp.networks.rows import for_each_class
from sam2sgp.networks.support_prior import SupportPrior
from sam2sgp.networks.support_regression import SupportRegression

MASK_LOGIT = 10.0
RETRIEVAL_GRID = 4
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORMALIZATION_EPS = 1e-3
PMG_DEFAULTS = {"prior": True, "regression": True}
PMA_DEFAULTS = {"box": True, "attention": True, "dense": False}


class SAM2SGP(nn.Module):
    """Support-set guided segmentation network.

    Args:
        backbone: "nano", "lite", "tiny", "small", "base_plus" or "large".
        image_size: side S of the square input, a multiple of 32.
        checkpoint: SAM 2.1 checkpoint to start from (strictly loaded), or None.
        freeze_encoder: keep image encoder and prompt encoder as they are, except for LoRA.
        lora: None or False for none, else the arguments of `add_lora`, e.g. {"r": 8, "alpha": 16}.
        pmg: pseudo-mask generation; switches `prior` and `regression` (which needs the prior).
        refinement: correct the final logits at the finest grid (`sam2sgp.networks.refinement`); needs the prior.
        pma: pseudo-mask attention; switches `box`, `attention`, `dense`. With all off there is no second decoder.
        memory_pool: side of the square of places whose memory tokens are averaged into one; 1 keeps all, as SAM2 does.
            None is the backbone's own.
        gradient_checkpointing: in training keep little of each image for the backward pass and compute the rest again,
            image by image and block by block: about a third more time, a fraction of the memory, the same gradients.

    Attributes:
        trunk_cache: in training, (normalised images, trunk) -> the trunk's levels, instead of calling the trunk; only
            for a trunk that is not trained, see `sam2sgp.engines.CachedFeatures`. None: none.

    Raises:
        ConfigError: an unknown backbone or switch, or an impossible size or pool.
        WeightsError: the checkpoint does not fit.

    Example:
        >>> net = SAM2SGP("nano", image_size=64).eval()
        >>> image, mask = torch.rand(2, 3, 64, 64), torch.ones(5, 1, 64, 64)
        >>> net(image, support_image=torch.rand(5, 3, 64, 64), support_label=mask).shape
        torch.Size([2, 1, 64, 64])
    """

    def __init__(
        self,
        backbone: str,
        image_size: int,
        checkpoint: str | Path | None = None,
        freeze_encoder: bool = False,
        lora: dict | Literal[False] | None = None,
        pmg: dict | None = None,
        pma: dict | None = None,
        refinement: bool = True,
        memory_pool: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        definition = backbone_definition(backbone)
        pmg = _settings("pmg", PMG_DEFAULTS, pmg)
        pma = _settings("pma", PMA_DEFAULTS, pma)
        self.backbone = backbone
        self.image_size = image_size
        self.gradient_checkpointing = gradient_checkpointing
        self.trunk_cache: Callable[[Tensor, nn.Module], list[Tensor]] | None = None
        self.uses_box, self.uses_attention, self.uses_dense = pma["box"], pma["attention"], pma["dense"]
        has_pma = any(pma.values())
        self.normalization = definition.normalization

        sam2 = build_sam2(backbone, image_size)
        self.memory_pool = _pool_size(memory_pool or definition.memory_pool, image_size // sam2.backbone_stride)
        if checkpoint is not None:
            load_sam2_checkpoint(sam2, checkpoint, backbone)
        self.image_encoder = sam2.image_encoder
        split_qkv(self.image_encoder.trunk)
        self.position_encoding = take_position_encoding(self.image_encoder.neck)
        self.feature_norms = None
        if definition.feature_norm:
            norms = [nn.InstanceNorm2d(sam2.hidden_dim, affine=True) for _ in range(3)]
            self.feature_norms = nn.ModuleList(norms)
        self.prompt_encoder = sam2.sam_prompt_encoder
        self.memory_encoder = sam2.memory_encoder
        layers = self.memory_encoder.mask_downsampler.encoder
        self._mask_halvings = sum(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in layers)
        self.memory_attention = sam2.memory_attention
        check_layout(self.memory_attention)
        self._add_temporal_encodings(sam2.maskmem_tpos_enc.detach(), definition.checkpoint is not None)
        self.no_mem_embed = nn.Parameter(sam2.no_mem_embed.detach().clone(), requires_grad=False)
        self.no_obj_embed = nn.Parameter(sam2.no_obj_embed_spatial.detach().clone(), requires_grad=False)
        second = deepcopy(sam2.sam_mask_decoder)
        self.pmg_decoder = GuidedMaskDecoder(sam2.sam_mask_decoder, guided=False, scores=not has_pma)
        self.pma_decoder = GuidedMaskDecoder(second, guided=self.uses_attention, scores=True) if has_pma else None
        self.prior: SupportPrior | None = None
        self.regression: SupportRegression | None = None
        self.refinement: Refinement | None = None
        self.regression_on_trunk = definition.regression_on_trunk
        if pmg["prior"]:
            self._add_prior(definition, sam2.hidden_dim, pmg["regression"], refinement)
        self._freeze(freeze_encoder)
        if lora:
            self.image_encoder.trunk = add_lora(self.image_encoder.trunk, **lora)
        if gradient_checkpointing:
            checkpoint_blocks(self.image_encoder.trunk)

    def _add_temporal_encodings(self, of_sam2: Tensor, pretrained: bool) -> None:
        """Add those of support items, and of slices of the query's own volume, from SAM2's (frames, 1, 1, M)."""
        # Support items are to the query what SAM2's conditioning frames are: temporal encoding number zero.
        self.memory_tpos = nn.Parameter(of_sam2[-1, 0, 0].clone())
        # Slices of the same volume have, by their distance, those of SAM2's earlier frames. Where these are not
        # trained, such a slice starts as a support item.
        earlier = of_sam2[:-1, 0, 0] if pretrained else self.memory_tpos.detach().expand_as(of_sam2[:-1, 0, 0])
        self.frame_tpos = nn.Parameter(earlier.clone())

    def _add_prior(self, definition: Backbone, width: int, regression: bool, refinement: bool) -> None:
        """The support prior, and what builds on it, for features of this width."""
        pretrained = definition.checkpoint is not None
        self.prior = SupportPrior(width, definition.prior_levels, definition.prior_dim, pretrained, regression)
        if regression:
            on_trunk = self.regression_on_trunk
            widths = self.image_encoder.trunk.channel_list if on_trunk else [width] * 3
            self.regression = SupportRegression(widths, definition.regression_dim, normalize=on_trunk)
        if refinement:
            self.refinement = Refinement(width, self.prior.map_count)

    def _freeze(self, freeze_encoder: bool) -> None:
        """Leave `requires_grad` only on what a training step reaches."""
        self.image_encoder.requires_grad_(not freeze_encoder)
        self.prompt_encoder.requires_grad_(False)
        if not freeze_encoder:
            used = [self.prompt_encoder.not_a_point_embed, self.prompt_encoder.no_mask_embed]
            if self.uses_box:
                used += self.prompt_encoder.point_embeddings[2:]
            if self.uses_dense:
                used.append(self.prompt_encoder.mask_downscaling)
            for module in used:
                module.requires_grad_(True)

    def encode(self, image: Tensor) -> ImageFeatures:
        """Features of images (B, 3, S, S) in [0, 1]. Raises `ConfigError` for another size."""
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, self.image_size, self.image_size):
            raise ConfigError(
                f"The network expects images (B, 3, {self.image_size}, {self.image_size}), found "
                f"{tuple(image.shape)}; resize them, or set `image_size`."
            )
        trunk_levels, levels, position = self._encoded(self.normalize(image))
        if self.feature_norms is not None:
            levels = [norm(level) for norm, level in zip(self.feature_norms, levels, strict=True)]
        fine, middle, embedding = levels
        levels = [embedding, middle, fine]
        key = None if self.prior is None else self.prior.keys(levels)
        pixels = None
        if self.regression is not None:
            pixels = self.regression.features(trunk_levels if self.regression_on_trunk else levels)
        return ImageFeatures(embedding, position, self._projected(fine, middle), key, pixels)

    @property
    def _readers(self) -> dict[str, nn.Module]:
        """What reads the finer levels."""
        parts = {"pmg": self.pmg_decoder, "pma": self.pma_decoder, "refinement": self.refinement}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def _skip_layers(self) -> list[tuple[nn.Conv2d, ...]]:
        """For the finest level and the next one, the projections of all readers."""
        return list(zip(*(part.skip_layers for part in self._readers.values()), strict=True))

    def _projected(self, *levels: Tensor) -> tuple[Tensor, ...]:
        """The finer levels as `ImageFeatures.high_res`: once per image, and fewer numbers to keep than the levels."""
        found = []
        for level, layers in zip(levels, self._skip_layers, strict=True):
            weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
            found.append(F.conv2d(level, weight, bias))
        return tuple(found)

    def _share(self, high_res: tuple[Tensor, Tensor], reader: str) -> tuple[Tensor, Tensor]:
        """One reader's channels of `ImageFeatures.high_res`."""
        number = list(self._readers).index(reader)
        widths = ([layer.out_channels for layer in layers] for layers in self._skip_layers)
        fine, middle = (level.split(parts, 1)[number] for level, parts in zip(high_res, widths, strict=True))
        return fine, middle

    def _encoded(self, image: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The trunk's levels of normalised images, the coarsest first; the neck's three, the finest first; and the
        position of the coarsest of these."""
        encoder = self.image_encoder
        if self.trunk_cache is not None and self.training:
            trunk_levels = self.trunk_cache(image, encoder.trunk)
        else:
            trunk_levels = encoder.trunk(image)
        levels, _ = encoder.neck(trunk_levels)
        last = len(levels) - encoder.scalp
        embedding = levels[last - 1]
        position = self.position_encoding(embedding).to(embedding.dtype)
        return trunk_levels[::-1], levels[last - 3 : last], position

    def normalize(self, image: Tensor) -> Tensor:
        """Images in [0, 1] as the trunk expects them."""
        if self.normalization == "imagenet":
            mean, std = (image.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
            return (image - mean) / std
        if self.normalization == "lite":
            return (image - LITE_MEAN) / LITE_STD
        std, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (std + NORMALIZATION_EPS)

    def retrieval_embedding(self, features: ImageFeatures) -> Tensor:
        """L2-normalised embedding (B, 16 D) pooled on a 4x4 grid; cosine similarity is the inner product."""
        pooled = F.adaptive_avg_pool2d(features.embedding.float(), RETRIEVAL_GRID)
        return F.normalize(pooled.flatten(1), dim=1)

    def encode_support(self, features: ImageFeatures, masks: Tensor) -> SupportMemory:
        """Memory of N support images with one binary mask per class.

        Args:
            features: of the N support images.
            masks: (N, C, S, S) in {0, 1}; encoded as SAM2 encodes given masks, as -10 and +10 logits.
        """
        count, classes = masks.shape[:2]
        flat = masks.reshape(-1, 1, *masks.shape[-2:]).to(features.embedding.dtype)
        size = 2**self._mask_halvings * features.embedding.shape[-1]
        logits = (2 * F.adaptive_avg_pool2d(flat, size) - 1) * MASK_LOGIT
        image = for_each_class(features.embedding, classes)
        tokens = self.memory_encoder(image, logits, skip_mask_sigmoid=True)["vision_features"]
        absent = (flat.flatten(1).amax(1) <= 0).to(tokens.dtype)[:, None, None, None]
        tokens = F.avg_pool2d(tokens + absent * self.no_obj_embed[..., None, None], self.memory_pool)
        tokens = tokens.reshape(count, classes, tokens.shape[1], -1)
        if self.prior is None:
            return SupportMemory(tokens, None, None, None, None)
        side = 4 * features.embedding.shape[-1]
        fine = F.adaptive_avg_pool2d(masks.float(), side).flatten(2)
        key = self.prior.support_keys(features.prior_key)
        if self.regression is None:
            return SupportMemory(tokens, key, fine, None, None)
        return SupportMemory(tokens, key, fine, *self.regression.gram(features.pixels, fine))

    def segment(self, features: ImageFeatures, support: SupportMemory | None) -> SGPOutput:
        """Segment encoded images with the support selected for each.

        Args:
            features: of B query images.
            support: memory with leading dimensions (B, C, K); None, or K = 0, is SAM2's path without memory (C = 1).
        """
        if support is not None and support.tokens.shape[2] == 0:
            support = None
        batch = len(features)
        classes = 1 if support is None else support.tokens.shape[1]
        conditioned = self._condition(features, support, classes)
        maps = self._support_maps(features, support)
        dense = self._no_mask(conditioned.shape[-1]).expand(len(conditioned), -1, -1, -1)
        if self.prior is not None and maps is not None:
            dense = dense + self.prior.dense(maps, conditioned.shape[-1])
        sparse = self._sparse(None, len(conditioned))
        position = self.prompt_encoder.get_dense_pe()
        high_res = self._share(features.high_res, "pmg")
        pseudo, iou, score = self.pmg_decoder(conditioned, position, sparse, dense, high_res)
        if self.prior is not None and maps is not None:
            pseudo = pseudo + self.prior.logits(maps)
        box = self.box(pseudo)
        logits = pseudo
        if self.pma_decoder is not None:
            logits, iou, score = self.guide(conditioned, dense, features.high_res, pseudo, box)
        if self.refinement is not None and maps is not None:
            fine, middle = self._share(features.high_res, "refinement")
            logits = logits + self.refinement([conditioned, middle, fine], maps, pseudo, logits)

        def per_class(values: Tensor) -> Tensor:
            return values.reshape(batch, classes, *values.shape[1:])

        def enlarge(values: Tensor) -> Tensor:
            size = (self.image_size, self.image_size)
            return per_class(F.interpolate(values.float(), size=size, mode="bilinear", align_corners=False)[:, 0])

        return SGPOutput(enlarge(logits), enlarge(pseudo), per_class(box), per_class(iou), per_class(score))

    def guide(
        self, conditioned: Tensor, dense: Tensor, high_res: tuple[Tensor, Tensor], pseudo: Tensor, box: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """PMA: what the second decoder, which must be there, makes of a pseudo-mask.

        Args:
            conditioned: (N, D, g, g) memory-conditioned embedding. dense: (N, D, g, g) dense prompt of the PMG.
            high_res: see `ImageFeatures`.
            pseudo: (N, 1, 4g, 4g) pseudo-mask logits. box: (N, 4) its box, see `SGPOutput`.

        Returns:
            Final logits (N, 1, 4g, 4g), the pseudo logits with the decoder's correction added; predicted IoU (N,);
            object score logits (N,).
        """
        assert self.pma_decoder is not None
        side = conditioned.shape[-1]
        guidance = F.adaptive_avg_pool2d(pseudo.sigmoid(), side)
        sparse = self._sparse(box if self.uses_box else None, len(conditioned))
        if self.uses_dense:
            dense = dense - self._no_mask(dense.shape[-1])
            dense = dense + self.prompt_encoder.mask_downscaling(pseudo.clamp(-MASK_LOGIT, MASK_LOGIT))
        position = self.prompt_encoder.get_dense_pe()
        high_res = self._share(high_res, "pma")
        correction, iou, score = self.pma_decoder(conditioned, position, sparse, dense, high_res, guidance)
        return pseudo + correction, iou, score

    def forward(
        self,
        image: Tensor,
        support_image: Tensor | None = None,
        support_label: Tensor | None = None,
        support_index: Tensor | None = None,
        frame_index: Tensor | None = None,
        frame_distance: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Segment images guided by support pairs.

        Args:
            image: (B, 3, S, S) query images in [0, 1].
            support_image: (N, 3, S, S) pool shared by all queries, or (B, K, 3, S, S) with K items of each query's
                own. None with `support_label` given: the batch is its own pool (training episodes).
            support_label: (N, C, S, S), or (B, K, C, S, S), binary masks in {0, 1}. None: no support, C = 1.
            support_index: (B, C, K) which pool items each query and class uses; None: the whole pool, or own items.
            frame_index: (B, F) which of the images are slices of the query's own volume that guide it: what the network
                makes of them with only their support enters the query's memory. A row without any is -1 throughout.
                Needs a support.
            frame_distance: (B, F) how many slices away they are, from 1.

        Returns:
            Logits (B, C, S, S) in evaluation; in training a dict of `SGPOutput`'s fields for the loss.
        """
        features = self._encode_all(image)
        support = None
        if support_label is not None:
            support_label, support_index = self._pool(support_label, support_index, len(image))
            pool = features if support_image is None else self._encode_all(support_image.flatten(0, -4))
            support = self.encode_support(pool, support_label).select(support_index)
        if frame_index is None:
            output = self._segment_all(features, support)
        else:
            assert support is not None
            output = self._segment_clips(features, support, frame_index, frame_distance)
        if self.training:
            return {field.name: getattr(output, field.name) for field in fields(output)}
        return output.logits

    @property
    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _encode_all(self, image: Tensor) -> ImageFeatures:
        """`encode`; with checkpoints, image by image."""
        if not self._checkpoints:
            return self.encode(image)
        return ImageFeatures.concatenate([self.encode(one) for one in image.split(1)])

    def _segment_all(self, features: ImageFeatures, support: SupportMemory | None) -> SGPOutput:
        """`segment`; with checkpoints, image by image, of which the backward pass finds only the inputs."""
        if not self._checkpoints:
            return self.segment(features, support)
        parts = []
        for row in torch.arange(len(features), device=features.embedding.device).split(1):
            own = None if support is None else support.rows(row)
            parts.append(checkpoint(self.segment, features[row], own, use_reentrant=False))
        return SGPOutput.concatenate(parts)

    def _segment_clips(
        self, features: ImageFeatures, support: SupportMemory, index: Tensor, distance: Tensor
    ) -> SGPOutput:
        """`segment`, with other images of the batch as further memory where `index` names some."""
        of_clip = (index >= 0).any(1)
        singles, clips = (torch.nonzero(rows)[:, 0] for rows in (~of_clip, of_clip))
        parts, order = [], []
        if len(singles):
            parts.append(self._segment_all(features[singles], support.rows(singles)))
            order.append(singles)
        if len(clips):
            own, own_support = features[clips], support.rows(clips)
            with torch.no_grad():
                found = (self.segment(own, own_support).logits > 0).float()
            memory = self.encode_support(own, found)
            classes = found.shape[1]
            number = torch.full((len(features),), -1, device=index.device)
            number[clips] = torch.arange(len(clips), device=index.device)
            chosen = number[index[clips]][:, None].expand(-1, classes, -1)
            own_distance = distance[clips][:, None].expand(-1, classes, -1)
            frames = replace(memory.select(chosen), distance=own_distance, item=-1 - chosen)
            parts.append(self._segment_all(own, own_support.beside(frames)))
            order.append(clips)
        return SGPOutput.concatenate(parts).rows(torch.argsort(torch.cat(order)))

    @staticmethod
    def _pool(label: Tensor, index: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Support labels as one pool (N, C, S, S) with an index (B, C, K) into it."""
        classes = label.shape[-3]
        if label.ndim == 5:
            own = torch.arange(batch * label.shape[1], device=label.device).reshape(batch, 1, -1)
            return label.flatten(0, 1), own.expand(-1, classes, -1) if index is None else index
        if index is None:
            index = torch.arange(len(label), device=label.device).expand(batch, classes, -1)
        return label, index

    def _condition(self, features: ImageFeatures, support: SupportMemory | None, classes: int) -> Tensor:
        """Embedding of every image and class (B * C, D, g, g) after memory attention over its support."""
        if support is None:
            return for_each_class(features.embedding, classes) + self.no_mem_embed.reshape(1, -1, 1, 1)
        side = features.embedding.shape[-1]
        grid = torch.empty(1, support.tokens.shape[3], side, side, device=support.tokens.device)
        encoding = F.avg_pool2d(self.memory_encoder.position_encoding(grid), self.memory_pool).flatten(2)
        position = encoding.to(support.tokens.dtype) + self._temporal(support)
        return attend_to_memory(
            self.memory_attention, features.embedding, features.position, support.tokens, position, self.memory_pool
        )

    def _temporal(self, support: SupportMemory) -> Tensor:
        """Temporal encoding (B, C, K, M, 1) of each item; the farthest that SAM2 knows for what is farther."""
        table = torch.cat([self.memory_tpos[None], self.frame_tpos])
        distance = support.distance
        if distance is None:
            distance = torch.zeros(support.tokens.shape[:3], dtype=torch.int64, device=table.device)
        return table[distance.clamp(max=len(self.frame_tpos))][..., None]

    def _support_maps(self, features: ImageFeatures, support: SupportMemory | None) -> Tensor | None:
        """What the support says at the finest grid, (B * C, M, 4g, 4g); None without support or prior."""
        if self.prior is None or support is None or support.prior_mask is None:
            return None
        match = self.prior(features.prior_key, support.prior_key, support.prior_mask, support.item)
        match = _square(match.flatten(0, 1)[:, None])
        position = _square(support.prior_mask.mean(2).flatten(0, 1)[:, None])
        scores = None
        if self.regression is not None:
            with torch.autocast(match.device.type, enabled=False):
                scores = self.regression(features.pixels, support.gram, support.gram_foreground)
            scores = _square(scores.flatten(0, 1))
        return self.prior.maps(match, position, scores)

    def _no_mask(self, side: int) -> Tensor:
        return self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(-1, -1, side, side)

    def _sparse(self, box: Tensor | None, rows: int) -> Tensor:
        """Prompt tokens of a box (N, 4), SAM2's empty point where there is none."""
        device = self.no_mem_embed.device
        if box is None:
            corners = torch.zeros(rows, 1, 2, device=device)
            labels = -torch.ones(rows, 1, dtype=torch.int32, device=device)
        else:
            corners = box.reshape(rows, 2, 2)
            labels = torch.tensor([[2, 3]], device=device).expand(rows, 2)
            labels = torch.where(box[:, :1] < 0, -1, labels)
        return self.prompt_encoder(points=(corners, labels), boxes=None, masks=None)[0]

    def box(self, pseudo: Tensor) -> Tensor:
        """Tight box (N, 4) in network pixels around p > 0.5 of pseudo-mask logits (N, 1, 4g, 4g); -1 if empty."""
        mask = pseudo[:, 0] > 0
        scale = self.image_size / mask.shape[-1]
        edges = []
        for axis in (1, 2):
            line = mask.any(axis).to(torch.uint8)
            edges.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
        (x0, x1), (y0, y1) = edges
        box = torch.stack([x0, y0, x1, y1], 1).float() * scale
        return torch.where(mask.flatten(1).any(1)[:, None], box, -1.0)


def _square(values: Tensor) -> Tensor:
    """(N, M, P) on a square grid -> (N, M, p, p)."""
    side = round(values.shape[-1] ** 0.5)
    return values.unflatten(-1, (side, side))


def _pool_size(pool: int, side: int) -> int:
    if isinstance(pool, bool) or not isinstance(pool, int) or pool < 1 or side % pool:
        raise ConfigError(
            f"memory_pool is {pool!r}: expected a number of places that divides the {side} along the memory's side."
        )
    return pool


def _settings(name: str, defaults: dict, given: dict | None) -> dict:
    unknown = sorted(set(given or {}) - set(defaults))
    if unknown:
        raise ConfigError(f"Unknown setting {name}.{unknown[0]}: expected one of {', '.join(defaults)}.")
    for key, value in (given or {}).items():
        if isinstance(defaults[key], bool) and not isinstance(value, bool):
            raise ConfigError(
                f"{name}.{key} is {value!r}: expected True or False, with a capital letter on a command line."
            )
    return {**defaults, **(given or {})}
