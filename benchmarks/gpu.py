"""What a GPU makes of a query and of a training step: precisions, torch.compile and gradient checkpointing.

    python benchmarks/gpu.py --backbone tiny --image_size 1024

Milliseconds per query (encoder, and everything behind it, K = 4) and per training step (one episode of 4 images, LoRA),
and the peak of the GPU's memory. Weights are random. Where there is no GPU it says so and does nothing.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from datetime import date

import torch

from sam2sgp.engines import SGPLoss
from sam2sgp.inferers.precision import autocast
from sam2sgp.networks import SAM2SGP

K = 4
EPISODE = 4
LORA = {"r": 8, "alpha": 16}


def milliseconds(work: Callable, device: torch.device, repeats: int) -> float:
    """Median time of a call that is warm."""
    for _ in range(3):
        work()
    found = []
    for _ in range(repeats):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        started.record()
        work()
        ended.record()
        torch.cuda.synchronize(device)
        found.append(started.elapsed_time(ended))
    return statistics.median(found)


def query(network: SAM2SGP, precision: str, device: torch.device, repeats: int) -> tuple[float, float]:
    """Milliseconds of the encoder, and of all else."""
    size = network.image_size
    image = torch.rand(1, 3, size, size, device=device)
    masks = torch.zeros(1, 1, size, size, device=device)
    masks[..., size // 4 : size // 2] = 1
    index = torch.zeros(1, 1, K, dtype=torch.long, device=device)
    with torch.inference_mode(), autocast(device.type, precision):
        features = network.encode(image)
        support = network.encode_support(features, masks).select(index)
        encode = milliseconds(lambda: network.encode(image), device, repeats)
        return encode, milliseconds(lambda: network.segment(features, support), device, repeats)


def step(network: SAM2SGP, precision: str, device: torch.device, repeats: int) -> tuple[float, float]:
    """Milliseconds of a training step, and the peak of memory in GiB."""
    size = network.image_size
    image = torch.rand(EPISODE, 3, size, size, device=device)
    label = torch.zeros(EPISODE, 1, size, size, device=device)
    label[..., size // 4 : size // 2] = 1
    index = torch.tensor([[[n for n in range(EPISODE) if n != own]] for own in range(EPISODE)], device=device)
    loss = SGPLoss().to(device)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def work() -> None:
        with autocast(device.type, precision):
            out = network(image, support_label=label, support_index=index)
        value = loss({name: tensor.float() for name, tensor in out.items()}, label)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()

    torch.cuda.reset_peak_memory_stats(device)
    taken = milliseconds(work, device, repeats)
    return taken, torch.cuda.max_memory_allocated(device) / 2**30


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--backbone", default="tiny")
    arguments.add_argument("--image_size", type=int, default=1024)
    arguments.add_argument("--repeats", type=int, default=10)
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU here, so there is nothing to measure.")
        return
    device = torch.device("cuda:0")
    print(
        f"\n{date.today()}, {torch.cuda.get_device_name(device)}, torch {torch.__version__}, {options.backbone}", end=""
    )
    print(f" at {options.image_size} px\n")
    print("| precision | compile | encoder, ms | the rest, ms | checkpoints | training step, ms | peak, GiB |")
    print("|" + " --- |" * 7)
    for precision, compiled, checkpoints in itertools.product(("fp32", "bf16", "fp16"), (False, True), (False, True)):
        torch.manual_seed(0)
        network = SAM2SGP(
            options.backbone,
            options.image_size,
            freeze_encoder=True,
            lora=LORA,
            gradient_checkpointing=checkpoints,
        ).to(device)
        if compiled:
            # The parts whose shapes are the same for every image.
            for part in (network.image_encoder.trunk, network.image_encoder.neck):
                part.compile(dynamic=False)
        encode, rest = query(network.eval(), precision, device, options.repeats)
        trained, peak = step(network.train(), precision, device, options.repeats)
        cells = [precision, compiled, f"{encode:.1f}", f"{rest:.1f}", checkpoints, f"{trained:.1f}", f"{peak:.2f}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
