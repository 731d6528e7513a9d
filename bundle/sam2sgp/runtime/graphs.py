"""The network as three graphs of tensors, for export.

    encode    image ─ features                                                    (B)
    memory    features, masks ─ memory of support items                           (N, C)
    segment   features, selected memory, fitted regression ─ logits, box, scores  (B, C, K)

The letters are the axes of any length; the image size is fixed. What lies between the graphs stays in PyTorch, being
cheap or out of ONNX's reach: retrieval, and the support regression's linear systems, a few of 46 unknowns per class.
"""

from copy import deepcopy
from dataclasses import fields

import torch
from sam2.modeling.backbones.hieradet import Hiera
from torch import Tensor, nn

from sam2sgp.networks import SAM2SGP, ImageFeatures, SGPOutput, SupportMemory, merge_lora

Tensors = dict[str, Tensor]

# Axes of features (B, ...), of masks (N, C, ...) and of selected memory (B, C, K, ...).
BATCH, CLASSES, ITEMS = 0, 1, 2
MEMORY = "memory_"


def feature_tensors(features: ImageFeatures) -> Tensors:
    """Features by name, without the positional encoding, which is the same for every image."""
    fine, middle = features.high_res
    named = {"embedding": features.embedding, "fine": fine, "middle": middle}
    return _given({**named, "prior_key": features.prior_key, "pixels": features.pixels})


def features_of(tensors: Tensors, position: Tensor) -> ImageFeatures:
    """The reverse of `feature_tensors`, with the positional encoding (1, D, g, g)."""
    return ImageFeatures(
        tensors["embedding"],
        position.expand(tensors["embedding"].shape[0], -1, -1, -1),
        (tensors["fine"], tensors["middle"]),
        tensors.get("prior_key"),
        tensors.get("pixels"),
    )


def selected_tensors(support: SupportMemory, regression_weights: Tensor | None) -> Tensors:
    """What `SAM2SGP.decode` needs of selected memory (B, C, K), by name."""
    distance = support.distance
    if distance is None:
        distance = support.tokens.new_zeros(support.tokens.shape[:3], dtype=torch.int64)
    own = {MEMORY + name: getattr(support, name) for name in ("tokens", "prior_key", "prior_mask")}
    return _given({**own, "distance": distance, "regression_weights": regression_weights})


def _given(tensors: dict[str, Tensor | None]) -> Tensors:
    return {name: value for name, value in tensors.items() if value is not None}


class Stage(nn.Module):
    """A part of the network from named tensors to named tensors.

    Args:
        network: what `exportable` makes.
        sample: inputs to trace with, in order. No two axes that may vary are of one length, and none is of length 1.

    Attributes:
        sample: the inputs given. sample_outputs: what comes of them. inputs, outputs: names in order. dynamic: for
            each input the axes that may vary.
    """

    def __init__(self, network: SAM2SGP, sample: Tensors) -> None:
        super().__init__()
        self.network = network
        self.sample = sample
        self.inputs = tuple(sample)
        self.dynamic = [self.axes(name) for name in self.inputs]
        with torch.no_grad():
            # This also fills the caches of positional encodings, which tracing must not do.
            self.sample_outputs = self.compute(sample)
        self.outputs = tuple(self.sample_outputs)

    def compute(self, tensors: Tensors) -> Tensors:
        """The stage itself."""
        raise NotImplementedError

    @staticmethod
    def axes(name: str) -> tuple[int, ...]:
        """The axes of an input that may vary."""
        return (BATCH,)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.compute(dict(zip(self.inputs, tensors, strict=True))).values())


class EncodeStage(Stage):
    """Image (B, 3, S, S) -> features."""

    def compute(self, tensors: Tensors) -> Tensors:
        return feature_tensors(self.network.encode(tensors["image"]))


class MemoryStage(Stage):
    """Features of N support images and masks (N, C, S, S) -> memory of a pool."""

    @staticmethod
    def axes(name: str) -> tuple[int, ...]:
        return (BATCH, CLASSES) if name == "masks" else (BATCH,)

    def compute(self, tensors: Tensors) -> Tensors:
        # The memory encoder does not look at the finer levels.
        read = tensors["embedding"], None, None, tensors.get("prior_key"), tensors.get("pixels")
        features = ImageFeatures(*read)  # type: ignore[arg-type]
        memory = self.network.encode_support(features, tensors["masks"])
        return _given({MEMORY + field.name: getattr(memory, field.name) for field in fields(memory)})


class SegmentStage(Stage):
    """Features of B images and memory (B, C, K) -> `SGPOutput`."""

    @staticmethod
    def axes(name: str) -> tuple[int, ...]:
        if name == "regression_weights":
            return (BATCH, CLASSES)
        return (BATCH, CLASSES, ITEMS) if name.startswith(MEMORY) or name == "distance" else (BATCH,)

    def compute(self, tensors: Tensors) -> Tensors:
        network = self.network
        tokens, prior_key, prior_mask = (tensors.get(MEMORY + name) for name in ("tokens", "prior_key", "prior_mask"))
        output = network.decode(
            features_of(tensors, position_of(network)),
            SupportMemory(tokens, prior_key, prior_mask, None, None, tensors["distance"]),
            tensors.get("regression_weights"),
        )
        return {field.name: getattr(output, field.name) for field in fields(SGPOutput)}


def position_of(network: SAM2SGP) -> Tensor:
    """The positional encoding (1, D, g, g) of an image's features."""
    side = network.prompt_encoder.image_embedding_size
    neck = network.image_encoder.neck
    return neck.position_encoding(network.no_mem_embed.new_empty(1, neck.d_model, *side))


@torch.no_grad()
def stages(network: SAM2SGP) -> dict[str, Stage]:
    """The three stages of a network by name."""
    network = exportable(network)
    batch, classes, items, pool = 2, 3, 5, 3
    size = network.image_size
    image = torch.rand(pool, 3, size, size)
    masks = (torch.rand(pool, classes, size, size) > 0.5).float()
    encode = EncodeStage(network, {"image": image})
    features = encode.sample_outputs
    read = [name for name in ("embedding", "prior_key", "pixels") if name in features]
    memory = MemoryStage(network, {**{name: features[name] for name in read}, "masks": masks})
    pooled = SupportMemory(*(memory.sample_outputs.get(MEMORY + field.name) for field in fields(SupportMemory))).select(
        torch.randint(0, pool, (batch, classes, items))
    )
    selected = selected_tensors(pooled, network.fit_regression(pooled))
    segment = SegmentStage(network, {**{name: value[:batch] for name, value in features.items()}, **selected})
    return {"encode": encode, "memory": memory, "segment": segment}


def exportable(network: SAM2SGP) -> SAM2SGP:
    """A copy on the CPU that computes the same with operations which ONNX has, and fewer of them.

    LoRA is merged; q, k and v are one linear layer again.
    """
    copy = deepcopy(network).to("cpu").eval().requires_grad_(False)
    merge_lora(copy)
    trunk = copy.image_encoder.trunk
    for block in trunk.blocks if isinstance(trunk, Hiera) else ():
        parts = [getattr(block.attn.qkv, name) for name in "qkv"]
        fused = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts))
        fused.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        fused.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        block.attn.qkv = fused
    return copy
