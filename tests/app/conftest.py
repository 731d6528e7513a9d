"""Studies folders with phantoms, and the app's parts on them, small enough for a CPU."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from lib.serving.approved_cases import LabelledCases
from lib.serving.published_weights import Weights
from lib.serving.segmenter import ServerSegmenter
from lib.settings import Settings
from lib.stores.opening import open_datastore
from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import make_phantoms
from tests.helpers.bundle_runs import computing_with_one_thread

APP = Path(__file__).parents[2] / "apps" / "sam2sgp"
SMALL = {"image_size": "64"}


@pytest.fixture(autouse=True)
def one_thread():
    with computing_with_one_thread():
        yield


@pytest.fixture(scope="session")
def phantom_cases(tmp_path_factory) -> dict[str, dict]:
    """Labelled phantoms by name: pictures `us_<patient>_<0..3>` and volumes `mr_<patient>`, of patients 000 to 003."""
    folder = tmp_path_factory.mktemp("app") / "phantoms"
    make_phantoms(folder, 4, size=(64, 64), num_slices=6, modalities=("us", "mr"), progress=False)
    return {case["name"]: case for case in load_datalist(folder)}


class Studio:
    """A studies folder and the app's parts on it."""

    def __init__(self, folder: Path, cases: dict[str, dict]) -> None:
        self.folder = folder
        self.studies = folder / "studies"
        self.studies.mkdir()
        self.known = cases

    def add(self, *names: str) -> None:
        """Copy images in."""
        for name in names:
            shutil.copy(self.known[name]["image"], self.studies)

    def approve(self, *names: str, of: str | None = None, tag: str = "final") -> None:
        """Copy labels in as files, those of the images or the label of another one."""
        target = self.studies / "labels" / tag
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            source = Path(self.known[of or name]["label"])
            shutil.copy(source, target / source.name.replace(of or name, name))

    def label(self, name: str, tag: str = "final") -> Path:
        """Where a label is."""
        return self.studies / "labels" / tag / Path(self.known[name]["label"]).name

    def settings(self, **conf: str) -> Settings:
        return Settings.from_conf(APP, str(self.studies), {**SMALL, "state_dir": str(self.folder / "state"), **conf})

    def cases(self, **conf: str) -> LabelledCases:
        settings = self.settings(**conf)
        return LabelledCases(open_datastore(settings), settings)

    def segmenter(self, weights: Weights | None = None, **conf: str) -> ServerSegmenter:
        cases = self.cases(**conf)
        weights = weights or Weights(self.folder / "weights", cases.settings.start_weights)
        return ServerSegmenter(cases.settings, weights, cases)

    def image(self, name: str) -> Path:
        return self.studies / Path(self.known[name]["image"]).name


@pytest.fixture
def studio(tmp_path, phantom_cases) -> Callable[..., Studio]:
    """Makes a `Studio` with images, some of which are approved."""

    def make(images: Iterable[str], approved: Iterable[str] = ()) -> Studio:
        made = Studio(tmp_path, phantom_cases)
        made.add(*images)
        made.approve(*approved)
        return made

    return make
