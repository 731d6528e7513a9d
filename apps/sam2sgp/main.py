"""The MONAI Label app: segment, correct, approve, and the next image is better.

    monailabel start_server --app apps/sam2sgp --studies <folder or DICOMweb address>

It only wires the parts together: see `lib`. MONAI Label builds it once in the server and again in each of the processes
that train, score and infer in batches; what they share is on the disk, in the datastore and in `Settings.state_dir`.
"""

import asyncio
import json
import logging
import os
import select
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from anyio import to_thread
from monailabel.config import settings as server_settings
from monailabel.endpoints import login
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import DefaultLabelTag

import sam2sgp
from lib.activelearning.progress import Progress
from lib.activelearning.scoring import Scores, Scoring
from lib.activelearning.strategies import Choices, strategies
from lib.checks import NotFound
from lib.ending import end_soon
from lib.http.connections import ConnectionLimits, limit_connections
from lib.http.endpoints import routes, without_path
from lib.http.guard import install, serve_only
from lib.http.health import Health, checks_of
from lib.http.logs import keep_logs, log_routes, quiet_libraries
from lib.http.loop import loop_routes
from lib.http.page import SupportPage, Threads
from lib.http.review import ReviewPage
from lib.http.task_endpoints import task_routes
from lib.http.viewers import viewer_routes
from lib.infers.segmentation import SegmentationTask
from lib.layout import OF_STATE, OF_STUDIES, bring_up_to_date
from lib.scratch import own_temporary_folder
from lib.serving.approved_cases import FINAL, LabelledCases
from lib.serving.options import AdaptParams, BatchParams, Declared, InferParams, TrainParams
from lib.serving.published_weights import Weights
from lib.serving.segmenter import ServerSegmenter
from lib.serving.usage import Usage
from lib.settings import Settings
from lib.state_folder import hold, make_private
from lib.stores.audit import Audit, current_user
from lib.stores.decisions import state_of
from lib.stores.opening import open_datastore
from lib.stores.records import of_prediction
from lib.stores.sessions import open_sessions
from lib.tasks.background import DONE, BackgroundTasks
from lib.tasks.batch import BatchInference
from lib.tasks.batch_report import FILE as BATCH_REPORT
from lib.trainers.adapt import AdaptTask
from lib.trainers.finetune import FineTuning
from sam2sgp.errors import DataError, Sam2SgpError

logger = logging.getLogger(__name__)

MODEL = "sam2sgp"
FINE_TUNING, ADAPTATION = "finetune", "adapt"
SCORING = "scores"
DEFAULT_STRATEGY = "hybrid"
# Module of the processes that train, score and infer in batches. The server's requests come before these.
BACKGROUND = "lib.tasks.worker"
SERVER = "monailabel.app"
NICENESS = 10
# Seconds that a start waits for an archive, and that background work does for the labels in it.
START_WAIT, BACKGROUND_WAIT = 10.0, 600.0
# Requests that are worked on at once: more than may wait for an archive.
THREADS = 100
# Seconds after which a thread that computes lets those that answer requests go on; Python's default is ten times that.
THREAD_SWITCH = 0.0005


class Sam2SgpApp(MONAILabelApp):
    """See the module."""

    # Set in the server; the processes of tasks count and measure nothing.
    _metrics: Any = None
    _progress: Progress | None = None

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        self._in_background = _started_as(BACKGROUND)
        self._tasks: BackgroundTasks | None = None
        if self._in_background:
            os.nice(NICENESS)
            _end_with_server()
        quiet_libraries()
        with _sentence_first():
            self.settings = Settings.from_conf(app_dir, studies, conf)
            # MONAI Label's server, and not a program that builds the app for itself.
            if SERVER in sys.modules:
                self.settings = self.settings.in_place()
                make_private(self.settings.state_dir)
                hold(self.settings.state_dir)
                bring_up_to_date(self.settings.state_dir, OF_STATE)
                for folder in self.settings.studies_folders:
                    bring_up_to_date(folder, OF_STUDIES)
                _hand_on(self.settings)
                self.log_file = keep_logs(self.settings.state_dir / "logs", self.settings.app_dir)
                own_temporary_folder(self.settings.state_dir)
            self.audit = Audit(self.settings.audit_file)
            self.usage = Usage(self.settings.state_dir / "usage.sqlite")
            self.weights = Weights(self.settings.state_dir / "weights", self.settings.start_weights)
            self.scores = Scores(self.settings.state_dir / "scores.sqlite")
            super().__init__(
                app_dir,
                studies,
                conf,
                name="SAM2-SGP",
                description="Segmentation guided by a support set of approved labels",
                version=sam2sgp.__version__,
            )

    # The parts

    def init_datastore(self):
        return open_datastore(self.settings)

    def init_infers(self):
        self.cases = LabelledCases(self.datastore(), self.settings)
        if self.cases.problem and not self._in_background:
            raise DataError(self.cases.problem)
        if self._in_background:
            self.cases.prepare(BACKGROUND_WAIT)
        self.segmenter = ServerSegmenter(self.settings, self.weights, self.cases)
        return {MODEL: SegmentationTask(self.segmenter)}

    def init_trainers(self):
        return {
            FINE_TUNING: FineTuning(
                self.settings.bundle_root,
                self.settings.state_dir,
                self.weights,
                self.segmenter.usable_cases,
                self.cases.declared,
                self.settings.overrides,
                self.settings.overlays,
                self.audit.write,
                self.segmenter.gain_of_adaptation,
            ),
            ADAPTATION: AdaptTask(self.settings.state_dir, self.weights, self.segmenter, self.audit.write),
        }

    def init_scoring_methods(self):
        return {SCORING: Scoring(self.segmenter, self.scores)}

    def init_strategies(self):
        self.choices = Choices(self.scores, self.cases.seeds)
        return strategies(self.choices)

    def init_batch_infer(self):
        return BatchInference(self.weights, self.segmenter.requests, self.settings.state_dir / BATCH_REPORT)

    def _load_sessions(self, load: bool = False):
        return open_sessions(self.settings)

    def bundle_path(self, model: str) -> None:
        """None: no folder joins the search path of a process."""
        return None

    def on_init_complete(self) -> None:
        """Called only in the server, when it is about to answer."""
        # Only the server has this module, and its import would start to build one.
        from monailabel.app import app

        from lib.http.metrics import Metrics, measure, metrics_routes

        sys.setswitchinterval(THREAD_SWITCH)
        end_soon(self.segmenter.ending)
        install(app, self.settings)
        limits = ConnectionLimits(int(self.settings.max_connections), int(self.settings.max_connections_per_address))
        limit_connections(asyncio.get_running_loop(), limits)
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        self._tasks = BackgroundTasks(Path(self.app_dir).resolve(), self._task_ended)
        folders = {"state": self.settings.state_dir}
        if not self.settings.is_remote:
            folders["studies"] = Path(self.settings.studies)
        self._metrics = Metrics(self.segmenter, self.datastore(), self._tasks, folders)
        logging.getLogger().addHandler(self._metrics.logged())
        measure(app, self._metrics)
        page = SupportPage(
            self.datastore(),
            self.segmenter,
            self.usage,
            self.ranked,
            self._trainers[FINE_TUNING].stats,
            self.on_save_label,
        )
        review = ReviewPage(
            self.datastore(),
            self.segmenter,
            self.ranked,
            self.settings.audit_file,
            self.settings.value("scale_intensity"),
            self.on_save_label,
        )
        self._progress = Progress(self.datastore(), self.segmenter, self.settings.progress_file, review.trail)
        threads = Threads()
        # In place of MONAI Label's own, of which none but its login is left.
        answered = [
            routes(self),
            task_routes(self, self._tasks),
            viewer_routes(self),
            log_routes(self.log_file),
            page.router(threads),
            review.router(threads),
            loop_routes(self._progress, self.segmenter.underway, self._tasks, self.settings.state_dir / BATCH_REPORT),
            metrics_routes(self._metrics),
            Health(checks_of(self.segmenter, self.datastore(), self.settings)).router(),
        ]
        if server_settings.MONAI_LABEL_AUTH_ENABLE:
            answered.append(login.router)
        serve_only(app, answered)
        self.cases.prepare(START_WAIT)
        with _sentence_first():
            self.segmenter.refresh()
        self._progress.start()
        super().on_init_complete()

    def ranked(self, images: list[str]) -> list[str]:
        """Ids of unlabelled images in the order in which the support page shows them."""
        return self.choices.ranked(DEFAULT_STRATEGY, images, self.datastore().get_labeled_images())

    # Requests

    def info(self) -> dict[str, Any]:
        """MONAI Label's, with `support`: the state of the support set and of the weights, and `archive`: its state."""
        self.segmenter.keep_up(certain=False)
        archive = {"archive": self.datastore().state()} if self.settings.is_remote else {}
        return {**super().info(), "support": self.segmenter.status(), **archive}

    def infer(self, request: Mapping[str, Any], datastore=None) -> dict[str, Any]:
        """Segment an image of the datastore, of a session, or sent along.

        With `save_label` the result of a datastore's image is saved with the tag `label_tag`; `final` approves it.
        """
        datastore = datastore or self.datastore()
        task = self._infers.get(request.get("model"))
        if task is None:
            raise NotFound(f"model: expected one of {', '.join(self._infers)}, found {request.get('model')!r}.")
        image = request.get("image")
        # Only the server makes paths: of an upload, or of a session's image. Requests of clients hold text.
        image_id = None if isinstance(image, Path) else image
        if not image or not isinstance(image, str | Path):
            raise NotFound("image: expected the id of an image or of a session, found none; choose an image first.")
        path = datastore.get_image_uri(image) if image_id else image
        if not path or not os.path.exists(path):
            raise NotFound(
                f"image {image_id or 'of the session'}: expected an image, found none; take one of the list."
            )
        params = InferParams.of_request(request)
        # There may be another one under its id by the time that it is segmented.
        seen = state_of(path) or ""
        with self._metrics.segmenting() if self._metrics else nullcontext(lambda found: None) as done:
            label, result = task(
                {**params.given(), "image": str(path), "image_id": image_id, "gone": request.get("gone")}
            )
            done(result)
        self.usage.add(used["item"] for items in result["support"].values() for used in items)
        tag = params.label_tag or DefaultLabelTag.ORIGINAL.value
        label_id = label
        if image_id and params.save_label:
            info = {**of_prediction(request["model"], result), "user": current_user.get()}
            try:
                label_id = datastore.save_label(image_id, label, tag, info, seen)
            except BaseException:
                # Nobody gets to know of the file.
                Path(label).unlink(missing_ok=True)
                raise
            if tag == FINAL:
                self.on_save_label(image_id, label_id)
        return {"label": label_id, "tag": tag, "file": label, "params": result}

    def batch_infer(self, request: Mapping[str, Any], datastore=None) -> dict[str, Any]:
        return super().batch_infer(_declared(request, BatchParams, "model"), datastore)

    def train(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Fine-tune, adapt, or roll the weights back: see `FineTuning` and `AdaptTask`."""
        params = AdaptParams if request.get("model") == ADAPTATION else TrainParams
        declared = _declared(request, params, "model")
        if not self.settings.allow_overrides:
            declared.pop("device", None)
        return super().train(declared)

    def scoring(self, request: Mapping[str, Any], datastore=None) -> dict[str, Any]:
        return super().scoring({"method": request.get("method")}, datastore)

    def next_sample(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The image to label next and what is known about it; {} if all are labelled."""
        strategy = self._strategies.get(request["strategy"])
        if strategy is None:
            names = ", ".join(self._strategies)
            raise NotFound(f"strategy: expected one of {names}, found {ascii(request['strategy'])[:80]}.")
        found = strategy(request, self.datastore())
        if not found:
            return {}
        if self._auto_update_scoring:
            self.async_scoring(None)
        return {**without_path(self.datastore().get_image_info(found["id"])), **found}

    def async_scoring(self, method: str | None, params=None) -> dict[str, Any]:
        """Have the server score in the background, unless a scoring waits for its turn already."""
        if self._tasks is None or self._tasks.waiting("scoring"):
            return {}
        return {name: self._tasks.start("scoring", {"method": name}, enqueue=True) for name in self._scoring_methods}

    def _task_ended(self, method: str, status: str) -> None:
        training = self._trainers[FINE_TUNING].stats().get("state") if method == "train" else None
        self._metrics.task_ended(method, status, training)
        if method == "train" and status == DONE and self._auto_update_scoring:
            self.async_scoring(None)

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """Have a label that came or went taken into the support set; the answer to the client says how that went.

        It is in use for the very next request. While an image is segmented, that can't be waited for: the answer then
        says `pending`, and what it says of the support set is as of before.
        """
        super().on_save_label(image_id, label_id)
        joined = self.segmenter.keep_up()
        if self._progress:
            self._progress.wake()
        status = self.segmenter.status()
        told = [*status["errors"], *status["warnings"]]
        return {"support_items": status["items"], "warnings": told, "pending": not joined}


@contextmanager
def _sentence_first() -> Iterator[None]:
    """What ends the start is said before the traceback, in which it is hard to find."""
    try:
        yield
    except Sam2SgpError as error:
        logger.error("%s", error)
        raise


def _declared(request: Mapping[str, Any], options: type[Declared], *names: str) -> dict[str, Any]:
    """What a task may see of its request: declared options with checked values, and the names given."""
    return {**{name: request[name] for name in names if name in request}, **options.of_request(request).given()}


def _hand_on(settings: Settings) -> None:
    """Have the processes of tasks started with the settings that this server has."""
    server_settings.MONAI_LABEL_APP_CONF = settings.for_tasks()
    os.environ["MONAI_LABEL_APP_CONF"] = json.dumps(server_settings.MONAI_LABEL_APP_CONF)
    if not server_settings.MONAI_LABEL_SESSION_PATH:
        server_settings.MONAI_LABEL_SESSION_PATH = str(settings.state_dir / "sessions")
        os.environ["MONAI_LABEL_SESSION_PATH"] = server_settings.MONAI_LABEL_SESSION_PATH


def _started_as(module: str) -> bool:
    """Whether this process was started by `python -m module`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == module


def _end_with_server() -> None:
    """From now on, end this process when the server that reads its output is gone: nobody could follow or stop it.

    At once and without any clean-up, as if it were killed together with its server.
    """

    def watch() -> None:
        output = select.poll()
        # With nothing to wait for, only the end of the pipe's other side is told.
        assert sys.__stdout__ is not None, "the server started it with a pipe"
        output.register(sys.__stdout__.fileno(), 0)
        output.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="server-watch").start()
