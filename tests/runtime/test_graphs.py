"""Exported graphs compute what the network does, and graphs of another network are refused."""

import importlib
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from PIL import Image

from sam2sgp.data.phantom import make_phantoms
from sam2sgp.errors import WeightsError, cause_of
from sam2sgp.networks import SAM2SGP, ImageFeatures, SGPOutput, SupportMemory, load_weights, save_weights
from sam2sgp.runtime import RUNTIMES, GraphRuntime
from sam2sgp.runtime.graphs import exportable, stages
from tests.helpers.bundle_runs import BUNDLE, run

SIZE = 64
LORA = {"r": 2, "alpha": 8}
FAST = {"k": 2, "slices_per_class": 1, "support_max_items": 6, "report_figures": 0, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(onnx|onnxscript)")


def settings(model: Path) -> dict:
    return {"model_file": str(model), "image_size": SIZE, "lora": LORA}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedded weights with LoRA that has an effect, and graphs of them next to the file."""
    torch.manual_seed(0)
    network = SAM2SGP("lite", SIZE, lora=LORA)
    load_weights(network, BUNDLE / "models" / "model.pt")
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    path = tmp_path_factory.mktemp("exported") / "model.pt"
    save_weights(network, path)
    run("exporting_onnx", "inference.json", **settings(path))
    return path


@pytest.fixture
def network(model) -> SAM2SGP:
    network = SAM2SGP("lite", SIZE, lora=LORA)
    load_weights(network, model)
    return network.eval()


def graphs(model: Path) -> Path:
    return model.with_suffix(".graphs")


def scene(network, batch: int, classes: int, items: int) -> tuple[ImageFeatures, SupportMemory]:
    """Features of queries, and of each the memory of some items, in which every other one is a slice of its volume."""
    generator = torch.Generator().manual_seed(batch)
    pool = network.encode(torch.rand(3, 3, SIZE, SIZE, generator=generator))
    masks = torch.zeros(3, classes, SIZE, SIZE)
    masks[:, :, 10:40, 20:50] = 1
    index = torch.randint(0, 3, (batch, classes, items), generator=generator)
    support = network.encode_support(pool, masks).select(index)
    distance = torch.arange(items).remainder(2).expand(batch, classes, items)
    return network.encode(torch.rand(batch, 3, SIZE, SIZE, generator=generator)), replace(support, distance=distance)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).abs().max()) <= 2e-4 * float(
        expected.abs().max() + 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@torch.no_grad()
def test_graphs_compute_what_the_network_does_for_any_numbers(model, network, runtime):
    exported = GraphRuntime(runtime, graphs(model))(network)
    for numbers in ((1, 1, 1), (2, 3, 5), (3, 1, 8), (1, 5, 2)):
        (features, support), (expected, memory) = scene(exported, *numbers), scene(network, *numbers)
        for name in ("embedding", "position", "prior_key", "pixels"):
            assert close(getattr(features, name), getattr(expected, name)), (numbers, name)
        assert all(close(*pair) for pair in zip(features.high_res, expected.high_res, strict=True))
        for field in fields(SupportMemory):
            assert close(getattr(support, field.name).float(), getattr(memory, field.name).float()), field.name
        output, reference = exported.segment(expected, memory), network.segment(expected, memory)
        for field in fields(SGPOutput):
            assert close(getattr(output, field.name), getattr(reference, field.name)), (numbers, field.name)
        assert close(exported.segment(expected, None).logits, network.segment(expected, None).logits)
        # Distances in the volume count, so equality above is not for want of reading them.
        plain = exported.segment(expected, replace(memory, distance=None)).logits
        assert numbers[2] == 1 or not torch.allclose(plain, output.logits, atol=1e-4)


@torch.no_grad()
def test_the_parts_of_every_network_are_graphs():
    """Whatever is switched off, stages put together are the network; in PyTorch, before any export."""
    switches = (
        {"pmg": {"prior": False}, "pma": {"box": False, "attention": False}},
        {"pmg": {"regression": False}, "pma": {"dense": True}},
        {"refinement": False},
        {"backbone": "lite", "lora": LORA},
    )
    for options in switches:
        torch.manual_seed(0)
        network = SAM2SGP(**{"backbone": "nano", "image_size": SIZE, **options}).eval()
        parts = stages(network)
        image, masks = torch.rand(4, 3, SIZE, SIZE), (torch.rand(4, 2, SIZE, SIZE) > 0.5).float()
        features = network.encode(image)
        support = network.encode_support(features, masks).select(torch.arange(4).expand(4, 2, -1))
        copy = exportable(network)
        assert close(copy.segment(copy.encode(image), support).logits, network.segment(features, support).logits)
        for stage in parts.values():
            again = stage(*stage.sample.values())
            assert len(again) == len(stage.outputs) == len(set(stage.outputs))
            assert not set(stage.inputs) & set(stage.outputs)


@pytest.mark.slow
def test_inference_by_graphs_gives_the_label_maps_of_pytorch(model, phantoms, tmp_path, monkeypatch):
    found = {}
    for look in ("rgb", "ct"):
        (tmp_path / look).mkdir()
        queries = sorted((phantoms / "queries" / look).iterdir())
        shutil.copy(queries[0], tmp_path / look)
    for runtime in ("eager", *RUNTIMES):
        for look in ("rgb", "ct"):
            folder = tmp_path / runtime / look
            with monkeypatch.context() as patch:
                if runtime != "eager":
                    patch.delattr(SAM2SGP, "encode")
                    patch.delattr(SAM2SGP, "encode_support")
                run(
                    "inferring",
                    "inference.json",
                    **settings(model),
                    **FAST,
                    runtime=runtime,
                    support_dir=str(phantoms / "support" / look),
                    dataset_dir=str(tmp_path / look),
                    output_dir=str(folder),
                )
            found[runtime, look] = [read(path) for path in sorted(folder.glob("*.[np]*g*"))]
    for (runtime, look), maps in found.items():
        expected = found["eager", look]
        assert len(maps) == len(expected) > 0
        values = sorted(set(np.unique(np.concatenate([map_.ravel() for map_ in expected]))) - {0})
        assert values
        for value in values:
            pair = (torch.from_numpy(np.concatenate([(m == value).ravel() for m in some])) for some in (maps, expected))
            dice = compute_dice(*(mask[None, None].float() for mask in pair))
            assert float(dice) >= 0.999, (runtime, look, value)


def read(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        return np.asarray(Image.open(path))
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.slow
def test_graphs_of_other_weights_or_settings_are_refused(model, network, tmp_path):
    runtime = GraphRuntime("onnxruntime", graphs(model))
    runtime(network)
    with torch.no_grad():
        network.memory_tpos.add_(1e-3)
    runtime.forget()
    with pytest.raises(WeightsError, match="other weights or settings; export them with .* exporting_onnx"):
        runtime(network)
    load_weights(network, model)
    network.uses_box = False
    with pytest.raises(WeightsError, match="other weights or settings"):
        runtime(network)

    network.uses_box = True
    torn = shutil.copytree(graphs(model), tmp_path / "torn.graphs")
    with open(torn / "segment.onnx", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(WeightsError, match="segment.onnx: expected the graph that graphs.json names"):
        GraphRuntime("onnxruntime", torn)(network)
    (torn / "graphs.json").write_text(json.dumps({"fingerprint": "?"}))
    with pytest.raises(WeightsError, match="graphs.json: can't be read"):
        GraphRuntime("onnxruntime", torn)(network)


def test_missing_graphs_say_how_to_make_them(phantoms, tmp_path):
    with pytest.raises(Exception) as raised:
        run(
            "inferring",
            "inference.json",
            runtime="onnxruntime",
            graphs_dir=str(tmp_path / "none"),
            support_dir=str(phantoms / "support" / "rgb"),
            dataset_dir=str(phantoms / "queries" / "rgb"),
            output_dir=str(tmp_path),
            **FAST,
        )
    message = str(cause_of(raised.value))
    assert isinstance(cause_of(raised.value), WeightsError)
    assert str(tmp_path / "none") in message and "exporting_onnx" in message


@pytest.mark.slow
def test_the_benchmark_measures_every_runtime(model, network, phantoms, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BUNDLE.parent / "benchmarks"))
    benchmark, tasks = (importlib.import_module(name) for name in ("export", "_tasks"))
    monkeypatch.setattr(benchmark, "build", lambda backbone, size: network)
    folder = shutil.copytree(graphs(model), tmp_path / "nano_64.graphs")
    names = [benchmark.EAGER, *RUNTIMES, benchmark.INT8]
    found = benchmark.times("nano:64:2", names, tmp_path, queries=2)
    for name, values in found.items():
        assert all(values[stage] > 0 for stage in benchmark.STAGES), name
        assert values["query"] > values["encode"] + values["segment"], name
    assert len(benchmark.time_table({"nano:64:2": found})) == 2 + len(names)

    make_phantoms(tmp_path / "data" / "pictures", 4, (64, 64), 6, seed=2, modalities=["us"], progress=False)
    task = tasks.make_tasks(tmp_path / "data", tmp_path / "tasks", queries=2)[:1]
    rows = benchmark.agreement(task, [benchmark.EAGER, "onnxruntime"], folder, tmp_path, settings(model))
    (row,) = rows.values()
    assert row["eager"] == 1 and row["onnxruntime"] >= 0.999 and 0 <= row["eager truth"] <= 1
    assert abs(row["onnxruntime truth"] - row["eager truth"]) < 0.01
