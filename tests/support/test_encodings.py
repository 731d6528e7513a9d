"""Items are encoded once, each by itself, and by whoever is first."""

import shutil

import pytest
import torch

from sam2sgp.support import SupportBank
from sam2sgp.support.lru import ByteLRU
from tests.helpers.pairs import (
    COUNT,
    NAMES,
    Counter,
    bank,
    data,
    embedding_of,
    files,
    network,
    preprocessing,
    segment,
)


def test_encoding_an_item_does_not_depend_on_the_others(folder, net):
    whole = bank(folder)
    alone = SupportBank(data(folder)[3:4], preprocessing(), NAMES, progress=False)
    for support in (whole, alone):
        support.encode(net)
    assert torch.equal(whole.embedding[3], alone.embedding[0])
    for name, values in alone.encodings._held[f"{alone.items[0].content}.item"].items():
        assert torch.equal(values, whole.encodings._held[f"{whole.items[3].content}.item"][name])


def test_every_item_is_encoded_once_and_never_again(folder, cache, net, encoder):
    bank(folder, cache).encode(net)
    assert encoder.calls == COUNT
    again = bank(folder, cache)
    again.encode(net)
    again.forget()
    again.encode(net)
    assert encoder.calls == COUNT
    bank(folder).encode(net)
    assert encoder.calls == 2 * COUNT


def test_regions_are_encoded_once_and_never_again(folder, cache, net, encoder):
    segment(bank(folder, cache), net)
    first = encoder.calls
    segment(bank(folder, cache), net)
    second = encoder.calls - first
    bank(folder).encode(net)
    segment(bank(folder), net)
    in_memory = encoder.calls - first - second - COUNT
    assert in_memory == first and second < first - COUNT


def test_precision_counts(folder, cache, net, encoder):
    support = bank(folder, cache)
    support.encode(net)
    full = support.memory.tokens
    with torch.autocast("cpu", torch.bfloat16):
        support.encode(net)
    assert encoder.calls == 2 * COUNT and not torch.equal(support.memory.tokens.float(), full)
    # What is made later, outside the block, is made in the precision that the bank was encoded in.
    shutil.rmtree(cache / "encoded")
    before = support.memory.tokens
    support.store.recent = ByteLRU(0, len)
    assert torch.equal(support.memory.tokens, before)


def test_pruning_leaves_what_this_network_and_kept_ones_encoded(folder, cache, net, encoder):
    support = bank(folder, cache)
    fingerprints = []
    for seed in (1, 2):
        support.encode(network(seed))
        fingerprints.append(support.fingerprint)
    support.encode(net)
    assert support.prune(keep=fingerprints[:1]) == fingerprints[1:]
    assert sorted(path.name for path in (cache / "encoded").iterdir()) == sorted([fingerprints[0], support.fingerprint])
    bank(folder, cache).encode(net)
    assert encoder.calls == COUNT
    # A process that still used what is gone makes it again.
    second = network(2)
    support.encode(second)
    assert torch.equal(support.embedding, embedding_of(folder, second))


def test_an_interrupted_encoding_goes_on_where_it_stopped(folder, cache, net, expected, monkeypatch):
    encode = net.encode

    def failing(image):
        if len(files(cache)) == 4:
            raise KeyboardInterrupt
        return encode(image)

    monkeypatch.setattr(net, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        bank(folder, cache).encode(net)
    counter = Counter(encode)
    monkeypatch.setattr(net, "encode", counter)
    support = bank(folder, cache)
    support.encode(net)
    assert counter.calls == COUNT - 4
    assert torch.equal(segment(support, net), expected)


def test_shares_are_encoded_once_and_together_are_the_whole(folder, cache, net, encoder):
    shutil.copy(folder / "images" / "case0.nii", folder / "images" / "again.nii")
    shutil.copy(folder / "labels" / "case0.nii", folder / "labels" / "again.nii")
    for number in (1, 0):
        bank(folder, cache).encode_share(net, "cpu", number, 2)
        assert encoder.calls == {1: COUNT // 2, 0: COUNT}[number]
    support = bank(folder, cache)
    support.encode(net)
    assert encoder.calls == COUNT and len(support) == COUNT + 1
    alone = bank(folder)
    alone.encode(net)
    assert torch.equal(support.embedding, alone.embedding)


def test_what_another_process_has_encoded_meanwhile_is_taken(folder, cache, net, encoder):
    """As under torch.distributed, where the processes start at different items."""
    first, second = bank(folder, cache), bank(folder, cache)
    encode = net.encode

    def in_between(image):
        if not second.fingerprint:
            second.encode(net)
        return encode(image)

    net.encode = in_between
    first.encode(net)
    assert encoder.calls == COUNT + 1 and torch.equal(first.embedding, second.embedding)
