"""The number format that a network computes in, as autocast."""

import torch

from sam2sgp.errors import ConfigError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Autocast context of a precision: "fp32" (off), "bf16", or "fp16" (GPU only; raises `ConfigError` on a CPU)."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}.")
    if precision == "fp16" and device_type == "cpu":
        raise ConfigError("precision is 'fp16', which needs a GPU: use 'bf16' or 'fp32' on a CPU.")
    dtype = PRECISIONS[precision]
    return torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
