"""The audit log: one whole line for each action, from several processes, after a kill and with the proxy's user."""

import json
import multiprocessing

import pytest

from lib.checks import StorageError
from lib.stores.audit import Audit, content_hash, current_user


def write_many(path, worker: int) -> None:
    audit = Audit(path)
    for number in range(50):
        audit.write("approve", image=f"{worker}_{number}", text="x" * 500)


def entries(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_who_what_and_when(tmp_path):
    token = current_user.set("dr. müller")
    try:
        Audit(tmp_path / "state" / "audit.jsonl").write("approve", image="A", tag="final", sha256="sha256:00")
    finally:
        current_user.reset(token)
    (entry,) = entries(tmp_path / "state" / "audit.jsonl")
    assert entry["user"] == "dr. müller" and entry["action"] == "approve" and entry["image"] == "A"
    assert entry["time"].endswith("+00:00")


def test_lines_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(path, worker)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(entry["image"] for entry in entries(path)) == sorted(f"{w}_{n}" for w in range(2) for n in range(50))


def test_a_line_cut_by_a_kill_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"action": "appr')
    Audit(path).write("remove label", image="A")
    assert json.loads(path.read_text().splitlines()[-1])["image"] == "A"


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="audit.jsonl: expected to append"):
        Audit(tmp_path / "file" / "audit.jsonl").write("approve")


def test_the_hash_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert content_hash(tmp_path / "a") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
