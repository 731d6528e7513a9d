"""Cases become items: which ones, and what becomes of those that can't be used."""

import logging
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from sam2sgp.errors import DataError
from sam2sgp.support import ItemRules, SupportSampler
from sam2sgp.support.catalogue import MAX_EMPTY
from sam2sgp.transforms import cache_keys
from tests.helpers import pairs
from tests.helpers.pairs import (
    COUNT,
    CountedPreprocessing,
    bank,
    bank_of,
    data,
    fresh,
    segment,
    spoil,
    write_case,
)


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


def test_what_an_older_reader_prepared_is_read_again(folder, cache, net, monkeypatch):
    bank(folder, cache).encode(net)
    monkeypatch.setattr(cache_keys, "READERS_VERSION", cache_keys.READERS_VERSION + 1)
    preprocessing = CountedPreprocessing()
    bank(folder, cache, transform=preprocessing).encode(net)
    assert preprocessing.calls == COUNT


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
    wide = bank(tmp_path / "set", cache, rules=ItemRules(slices_per_class=4))
    wide.encode(net)
    assert [item.id for item in wide.items] == [f"scan#{item.slice}" for item in wide.items] and encoder.calls == 4 + 3
    assert [item.slice for item in wide.items if not item.info.holds] == [0, 1, 11], "which hold nothing"
    assert not wide.holds[[0, 1, -1]].any() and len(wide.memory.tokens) == 4
    narrow = bank(tmp_path / "set", cache, rules=ItemRules(slices_per_class=2))
    narrow.encode(net)
    assert len(narrow) == 2 + 3 and encoder.calls == 4 + 3, "slices that were chosen before are found"


def test_a_limit_holds_after_reconciling(folder, place, net):
    limited = ItemRules(max_items=3)
    support = bank(folder, place, rules=limited)
    write_case(folder, "new", 10)
    for _ in range(2):
        support.reconcile(data(folder))
        assert len(support) == 3
        assert [item.id for item in support.items] == [item.id for item in bank(folder, rules=limited).items]


def test_one_bad_case_is_listed_and_the_others_are_used(folder, place, net):
    spoil(folder, "case1")
    with pytest.raises(DataError, match="case1"):
        bank(folder, place)
    preprocessing = CountedPreprocessing()
    support = bank(folder, place, rules=ItemRules(skip_errors=True), transform=preprocessing)
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
    support = bank_of(cases, place, class_names={1: "square"}, rules=ItemRules(skip_errors=True))
    assert [error["name"] for error in support.errors] == ["case0", "case1", "case3", "case5"]
    assert "found value 2" in support.errors[1]["error"] and len(support) == 2


def test_a_label_changed_after_the_cache_was_deleted_is_never_taken_for_the_old_one(folder, cache, tmp_path):
    support = bank(folder, cache, megabytes=0)
    label = support.items[2].label.clone()
    shutil.rmtree(cache)
    assert torch.equal(support.items[2].label, label)
    shutil.rmtree(cache)
    write_case(folder, "case2", 2, shift=3)
    with pytest.raises(DataError, match="case2"):
        support.items[2].label  # noqa: B018


def add_value(folder, name: str, value: int, count: int) -> None:
    """Give some background pixels of a label, in one row, another value."""
    path = folder / "labels" / f"{name}.nii"
    image = nib.load(path)
    array = np.array(image.dataobj)
    array[2, :count] = value
    nib.save(nib.Nifti1Image(array, image.affine), path)
    pairs.age(path)


def test_a_value_that_nothing_names_and_only_one_label_has_is_told(folder, place, caplog):
    add_value(folder, "case4", 7, 5)
    support = bank(folder, place, class_names={})
    [sentence] = support.warnings
    assert f"{folder / 'labels' / 'case4.nii'}: value 7 (5 pixels) is in none of the other 5 labels" in sentence
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == [sentence]
    cases = data(folder)
    again = bank(folder, place, class_names={})
    assert again.warnings == [sentence], "what is known of a case from the folder tells it, too"
    again.reconcile([case | {"named": [7]} for case in cases])
    assert again.warnings == []


def test_a_class_that_is_gone_at_the_networks_size_is_told(folder):
    for name in ("case1", "case3", "case5"):
        write_case(folder, name, 0)
    add_value(folder, "case0", 2, 1)
    assert bank(folder).warnings == []
    small = pairs.preprocessing()
    small.transforms[2].size = 16
    [sentence] = bank(folder, transform=small).warnings
    assert f"{folder / 'labels' / 'case0.nii'}: value 2 (1 pixel) is too small to be seen at the network's" in sentence


def test_strays_of_a_class_are_told(folder):
    add_value(folder, "case0", 2, 1)
    [sentence] = bank(folder).warnings
    assert f"{folder / 'labels' / 'case0.nii'}: value 2 (1 pixel) is hardly there" in sentence


def write_empty(folder, name: str) -> None:
    """A case whose label is empty."""
    write_case(folder, name, len(name))
    path = folder / "labels" / f"{name}.nii"
    nib.save(nib.Nifti1Image(np.zeros((48, 48, 1), np.uint8), np.eye(4)), path)
    pairs.age(path)


def test_pictures_with_an_empty_label_are_items_that_no_limit_counts(folder, place):
    for number in range(40):
        write_empty(folder, f"an_empty_one_{number:02}")
    support = bank(folder, place, rules=ItemRules(max_items=3))
    holding = [bool(item.info.holds) for item in support.items]
    assert sum(holding) == 3 and holding[:3] == 3 * [True] and not support.holds[3:].any()
    support = bank(folder, place)
    assert sum(bool(item.info.holds) for item in support.items) == COUNT and len(support) == COUNT + MAX_EMPTY


def test_only_empty_labels_are_none_and_of_another_group_they_take_no_guidance_away(folder, place, net, tmp_path):
    for number in range(2):
        write_empty(tmp_path / "other", f"empty_{number}")
    empty = [case | {"group": "other"} for case in data(tmp_path / "other")]
    with pytest.raises(DataError, match="at least one object"):
        bank(tmp_path / "other", place)
    support = bank(folder, place)
    # Twice, as the second time nothing is read.
    for _ in range(2):
        support.reconcile([*data(folder), *empty])
        assert len(support) == COUNT + 2
    support.encode(net)
    assert support.retrieve_for(COUNT, SupportSampler(k=2)), "the labels of the first group guide it"


def test_an_object_that_is_lost_at_the_networks_size_makes_no_empty_picture(folder, place):
    write_case(folder, "tiny", 4)
    label = np.zeros((480, 480, 1), np.uint8)
    label[104, 104] = 1
    for kind, array in (("images", np.random.default_rng(0).random(label.shape, np.float32)), ("labels", label)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / kind / "tiny.nii")
        pairs.age(folder / kind / "tiny.nii")
    assert "tiny" not in [item.id for item in bank(folder, place).items]
