"""Networks whose passes are done by exported graphs, on the CPU.

`GraphRuntime` makes of a network one with the same methods, which reads its weights' graphs from a folder. It is for
one thread at a time, as the inferer that holds it.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP, ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.runtime.export import checked_files, need
from sam2sgp.runtime.graphs import MEMORY, Tensors, feature_tensors, features_of, position_of, selected_tensors

Graph = Callable[[Tensors], Tensors]


def _onnxruntime(file: Path, threads: int) -> Graph:
    onnxruntime = need("onnxruntime", "runtime 'onnxruntime'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(tensors: Tensors) -> Tensors:
        return _tensors(names, session.run(names, _arrays(tensors)))

    return run


def _arrays(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: value.detach().contiguous().numpy() for name, value in tensors.items()}


def _tensors(names: list[str], arrays: list[np.ndarray]) -> Tensors:
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


RUNTIMES = {"onnxruntime": _onnxruntime}
EAGER = "eager"


class GraphNetwork(nn.Module):
    """A `SAM2SGP` whose methods for inference run graphs.

    Args:
        network: on the CPU; it does what is not in the graphs, and stays as it is.
        graphs: by stage.
        runtime: name of what runs them.
    """

    def __init__(self, network: SAM2SGP, graphs: dict[str, Graph], runtime: str) -> None:
        super().__init__()
        self.network = network
        self.graphs = graphs
        self.runtime = runtime
        self.backbone, self.image_size, self.normalization = network.backbone, network.image_size, network.normalization
        self.position = position_of(network)

    def encode(self, image: Tensor) -> ImageFeatures:
        """As `SAM2SGP.encode`."""
        self.network.check_size(image)
        return features_of(self.graphs["encode"]({"image": image.float()}), self.position)

    def retrieval_embedding(self, features: ImageFeatures) -> Tensor:
        """As `SAM2SGP.retrieval_embedding`."""
        return self.network.retrieval_embedding(features)

    def encode_support(self, features: ImageFeatures, masks: Tensor) -> SupportMemory:
        """As `SAM2SGP.encode_support`."""
        read = {name: value for name, value in feature_tensors(features).items() if name not in ("fine", "middle")}
        found = self.graphs["memory"]({**read, "masks": masks.float()})
        return SupportMemory(*(found.get(MEMORY + field.name) for field in fields(SupportMemory)))

    def segment(self, features: ImageFeatures, support: SupportMemory | None) -> SGPOutput:
        """As `SAM2SGP.segment`, which also does the case without support."""
        if support is None or support.tokens.shape[2] == 0:
            return self.network.segment(features, support)
        selected = selected_tensors(support, self.network.fit_regression(support))
        return SGPOutput(**self.graphs["segment"]({**feature_tensors(features), **selected}))


class GraphRuntime:
    """Runs networks by the graphs that `export_graphs` wrote.

    Args:
        name: "onnxruntime", the package that runs them; it must be installed.
        folder: of the graphs.
        precision: of the inferer; the graphs are "fp32".

    Raises:
        ConfigError: an unknown name, a package that is not installed, or another precision.
    """

    def __init__(self, name: str, folder: str | Path, precision: str = "fp32") -> None:
        if name not in RUNTIMES:
            raise ConfigError(f"runtime is {name!r}: expected one of {', '.join([EAGER, *RUNTIMES])}.")
        if precision != "fp32":
            raise ConfigError(f"precision is {precision!r}: runtime {name!r} computes only in fp32; set one of them.")
        need(name, f"runtime {name!r}")
        self.name = name
        self.folder = Path(folder)
        self.precision = precision
        self._made: GraphNetwork | None = None

    def forget(self) -> None:
        """Read the graphs again at the next call, because the network has changed."""
        self._made = None

    def __call__(self, network: SAM2SGP) -> GraphNetwork:
        """The network, run by graphs.

        Raises:
            ConfigError: it is not on the CPU.
            WeightsError: there are no graphs, damaged ones, or ones of another network.
        """
        if self._made is None or self._made.network is not network:
            device = next(network.parameters()).device
            if device.type != "cpu":
                raise ConfigError(
                    f"runtime {self.name!r} computes on the CPU, the network is on {device}: set `device` to "
                    f"`$torch.device('cpu')`, or `runtime` to {EAGER!r}."
                )
            files = checked_files(network, self.folder)
            threads = torch.get_num_threads()
            graphs = {stage: RUNTIMES[self.name](file, threads) for stage, file in files.items()}
            self._made = GraphNetwork(network, graphs, self.name).eval()
        return self._made
