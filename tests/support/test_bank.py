"""The support bank: the same with and without a folder, in line with its cases, and at no cost of its size."""

import nibabel as nib
import numpy as np
import pytest
import torch

from sam2sgp.errors import DataError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.support import ItemRules, SupportBank, SupportSampler, tensor_store
from tests.helpers.banks import phantom
from tests.helpers.pairs import (
    COUNT,
    CountedPreprocessing,
    Counter,
    bank,
    bank_of,
    data,
    files,
    fresh,
    network,
    query,
    segment,
    spoil,
    write_case,
    write_set,
)


@pytest.mark.parametrize("megabytes", [256, 0.05, 0])
def test_results_are_the_same_to_the_last_bit_with_and_without_a_folder(folder, cache, net, expected, megabytes):
    written = segment(bank(folder, cache, megabytes=megabytes), net)
    read = segment(bank(folder, cache, megabytes=megabytes), net)
    assert torch.equal(written, expected) and torch.equal(read, expected)
    assert expected.isfinite().all() and expected.std() > 0


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


def test_where_errors_are_not_skipped_the_bank_stays_as_it_was(folder, place, net):
    support = bank(folder, place)
    before = segment(support, net)
    spoil(folder, "case1")
    with pytest.raises(DataError):
        support.reconcile(data(folder))
    assert len(support) == COUNT and torch.equal(segment(support, net), before)


def test_a_bank_may_start_empty(folder, place, net):
    with pytest.raises(DataError, match="at least one object"):
        bank_of([], place)
    support = bank_of([], place, rules=ItemRules(allow_empty=True))
    support.encode(net)
    features = net.encode(query().expand(-1, 3, -1, -1))
    assert len(support) == 0 and support.retrieve(net, features, SupportSampler()) == []
    support.reconcile(data(folder))
    assert torch.equal(segment(support, net), fresh(folder, net))
    support.reconcile([])
    assert support.retrieve(net, features, SupportSampler()) == [] and support.patients == {}


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
        support = bank(write_set(tmp_path / f"set{count}", count), tmp_path / "cache", megabytes=0)
        support.encode(net)
        inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=3), batch_size=1))
        inferer(query(count=1), net, patient="case0", group="set6")
        support.items = Visits(support.items)
        Visits.count = encoder.calls = reads.calls = 0
        inferer(query(count=1), net, patient="case0", group="set6")
        support.tile_share(0, net.image_size), support.tile_share(1, net.image_size)
        costs.append((encoder.calls, reads.calls, Visits.count))
    (encoded, read, visited), larger = costs
    assert encoded == larger[0] == 1
    # Three items for each of two classes, of which some are the same.
    assert 3 <= read <= 6 and 3 <= larger[1] <= 6
    assert visited <= 12 and larger[2] <= 12


def test_a_bank_of_other_patients_has_tables_of_its_own_and_writes_nothing(folder, cache, net):
    support = bank(folder, cache)
    other = support.of_patients([*"aabbcc"])
    assert set(other.patients) == {*"abc"} and set(support.patients) == {item.id for item in support.items}
    assert torch.equal(other.holds, support.holds) and other.scaling() == support.scaling()
    segment(other, net)
    assert not files(cache) and support.embedding is None


def test_mirrored_items_are_encoded_once_where_there_is_a_folder(folder, cache, net, encoder):
    support = bank(folder, cache)
    support.encode(net)
    mirrored = support.mirrored()
    mirrored.encode(net)
    encoded = encoder.calls
    again = bank(folder, cache).mirrored()
    again.encode(net)
    assert encoder.calls == encoded == 2 * COUNT and torch.equal(again.embedding, mirrored.embedding)
    assert torch.equal(again.items[0].image, support.items[0].image.flip(-1))
    write_case(folder, "new", 10)
    support.reconcile(data(folder))
    support.mirrored().encode(net)
    assert encoder.calls == encoded + 1 and not torch.equal(support.embedding[0], mirrored.embedding[0])


def test_a_mirrored_bank_in_memory_encodes_what_is_new_and_is_forgotten_with_the_network(folder, net, encoder):
    support = bank(folder)
    support.encode(net)
    mirrored = support.mirrored()
    mirrored.encode(net)
    encoded = encoder.calls
    write_case(folder, "new", 10)
    support.reconcile(data(folder))
    assert support.mirrored() is mirrored and len(mirrored) == COUNT + 1
    mirrored.encode_missing(net)
    assert encoder.calls == encoded + 1 and len(mirrored.embedding) == COUNT + 1
    support.forget()
    assert support.mirrored() is not mirrored and support.mirrored().embedding is None


def test_what_a_step_raises_ends_the_encoding_which_goes_on_from_there(folder, cache, net, encoder):
    support = bank(folder, cache)

    def step(slices: int) -> None:
        if encoder.calls == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        support.encode(net, step=step)
    assert encoder.calls == 2 and support.embedding is None
    support.encode(net)
    assert encoder.calls == COUNT


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


def test_one_piece_classes_are_told_by_each_group_and_by_patients_and_are_kept_in_the_folder(tmp_path):
    """Of six volumes of two groups, class 1 is in two parts in one; class 2 is one piece wherever it is."""
    cases = []
    for number in range(6):
        label = np.zeros((16, 16, 6), np.uint8)
        label[2:8, 2:8, :3] = 1
        label[10:14, 10:14, 1:5] = 2 * (number < 3)
        label[2:8, 2:8, 5] = number == 5
        case = {"name": f"v{number}", "patient": f"p{number}", "group": "ab"[number // 3]}
        for kind, array in (("image", label.astype(np.float32)), ("label", label)):
            case[kind] = str(tmp_path / f"{kind}{number}.nii")
            nib.save(nib.Nifti1Image(array, np.eye(4)), case[kind])
        cases.append(case)
    for _ in ("made", "read from the folder"):
        support = bank_of(cases, tmp_path / "cache")
        assert [support.one_piece(group=group) for group in ("a", "b", "c", None)] == [[1, 2], [], [2], [2]]
        assert support.one_piece("p5") == [1, 2] and support.one_piece("p0", "a") == []
    # A query looks at no item: of many classes in long volumes there are thousands.
    expected = support.one_piece(group="a")
    shares = [item.main_shares for item in support.items]
    for item in support.items:
        item.main_shares = {}
    assert support.one_piece(group="a") == expected
    for item, own in zip(support.items, shares, strict=True):
        item.main_shares = own
    assert support.of_patients(["one"] * len(support)).one_piece() == []


def test_a_declared_class_beyond_a_byte_is_not_the_class_256_below():
    cases = [phantom(number) for number in range(2)]
    support = SupportBank(cases, lambda case: case, {1: "disc", 256: "other", 257: "another"}, progress=False)
    masks = support.masks(support.items)
    assert masks[:, 0].any() and not masks[:, 1:].any()
