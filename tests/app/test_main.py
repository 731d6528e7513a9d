"""The app as MONAI Label builds it."""

import pytest

from main import Sam2SgpApp
from sam2sgp.errors import DataError
from tests.app.conftest import APP


def test_a_seed_folder_without_pairs_ends_the_start_with_one_sentence(studio, tmp_path, caplog):
    made = studio(["us_000_0"])
    (tmp_path / "seeds" / "images").mkdir(parents=True)
    conf = {"state_dir": str(tmp_path / "state"), "support_dir": str(tmp_path / "seeds")}
    with pytest.raises(DataError, match="support_dir is not used: .*seeds") as caught:
        Sam2SgpApp(str(APP), str(made.studies), conf)
    assert "\n" not in str(caught.value)
    assert str(caught.value) in [record.message for record in caplog.records]
