"""Published weights: publication in one step, order of versions, rolling back, damage and several processes."""

import json
import multiprocessing
import os

import pytest

from lib.serving.published_weights import Weights
from sam2sgp.errors import WeightsError


@pytest.fixture
def start(tmp_path):
    path = tmp_path / "start.pt"
    path.write_bytes(b"start")
    return path


@pytest.fixture
def weights(tmp_path, start):
    return Weights(tmp_path / "weights", start)


def a_file(tmp_path, content: bytes):
    path = tmp_path / "trained.pt"
    path.write_bytes(content)
    return path


def test_the_embedded_weights_serve_until_something_is_published(weights, start):
    assert weights.active().name == "embedded" and weights.active().path == start
    assert [version.name for version in weights.versions()] == ["embedded"]
    assert not weights.folder.exists()


def test_a_published_version_is_a_whole_copy_and_in_use_in_other_objects_too(weights, tmp_path, start):
    other = Weights(weights.folder, start)
    assert other.active().name == "embedded"
    (tmp_path / "more").write_text("{}")
    version = weights.publish(a_file(tmp_path, b"one"), {"dice": 0.5}, {"halves.json": tmp_path / "more"})
    assert version == other.active() == weights.versions()[1]
    assert version.path.read_bytes() == b"one" and version.metrics == {"dice": 0.5} and version.published
    assert version.path.with_name("halves.json").read_text() == "{}"
    assert not list(weights.folder.glob(".part.*"))


def test_rolling_back_goes_to_what_was_replaced_and_ends_at_the_embedded_weights(weights, tmp_path):
    for content in (b"one", b"two"):
        weights.publish(a_file(tmp_path, content), {})
    assert weights.roll_back().path.read_bytes() == b"one"
    three = weights.publish(a_file(tmp_path, b"three"), {})
    assert (three.name, three.replaced) == ("3", "1")
    assert weights.roll_back().name == "1" and weights.roll_back().name == "embedded"
    with pytest.raises(WeightsError, match="none before"):
        weights.roll_back()
    assert [version.name for version in weights.versions()] == ["embedded", "1", "2", "3"]


def test_nothing_to_roll_back_to_is_said_and_makes_no_folder(weights):
    with pytest.raises(WeightsError, match="none before"):
        weights.roll_back()
    assert not weights.folder.exists()


def test_asking_for_the_active_version_again_reads_no_file(weights, tmp_path, monkeypatch):
    weights.publish(a_file(tmp_path, b"one"), {})
    weights.active()
    monkeypatch.setattr(Weights, "_read", lambda *_: pytest.fail("read again"))
    assert weights.active().name == "1"


def test_a_failed_publication_leaves_the_old_version_in_use(weights, tmp_path):
    weights.publish(a_file(tmp_path, b"one"), {})
    with pytest.raises(WeightsError, match="stay in use"):
        weights.publish(tmp_path / "absent.pt", {})
    assert weights.active().name == "1" and len(weights.versions()) == 2
    assert not list(weights.folder.glob(".part.*"))


def test_damage_is_named(weights, tmp_path, start):
    weights.publish(a_file(tmp_path, b"one"), {})
    (weights.folder / "active.json").write_text('{"version": "../start"}')
    with pytest.raises(WeightsError, match="is not there"):
        Weights(weights.folder, start).active()
    (weights.folder / "active.json").write_text("{")
    with pytest.raises(WeightsError, match="active.json"):
        Weights(weights.folder, start).active()
    (weights.folder / "active.json").unlink()
    assert Weights(weights.folder, start).active().name == "embedded"


def _publish(folder, start, path, count):
    weights = Weights(folder, start)
    for _ in range(count):
        weights.publish(path, {})


def test_several_processes_publish_without_losing_a_version(weights, tmp_path, start):
    path = a_file(tmp_path, os.urandom(100_000))
    processes = [
        multiprocessing.get_context("fork").Process(target=_publish, args=(weights.folder, start, path, 3))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    versions = weights.versions()
    assert [version.name for version in versions] == ["embedded", "1", "2", "3", "4", "5", "6"]
    assert [version.replaced for version in versions[1:]] == ["embedded", "1", "2", "3", "4", "5"]
    assert json.loads((weights.folder / "active.json").read_text())["version"] == "6"
