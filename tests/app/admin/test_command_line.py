"""Which server a command is about."""

import os

import pytest

from lib.admin.command_line import check_state, parser_of, settings_of, with_file
from sam2sgp.errors import ConfigError
from tests.app.conftest import APP


def given(*words: object):
    return parser_of("x").parse_args([*map(str, words)])


@pytest.fixture
def studies(tmp_path):
    (tmp_path / "studies").mkdir()
    return tmp_path / "studies"


def test_a_server_is_named_by_its_studies_and_state(studies, tmp_path):
    settings = settings_of(given("--studies", studies, "--state-dir", tmp_path / "state"), APP)
    assert (settings.studies, settings.state_dir) == (str(studies), tmp_path / "state")


def test_the_settings_file_names_both_and_the_command_line_comes_first(studies, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(f"studies = '{studies}'\nstate_dir = '{tmp_path / 'one'}'\nport = 8123\n")
    assert settings_of(given("--settings", file), APP).state_dir == tmp_path / "one"
    words = given("--settings", file, "--state-dir", tmp_path / "two")
    assert settings_of(words, APP).state_dir == tmp_path / "two"
    _, start = with_file(given("--settings", file), {}, APP, "x")
    assert start["port"] == 8123


def test_no_studies_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="studies: expected a folder .*, found none; give --studies, or --settings"):
        settings_of(given(), APP)


def test_a_state_that_was_never_made_is_named(studies, tmp_path):
    settings = settings_of(given("--studies", studies, "--state-dir", tmp_path / "state"), APP)
    with pytest.raises(ConfigError, match=f"found no {tmp_path / 'state'}"):
        check_state(settings)
    (tmp_path / "state").mkdir()
    check_state(settings)


def test_root_does_not_work_on_the_state_of_another_user(studies, tmp_path, monkeypatch):
    state = tmp_path / "state"
    state.mkdir()
    owner = 12345 if os.geteuid() == 0 else os.geteuid()
    if os.geteuid() == 0:
        os.chown(state, owner, owner)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match="expected to be run by the folder's user, found root.*run it as user"):
        settings_of(given("--studies", studies, "--state-dir", state), APP)
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    settings_of(given("--studies", studies, "--state-dir", state), APP)
