"""A run says how to repeat it."""

import hashlib
import shlex
import sys
from importlib.metadata import version

from sam2sgp.report.run_info import run_info_of


def test_a_run_can_be_repeated(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"weights")
    run_info = run_info_of({"Weights": tmp_path / "w.pt", "Retrieval": "K = 8"})
    assert run_info["SHA-256 of the weights"] == hashlib.sha256(b"weights").hexdigest()
    assert shlex.split(run_info["Command"]) == sys.orig_argv and f"torch {version('torch')}" in run_info["Versions"]


def test_the_command_is_told_as_it_was_typed_with_the_folder_that_its_paths_start_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/sam2sgp", "segment", "-s", "my labels"])
    run_info = run_info_of({})
    assert run_info["Command"] == "sam2sgp segment -s 'my labels'" and run_info["Folder"] == str(tmp_path)
