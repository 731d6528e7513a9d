"""Tokens of scripts: stored as hashes only, whole or not at all, and seen by whoever reads them at once."""

import json
import threading

import pytest

from lib.checks import Unauthorized
from lib.roles import Role
from lib.stores import tokens as module
from lib.stores.tokens import FILE, PREFIX, Tokens, Unreadable
from sam2sgp.errors import ConfigError


def test_a_token_is_known_by_its_hash_which_only_its_user_may_read(tmp_path):
    made = Tokens(tmp_path)
    text = made.add("nightly", Role.annotator)
    assert text.startswith(PREFIX) and len(text) > len(PREFIX) + 40
    assert made.find(text) == ("nightly", Role.annotator)
    stored = (tmp_path / FILE).read_text()
    assert text not in stored and text.removeprefix(PREFIX) not in stored
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert made.add("other", Role.reader) != text
    for wrong in ("", PREFIX, text[:-1], text + " ", text.lower(), json.loads(stored)[0]["sha256"]):
        with pytest.raises(Unauthorized, match="unknown or revoked"):
            made.find(wrong)


def test_another_program_sees_a_new_token_a_revoked_one_and_one_whose_time_is_over(tmp_path, monkeypatch):
    server, admin = Tokens(tmp_path), Tokens(tmp_path)
    with pytest.raises(Unauthorized):
        server.find("x")
    text = admin.add("nightly", Role.admin, days=2)
    assert server.find(text) == ("nightly", Role.admin)
    now = module.time.time()
    for days, is_over in ((1.9, False), (2.1, True)):
        monkeypatch.setattr(module.time, "time", lambda days=days: now + days * module.DAY)
        assert [token.is_over() for token in server.all()] == [is_over]
    with pytest.raises(Unauthorized, match="time is over"):
        server.find(text)
    monkeypatch.undo()
    admin.revoke("nightly")
    with pytest.raises(Unauthorized, match="unknown or revoked"):
        server.find(text)


def test_every_token_is_compared_whatever_the_first_one_says(tmp_path, monkeypatch):
    """As long for a right one as for a wrong one, and by a comparison that takes as long for any."""
    made = Tokens(tmp_path)
    text = [made.add(f"script-{number}", Role.reader) for number in range(3)][0]
    compared = []
    compare = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    made.find(text)
    with pytest.raises(Unauthorized):
        made.find("x")
    assert len(compared) == 6


def test_a_name_is_one_scripts(tmp_path):
    made = Tokens(tmp_path)
    made.add("nightly", Role.admin)
    with pytest.raises(ConfigError, match="found a token named 'nightly'; revoke that first"):
        made.add("nightly", Role.reader)
    for wrong in ("", "../x", "-x", "a b", "a\n", "é", "a" * 65):
        with pytest.raises(ConfigError, match="expected up to 64 letters"):
            made.add(wrong, Role.reader)
    with pytest.raises(ConfigError, match=r"expected the name of a token \(nightly\), found 'other'"):
        made.revoke("other")
    assert [token.name for token in made.all()] == ["nightly"]


def test_of_changes_at_once_none_is_lost(tmp_path):
    threads = [threading.Thread(target=Tokens(tmp_path).add, args=(f"s{n}", Role.reader)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {token.name for token in Tokens(tmp_path).all()} == {f"s{n}" for n in range(8)}


@pytest.mark.parametrize(
    "content", ["{", "{}", '[{"name": "a"}]', '[{"name": "a", "role": "boss", "sha256": "0", "made": 0}]', "[1]"]
)
def test_a_damaged_file_is_said_and_not_taken_for_an_empty_one(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    for change in (lambda made: made.all(), lambda made: made.find("x"), lambda made: made.add("a", Role.reader)):
        with pytest.raises(Unreadable, match="damaged or unreadable; its administrator has to delete it"):
            change(Tokens(tmp_path))
    assert (tmp_path / FILE).read_text() == content
