"""The training step's forward pass, in the precision asked for."""

from monai.inferers import SimpleInferer

from sam2sgp.inferers.precision import autocast


class EpisodeInferer(SimpleInferer):
    """Run the network on (E * G, 3, S, S) images under autocast; the loss is computed in float32 outside."""

    def __init__(self, precision: str = "fp32") -> None:
        super().__init__()
        self.precision = precision

    def __call__(self, inputs, network, *args, **kwargs):
        with autocast(inputs.device.type, self.precision):
            out = super().__call__(inputs, network, *args, **kwargs)
        return {key: value.float() for key, value in out.items()} if isinstance(out, dict) else out.float()
