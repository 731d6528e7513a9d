"""The MONAI Label app: segment, correct, approve, and the next image is better.

    monailabel start_server --app apps/sam2sgp --studies <folder or DICOMweb address>

It only wires the parts together: see `lib`. MONAI Label builds it once in the server and anew in each of the processes
that train, score and infer in batches; what they share is on the disk, in the datastore and in `Settings.state_dir`.
"""

import asyncio
import logging
import os
import select
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from anyio import to_thread
from fastapi import Request
from fastapi.responses import JSONResponse
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.utils.async_tasks.utils import tasks

import sam2sgp
from lib.audit import Audit
from lib.batch import BatchInference
from lib.checks import NotFound
from lib.connections import ConnectionLimits, limit_connections
from lib.datastore import open_datastore
from lib.endpoints import routes
from lib.guard import confine, install, refuse
from lib.infers.segmentation import Segmentation
from lib.logs import keep_logs, log_routes, quiet_libraries
from lib.options import flag
from lib.page import SupportPage
from lib.records import of_prediction
from lib.scoring import Scores, Scoring
from lib.scratch import own_temporary_folder
from lib.segmenter import Segmenter
from lib.sessions import open_sessions
from lib.settings import Settings
from lib.strategies import Choices, strategies
from lib.support import FINAL, LabelledCases
from lib.trainers.finetune import FineTuning
from lib.usage import Usage
from lib.weights import Weights
from sam2sgp.errors import DataError, Sam2SgpError

logger = logging.getLogger(__name__)

MODEL = "sam2sgp"
FINE_TUNING = "finetune"
SCORING = "scores"
DEFAULT_STRATEGY = "hybrid"
# Module that MONAI Label runs for training, scoring and batch inference. The server's requests come before these.
BACKGROUND = "monailabel.interfaces.utils.app"
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

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        self._in_background = _started_as(BACKGROUND)
        if self._in_background:
            os.nice(NICENESS)
            _end_with_server()
        quiet_libraries()
        with _sentence_first():
            self.settings = Settings.from_conf(app_dir, studies, conf)
            # MONAI Label's server, and not a program that builds the app for itself.
            if SERVER in sys.modules:
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
        self.segmenter = Segmenter(self.settings, self.weights, self.cases)
        return {MODEL: Segmentation(self.segmenter)}

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
            )
        }

    def init_scoring_methods(self):
        return {SCORING: Scoring(self.segmenter, self.scores)}

    def init_strategies(self):
        self.choices = Choices(self.scores, self.cases.seeds)
        return strategies(self.choices)

    def init_batch_infer(self):
        return BatchInference()

    def _load_sessions(self, load: bool = False):
        return open_sessions(self.settings)

    def bundle_path(self, model: str) -> None:
        """None: MONAI Label would put a client's folder on the path of the processes it starts."""
        return None

    def on_init_complete(self) -> None:
        """Called in the server alone, when it is about to answer."""
        # Only the server has this module, and its import would start to build one.
        from monailabel.app import app

        sys.setswitchinterval(THREAD_SWITCH)
        app.add_exception_handler(OSError, _not_stored)
        install(app, self.settings)
        limits = ConnectionLimits(int(self.settings.max_connections), int(self.settings.max_connections_per_address))
        limit_connections(asyncio.get_running_loop(), limits)
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        # Before MONAI Label's own.
        app.router.routes[:0] = [*routes(self).routes, *log_routes(self.log_file).routes]
        page = SupportPage(
            self.datastore(),
            self.segmenter,
            self.usage,
            self.ranked,
            self._trainers[FINE_TUNING].stats,
            self.on_save_label,
        )
        app.include_router(page.router())
        self.cases.prepare(START_WAIT)
        with _sentence_first():
            self.segmenter.refresh()
        threading.Thread(target=self._warm_up, daemon=True, name="sam2sgp-warm-up").start()
        super().on_init_complete()

    def _warm_up(self) -> None:
        try:
            self.segmenter.encode()
        except Exception:
            # The request that needs it tells its client.
            logger.exception("The support set could not be encoded at the start")

    def ranked(self, images: list[str]) -> list[str]:
        """Ids of unlabelled images in the order in which the support page shows them."""
        return self.choices.ranked(DEFAULT_STRATEGY, images, self.datastore().get_labeled_images())

    # Requests

    def info(self) -> dict[str, Any]:
        """MONAI Label's, with `support`: the state of the support set and of the weights, and `archive`: its state."""
        self.segmenter.keep_up(certain=False)
        archive = {"archive": self.datastore().state()} if self.settings.is_remote else {}
        return {**super().info(), "support": self.segmenter.facts(), **archive}

    def infer(self, request: Mapping[str, Any], datastore=None) -> dict[str, Any]:
        """Segment an image of the datastore, of a session, or sent along.

        With `save_label` the result of a datastore's image is saved with the tag `label_tag`; `final` approves it.
        """
        datastore = datastore or self.datastore()
        try:
            return self._infer(confine(dict(request), self.settings), datastore)
        except Exception as error:
            raise refuse(error) from error

    def _infer(self, request: dict[str, Any], datastore) -> dict[str, Any]:
        task = self._infers.get(request.get("model"))
        if task is None:
            raise NotFound(f"model: expected one of {', '.join(self._infers)}, found {request.get('model')!r}.")
        image = request.get("image")
        if not isinstance(image, str) or not image:
            raise NotFound("image: expected the id of an image or of a session, found none; choose an image first.")
        # Only the server makes absolute paths: of an upload, or of a session's image.
        image_id = None if os.path.isabs(image) else image
        path = datastore.get_image_uri(image) if image_id else image
        if not path or not os.path.exists(path):
            raise NotFound(
                f"image {image_id or 'of the session'}: expected an image, found none; take one of the list."
            )
        save_label = flag(request, "save_label")
        label, params = task({**request, "image": path, "image_id": image_id})
        self.usage.add(used["item"] for items in params["support"].values() for used in items)
        tag = request.get("label_tag") or DefaultLabelTag.ORIGINAL.value
        label_id = label
        if image_id and save_label:
            info = of_prediction(request["model"], params)
            label_id = datastore.save_label(image_id, label, tag, info)
            if tag == FINAL:
                self.on_save_label(image_id, label_id)
        return {"label": label_id, "tag": tag, "file": label, "params": params}

    def batch_infer(self, request: Mapping[str, Any], datastore=None) -> dict[str, Any]:
        return super().batch_infer(confine(dict(request), self.settings), datastore)

    def train(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Fine-tune, or roll the weights back: see `FineTuning`."""
        try:
            return super().train(confine(dict(request), self.settings))
        except Exception as error:
            raise refuse(error) from error

    def async_scoring(self, method: str | None, params=None) -> dict[str, Any]:
        """MONAI Label's, which wants it after every offer of an image: one that waits for its turn is enough."""
        if any(task["status"] == "SUBMITTED" for task in tasks("scoring")):
            return {}
        return super().async_scoring(method, params)

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """Have a label that came or went taken into the support set; the answer to the client says how that went.

        It is in use for the very next request. While an image is segmented, that can't be waited for: the answer then
        says `pending`, and what it says of the support set is as of before.
        """
        super().on_save_label(image_id, label_id)
        joined = self.segmenter.keep_up()
        facts = self.segmenter.facts()
        return {"support_items": facts["items"], "warnings": facts["errors"], "pending": not joined}


@contextmanager
def _sentence_first() -> Iterator[None]:
    """What ends the start is said before the traceback, in which it is hard to find."""
    try:
        yield
    except Sam2SgpError as error:
        logger.error("%s", error)
        raise


async def _not_stored(request: Request, error: OSError) -> JSONResponse:
    """The answer to a request in which a file could not be written, such as an upload on a full disk."""
    answer = refuse(error)
    logger.error("%s %s", request.method, request.url.path, exc_info=error)
    return JSONResponse({"detail": answer.detail}, answer.status_code)


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
        output.register(sys.__stdout__.fileno(), 0)
        output.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="server-watch").start()
