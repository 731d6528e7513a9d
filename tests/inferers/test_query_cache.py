"""Features of queries are kept, for one network and precision, in a bounded cache."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.inferers.query_cache import QueryCache
from sam2sgp.support import SupportSampler
from tests.helpers.bundle_runs import computing_with_one_thread
from tests.helpers.pairs import (
    COUNT,
    Counter,
    bank,
    network,
    query,
    write_set,
)


@pytest.fixture(scope="module")
def net():
    with computing_with_one_thread():
        yield network()


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set", COUNT)


def test_a_second_request_on_an_image_skips_the_encoder(folder, net, monkeypatch):
    encoder = Counter(net.encode)
    monkeypatch.setattr(net, "encode", encoder)
    support = bank(folder)
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2), batch_size=2), query_cache=QueryCache())
    first = inferer(query(), net)
    calls = encoder.calls
    assert torch.equal(inferer(query(), net), first) and encoder.calls == calls
    inferer = replace(inferer, settings=replace(inferer.settings, sampler=SupportSampler(k=3)))
    more = inferer(query(), net)
    assert encoder.calls == calls and not torch.equal(more, first)
    assert torch.equal(
        more, SupportSetInferer(support, InferenceSettings(SupportSampler(k=3), batch_size=2))(query(), net)
    )
    calls = encoder.calls
    inferer(query(98), net)
    assert encoder.calls == calls + 2


def test_features_of_another_network_or_precision_are_not_used(folder):
    support, query_cache = bank(folder), QueryCache()
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2)), query_cache=query_cache)
    for seed in (0, 1, 0):
        inferer.reset()
        assert torch.equal(
            inferer(query(), network(seed)),
            SupportSetInferer(bank(folder), InferenceSettings(SupportSampler(k=2)))(query(), network(seed)),
        )
    assert len(query_cache.recent) == 2 * len(query())
    half = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2), precision="bf16"), query_cache=query_cache)
    half(query(), network(0))
    assert len(query_cache.recent) == 3 * len(query())


def test_only_the_images_that_are_new_are_encoded(net):
    cache, encoded = QueryCache(), []
    images = query(count=4).expand(-1, 3, -1, -1)

    def encode(image):
        encoded.append(len(image))
        return net.encode(image)

    counting = SimpleNamespace(encode=encode)
    cache(images[[1, 3]], counting, "")
    features = cache(images[[0, 1, 0, 3]], counting, "")
    assert encoded == [2, 1]
    torch.testing.assert_close(features.embedding, net.encode(images[[0, 1, 0, 3]]).embedding)


def test_cached_features_are_bounded(net, folder):
    whole = QueryCache()
    whole(query(count=1).expand(-1, 3, -1, -1), net, "")
    small = QueryCache(2.5 * whole.recent.currsize / 2**20)
    SupportSetInferer(bank(folder), InferenceSettings(SupportSampler(k=2), batch_size=1), query_cache=small)(
        query(count=5), net
    )
    assert len(small.recent) == 2 and small.recent.currsize <= small.recent.maxsize
