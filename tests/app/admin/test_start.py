"""The start of the server: which settings it gets, and what it leaves alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from monailabel.main import Main as MonaiLabel

from lib.admin.start import address, arguments, chosen, linked_app
from manage import main
from sam2sgp.errors import ConfigError
from tests.app.conftest import APP


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "my images").mkdir()
    path = tmp_path / "settings.toml"
    path.write_text("studies = 'my images'\nhost = '0.0.0.0'\nport = 8123\nk = 3\nct_window = [-100, 300]\n")
    return path


def test_the_command_line_comes_before_the_file_and_the_file_before_the_defaults(file, tmp_path):
    settings, host, port = chosen(arguments(["--settings", str(file)]), APP)
    assert (settings.studies, host, port) == (str(tmp_path / "my images"), "0.0.0.0", 8123)
    assert settings.overrides == {"k": 3, "ct_window": [-100, 300]}
    (tmp_path / "other").mkdir()
    words = ["--studies", str(tmp_path / "other"), "--host", "::1", "--port", "8124", "--conf", "ct_window", "[0, 9]"]
    settings, host, port = chosen(arguments(["--settings", str(file), *words]), APP)
    assert (settings.studies, host, port) == (str(tmp_path / "other"), "::1", 8124)
    assert settings.overrides == {"k": 3, "ct_window": [0, 9]}
    _, host, port = chosen(arguments(["--studies", str(tmp_path)]), APP)
    assert (host, port) == ("127.0.0.1", 8000)


def test_what_is_missing_is_said_before_anything_is_made(file, tmp_path):
    with pytest.raises(ConfigError, match="found none; give it on the command line, or as studies in the settings"):
        chosen(arguments([]), APP)
    with pytest.raises(ConfigError, match="found no folder .*absent; correct its path"):
        chosen(arguments(["--studies", str(tmp_path / "absent")]), APP)
    assert not (tmp_path / "absent").exists()


def test_the_servers_folder_links_to_the_code_and_follows_it(tmp_path):
    code, folder = tmp_path / "code", tmp_path / "state" / "app"
    (code / "lib").mkdir(parents=True)
    (code / "main.py").write_text("first")
    (code / "logs").mkdir()
    assert linked_app(code, folder) == folder
    (folder / "logs").mkdir()
    (folder / "logs" / "app.log").touch()
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "main.py").write_text("second")
    linked_app(newer, folder)
    assert (folder / "main.py").read_text() == "second" and not (folder / "lib").is_symlink()
    assert (folder / "logs" / "app.log").is_file() and not (code / "logs" / "app.log").exists()


@pytest.mark.parametrize("newer", ["my images", "state"])
def test_folders_of_a_newer_version_end_the_start_with_one_line(file, tmp_path, capsys, newer):
    file.write_text(file.read_text() + "state_dir = 'state'\n")
    (tmp_path / "state").mkdir()
    (tmp_path / newer / ".sam2sgp-layout.json").write_text('{"layout": 99}')
    assert main("serve", "--settings", str(file)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / newer}: expected files of layout 1 or older, found layout 99")
    assert not (tmp_path / "state" / "app").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Elsewhere PyTorch's threads are of another library")
@pytest.mark.parametrize(("own", "rounds"), [({}, 0), ({"OMP_WAIT_POLICY": "ACTIVE"}, 30_000_000_000)])
def test_pytorchs_threads_wait_asleep_unless_the_user_wants_them_awake(tmp_path, own, rounds):
    """The library of its threads tells how often one looks before it sleeps; by default that is 300,000 times."""
    usual = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, str(APP / "manage.py"), "serve", "--studies", str(tmp_path / "absent")],
        env={**usual, **own, "OMP_DISPLAY_ENV": "VERBOSE"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1 and "found no folder" in done.stderr
    assert f"GOMP_SPINCOUNT = '{rounds}'" in done.stderr


def test_a_mistake_ends_the_start_with_one_line(file, capsys):
    file.write_text("ct_windw = [1, 2]")
    assert main("serve", "--studies", str(file.parent), "--settings", str(file)) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(f"error: {file}, ct_windw: expected") and told.err.count("\n") == 1


@pytest.mark.parametrize(
    "host, shown",
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("pacs", "pacs")],
)
def test_the_address_told_is_one_that_a_browser_takes(host, shown):
    assert address(host, 8123) == f"http://{shown}:8123/"


def test_monai_label_gets_values_with_types_and_spaces(file, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(MonaiLabel, "action_start_server", lambda self, options: started.append(vars(options)))
    state = tmp_path / "the state"
    assert main("serve", "--settings", str(file), "--conf", "state_dir", str(state)) == 0
    assert "its pages are at http://127.0.0.1:8123/" in capsys.readouterr().out
    [options] = started
    assert options["studies"] == str(tmp_path / "my images") and options["port"] == 8123
    assert dict(options["conf"]) == {"k": 3, "ct_window": [-100, 300], "state_dir": str(state)}
    assert (Path(options["app"]) / "main.py").samefile(APP / "main.py") and state.stat().st_mode & 0o777 == 0o700
