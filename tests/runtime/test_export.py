"""Graphs are found beside their weights, and only whole ones of the network in use are taken."""

import json

import pytest

from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.files import sha256_of
from sam2sgp.networks import SAM2SGP
from sam2sgp.runtime.export import MANIFEST, STAGES, checked_files, graphs_fingerprint, graphs_folder, need


def test_graphs_lie_next_to_their_weights():
    assert graphs_folder("models/model.pt") == "models/model.graphs"


def test_a_package_that_is_missing_is_named_with_the_remedy():
    assert need("json", "x") is json
    with pytest.raises(ConfigError, match="^The export needs the package 'no_such_package'.*`pip install no_such_pac"):
        need("no_such_package", "The export")


@pytest.fixture
def written(tmp_path):
    """A network, and a folder that says to hold its graphs."""
    network = SAM2SGP("nano", 64).eval()
    for name in STAGES:
        (tmp_path / f"{name}.onnx").write_text(name)
    hashes = {path.name: sha256_of(path) for path in tmp_path.iterdir()}
    manifest = {"fingerprint": graphs_fingerprint(network), "backbone": "nano", "image_size": 64, "sha256": hashes}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    return network, tmp_path


def test_whole_graphs_of_the_network_are_taken(written):
    network, folder = written
    assert checked_files(network, folder) == {name: folder / f"{name}.onnx" for name in STAGES}


def test_another_network_and_changed_or_missing_graphs_are_refused(written):
    network, folder = written
    network.uses_box = not network.uses_box
    with pytest.raises(WeightsError, match="found graphs of the nano network at 64 px with other weights or settings"):
        checked_files(network, folder)
    network.uses_box = not network.uses_box
    (folder / "memory.onnx").write_text("another")
    with pytest.raises(WeightsError, match="memory.onnx: expected the graph that graphs.json names"):
        checked_files(network, folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(WeightsError, match="expected the exported graphs of the network, found none"):
        checked_files(network, folder)
