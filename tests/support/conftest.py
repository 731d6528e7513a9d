"""A support set of six cases, a network, and what the bank in memory makes of them."""

from pathlib import Path

import pytest
import torch

from sam2sgp.networks import SAM2SGP
from tests.helpers.bundle_runs import computing_with_one_thread
from tests.helpers.pairs import (
    COUNT,
    Counter,
    bank,
    network,
    segment,
    write_set,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes of these tests: with more threads, random weights and results differ in their last bits."""
    with computing_with_one_thread():
        yield


@pytest.fixture(scope="session")
def net() -> SAM2SGP:
    with computing_with_one_thread():
        return network()


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_set(tmp_path / "set", COUNT)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def encoder(net, monkeypatch) -> Counter:
    """Counts the passes of the encoder."""
    counter = Counter(net.encode)
    monkeypatch.setattr(net, "encode", counter)
    return counter


@pytest.fixture(scope="session")
def expected(net, tmp_path_factory) -> torch.Tensor:
    """Logits with a bank in memory."""
    with computing_with_one_thread():
        return segment(bank(write_set(tmp_path_factory.mktemp("memory") / "set", COUNT)), net)


@pytest.fixture(params=["folder", "memory"])
def place(request, cache) -> Path | None:
    return cache if request.param == "folder" else None
