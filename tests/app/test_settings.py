"""What an operator may set, and what is said about the rest."""

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from lib.roles import Role
from lib.settings import METHOD_KEYS, Settings
from sam2sgp.errors import ConfigError

APP = Path(__file__).parents[2] / "apps" / "sam2sgp"
INFERENCE = json.loads((APP.parents[1] / "bundle" / "configs" / "inference.json").read_text())


def settings(studies="studies", **conf) -> Settings:
    return Settings.from_conf(APP, studies, conf)


def test_without_conf_the_app_works_with_the_bundles_own_values():
    made = settings()
    assert made.overrides == {} and made.overlays == ()
    assert made.value("k") == INFERENCE["k"]
    assert made.start_weights == APP.parents[1] / "bundle" / "models" / "model.pt"


def test_every_key_of_the_method_is_one_of_the_bundles_config():
    assert set(METHOD_KEYS) <= INFERENCE.keys()


def test_values_of_the_method_are_read_as_json_or_as_words():
    made = settings(k="3", retrieval="random", three_d_memory="false", ct_window="[-100, 300]", object_gate="off")
    config = ConfigParser(made.config())
    assert config["k"] == 3 and config["ct_window"] == [-100, 300] and config["object_gate"] is False
    sampler = config.get_parsed_content("support_sampler")
    assert (sampler.k, sampler.mode) == (3, "random")
    assert config.get_parsed_content("volume_memory") is None


def test_a_backbone_is_an_overlay_of_the_bundle(tmp_path):
    weights = tmp_path / "tiny.pt"
    weights.touch()
    made = settings(backbone="tiny", model_file=str(weights))
    assert made.overlays == ("configs/backbones/tiny.json",)
    assert made.value("image_size") == 512 and made.start_weights == weights
    assert settings(backbone="tiny", model_file=str(weights), image_size="256").value("image_size") == 256


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("dicomweb_expiri", "3", "did you mean dicomweb_expiry?"),
        ("kk", "3", r"--conf kk: expected one of .*\bk\b.*found an unknown key"),
        ("output_dir", "/tmp", "found an unknown key"),
        ("k", "$__import__('os').abort()", "which a config would run as code"),
        ("image_size", "@k", "which a config would run as code"),
        ("max_upload_mb", "many", "expected a number of MiB, found 'many'"),
        ("max_upload_mb", "0", "expected a number of MiB"),
        ("dicomweb_cache_gb", "inf", "expected a number of GiB, found 'inf'"),
        ("dicomweb_filter", "CT", "expected attributes as JSON such as .*, found 'CT'"),
        ("dicomweb_filter", "[1]", "expected attributes as JSON such as .*, found \\[1\\]"),
        ("hosts", "a.example, b/c", "expected names such as viewer.example, found 'b/c'"),
        ("k", "many", "--conf k: expected a whole number of at least 1, found 'many'"),
        ("object_gate", "perhaps", "--conf object_gate: expected True or False, found 'perhaps'"),
        ("allow_overrides", "maybe", "expected true or false, found 'maybe'"),
        ("cors_origins", "viewer.example", "expected origins such as https://viewer.example"),
        ("users", "anna", r'--conf users: expected a table of users and their roles such as {"anna": "admin"}, found'),
        ("users", '{"ben": "aprover"}', "--conf users, ben: .*, found 'aprover'; did you mean approver?"),
        ("users", '{"ben": "Admin"}', "found 'Admin'; did you mean admin?"),
        (
            "users",
            '{"ben": 4}',
            "--conf users, ben: expected one of reader, annotator, approver, admin, found 4; choose",
        ),
        ("users", '{"ben": "admin"}', "user_header: expected the header in which the reverse proxy names the user"),
        ("default_role", "reader", "user_header: expected the header"),
        ("default_role", "readers", "--conf default_role: .*did you mean reader?"),
        ("approve_own", "no", "user_header: expected the header"),
        ("approve_own", "perhaps", "--conf approve_own: expected true or false, found 'perhaps'"),
        ("backbone", "huge", "expected one of base_plus, large, lite, nano, small, tiny, found 'huge'"),
        ("model_file", "/nowhere/model.pt", "expected a weights file, found no /nowhere/model.pt"),
        ("support_dir", "/nowhere", "expected a folder of labelled pairs, found no /nowhere"),
        ("bundle_root", "/nowhere", r"expected a bundle with configs/inference.json, found none in /nowhere"),
    ],
)
def test_a_value_that_cannot_work_is_named_in_one_sentence(key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        settings(**{key: value})
    assert "\n" not in str(caught.value)


def test_each_studies_folder_has_a_state_of_its_own_outside_the_code(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    one, other = settings(str(tmp_path / "a")), settings(str(tmp_path / "b"))
    assert one.state_dir != other.state_dir and one.state_dir.parent == tmp_path / "data" / "sam2sgp" / "state"
    assert settings(str(tmp_path / "x" / ".." / "a")).state_dir == one.state_dir
    assert settings("http://pacs/dicom-web/").state_dir == settings("http://pacs/dicom-web").state_dir


def test_roles_are_read_from_a_file_and_from_the_command_line(tmp_path):
    header = "user_header = 'X-Remote-User'\n"
    path = tmp_path / "settings.toml"
    path.write_text(
        f"{header}default_role = 'reader'\napprove_own = false\nusers = {{ anna = 'admin', ben = 'approver' }}"
    )
    made = settings(settings=str(path))
    assert made.users == {"anna": Role.admin, "ben": Role.approver} and made.default_role is Role.reader
    assert made.approve_own is False
    assert settings(user_header="X", users='{"anna": "admin"}').users == {"anna": Role.admin}
    # What is written below the table belongs to it, which would be no setting.
    path.write_text(f"{header}[users]\nanna = 'admin'\nhosts = 'a.example'\n")
    with pytest.raises(ConfigError, match="settings.toml, users, hosts: expected one of .*, found 'a.example'"):
        settings(settings=str(path))
    # As the processes of tasks get them.
    assert json.loads(json.dumps(made.for_tasks()))["users"] == {"anna": "admin", "ben": "approver"}


def test_origins_and_flags_are_read():
    made = settings(cors_origins="https://a.example/, http://b:3000", allow_overrides="yes", max_upload_mb="10")
    assert made.cors_origins == ("https://a.example", "http://b:3000")
    assert made.allow_overrides and made.max_upload_mb == 10
    made = settings(hosts="Viewer.Example, other", dicomweb_filter='{"Modality": "CT"}', dicomweb_expiry="0")
    assert made.hosts == ("viewer.example", "other") and made.dicomweb_filter == {"Modality": "CT"}
    assert made.dicomweb_expiry == 0
