"""The support bank's folder: damage, a full disk, processes that share it, and kills."""

import logging
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from sam2sgp.support import SupportBank, tensor_store
from tests.helpers import pairs
from tests.helpers.pairs import (
    COUNT,
    CountedPreprocessing,
    bank,
    files,
    segment,
    write_set,
)

ROOT = Path(__file__).parents[2]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-len(content) // 4] ^= 1
    path.write_bytes(content)


def _another_item(path: Path) -> None:
    other = next(other for other in sorted(path.parent.iterdir()) if other != path and other.suffix == path.suffix)
    shutil.copy(other, path)


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip_a_bit, _another_item, Path.unlink])
@pytest.mark.parametrize("index", ["kept", "lost"])
def test_damaged_files_are_made_again(folder, cache, net, expected, encoder, damage, index):
    segment(bank(folder, cache), net)
    for path in files(cache, "encoded")[::2] + files(cache, "prepared")[::2]:
        damage(path)
    if index == "lost":
        shutil.rmtree(cache / "index")
    assert torch.equal(segment(bank(folder, cache), net), expected)
    if index == "kept":
        for item in bank(folder, cache).items:
            assert item.image.shape[-1] == pairs.SIZE


def test_damage_while_the_bank_is_in_use_is_repaired(folder, cache, net, expected, encoder):
    support = bank(folder, cache, megabytes=0)
    assert torch.equal(segment(support, net), expected)
    for path in files(cache):
        _truncate(path)
    assert torch.equal(segment(support, net), expected)
    valid = [path for path in files(cache) if tensor_store.load(path, str(path.relative_to(cache).with_suffix("")))]
    assert valid, "what was read is whole again"


def _garbage(index: Path) -> None:
    index.write_bytes(os.urandom(5000))


def _cut(index: Path) -> None:
    with sqlite3.connect(index) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    index.write_bytes(index.read_bytes()[:5000])


def _wrong_values(index: Path) -> None:
    with sqlite3.connect(index) as connection:
        rows = connection.execute("SELECT rowid, value FROM facts").fetchall()
        for row, value in rows:
            connection.execute("UPDATE facts SET value = ? WHERE rowid = ?", (value[:-1] + b"\x07", row))
    connection.close()


def _wrong_schema(index: Path) -> None:
    index.unlink()
    with sqlite3.connect(index) as connection:
        connection.execute("CREATE TABLE facts (other TEXT)")
    connection.close()


@pytest.mark.parametrize("damage", [_garbage, _cut, _wrong_values, _wrong_schema, Path.unlink])
def test_a_damaged_index_costs_nothing_but_reading(folder, cache, net, expected, encoder, damage):
    bank(folder, cache).encode(net)
    calls = encoder.calls
    damage(cache / "index" / "index.sqlite")
    support = bank(folder, cache)
    support.encode(net)
    assert encoder.calls == calls, "files are valid without the index"
    assert torch.equal(segment(support, net), expected)
    if damage in (_garbage, _cut, _wrong_values, Path.unlink):
        preprocessing = CountedPreprocessing()
        bank(folder, cache, transform=preprocessing)
        assert preprocessing.calls == 0, "the index is whole again"


def test_the_folder_may_be_deleted_at_any_time(folder, cache, net, expected):
    support = bank(folder, cache, megabytes=0)
    shutil.rmtree(cache)
    assert torch.equal(segment(support, net), expected)
    shutil.rmtree(cache)
    assert torch.equal(segment(support, net), expected)
    assert files(cache), "and is filled again"


@contextmanager
def full_disk():
    """No file can grow beyond a kilobyte, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_memory_takes_over_with_one_warning(folder, cache, net, expected, encoder, caplog):
    with full_disk(), caplog.at_level(logging.WARNING):
        support = bank(folder, cache, megabytes=0)
        assert torch.equal(segment(support, net), expected)
        calls = encoder.calls
        support.encode(net)
        assert encoder.calls == calls, "what could not be written is held"
    assert len([record for record in caplog.records if "support_cache_dir" in record.message]) == 1
    assert not files(cache) and not list(cache.glob("*/*/.*"))
    assert torch.equal(segment(bank(folder, cache), net), expected)


@contextmanager
def without_rights(folder: Path):
    """As a user who may read everything in a folder and write nothing."""
    user = os.geteuid()
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.parametrize("filled", [True, False])
def test_a_folder_that_can_not_be_written_is_read_and_memory_does_the_rest(net, expected, encoder, caplog, filled):
    with TemporaryDirectory() as place:
        place = Path(place)
        place.chmod(0o755)
        folder, cache = write_set(place / "set", COUNT), place / "cache"
        cache.mkdir()
        if filled:
            bank(folder, cache).encode(net)
        calls = encoder.calls
        with without_rights(place), caplog.at_level(logging.WARNING):
            preprocessing = CountedPreprocessing()
            support = bank(folder, cache, transform=preprocessing)
            support.encode(net)
            if filled:
                assert encoder.calls == calls and preprocessing.calls == 0
            assert torch.equal(segment(support, net), expected)
        assert len([record for record in caplog.records if "support_cache_dir" in record.message]) == 1


# Forks for each cache folder a process that fills it; a fork before any computation saves importing everything again.
FILL = """
import os, sys
sys.path.insert(0, {root!r})
from tests.helpers.pairs import encode_to
{setup}
pids = []
for cache, moment in {caches!r}:
    pids.append(os.fork())
    if not pids[-1]:
        left = moment
        encode_to({folder!r}, cache)
        os._exit(0)
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


# Ends the process at the given step: while a file is half written, or before or after it appears or a row is added.
KILL = """
import signal, sqlite3
from pathlib import Path
def step():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def stepping(function):
    def call(*arguments, **keywords):
        step()
        result = function(*arguments, **keywords)
        step()
        return result
    return call
write = Path.write_bytes
def half(path, content):
    write(path, content[: len(content) // 2])
    step()
    return write(path, content)
Path.write_bytes = half
os.replace = stepping(os.replace)
class Connection(sqlite3.Connection):
    executemany = stepping(sqlite3.Connection.executemany)
connect = sqlite3.connect
sqlite3.connect = lambda *arguments, **keywords: connect(*arguments, factory=Connection, **keywords)
"""


def fill(folder: Path, caches: list[tuple[Path, int]], setup: str = "") -> list[int]:
    """Exit codes of processes that fill one cache folder each, all at once."""
    code = FILL.format(root=str(ROOT), setup=setup, folder=str(folder), caches=[(str(c), m) for c, m in caches])
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bundle")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [int(code) for code in done.stdout.split()]


@pytest.mark.slow
def test_two_processes_at_once_make_one_whole_bank(folder, cache, net, expected, encoder):
    assert fill(folder, [(cache, 0)] * 2) == [0, 0]
    support = bank(folder, cache)
    support.encode(net)
    assert encoder.calls == 0 and not list(cache.glob("*/*/.*"))
    assert torch.equal(segment(support, net), expected)


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_only_what_was_being_written(folder, tmp_path, net, expected, encoder):
    # Preparing takes the first 22 steps, encoding the items the next 20, their regions and tiles the rest.
    moments = sorted(np.random.default_rng(7).choice(range(60), 12, replace=False).tolist())
    caches = [tmp_path / f"cache{moment}" for moment in moments]
    assert fill(folder, list(zip(caches, moments, strict=True)), KILL) == [-signal.SIGKILL] * len(moments)
    encoded = []
    for cache in caches:
        encoded.append(len([path for path in files(cache) if path.name.endswith(".item.safetensors")]))
        encoder.calls = 0
        support = bank(folder, cache)
        support.encode(net)
        assert encoder.calls == COUNT - encoded[-1]
        assert torch.equal(segment(support, net), expected)
    assert encoded[0] == 0 and encoded[-1] == COUNT and len(set(encoded)) > 3


def test_memory_read_is_bounded(folder, cache, net):
    whole = bank(folder, cache)
    segment(whole, net)
    encoding = sum(tensor.nbytes for tensor in whole.store.read(f"encoded/{whole.fingerprint}/{_item(whole)}").values())
    small = bank(folder, cache, megabytes=2.5 * encoding / 2**20)
    segment(small, net)
    assert small.store.recent.currsize <= 2.5 * encoding < whole.store.recent.currsize
    assert not small.encodings._held and not small.catalogue._pixels and not small.store._unsaved


def _item(support: SupportBank) -> str:
    return f"{support.items[0].content}.item"
