"""Exchange of the weights that serve, with networks that are lists."""

import threading
from pathlib import Path

import pytest

from lib.serving.exchange import WeightsExchange
from lib.serving.published_weights import Version
from sam2sgp.errors import WeightsError

OLD, NEW, NEWER = (Version(name, Path(f"{name}.pt")) for name in ("old", "new", "newer"))


@pytest.fixture(autouse=True)
def _no_waiting_behind_others(monkeypatch):
    # It would hold for the thread of the tests, too.
    monkeypatch.setattr("lib.serving.exchange.give_way", lambda: None)


def test_a_version_is_built_beside_the_one_that_serves_then_takes_over():
    go_on, served = threading.Event(), []
    exchange = WeightsExchange(lambda version: go_on.wait(60) and [version.name], served.append)
    exchange.want(NEW, OLD)
    exchange.want(NEWER, OLD)  # one at a time
    assert exchange.rebuilding == "new" and served == []
    go_on.set()
    exchange.wait()
    assert exchange.rebuilding is None and exchange.problem is None and served == [["new"]]


def test_the_version_that_serves_is_not_built_again():
    exchange = WeightsExchange(lambda version: pytest.fail("built again"), pytest.fail)
    exchange.want(OLD, OLD)
    exchange.wait()
    assert exchange.rebuilding is None


def test_a_version_that_fails_is_told_and_tried_once_only():
    tried, served = [], []

    def build(version):
        tried.append(version.name)
        if version is NEW:
            raise WeightsError("new.pt: expected weights, found text.")
        return [version.name]

    exchange = WeightsExchange(build, served.append)
    for _ in range(2):
        exchange.want(NEW, OLD)
        exchange.wait()
    assert tried == ["new"] and served == []
    assert (
        exchange.problem
        == "The weights 'new' can't be put in use, the old ones serve: new.pt: expected weights, " + ("found text.")
    )
    exchange.want(NEWER, OLD)
    exchange.wait()
    assert served == [["newer"]] and exchange.problem is None


def test_back_at_the_version_that_serves_nothing_is_wrong():
    def build(version):
        raise WeightsError("new.pt: expected weights, found text.")

    exchange = WeightsExchange(build, pytest.fail)
    exchange.want(NEW, OLD)
    exchange.wait()
    assert exchange.problem
    exchange.want(OLD, OLD)
    assert exchange.problem is None
