"""Graphs that can't be run are refused."""

from types import SimpleNamespace

import pytest

from sam2sgp.adaptation import SupportAdaptation
from sam2sgp.engines import adapted
from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP
from sam2sgp.runtime import RUNTIMES, GraphRuntime, export_graphs
from sam2sgp.runtime import export as export_module


def test_what_can_not_work_is_refused_with_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="runtime is 'tensorrt': expected one of eager, onnxruntime"):
        GraphRuntime("tensorrt", tmp_path)
    with pytest.raises(ConfigError, match="precision is 'bf16': runtime 'onnxruntime' computes only in fp32"):
        GraphRuntime("onnxruntime", tmp_path, "bf16")
    runtime, adapter = GraphRuntime("onnxruntime", tmp_path), SupportAdaptation(60, None, 0, None)
    with pytest.raises(ConfigError, match="leave `adapt_seconds`"):
        adapted(SimpleNamespace(runtime=runtime), None, adapter)
    with pytest.raises(ConfigError, match="computes on the CPU, the network is on meta"):
        runtime(SAM2SGP("nano", 64).to("meta"))

    def absent(package: str) -> None:
        raise ImportError(package)

    monkeypatch.setattr(export_module, "import_module", absent)
    for name in RUNTIMES:
        with pytest.raises(ConfigError, match=f"run `pip install {name}`"):
            GraphRuntime(name, tmp_path)
    with pytest.raises(ConfigError, match="run `pip install onnx`"):
        export_graphs(SAM2SGP("nano", 64), tmp_path)
    assert not any(tmp_path.iterdir())
