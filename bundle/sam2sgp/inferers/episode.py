"""The training step's forward pass, in the precision asked for."""

import torch
from monai.inferers import SimpleInferer

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


class EpisodeInferer(SimpleInferer):
    """Run the network on (E * G, 3, S, S) images under autocast; the loss is computed in float32 outside."""

    def __init__(self, precision: str = "fp32") -> None:
        super().__init__()
        self.precision = precision

    def __call__(self, inputs, network, *args, **kwargs):
        with autocast(inputs.device.type, self.precision):
            out = super().__call__(inputs, network, *args, **kwargs)
        return {key: value.float() for key, value in out.items()} if isinstance(out, dict) else out.float()
