"""A settings file in place of `--conf`, and beside it."""

import json
from pathlib import Path

import pytest

from lib.settings import Settings, start_values
from lib.settings_file import read_settings_file
from sam2sgp.errors import ConfigError

APP = Path(__file__).parents[2] / "apps" / "sam2sgp"
TOML = """
k = 3
ct_window = [-100, 300]
three_d_memory = false
hosts = ["Viewer.Example", "other"]
max_upload_mb = 10
support_dir = "seeds and more"

[dicomweb_filter]
Modality = "MR"
"""


def settings(path: Path, starts: bool = False, **conf: str) -> Settings:
    return Settings.from_conf(APP, "studies", {"settings": str(path), **conf}, starts)


@pytest.fixture
def written(tmp_path):
    """Writes a settings file."""
    (tmp_path / "seeds and more").mkdir()

    def write(text: str, name: str = "my settings.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_values_have_the_types_that_they_are_written_with(written, suffix):
    content = TOML
    if suffix == ".json":
        values = {"k": 3, "ct_window": [-100, 300], "three_d_memory": False, "hosts": ["Viewer.Example", "other"]}
        values |= {"max_upload_mb": 10, "support_dir": "seeds and more", "dicomweb_filter": {"Modality": "MR"}}
        content = json.dumps(values)
    path = written(content, f"x{suffix}")
    made = settings(path)
    assert made.overrides == {"k": 3, "ct_window": [-100, 300], "three_d_memory": False}
    assert made.hosts == ("viewer.example", "other") and made.max_upload_mb == 10
    assert made.dicomweb_filter == {"Modality": "MR"}
    assert made.support_dir == path.parent / "seeds and more", "relative to the file"


def test_conf_comes_before_the_file(written):
    made = settings(written("k = 3\nval_batch_size = 2"), k="5", max_upload_mb="7")
    assert made.overrides == {"k": 5, "val_batch_size": 2} and made.max_upload_mb == 7


def test_tasks_get_the_settings_of_the_server_though_the_file_has_changed(written):
    path = written(TOML)
    server = settings(path, k="5")
    path.write_text("k = 1")
    told = json.loads(json.dumps(server.for_tasks()))
    task = Settings.from_conf(APP, "studies", told)
    assert (task.overrides, task.hosts, task.support_dir) == (server.overrides, server.hosts, server.support_dir)
    assert task.dicomweb_filter == server.dicomweb_filter and task.state_dir == server.state_dir


@pytest.mark.parametrize(
    "text, message",
    [
        ("ct_windw = [-100, 300]", r"my settings.toml, ct_windw: expected one of .*; did you mean ct_window\?"),
        ("max_upload_mb = 'many'", "my settings.toml, max_upload_mb: expected a number of MiB, found 'many'"),
        ("hosts = ['a', 'b/c']", "my settings.toml, hosts: expected names such as viewer.example"),
        ("k = 'many'", "my settings.toml, k: expected a whole number"),
        ("k = '$__import__(\"os\").abort()'", "my settings.toml, k: expected a value, found .* run as code"),
        ("ct_window = ['$1', '$2']", "my settings.toml, ct_window: expected"),
        ("k = 3\nk = 4", "my settings.toml: expected TOML in UTF-8, found a mistake: .*overwrite"),
        ("k: 3", "my settings.toml: expected TOML in UTF-8, found a mistake"),
        ("[dicomweb_filter]\nStudyDate = 2024-01-02", "the date or time 2024-01-02, which has to stand in quotes"),
        ("host = '0.0.0.0'", "my settings.toml, host: expected a setting of the app, found one of `sam2sgp serve`"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_name(written, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        settings(written(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.json", '{"k": 3, "k": 4}', "the key 'k' twice"),
        ("x.json", '{"k": NaN}', "NaN, which is no number"),
        ("x.json", "[1]", "expected an object of settings"),
        ("x.json", "[" * 100_000, "expected JSON in UTF-8"),
        ("x.yaml", "k: 3", "expected a settings file with a name that ends in .toml or .json"),
    ],
)
def test_what_is_no_settings_file_is_refused(written, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read_settings_file(written(text, name))


def test_a_settings_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="absent.toml: expected a settings file, found No such file"):
        settings(tmp_path / "absent.toml")


def test_the_file_may_say_where_to_listen_and_to_whom(written):
    path = written("studies = 'images of livers'\nhost = '::1'\nport = 8123\nk = 3")
    assert start_values(path) == {"studies": str(path.parent / "images of livers"), "host": "::1", "port": 8123}
    assert settings(path, starts=True).overrides == {"k": 3}
    address = "http://archive:8042/dicom-web"
    assert start_values(written(f"studies = '{address}'")) == {"studies": address}
    for text, message in (("port = 70000", "65535, found 70000"), ("port = true", "found True"), ("host = 1", "text")):
        with pytest.raises(ConfigError, match=message):
            start_values(written(text))
