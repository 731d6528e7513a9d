"""Classes as a batch dimension: rows of images to rows of images and classes."""

from torch import Tensor


def for_each_class(values: Tensor, classes: int) -> Tensor:
    """Repeat each image's row for its classes, (B, ...) -> (B * C, ...), classes of an image adjacent.

    The same as `repeat_interleave`, which would copy where there is one class.
    """
    return values[:, None].expand(-1, classes, *values.shape[1:]).flatten(0, 1)
