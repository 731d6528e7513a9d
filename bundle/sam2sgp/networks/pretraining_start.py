"""What pre-training does with a network before its first step."""

from pathlib import Path

from torch import nn

from sam2sgp.networks.lite import LiteTrunk, load_imagenet
from sam2sgp.networks.sam2_sgp import SAM2SGP
from sam2sgp.networks.weights import load_weights


def start_pretraining(network: SAM2SGP, weights: str | Path | None, frozen_levels: int = 0) -> SAM2SGP:
    """Give a network, in place, the weights that its pre-training starts from, and return it.

    Args:
        weights: a file of `save_weights`; None: ImageNet's for the trunk of the lite backbone, all else at random.
        frozen_levels: of a lite trunk; if not 0, what computes its finest levels is not trained, and of the rest only
            the 1x1 convolutions: on a CPU, the gradients of the depthwise filters, 2 % of the weights, take half of the
            trunk's backward pass.
    """
    trunk = network.image_encoder.trunk
    if weights:
        load_weights(network, weights)
    elif isinstance(trunk, LiteTrunk):
        load_imagenet(trunk)
    if isinstance(trunk, LiteTrunk) and frozen_levels:
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.requires_grad_(False)
        for stage in trunk.stages(frozen_levels):
            stage.requires_grad_(False)
    return network


def parameter_groups(network: SAM2SGP, learning_rate: float, trunk_factor: float) -> list[dict]:
    """Trainable parameters for an optimiser.

    Args:
        trunk_factor: the rate of a lite trunk, which knows ImageNet, is `learning_rate` times this.
    """
    trunk = network.image_encoder.trunk
    own = {id(parameter) for parameter in trunk.parameters()} if isinstance(trunk, LiteTrunk) else set()
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
    lower = [p for p in trunk.parameters() if p.requires_grad and id(p) in own]
    groups = [{"params": rest, "lr": learning_rate}, {"params": lower, "lr": learning_rate * trunk_factor}]
    return [group for group in groups if group["params"]]
