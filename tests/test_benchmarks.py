"""The benchmarks' task maker, peers and scripts, on phantoms."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sam2sgp.data import load_datalist, read_image
from sam2sgp.data.phantom import make_phantoms
from sam2sgp.networks import SAM2SGP, save_weights

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = "image_size=64"


@pytest.fixture
def script(monkeypatch):
    """Import a benchmark as its script does: the scripts import each other from their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two data sets that no table knows: one of pictures, one of volumes."""
    folder = tmp_path_factory.mktemp("benchmark_data")
    for name, modality in (("pictures", "us"), ("volumes", "mr")):
        make_phantoms(folder / name, 4, (64, 64), 6, seed=2, modalities=[modality], progress=False)
    return folder


def test_tasks_share_no_patient_and_spread_their_first_pairs(script, data, tmp_path):
    tasks = script("_tasks").make_tasks(data, tmp_path, queries=4)
    assert {task.dataset for task in tasks} == {"pictures", "volumes"}
    for task in tasks:
        sides = {side: load_datalist(task.folder / side) for side in ("support", "queries")}
        patients = {side: {case["patient"] for case in cases} for side, cases in sides.items()}
        assert not patients["support"] & patients["queries"]
        assert [len(sides["support"]), len(sides["queries"])] == [len(task.support), len(task.queries)]
        first = task.support[: len(patients["support"])]
        assert {stem.split("_")[0] for stem in first} == patients["support"]
        for side, stems in (("support", task.support), ("queries", task.queries)):
            assert all(task.mask(side, stem).any() for stem in stems)


def test_tasks_keep_the_slices_of_a_volume(script, data, tmp_path):
    module = script("_tasks")
    task = next(task for task in module.make_tasks(data, tmp_path, queries=4) if task.dataset == "volumes")
    stored = read_image(task.image("queries", task.queries[0])).slices[0, 0]
    scaled = [
        module.ScaleIntensityByModalityd()(module.LoadCased()(case))["image"].numpy()
        for case in load_datalist(data / "volumes")
    ]
    distances = [np.abs(volume[:, 0] - stored / 65535).max((1, 2)).min() for volume in scaled]
    assert min(distances) < 1e-4


def test_an_unchanged_call_reads_the_tasks_it_finds(script, data, tmp_path):
    make_tasks = script("_tasks").make_tasks
    first = make_tasks(data, tmp_path, queries=4)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert make_tasks(data, tmp_path, queries=4) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == stamps
    assert {len(task.queries) for task in make_tasks(data, tmp_path, queries=1)} == {1}


def test_augmentation_moves_image_and_mask_alike(script):
    peers = script("_peers")
    torch.manual_seed(0)
    masks = torch.zeros(8, 1, 64, 64)
    masks[:, :, 12:40, 8:30] = 1
    images, moved = peers.augment(masks.expand(-1, 3, -1, -1), masks, [-1, -2])
    assert (moved != masks).float().mean() > 0.02
    for image, mask in zip(images[:, 0], moved[:, 0], strict=True):
        assert image[mask > 0].mean() - image[mask == 0].mean() > 0.6


def test_flips_are_only_along_axes_that_keep_the_target_in_place(script):
    masks = torch.zeros(4, 1, 32, 32)
    masks[:, :, 2:8, 10:22] = 1
    assert script("_peers").flip_axes(masks) == [-1]


def test_peers_give_maps_of_the_images_size(script):
    peers = script("_peers")
    images, masks = torch.rand(3, 3, 64, 64), torch.ones(3, 1, 64, 64)
    for name, peer in peers.PEERS.items():
        predict, steps = peers.train(peer, images, masks, seconds=0.01, seed=0)
        assert steps >= 1, name
        assert predict(images[:2]).shape == (2, 1, 64, 64), name


def test_patients_make_the_interval(script):
    fewshot = script("fewshot")
    rows = [{"patient": patient, "dice": value, "share": 0.1} for patient in "ab" for value in (0.2, 0.6)]
    same = {"task": "t", "rows": rows}
    assert fewshot.interval(fewshot.bootstrap(same)) == ""
    other = {"task": "t", "rows": [{**row, "dice": float(row["patient"] == "a")} for row in rows]}
    assert fewshot.interval(fewshot.bootstrap(other)) == " [0.000, 1.000]"
    assert fewshot.mean_of(other) == 0.5


@pytest.mark.slow
def test_the_whole_comparison_runs_and_is_not_repeated(script, data, tmp_path, monkeypatch, capsys):
    fewshot, ablation = script("fewshot"), script("ablation")
    weights = tmp_path / "model.pt"
    save_weights(fewshot.bundle_config({"image_size": 64}).get_parsed_content("network"), weights)
    command = ["fewshot.py", "--data", str(data), "--output", str(tmp_path / "out"), "--weights", str(weights)]
    command += ["--queries", "2", "--k", "2", "--seconds", "0.01", "--set", SIZE, "--tasks", "*_disc"]
    command += ["--methods", "plain", "basic_unet", "mean_mask", "nearest_copy", "controls"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        fewshot.main()
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines() if line]
    done = {(record["task"], record["method"], record["k"]) for record in lines}
    # Plain at K = 2 and, to compare the three controls with, at 16; three peers.
    assert len(lines) == len(done) == 2 * 8
    for record in lines:
        assert len(record["rows"]) == 2
        assert all(0 <= row["dice"] <= 1 and row["hd95"] >= 0 for row in record["rows"])
    table = capsys.readouterr().out
    for text in ("| Dice, K = 2 |", "| HD95 in pixels, K = 2 |", "plain − basic_unet", "inverted: complement"):
        assert text in table

    task = script("_tasks").make_tasks(data, tmp_path / "out/tasks", 2)[0]
    support = task.folder / "support"
    overrides = {"image_size": 64, "model_file": str(weights)}
    config = fewshot.bundle_config(overrides)
    silenced = tuple(key for key, on in ablation.switches(config).items() if on)
    assert {"pmg::prior", "pma::box", "pma::attention"} <= set(silenced)
    full = ablation.segment(task, support, ablation.Variant("full"), overrides)
    bare = ablation.segment(task, support, ablation.Variant("bare", silenced=(*silenced, "pma")), overrides)
    assert len(full["rows"]) == len(bare["rows"]) == 2
    assert [row["dice"] for row in full["rows"]] != [row["dice"] for row in bare["rows"]]


def test_volumes_are_compared_with_and_without_memory_and_gate(script, data, tmp_path, monkeypatch, capsys):
    command = [
        "volumes.py",
        f"phantoms={data / 'volumes'}",
        "--cases",
        "1",
        "--output",
        str(tmp_path),
        "--figures",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", command)
    script("volumes").main()
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| phantoms")]
    steps = "slice by slice", "2 neighbours", "2 neighbours, object gate", "2 neighbours, object gate, one piece"
    assert {line[2] for line in lines} == set(steps)
    assert len(lines) == 4 * len({line[1] for line in lines})
    assert all(0 <= float(line[3]) <= 1 and float(line[8]) > 0 for line in lines)
    false, empty = zip(*(map(int, line[6].split(" of ")) for line in lines), strict=True)
    assert sum(empty) > 0 and all(some <= all_ for some, all_ in zip(false, empty, strict=True))


def test_searching_for_likely_classes_is_compared_with_all(script, data, tmp_path, monkeypatch, capsys):
    for name, case in zip(("support", "queries"), load_datalist(data / "volumes")[:2], strict=True):
        for kind in ("image", "label"):
            (tmp_path / name / f"{kind}s").mkdir(parents=True)
            shutil.copy(case[kind], tmp_path / name / f"{kind}s")
    folders = [str(tmp_path / name) for name in ("support", "queries")]
    command = ["volumes.py", "--classes", *folders, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    script("volumes").main()
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "likely" in line or "| all" in line]
    # Of three classes all are likely.
    assert len(lines) == 2 and lines[0][1] == lines[1][1] and lines[0][3] == lines[1][3]
    assert 0 < float(lines[0][3].rstrip("| ")) <= 1 and float(lines[0][2]) > 0


def test_slices_without_a_class_are_counted(script):
    found = script("volumes").Found([])
    truth, pred = torch.zeros(2, 4, 3, 3, dtype=torch.uint8)
    truth[1:3, 0, 0] = 2
    pred[:2, 1, 1] = 2
    found.add({"truth_index": truth, "pred_index": pred, "pred": pred, "confidence": {3: 0.5, 7: 0.5}, "seconds": 2.0})
    assert found.empty == {3: 4, 7: 2} and found.false == {3: 0, 7: 1} and found.per_slice == 0.5


def test_the_cost_of_a_slice_is_measured(script):
    found = script("volumes").timed("lite", 10)
    assert found["slice"] > 0 and found["single"] > 0 and found["mebibytes"] > 0


def test_latency_measures_every_stage_and_both_designs(script, monkeypatch):
    latency = script("latency")
    monkeypatch.setattr(latency, "COPY_BYTES", 2**20)
    encoded = []
    encode = SAM2SGP.encode
    monkeypatch.setattr(SAM2SGP, "encode", lambda network, image: encoded.append(len(image)) or encode(network, image))
    found = {}
    for design in (latency.OURS, latency.AUTHORS):
        encoded.clear()
        found[design] = latency.measure(latency.Case("lite", 64, 4, 2, 1, design), queries=2)
        # One pass measures the encoder's operations, and of ours another one those of all stages. Ours encodes the
        # support set once, and per query the image and the region of its second pass, after four regions once; theirs
        # the support set with every query.
        expected = {latency.OURS: 2 + 4 + 3 * 2 + 4, latency.AUTHORS: 1 + 3 * (1 + 4)}
        assert sum(encoded) == expected[design]
    assert all(found[latency.OURS][stage] > 0 for stage in (*latency.STAGES, latency.SECOND))
    assert found[latency.AUTHORS].keys() & set(latency.STAGES) == set()
    own = found[latency.OURS]
    assert own["operations of encode"] == own["operations"] > own["operations of attention"] > 1e6
    assert all(own[latency.OPERATIONS + stage] > 0 for stage in latency.COMPUTING)


def test_a_training_steps_operations_are_counted_in_encoder_passes(script):
    steps, clock = script("training_speed").steps, iter(range(99)).__next__
    lora, frozen, cached = (steps("nano", 64, case, 1, clock)["operations"] for case in ("lora", "frozen", "cached"))
    # Of `cached` nothing of the trunk is left, of `lora` the way back goes through it, too.
    assert lora > frozen + 0.5 > cached + 1 > 2


def test_latency_asks_for_a_picture_again(script, monkeypatch, capsys):
    latency = script("latency")
    monkeypatch.setattr(latency, "COPY_BYTES", 2**20)
    case = latency.Case("lite", 64, 4, 4, 3, latency.REQUESTS)
    found = latency.measure(case, queries=2)
    first, half, one = (found[latency.ENCODED + name] for name in ("query", latency.ANOTHER_K, latency.OTHER_CLASSES))
    assert first > half and one == 0
    assert found["query"] > found[latency.OTHER_CLASSES] > 0 and found[latency.ANOTHER_K] > 0
    latency.requests_table({case: found})
    ratio = found[latency.OTHER_CLASSES] / found["query"]
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"({one:.0f}) | {ratio:.2f} |")


def test_a_budget_is_a_ratio_of_its_two_cases(script, capsys, tmp_path):
    latency = script("latency")
    results = {}
    for number, budget in enumerate(latency.BUDGETS.values()):
        for case in (budget.upper, budget.lower):
            if case is not None:
                stages = {stage: 0.25 for stage in latency.STAGES}
                shown = stages if case.design == latency.OURS else {}
                operations = {latency.OPERATIONS + stage: 1e9 for stage in latency.COMPUTING}
                limits = {"operations": 1e9, "rate": 1e10, "floor": 0.1, "read_floor": 0.1, **operations}
                again = {latency.ANOTHER_K: 1.0, latency.OTHER_CLASSES: 1.0}
                results[case] = {**shown, **again, **limits, "query": number + 1.0, "peak": 2**20 / 1e3}
    memory, encoder = latency.BUDGETS["memory"], latency.BUDGETS["encoder_512"]
    assert memory.value(results) == pytest.approx(2**40 / 1e12)
    assert encoder.value(results) == results[encoder.upper]["query"] / 0.25
    latency.table(results)
    assert capsys.readouterr().out.count("\n") == 2 + len(results)
    latency.floors(results)
    own = [case for case in results if case.design == latency.OURS]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3 + len(own) and printed.count("1.00: 250.0 (100.0)") == 6 * len(own)
    assert (encoder.is_met(1.4), encoder.is_met(1.41)) == (True, False)
    authors = latency.BUDGETS["authors_512_4"]
    assert (authors.is_met(3.0), authors.is_met(2.9)) == (True, False)
    latency.plot(results, tmp_path / "stages.png")
    assert (tmp_path / "stages.png").stat().st_size > 1000


def test_an_interrupted_bank_encodes_each_item_once(script, monkeypatch, capsys):
    latency = script("latency")
    monkeypatch.setattr(latency, "EMBEDDED", ("lite", 64))
    monkeypatch.setattr(latency, "WEIGHTS", None)
    monkeypatch.setattr(latency, "load_weights", lambda *_: None)
    monkeypatch.setattr(latency, "BANKS", (4,))
    latency.build_banks(lambda: 0.0)
    assert capsys.readouterr().out.splitlines()[-1] == "| 4 | 0.0000 | 4 | 4 |"


def test_without_a_gpu_its_benchmark_says_so_and_succeeds(script, monkeypatch, capsys):
    gpu = script("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    gpu.main()
    assert capsys.readouterr().out == "PyTorch sees no GPU here, so there is nothing to measure.\n"


def test_our_attention_agrees_with_sam2s_module_and_pooled_memory_does_not(script, data, monkeypatch, capsys):
    agreement = script("agreement")
    command = ["agreement.py", f"pictures={data / 'pictures'}", "--image_size", "64", "--queries", "2", "--k", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--variants", "attention", "memory_pool 2"])
    monkeypatch.setattr(agreement, "SUPPORT_PATIENTS", 2)
    agreement.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in rows] == ["attention", "memory_pool 2"]
    assert float(rows[0][4]) > 0.999 > float(rows[1][4])


def test_strategies_are_compared_and_not_repeated(script, data, tmp_path, monkeypatch, capsys):
    active = script("active_learning")
    command = ["active_learning.py", f"pictures={data / 'pictures'}", "--output", str(tmp_path), "--labels", "2", "3"]
    command += ["--seeds", "1", "--test", "2", "--pool", "6", "--held_out", "pictures", "--threads", "1"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        active.main()
    records = active.read(tmp_path / "results.jsonl")
    assert [record["strategy"] for record in records] == ["random", "uncertainty", "coverage", "hybrid"]
    # All start from the same two images.
    assert len({record["curve"][2] for record in records}) == len({tuple(r["chosen"][:2]) for r in records}) == 1
    assert all(len(set(record["chosen"])) == 3 and 0 <= record["curve"][3] <= 1 for record in records)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| hybrid")]
    assert len(lines) == 2 and f"{records[3]['curve'][3]:.3f}" in lines[0]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_apps_training_is_measured_where_there_are_patients_enough(script, data, tmp_path, monkeypatch, capsys):
    active = script("active_learning")
    # The pool is of three.
    for module in (active, sys.modules["lib.trainers.data"]):
        monkeypatch.setattr(module, "MIN_PATIENTS", 2)
    monkeypatch.setattr(sys.modules["lib.trainers.data"], "MIN_PATIENTS_OF_A_HALF", 1)
    monkeypatch.setattr(active.FineTuning, "_run", lambda self, settings, half: Path(settings["model_file"]))
    dice = iter([{"a": 0.2}, {"a": 0.1}, {"b": 0.4}, {"b": 0.3}])
    monkeypatch.setattr(active.FineTuning, "_dice", lambda self, weights, settings: next(dice))
    command = ["active_learning.py", f"pictures={data / 'pictures'}", "--output", str(tmp_path), "--labels", "1", "4"]
    command += ["--seeds", "1", "--test", "2", "--pool", "6", "--held_out", "pictures", "--threads", "1", "--finetune"]
    monkeypatch.setattr(sys, "argv", [*command, "--strategies", "random"])
    active.main()
    (record,) = active.read(tmp_path / "results.jsonl")
    assert record["finetuned"] == {4: record["curve"][4]} and next(dice, None) is None
    assert record["trainings"]["4"]["state"] == "kept" and record["trainings"]["4"]["new_metric"] == pytest.approx(0.2)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| random, fine-tuned")]
    assert f"|  | {record['finetuned'][4]:.3f} ± 0.000 |" in line


def test_the_number_of_labels_needed_lies_between_those_measured(script):
    needed = script("active_learning").labels_needed
    curve = {2: 0.4, 4: 0.5, 8: 0.7}
    assert [needed(curve, target) for target in (0.3, 0.5, 0.6, 0.8)] == [2.0, 4.0, 6.0, None]


def test_draws_are_small_support_sets_biased_as_named_and_never_share_a_patient_with_queries(script, data):
    module = script("adaptation_safety")
    pictures = module.Collection(data / "pictures", [])
    for bias in ("random", "look"):
        support, queries = pictures.draw(module.Draw("pictures", 3, bias, 0, False), 9)
        assert len(support) == 3 and queries
        assert not {case["patient"] for case in support} & {case["patient"] for case in queries}
    assert pictures.draw(module.Draw("pictures", 12, "random", 0, False), 9) is None
    kinds = [{"name": f"{kind}_{number}", "patient": f"{kind}{number}"} for kind in "ab" for number in range(5)]
    pictures.cases = kinds
    support, queries = pictures.draw(module.Draw("pictures", 4, "kind", 1, False), 20)
    assert {case["name"][0] for case in support} == {"b"} and len(queries) == 6


def test_gains_and_losses_by_adaptation_are_counted_and_not_repeated(script, data, tmp_path, monkeypatch, capsys):
    module = script("adaptation_safety")
    monkeypatch.setattr("sam2sgp.adaptation.plan.WHOLE_SIZE", 64)
    save_weights(SAM2SGP("lite", 64), tmp_path / "model.pt")
    arguments = ["--data", str(data), "--output", str(tmp_path), "--sets", "pictures", "--k", "3", "--biases", "random"]
    arguments += ["--names", "hidden", "--steps", "1", "--draws", "1", "--queries", "1"]
    arguments += ["--set", SIZE, "--weights", str(tmp_path / "model.pt")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["adaptation_safety.py", *arguments])
        module.main()
    (row,) = module.read_rows(tmp_path / "draws.csv")
    assert row.hidden and row.groups == 3 and row.adapted == pytest.approx(row.plain + row.gain)
    assert "names hidden | 1 |" in capsys.readouterr().out


def test_a_loss_of_more_than_two_hundredths_counts_as_harm(script):
    module = script("adaptation_safety")
    plain = {"queries": 9, "groups": 4, "plain": 0.5, "choices": "{}", "seconds": 1.0, "settings": "s"}
    rows = [
        module.Row("set", 4, "random", n, False, adapted=0.5 + g, **plain) for n, g in enumerate((0.2, 0, -0.05, 0.1))
    ]
    (line,) = [line for line in module.table(rows).splitlines() if line.startswith("| all")]
    assert "| +0.062 | -0.050 |" in line and line.endswith("| 25% |")


def test_marks_are_judged_by_the_dice_of_what_they_mark(script, tmp_path):
    confidence = script("confidence")
    dice = {"a": 0.9, "b": 0.8, "c": 0.2, "d": 0.0}
    said = {"a": ("0.95", "False"), "b": ("0.82", "False"), "c": ("0.81", "True"), "d": ("", "False")}
    record = {"task": "t", "method": "plain", "k": 16, "seen": True}
    record["rows"] = [{"query": name, "dice": value} for name, value in dice.items()]
    (tmp_path / "results.jsonl").write_text(json.dumps(record))
    folder = tmp_path / "runs" / "t" / "plain_16" / "output"
    folder.mkdir(parents=True)
    rows = [f"{name},{shown},{unlike},False" for name, (shown, unlike) in said.items()]
    (folder / "summary.csv").write_text("\n".join(["case,mean_confidence,unlike_support,maybe_absent", *rows]))
    found = confidence.queries(tmp_path, "plain", 16)
    lines = dict(row.strip("| ").split(" | ", 1) for row in confidence.table(found)[2:])
    # Marked: b, c, and d, of which nothing was found.
    assert lines["confidence below 0.85"] == "0.75 | 0.33 | 0.90 | 1.00 | 0.67"
    assert lines["unlike the support set"] == "0.25 | 0.20 | 0.57 | 0.50 | 1.00"


def test_labels_that_fit_are_not_taken_for_turned(script, data, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["turned_labels", str(data / "volumes"), "--draws", "2"])
    script("turned_labels").main()
    assert "Taken for turned: 0 of 4 support sets" in capsys.readouterr().out
