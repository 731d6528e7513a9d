"""What a cached thing depends on: files by their content and the network, never a path."""

import os
import shutil

import pytest
import torch

from sam2sgp.networks import SAM2SGP
from sam2sgp.support import content
from tests.helpers import pairs
from tests.helpers.pairs import (
    COUNT,
    CountedPreprocessing,
    Counter,
    age,
    bank,
    data,
    embedding_of,
    fresh,
    network,
    segment,
    write_case,
)


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


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_an_edited_file_is_not_taken_for_the_old_one(folder, cache, net, encoder, kind, tmp_path):
    bank(folder, cache).encode(net)
    write_case(tmp_path / "edited", "case2", 2, shift=3)
    shutil.copy(tmp_path / "edited" / kind / "case2.nii", folder / kind / "case2.nii")
    support = bank(folder, cache)
    support.encode(net)
    assert encoder.calls == COUNT + 1
    assert torch.equal(segment(support, net), fresh(folder, net))


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
        assert torch.equal(support.embedding, embedding_of(folder, adapted))
    assert len(fingerprints) == 3


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
