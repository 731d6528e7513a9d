"""The support bank on disk: what it finds again, what it notices, what it survives, and what it costs."""

import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sam2sgp.errors import DataError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.networks import SAM2SGP
from sam2sgp.support import SupportBank, SupportSampler, content, tensor_store
from sam2sgp.support.lru import ByteLRU
from sam2sgp.transforms import cache_keys
from tests.support import pairs
from tests.support.pairs import (
    COUNT,
    CountedPreprocessing,
    Counter,
    age,
    bank,
    files,
    fresh,
    network,
    query,
    segment,
    write_case,
    write_set,
)

# Equality


@pytest.mark.parametrize("megabytes", [256, 0.05, 0])
def test_results_are_the_same_to_the_last_bit_with_and_without_a_folder(folder, cache, net, expected, megabytes):
    written = segment(bank(folder, cache, cache_mb=megabytes), net)
    read = segment(bank(folder, cache, cache_mb=megabytes), net)
    assert torch.equal(written, expected) and torch.equal(read, expected)
    assert expected.isfinite().all() and expected.std() > 0


def test_encoding_an_item_does_not_depend_on_the_others(folder, net):
    whole = bank(folder)
    alone = bank(folder).subset([3])
    for support in (whole, alone):
        support.encode(net)
    assert torch.equal(whole.embedding[3], alone.embedding[0])
    for name, values in alone.encodings._held[f"{alone.items[0].content}.item"].items():
        assert torch.equal(values, whole.encodings._held[f"{whole.items[3].content}.item"][name])


def test_items_from_the_folder_have_the_pixels_of_those_in_memory(folder, cache):
    bank(folder, cache)
    for stored, held in zip(bank(folder, cache).items, bank(folder).items, strict=True):
        assert torch.equal(stored.image, held.image) and torch.equal(stored.label, held.label)
        assert torch.equal(stored.thumbnail, held.thumbnail) and stored.thumbnail.dtype == torch.uint8
        assert stored.thumbnail.shape == (pairs.SIZE, pairs.SIZE, 3)
        assert (stored.id, stored.content, stored.source) == (held.id, held.content, held.source)
        assert stored.regions.keys() == held.regions.keys() and stored.tiles.keys() == held.tiles.keys()
        for value, (image, mask) in held.regions.items():
            assert torch.equal(stored.regions[value][0], image) and torch.equal(stored.regions[value][1], mask)


# Found again


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


def test_the_same_content_under_other_names_is_found(folder, cache, net, encoder, tmp_path):
    before = bank(folder, cache)
    before.encode(net)
    for kind in ("images", "labels"):
        (tmp_path / "other" / kind).mkdir(parents=True)
        for number in range(COUNT):
            shutil.copy(folder / kind / f"case{number}.nii", tmp_path / "other" / kind / f"scan{number}.nii")
    preprocessing = CountedPreprocessing()
    after = bank(tmp_path / "other", cache, transform=preprocessing)
    after.encode(net)
    assert preprocessing.calls == 0 and encoder.calls == COUNT
    assert [item.content for item in after.items] == [item.content for item in before.items]
    assert [item.id for item in after.items] == [f"scan{number}" for number in range(COUNT)]
    assert after.items[2].source == str(tmp_path / "other" / "images" / "scan2.nii")


def test_what_an_older_reader_prepared_is_read_again(folder, cache, net, monkeypatch):
    bank(folder, cache).encode(net)
    monkeypatch.setattr(cache_keys, "READERS_VERSION", cache_keys.READERS_VERSION + 1)
    preprocessing = CountedPreprocessing()
    bank(folder, cache, transform=preprocessing).encode(net)
    assert preprocessing.calls == COUNT


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_an_edited_file_is_not_taken_for_the_old_one(folder, cache, net, encoder, kind, tmp_path):
    bank(folder, cache).encode(net)
    write_case(tmp_path / "edited", "case2", 2, shift=3)
    shutil.copy(tmp_path / "edited" / kind / "case2.nii", folder / kind / "case2.nii")
    support = bank(folder, cache)
    support.encode(net)
    assert encoder.calls == COUNT + 1
    assert torch.equal(segment(support, net), fresh(folder, net))


def test_other_preprocessing_finds_nothing(folder, cache, net, encoder):
    bank(folder, cache).encode(net)
    other = pairs.preprocessing()
    other.transforms[1].percentiles = (5.0, 95.0)
    bank(folder, cache, transform=other).encode(net)
    assert encoder.calls == 2 * COUNT


def test_slices_of_a_volume_are_items_of_their_own(tmp_path, cache, net, encoder):
    label = np.zeros((32, 32, 12), np.uint8)
    label[8:20, 8:20, 2:11] = 1
    for kind, array in (("images", label + np.random.default_rng(0).random(label.shape)), ("labels", label)):
        (tmp_path / "set" / kind).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / "set" / kind / "scan.nii.gz")
    wide = bank(tmp_path / "set", cache, slices_per_class=4)
    wide.encode(net)
    assert [item.id for item in wide.items] == [f"scan#{item.slice}" for item in wide.items] and encoder.calls == 4 + 3
    assert [item.slice for item in wide.items if not item.info.holds] == [0, 1, 11], "which hold nothing"
    assert not wide.holds[[0, 1, -1]].any() and len(wide.memory.tokens) == 4
    narrow = bank(tmp_path / "set", cache, slices_per_class=2)
    narrow.encode(net)
    assert len(narrow) == 2 + 3 and encoder.calls == 4 + 3, "slices that were chosen before are found"


# The network


def _other_weights(net):
    with torch.no_grad():
        next(net.memory_encoder.parameters()).add_(1e-3)


def _other_normalization(net):
    net.normalization = "imagenet"


@pytest.mark.parametrize("change", [_other_weights, _other_normalization])
def test_a_changed_network_never_sees_old_memory_and_the_old_one_finds_it_again(folder, cache, change):
    support, changed, plain = bank(folder, cache), network(), network()
    support.encode(plain)
    old, fingerprint = support.memory.tokens, support.fingerprint
    change(changed)
    support.forget()
    support.encode(changed)
    assert support.fingerprint != fingerprint and not torch.equal(support.memory.tokens, old)
    assert torch.equal(segment(support, changed), fresh(folder, changed))
    plain.encode = Counter(plain.encode)
    support.encode(plain)
    assert plain.encode.calls == 0 and torch.equal(support.memory.tokens, old)


def test_lora_and_its_scale_count(folder, cache):
    networks = []
    for alpha in (8, 16):
        torch.manual_seed(0)
        adapted = SAM2SGP("nano", pairs.SIZE, lora={"r": 4, "alpha": alpha}).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        networks.append(adapted)
    assert content.checksum(networks[0].state_dict()) == content.checksum(networks[1].state_dict())
    support = bank(folder, cache)
    fingerprints = set()
    for adapted in (*networks, network()):
        support.encode(adapted)
        fingerprints.add(support.fingerprint)
        assert torch.equal(support.embedding, _embedding(folder, adapted))
    assert len(fingerprints) == 3


def _embedding(folder, net):
    support = bank(folder)
    support.encode(net)
    return support.embedding


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
    assert torch.equal(support.embedding, _embedding(folder, second))


# Reconciling


@pytest.fixture(params=["folder", "memory"])
def place(request, cache) -> Path | None:
    return cache if request.param == "folder" else None


def data(folder: Path) -> list[dict]:
    return pairs.load_datalist(folder)


def test_the_next_query_uses_added_cases_and_only_those_are_read_and_encoded(folder, place, net, encoder):
    preprocessing = CountedPreprocessing()
    support = bank(folder, place, transform=preprocessing)
    segment(support, net)
    write_case(folder, "new", 10)
    encoded, read = encoder.calls, preprocessing.calls
    changes = support.reconcile(data(folder))
    assert changes.added == ["new"] and changes.removed == [] and encoder.calls == encoded
    image = support.items[-1].image.float()[None]
    features = net.encode(image.expand(-1, 3, -1, -1))
    retrieved = support.retrieve(net, features, SupportSampler(k=1))[0]
    assert support.items[int(retrieved.index)].id == "new"
    assert preprocessing.calls == read + 1 and encoder.calls == encoded + 2
    assert torch.equal(segment(support, net), fresh(folder, net))


def test_removed_cases_leave_at_once(folder, place, net, encoder):
    support = bank(folder, place)
    segment(support, net)
    for kind in ("images", "labels"):
        (folder / kind / "case1.nii").unlink()
    calls = encoder.calls
    assert support.reconcile(data(folder)).removed == ["case1"]
    assert len(support) == COUNT - 1 and "case1" not in [item.id for item in support.items]
    features = net.encode(query().expand(-1, 3, -1, -1))
    index = support.retrieve(net, features, SupportSampler(k=COUNT))[0].index
    assert index.max() == COUNT - 2 and encoder.calls == calls + 1
    assert torch.equal(segment(support, net), fresh(folder, net))


def test_an_item_finds_what_guides_it_in_the_table_as_it_is_now(folder, place, net):
    support = bank(folder, place)
    support.encode(net)
    for kind in ("images", "labels"):
        (folder / kind / "case0.nii").unlink()
    write_case(folder, "new", 10)
    support.reconcile(data(folder))
    for number, name in ((0, "case1"), (len(support) - 1, "new")):
        item = support.items[number]
        found = support.retrieve_for(number, SupportSampler(k=2))
        features = net.encode(item.image.float()[None].expand(-1, 3, -1, -1))
        expected = support.retrieve(net, features, SupportSampler(k=2), item.patient, item.group)
        assert item.id == name
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.index, other.index) and number not in one.index
            torch.testing.assert_close(one.similarity, other.similarity)


def test_a_file_changed_in_place_is_noticed_by_its_time_alone(folder, place, net, encoder, tmp_path):
    support = bank(folder, place)
    support.encode(net)
    old = support.items[2].content
    path = folder / "labels" / "case2.nii"
    state = path.stat()
    write_case(tmp_path / "edited", "case2", 2, shift=3)
    path.write_bytes((tmp_path / "edited" / "labels" / "case2.nii").read_bytes())
    os.utime(path, ns=(state.st_mtime_ns + 1, state.st_mtime_ns + 1))
    assert (path.stat().st_size, path.stat().st_ino) == (state.st_size, state.st_ino)
    changes = support.reconcile(data(folder))
    assert changes.added == changes.removed == ["case2"] and support.items[2].content != old
    assert torch.equal(segment(support, net), fresh(folder, net))


def test_a_file_changed_twice_within_one_tick_of_the_clock_is_noticed(folder, place, tmp_path):
    path = folder / "labels" / "case2.nii"
    age(path, -60)
    state = path.stat()
    support = bank(folder, place)
    write_case(tmp_path / "edited", "case2", 2, shift=3)
    path.write_bytes((tmp_path / "edited" / "labels" / "case2.nii").read_bytes())
    os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns))
    assert support.reconcile(data(folder)).added == ["case2"]


def test_unchanged_files_are_neither_hashed_nor_read(folder, cache, monkeypatch):
    support = bank(folder, cache)
    hashed = Counter(content.hashlib.file_digest)
    monkeypatch.setattr(content.hashlib, "file_digest", hashed)
    preprocessing = CountedPreprocessing()
    again = bank(folder, cache, transform=preprocessing)
    support.reconcile(data(folder))
    assert hashed.calls == 0 and preprocessing.calls == 0
    again.catalogue._hashes = content.FileHashes()
    again.reconcile(data(folder))
    assert hashed.calls == 2 * COUNT


def test_a_new_class_gets_a_column(tmp_path, place, net):
    folder = tmp_path / "set"
    write_case(folder, "case0", 0)
    write_case(folder, "case2", 2)
    support = bank(folder, place, class_names={})
    assert support.class_values == [1]
    before = segment(support, net)
    write_case(folder, "case1", 1)
    support.reconcile(data(folder))
    assert support.class_names == {1: "class_1", 2: "class_2"} and support.holds.tolist()[1] == [True, True]
    after = segment(support, net)
    assert before.shape[1] == 1 and after.shape[1] == 2
    assert torch.equal(after, segment(bank(folder, class_names={}), net))


def test_a_limit_holds_after_reconciling(folder, place, net):
    support = bank(folder, place, max_items=3)
    write_case(folder, "new", 10)
    for _ in range(2):
        support.reconcile(data(folder))
        assert len(support) == 3
        assert [item.id for item in support.items] == [item.id for item in bank(folder, max_items=3).items]


# Cases that can't be used


def spoil(folder: Path, name: str) -> None:
    path = folder / "labels" / f"{name}.nii"
    path.write_bytes(path.read_bytes()[:400])
    age(path)


def test_one_bad_case_is_listed_and_the_others_are_used(folder, place, net):
    spoil(folder, "case1")
    with pytest.raises(DataError, match="case1"):
        bank(folder, place)
    preprocessing = CountedPreprocessing()
    support = bank(folder, place, skip_errors=True, transform=preprocessing)
    assert [item.id for item in support.items] == ["case0", "case2", "case3", "case4", "case5"]
    (error,) = support.errors
    assert error["name"] == "case1" and error["source"] == str(folder / "images" / "case1.nii")
    assert "case1.nii" in error["error"]
    calls = preprocessing.calls
    support.reconcile(data(folder))
    assert preprocessing.calls == calls and len(support.errors) == 1, "the same bad file is not read again and again"
    write_case(folder, "case1", 1)
    support.reconcile(data(folder))
    assert support.errors == [] and len(support) == COUNT
    assert torch.equal(segment(support, net), fresh(folder, net))


def test_a_missing_file_and_an_undeclared_class_are_listed(folder, place):
    cases = data(folder)
    (folder / "images" / "case0.nii").unlink()
    support = SupportBank(
        cases, pairs.preprocessing(), {1: "square"}, progress=False, cache_dir=place, skip_errors=True
    )
    assert [error["name"] for error in support.errors] == ["case0", "case1", "case3", "case5"]
    assert "found value 2" in support.errors[1]["error"] and len(support) == 2


def test_where_errors_are_not_skipped_the_bank_stays_as_it_was(folder, place, net):
    support = bank(folder, place)
    before = segment(support, net)
    spoil(folder, "case1")
    with pytest.raises(DataError):
        support.reconcile(data(folder))
    assert len(support) == COUNT and torch.equal(segment(support, net), before)


def test_a_bank_may_start_empty(folder, place, net):
    with pytest.raises(DataError, match="at least one object"):
        SupportBank([], pairs.preprocessing(), pairs.NAMES, progress=False, cache_dir=place)
    support = SupportBank([], pairs.preprocessing(), pairs.NAMES, progress=False, cache_dir=place, allow_empty=True)
    support.encode(net)
    features = net.encode(query().expand(-1, 3, -1, -1))
    assert len(support) == 0 and support.retrieve(net, features, SupportSampler()) == []
    support.reconcile(data(folder))
    assert torch.equal(segment(support, net), fresh(folder, net))
    support.reconcile([])
    assert support.retrieve(net, features, SupportSampler()) == [] and support.patients == {}


def test_a_label_changed_after_the_cache_was_deleted_is_never_taken_for_the_old_one(folder, cache, tmp_path):
    support = bank(folder, cache, cache_mb=0)
    label = support.items[2].label.clone()
    shutil.rmtree(cache)
    assert torch.equal(support.items[2].label, label)
    shutil.rmtree(cache)
    write_case(folder, "case2", 2, shift=3)
    with pytest.raises(DataError, match="case2"):
        support.items[2].label  # noqa: B018


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


# Cost


class Visits(list):
    """A list that counts how often its entries are looked at one by one."""

    count = 0

    def __getitem__(self, index):
        Visits.count += 1
        return super().__getitem__(index)

    def __iter__(self):
        for entry in super().__iter__():
            Visits.count += 1
            yield entry


def test_a_query_costs_the_same_however_large_the_bank_is(tmp_path, net, encoder, monkeypatch):
    reads = Counter(tensor_store.load)
    monkeypatch.setattr(tensor_store, "load", reads)
    costs = []
    for count in (6, 36):
        support = bank(write_set(tmp_path / f"set{count}", count), tmp_path / "cache", cache_mb=0)
        support.encode(net)
        inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=3), batch_size=1))
        inferer(query(count=1), net, patient="case0", group="set6")
        support.items = Visits(support.items)
        Visits.count = encoder.calls = reads.calls = 0
        inferer(query(count=1), net, patient="case0", group="set6")
        support.is_thin(0), support.is_thin(1)
        costs.append((encoder.calls, reads.calls, Visits.count))
    (encoded, read, visited), larger = costs
    assert encoded == larger[0] == 1
    # Three items for each of two classes, of which some are the same.
    assert 3 <= read <= 6 and 3 <= larger[1] <= 6
    assert visited <= 12 and larger[2] <= 12


# Queries


def test_a_part_has_tables_of_its_own_and_writes_nothing(folder, cache, net):
    support = bank(folder, cache)
    subset = support.subset([1, 4])
    assert [item.id for item in subset.items] == ["case1", "case4"] and set(subset.patients) == {"case1", "case4"}
    assert subset.holds.tolist() == [[True, True], [True, False]]
    segment(subset, net)
    assert not files(cache) and support.embedding is None


def test_the_version_counts_up_when_items_or_network_change_and_only_then(folder, net):
    support = bank(folder)
    first = support.version
    support.reconcile(support.data)
    support.encodings.adopt(net, torch.device("cpu"))
    segment(support, net)
    encoded = support.version
    assert encoded > first
    segment(support, net)
    support.reconcile(list(support.data))
    assert support.version == encoded
    versions = [encoded]
    for change in (support.data[:-1], [case | {"patient": "another"} for case in support.data[:-1]]):
        support.reconcile(change)
        versions.append(support.version)
    support.forget()
    versions.append(support.version)
    assert versions == sorted(set(versions))
