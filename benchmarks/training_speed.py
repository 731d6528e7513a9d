"""What a training step costs: over an encoder pass of the same images, in memory, and in waiting for data.

    python benchmarks/training_speed.py                                  # all
    python benchmarks/training_speed.py --parts steps --cases lora cached --size 512
    python benchmarks/training_speed.py --parts memory --size 1024
    python benchmarks/training_speed.py --parts data --dataset DIR

`steps`: a step of the overlays' episode (4 images, each guided by the 3 others) with forward pass, loss, backward pass
and optimiser, over a pass of only the frozen encoder over the same images. `lora` trains LoRA and all behind the
encoder, `frozen` only what is behind it, `cached` that with the encoder's features from the cache, `clips` is `lora`
with two clips of two slices. Next to it stand the multiplications and additions of the step over those of the pass,
which is about the ratio where both run at one rate. `memory`: the peak of the process with and without gradient
checkpointing, each in a process of its own. `data`: a training as `configs/train.json` declares it, and the share of
its time in which the step waits for data, by ignite's profiler, with both precisions; on phantoms unless a folder is
named.

Weights are random. `--cpu_time` counts the processor's seconds instead of the clock's in `steps`.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from ignite.handlers import BasicTimeProfiler
from latency import counter
from monai.bundle import ConfigParser

from sam2sgp.data.phantom import make_phantoms
from sam2sgp.engines import SGPLoss, TrunkCache
from sam2sgp.networks import SAM2SGP

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
EPISODE = 4
LORA = {"r": 8, "alpha": 16}
CASES = {
    "lora": {"lora": LORA},
    "frozen": {},
    "cached": {},
    "clips": {"lora": LORA},
}
PARTS = ("steps", "memory", "data")


def episode(size: int, clips: bool) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Images and masks of one episode, and the network's arguments."""
    image = torch.rand(EPISODE, 3, size, size)
    label = torch.zeros(EPISODE, 1, size, size)
    label[..., size // 4 : size // 2, size // 4 : size // 2] = 1
    index = torch.tensor([[[n for n in range(EPISODE) if n != own]] for own in range(EPISODE)])
    arguments = {"support_label": label, "support_index": index}
    if clips:
        frames = torch.tensor([[1], [0], [3], [2]])
        arguments |= {"frame_index": frames, "frame_distance": torch.ones_like(frames)}
    return image, label, arguments


def training_step(network: SAM2SGP, size: int, clips: bool) -> Callable[[], None]:
    image, label, arguments = episode(size, clips)
    loss = SGPLoss()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-4)

    def work() -> None:
        value = loss(network(image, **arguments), label)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return work


def build(backbone: str, size: int, case: str, checkpoints: bool = False) -> SAM2SGP:
    torch.manual_seed(0)
    return SAM2SGP(backbone, size, freeze_encoder=True, gradient_checkpointing=checkpoints, **CASES[case]).train()


def steps(backbone: str, size: int, case: str, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of an encoder pass and of a step, and the operations of a step over those of a pass."""
    network = build(backbone, size, case)
    image = episode(size, False)[0]
    work = training_step(network, size, case == "clips")

    def encode() -> None:
        with torch.no_grad():
            network.eval().encode(image)
        network.train()

    def timed(call: Callable) -> float:
        started = clock()
        call()
        return clock() - started

    with tempfile.TemporaryDirectory() as folder:
        with counter() as of_pass:
            encode()
        plain = [timed(encode) for _ in range(repeats)]
        if case == "cached":
            torch.manual_seed(0)
            network.trunk_cache = TrunkCache(folder, megabytes=0)
            work = training_step(network, size, False)
            work()
        with counter() as of_step:
            work()
        whole = [timed(work) for _ in range(repeats)]
    operations = of_step.get_total_flops() / of_pass.get_total_flops()
    return {"encoder": statistics.median(plain), "step": statistics.median(whole), "operations": operations}


def memory(backbone: str, size: int, checkpoints: bool) -> dict[str, float]:
    """Peak MiB of this process after one step, and its seconds."""
    work = training_step(build(backbone, size, "lora", checkpoints), size, False)
    started = time.process_time()
    work()
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "step": time.process_time() - started}


def waiting(
    dataset: Path, workers: int, output: Path, overlay: str | None, size: int, precision: str
) -> dict[str, float]:
    """Seconds per step, the share of them in which it waits for data, and images a second."""
    parser = ConfigParser()
    files = [str(BUNDLE / "configs" / "train.json")]
    overrides = {"image_size": size, "weights": False, "max_epochs": 1, "episodes_per_epoch": 24, "progress": False}
    if overlay:
        files.append(str(BUNDLE / "configs" / "backbones" / f"{overlay}.json"))
        overrides["checkpoint"] = None
        overrides["episodes_per_epoch"] = 8
    parser.read_config(files)
    # Neither validation nor a second run's state belongs to a step.
    overrides |= {"bundle_root": str(BUNDLE), "dataset_dir": str(dataset), "output_dir": str(output)}
    overrides |= {"num_workers": workers, "val_interval": 2, "resume": False, "precision": precision}
    for key, value in overrides.items():
        parser[key] = value
    parser["train"]["handlers"] = [
        entry for entry in parser["train"]["handlers"] if entry["_target_"] != "sam2sgp.engines.ResumableCheckpoint"
    ]
    trainer = parser.get_parsed_content("train::trainer")
    profiler = BasicTimeProfiler()
    profiler.attach(trainer)
    trainer.run()
    # The first batch waits for the workers to start.
    data, work = profiler.dataflow_times[1:].sum(), profiler.processing_times[1:].sum()
    step = float(data + work) / (len(profiler.dataflow_times) - 1)
    images = parser["images_per_episode"] * parser["episodes_per_step"]
    return {"step": step, "waiting": float(data / (data + work)), "images": images / step}


def in_a_process(part: str, options: argparse.Namespace, *settings: object) -> dict[str, float]:
    child = [sys.executable, __file__, "--child", json.dumps([part, *settings]), "--threads", str(options.threads)]
    child += ["--cpu_time"] if options.cpu_time else []
    return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def run_child(part: str, settings: list, clock: Callable[[], float]) -> dict[str, float]:
    if part == "steps":
        return steps(*settings, clock)
    return memory(*settings)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments.add_argument("--backbone", default="tiny")
    arguments.add_argument("--size", type=int, nargs="+", default=[512])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--dataset", type=Path, help="labelled folder for `data`")
    arguments.add_argument("--overlay", help="backbone overlay for `data`; none: lite")
    arguments.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    arguments.add_argument("--cpu_time", action="store_true")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        part, *settings = json.loads(options.child)
        print(json.dumps(run_child(part, settings, time.process_time if options.cpu_time else time.perf_counter)))
        return
    print(f"\n{date.today()}, {platform.machine()}, torch {torch.__version__}, {options.threads} threads", flush=True)
    if "steps" in options.parts:
        print("\n| backbone | px | case | encoder pass, s | step, s | step over pass (budget 3) | in operations |")
        print("| --- " * 7 + "|")
        for size in options.size:
            for case in options.cases:
                found = in_a_process("steps", options, options.backbone, size, case, options.repeats)
                ratio = found["step"] / found["encoder"]
                print(f"| {options.backbone} | {size} | {case} ", end="")
                print(
                    f"| {found['encoder']:.2f} | {found['step']:.2f} | {ratio:.2f} | {found['operations']:.2f} |",
                    flush=True,
                )
    if "memory" in options.parts:
        print("\n| backbone | px | checkpoints | peak, MiB | step, s of processor time |\n" + "| --- " * 5 + "|")
        for size in options.size:
            for checkpoints in (False, True):
                found = in_a_process("memory", options, options.backbone, size, checkpoints)
                print(f"| {options.backbone} | {size} | {checkpoints} ", end="")
                print(f"| {found['peak']:.0f} | {found['step']:.1f} |", flush=True)
    if "data" in options.parts:
        print("\n| config | px | precision | workers | s per step | images a second | share waiting for data |")
        print("| --- " * 7 + "|")
        size = options.size[0] if options.overlay else 256
        with tempfile.TemporaryDirectory() as folder:
            dataset = options.dataset or make_phantoms(Path(folder, "phantoms"), 4, progress=False)
            for precision, workers in itertools.product(("fp32", "bf16"), options.workers):
                found = waiting(dataset, workers, Path(folder, "run"), options.overlay, size, precision)
                print(f"| {options.overlay or 'lite'} | {size} | {precision} | {workers} ", end="")
                print(f"| {found['step']:.2f} | {found['images']:.1f} | {found['waiting']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
