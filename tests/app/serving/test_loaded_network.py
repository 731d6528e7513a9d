"""A loaded network segments in whatever memory there is."""

import pytest
import torch

from lib.serving.loaded_network import OutOfMemory, attempts
from sam2sgp.support.encodings import Encodings

PICTURES = ["us_000_0", "us_001_0", "us_003_0"]
QUERY = "us_003_0"


def test_memory_running_out_is_answered_with_smaller_batches_and_a_warning(studio, monkeypatch):
    made = studio(["mr_000", "mr_001"], ["mr_000"])
    segmenter = made.segmenter(three_d_memory="false", region_below="0", query_cache_mb="0")
    whole = segmenter.segment(made.image("mr_001"))
    assert whole["warnings"] == []
    network, segment = segmenter.network, segmenter.network.segment

    def small(features, support):
        if len(features) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return segment(features, support)

    monkeypatch.setattr(network, "segment", small)
    result = segmenter.segment(made.image("mr_001"))
    assert result["warnings"] == [
        "Memory ran out, so the image was segmented with 2 slices at a time; that takes longer."
    ]
    assert (result["pred"] == whole["pred"]).float().mean() > 0.999
    monkeypatch.setattr(network, "segment", lambda *args: small(range(9), None))
    with pytest.raises(OutOfMemory, match="does not even slice by slice"):
        segmenter.segment(made.image("mr_001"))
    monkeypatch.setattr(network, "segment", segment)
    assert segmenter.segment(made.image("mr_001"))["warnings"] == []


@pytest.mark.parametrize(("names", "mirror", "times"), [("us", "auto", 2), ("us", "false", 1), ("mr", "auto", 1)])
def test_mirrored_pictures_are_encoded_in_the_background_too(studio, monkeypatch, names, mirror, times):
    names = PICTURES if names == "us" else ["mr_000", "mr_001"]
    made = studio(names, names)
    segmenter = made.segmenter(mirror=mirror)
    bank, encoded = segmenter.bank, []
    through = Encodings._through_network
    monkeypatch.setattr(
        Encodings, "_through_network", lambda self, images, masks: encoded.append(1) or through(self, images, masks)
    )
    serving = segmenter._ready()

    def step(slices: int) -> None:
        if len(encoded) == times * len(bank) - 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        serving.encode(step)
    serving.encode()
    assert len(encoded) == times * len(bank)
    version = bank.version
    serving.encode()
    assert len(encoded) == times * len(bank) and bank.version == version


def test_other_errors_are_not_taken_for_a_lack_of_memory(studio, monkeypatch):
    made = studio(PICTURES, ["us_000_0"])
    segmenter = made.segmenter()

    def broken(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(segmenter.network, "segment", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        segmenter.segment(made.image(QUERY))


def test_a_gpu_is_tried_with_smaller_batches_before_the_cpu():
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert list(attempts(cuda, 5)) == [(cuda, 5), (cuda, 2), (cuda, 1), (cpu, 1)]
    assert list(attempts(cpu, 2)) == [(cpu, 2), (cpu, 1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_without_memory_gives_way_to_the_cpu_for_one_request(studio, monkeypatch):
    made = studio(PICTURES, PICTURES[:2])
    segmenter = made.segmenter()
    on_gpu = segmenter.segment(made.image(QUERY))
    segment = segmenter.network.segment

    def no_gpu(features, support):
        if features.embedding.is_cuda:
            raise torch.OutOfMemoryError("out of memory")
        return segment(features, support)

    monkeypatch.setattr(segmenter.network, "segment", no_gpu)
    on_cpu = segmenter.segment(made.image(QUERY))
    assert on_cpu["device"] == "cpu" and "on the CPU" in on_cpu["warnings"][0]
    assert (on_cpu["pred"] == on_gpu["pred"]).float().mean() > 0.99
    monkeypatch.setattr(segmenter.network, "segment", segment)
    again = segmenter.segment(made.image(QUERY))
    assert again["device"].startswith("cuda") and again["warnings"] == []
    assert torch.equal(again["pred"], on_gpu["pred"])
