"""What passes between the steps of `SAM2SGP`: features of images, memory of support items, and the result.

All are batches of tensors whose rows can be taken and put together; nothing here computes.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class ImageFeatures:
    """What the encoder makes of B images; g is the side of the embedding's grid, D its width.

    Attributes:
        embedding: (B, D, g, g).
        position: its positional encoding, (B, D, g, g).
        high_res: what the decoders and the refinement read of the two finer FPN levels, (B, D', 4g, 4g) and
            (B, D'', 2g, 2g): the channels of each one's own projection, side by side.
        prior_key: (B, P, d) features for the support prior, or None where it is off.
        pixels: (B, 16 g^2, d') features for the support regression, or None where it is off.
    """

    embedding: Tensor
    position: Tensor
    high_res: tuple[Tensor, Tensor]
    prior_key: Tensor | None
    pixels: Tensor | None

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> "ImageFeatures":
        """Features of some of the images."""
        fine, middle = self.high_res
        key, pixels = (None if values is None else values[rows] for values in (self.prior_key, self.pixels))
        return ImageFeatures(self.embedding[rows], self.position[rows], (fine[rows], middle[rows]), key, pixels)

    @staticmethod
    def concatenate(parts: list["ImageFeatures"]) -> "ImageFeatures":
        """Features of the images of all parts."""
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(ImageFeatures)}
        fine, middle = zip(*columns.pop("high_res"), strict=True)
        joined = {name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}
        return ImageFeatures(high_res=(torch.cat(fine), torch.cat(middle)), **joined)


@dataclass
class SupportMemory:
    """What the network needs of support items; leading dimensions (N, C) for a pool, (B, C, K) once selected.

    Attributes:
        tokens: (..., M, T / memory_pool^2) memory tokens, T = g * g.
        prior_key: (..., T, d), without the class dimension in a pool; None where the prior is off.
        prior_mask: (..., 16 T) in [0, 1]; None where the prior is off.
        gram: (..., d', d'), without the class dimension in a pool; None where the regression is off.
        gram_foreground: (..., d', d'); None where the regression is off.
        distance: (B, C, K) int64, how many slices away an item is in the query's own volume, 0 for items of the support
            set; None: all are of the support set.
        item: (B, C, K) int64, which image an item is; where two numbers of a query are equal, so are `prior_key` and
            `gram`. Slices of the query's own volume have negative numbers. None: not known, or a pool.
    """

    tokens: Tensor
    prior_key: Tensor | None
    prior_mask: Tensor | None
    gram: Tensor | None
    gram_foreground: Tensor | None
    distance: Tensor | None = None
    item: Tensor | None = None

    def select(self, index: Tensor, classes: Tensor | None = None) -> "SupportMemory":
        """Pick K items per query and class from a pool of N.

        Args:
            index: (B, C, K) numbers of items; the result has these leading dimensions.
            classes: (C,) which of the pool's classes they are for; None: all, in order.
        """
        if classes is None:
            classes = torch.arange(index.shape[1], device=index.device)
        classes = classes[None, :, None]

        def of_item(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        def of_class(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index, classes]

        return SupportMemory(
            of_class(self.tokens),
            of_item(self.prior_key),
            of_class(self.prior_mask),
            of_item(self.gram),
            of_class(self.gram_foreground),
            item=index,
        )

    @staticmethod
    def concatenate(parts: list["SupportMemory"]) -> "SupportMemory":
        """One pool of several."""
        return SupportMemory._joined(parts, 0)

    def rows(self, rows: Tensor) -> "SupportMemory":
        """The memory of some of the queries (or, of a pool, some of its items)."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return SupportMemory(**{name: None if value is None else value[rows] for name, value in values})

    def beside(self, other: "SupportMemory") -> "SupportMemory":
        """Items of both, K + K' of them, for the same queries and classes."""
        return self._joined([part._with_distance() for part in (self, other)], 2)

    def _with_distance(self) -> "SupportMemory":
        if self.distance is not None:
            return self
        return replace(self, distance=self.tokens.new_zeros(self.tokens.shape[:3], dtype=torch.int64))

    @staticmethod
    def of_classes(parts: list["SupportMemory"]) -> "SupportMemory":
        """Memory (B, C, K) of classes of which each part holds some."""
        return SupportMemory._joined(parts, 1)

    @staticmethod
    def _joined(parts: list["SupportMemory"], dim: int) -> "SupportMemory":
        columns = ([getattr(part, field.name) for part in parts] for field in fields(SupportMemory))
        return SupportMemory(
            *(None if any(v is None for v in column) else torch.cat(column, dim) for column in columns)
        )

    def to(self, device: torch.device | str) -> "SupportMemory":
        """The same memory on another device."""
        values = (getattr(self, field.name) for field in fields(self))
        return SupportMemory(*(None if value is None else value.to(device) for value in values))


@dataclass
class SGPOutput:
    """Result for B images and C classes on the network's grid (S x S).

    logits, pseudo_logits: (B, C, S, S), foreground where > 0.
    box: (B, C, 4) as x0, y0, x1, y1 in pixels, x1 and y1 exclusive; all -1 where the pseudo-mask is empty.
    iou: (B, C) predicted IoU in [0, 1]. object_score: (B, C) logits, object present where > 0.
    """

    logits: Tensor
    pseudo_logits: Tensor
    box: Tensor
    iou: Tensor
    object_score: Tensor

    def rows(self, rows: slice | Tensor) -> "SGPOutput":
        """The result for some of the images."""
        return SGPOutput(*(getattr(self, field.name)[rows] for field in fields(SGPOutput)))

    @staticmethod
    def concatenate(parts: list["SGPOutput"]) -> "SGPOutput":
        """The result for the images of all parts."""
        return SGPOutput(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(SGPOutput)))
