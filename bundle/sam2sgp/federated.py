"""What MONAI's federated learning client needs beyond the training config: a filter of what a client sends.

`monai.fl.client.MonaiAlgo` sends a network's whole state. With a frozen encoder most of that is the same on every
client and never changes, so the filter keeps only the trained parameters; the receiving side of `MonaiAlgo` takes in
whatever part of the state it is given.
"""

from monai.fl.utils.exchange_object import ExchangeObject
from monai.fl.utils.filters import Filter
from torch import nn

from sam2sgp.errors import ConfigError


class TrainableWeights(Filter):
    """Keeps of the weights, or weight differences, that a client sends those of parameters in training.

    Args:
        network: built as the clients' networks are; only the names of what it trains are kept.

    Raises:
        ConfigError: the network trains nothing.
    """

    def __init__(self, network: nn.Module) -> None:
        self.names = frozenset(name for name, value in network.named_parameters() if value.requires_grad)
        if not self.names:
            raise ConfigError("The network trains no parameter, so there is nothing to send: change `freeze_encoder`.")

    def __call__(self, data: ExchangeObject, extra: dict | None = None) -> ExchangeObject:
        """The object given, with the other weights left out.

        Raises:
            ConfigError: the weights are not those of a network built alike.
        """
        absent = sorted(self.names - data.weights.keys())
        if absent:
            raise ConfigError(
                f"The filter of federated weights expected {absent[0]}, which the client's network does not have: give "
                "`config_filters_filename` the same list of configs as `config_train_filename`."
            )
        data.weights = {name: value for name, value in data.weights.items() if name in self.names}
        return data
