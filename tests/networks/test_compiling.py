"""torch.compile of the image encoder, guarded."""

from copy import deepcopy

import pytest
import torch

from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP, compile_encoder, compiling


def test_the_encoder_runs_compiled_and_names_and_copies_stay(monkeypatch):
    network = SAM2SGP("nano", 64).eval()
    names, image = list(network.state_dict()), torch.rand(1, 3, 64, 64)
    expected = network.encode(image).embedding
    calls = []
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *args: calls.append(1) or call(*args))
    assert compile_encoder(network) is network
    torch.testing.assert_close(network.encode(image).embedding, expected)
    assert calls == [1, 1]  # trunk and neck
    assert list(network.state_dict()) == names
    deepcopy(network).encode(image)
    assert calls == [1, 1]  # trunk and neck


def test_without_what_a_compiler_needs_the_error_says_so(monkeypatch):
    network = SAM2SGP("nano", 64)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="g\\+\\+"):
        compile_encoder(network)
