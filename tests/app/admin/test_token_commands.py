"""The commands about tokens: what they print and keep, and what a server makes of it."""

import json
import re
from pathlib import Path

import pytest

from lib.roles import Role
from lib.stores.tokens import FILE, Tokens
from manage import main


@pytest.fixture
def server(tmp_path) -> list[str]:
    """The words that say which server."""
    (tmp_path / "state").mkdir()
    (tmp_path / "studies").mkdir()
    settings = tmp_path / "settings.toml"
    settings.write_text(
        "studies = 'studies'\nstate_dir = 'state'\nuser_header = 'X-Remote-User'\nusers = { anna = 'admin' }\n"
    )
    return ["--settings", str(settings)]


def audit(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "state" / "audit.jsonl").read_text().splitlines()]


def test_a_token_is_printed_once_listed_and_revoked(server, tmp_path, capsys):
    assert main("token", *server, "--name", "nightly", "--role", "annotator", "--days", "90") == 0
    printed = capsys.readouterr()
    [text] = printed.out.splitlines()
    assert "not shown again" in printed.err and "for 90 days" in printed.err and text not in printed.err
    assert Tokens(tmp_path / "state").find(text) == ("nightly", Role.annotator)
    assert main("tokens", *server) == 0
    listed = capsys.readouterr().out
    assert re.fullmatch(r"nightly: annotator, made \S+ \S+ UTC, until \S+ \S+ UTC\n", listed) and text not in listed
    assert main("tokens", *server, "--revoke", "nightly") == 0 and main("tokens", *server) == 0
    assert capsys.readouterr().out == "nightly: revoked\nNo tokens.\n"
    lines = audit(tmp_path)
    assert [(line["action"], line["token"]) for line in lines] == [
        ("make token", "nightly"),
        ("revoke token", "nightly"),
    ]
    assert text not in json.dumps(lines)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--name", "x", "--role", "aprover"], "role: expected one of .*, found 'aprover'; did you mean approver?"),
        (["--name", "anna", "--role", "admin"], "name: expected none of a user, found 'anna'"),
        (["--name", "a b", "--role", "admin"], "name: expected up to 64 letters"),
        (["--name", "x", "--role", "admin", "--days", "0"], "days: expected a number from 1 to 36500, found 0"),
        # Its end would be after the last year that can be listed.
        (["--name", "x", "--role", "admin", "--days", "9999999"], "days: expected a number from 1 to 36500"),
    ],
)
def test_what_can_not_be_a_token_is_said_in_one_sentence(server, tmp_path, capsys, words, message):
    assert main("token", *server, *words) == 1
    printed = capsys.readouterr()
    assert re.search(message, printed.err) and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "state" / FILE).exists()


def test_a_token_that_can_not_be_noted_is_not_made(server, tmp_path, capsys):
    (tmp_path / "state" / "audit.jsonl").mkdir()
    assert main("token", *server, "--name", "nightly", "--role", "reader") == 1
    assert "audit log" in capsys.readouterr().err and Tokens(tmp_path / "state").all() == ()


def test_tokens_are_for_a_server_that_there_is(server, tmp_path, capsys):
    (tmp_path / "state").rmdir()
    assert main("tokens", *server) == 1
    assert "expected the state folder of the server" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()
