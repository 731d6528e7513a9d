"""The process of a task: one method, by a request on the standard input, and one line where it fails."""

import io
import json
import logging
from types import SimpleNamespace

import pytest

from lib.tasks import worker
from sam2sgp.errors import DataError


@pytest.fixture
def call(monkeypatch):
    """Run the process's program with an app that trains as it is told to."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def called(train, method: str = "train", request: object = None) -> int:
        monkeypatch.setattr(worker.sys, "stdin", io.StringIO(json.dumps(request)))
        monkeypatch.setattr(worker.monailabel_app, "app_instance", lambda: SimpleNamespace(train=train))
        return worker.main(method)

    return called


def test_the_app_gets_the_request(call, caplog):
    asked = []
    caplog.set_level(logging.INFO)
    assert call(lambda request: asked.append(request) or {"dice": 0.9}, request={"model": "finetune"}) == 0
    assert asked == [{"model": "finetune"}] and 'Result: {"dice": 0.9}' in caplog.text


def test_what_people_can_mend_is_the_last_line_and_all_else_is_in_the_log(call, caplog):
    def fail(error: Exception):
        def train(request):
            raise error

        return train

    assert call(fail(DataError("a: expected b, found c."))) == 1
    assert caplog.messages == ["train: a: expected b, found c."]
    caplog.clear()
    assert call(fail(KeyError("secret"))) == 1
    assert caplog.messages[-1] == "train: The server failed; its log says why." and caplog.records[0].exc_info


def test_settings_are_not_in_the_output_that_every_user_may_read(monkeypatch, caplog, tmp_path):
    app = worker.monailabel_app
    (tmp_path / "main.py").write_text("")
    made = SimpleNamespace(train=lambda request: {})
    monkeypatch.setattr(app, "apps", {})
    monkeypatch.setattr(app, "get_class_of_subclass_from_file", lambda *_: lambda **_: made)
    monkeypatch.setattr(app.settings, "MONAI_LABEL_APP_DIR", str(tmp_path))
    monkeypatch.setattr(app.settings, "MONAI_LABEL_APP_CONF", {"users": {"anna": "admin"}})
    monkeypatch.setattr(worker.sys, "stdin", io.StringIO("{}"))
    monkeypatch.setattr(app.logger, "level", logging.NOTSET)
    with caplog.at_level(logging.INFO):
        assert worker.main("train") == 0
    assert "Result: {}" in caplog.text and "anna" not in caplog.text


def test_no_other_method_of_the_app_is_called(call):
    with pytest.raises(SystemExit, match="method: expected one of .*train.*, found '__init__'"):
        call(None, "__init__")
