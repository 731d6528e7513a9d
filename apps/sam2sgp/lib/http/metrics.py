"""What a Prometheus server may know of this one: `GET /sam2sgp/metrics`.

    requests ─ Measured ─┐
    segmentations, tasks ┼─ Metrics ─ text format 0.0.4
    what there is now ───┘

Labels of requests are the templates of routes, never addresses, and methods of a fixed list, so the number of series
doesn't grow with what clients ask for. Counters start at nought with the server. What is only looked at (support set,
images, tasks, disks, archive) is read when it is asked for; a part that can't be read is left out.

All methods may be called from several threads. No request waits for anything here.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import sam2sgp
from lib.http.routing import router
from lib.tasks.background import METHODS as TASKS
from lib.tasks.background import BackgroundTasks
from sam2sgp.data.io import decoding

logger = logging.getLogger(__name__)

HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
OTHER = "other"
# The route of requests that none answers: refused before, or not found.
NO_ROUTE = "none"
# Seconds: from a list to a volume of many slices.
REQUEST_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
SEGMENTATION_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
# What people decide about labels, by the route that does it.
DECISIONS = {
    ("POST", "/sam2sgp/approve"): "approve",
    ("POST", "/sam2sgp/reject"): "reject",
    ("POST", "/sam2sgp/remove"): "remove",
    ("POST", "/sam2sgp/restore"): "restore",
    ("POST", "/sam2sgp/review/correct"): "correct",
    ("POST", "/sam2sgp/review/bring_back"): "bring_back",
    ("PUT", "/datastore/label"): "submit",
}
# Steps of a segmentation, of those that its result tells the seconds of, besides waiting for its turn.
WORK = ("support", "pre", "infer", "write")
STATES = ("published", "kept", "failed", "rolled_back", "stopped")


class Metrics:
    """Counts, and looks when it is asked.

    Args:
        segmenter: tells whether it `is_at_work`, and the `state` of the support set.
        datastore: tells images and labelled images; of an archive its `state`, too.
        tasks: trainings and the like; None where there are none.
        folders: on whose disks something is kept, by name.
    """

    def __init__(
        self,
        segmenter: Any,
        datastore: Any,
        tasks: BackgroundTasks | None = None,
        folders: dict[str, Path] | None = None,
    ) -> None:
        self._segmenter = segmenter
        self._datastore = datastore
        self._tasks = tasks
        self._folders = dict(folders or {})
        self._lock = threading.Lock()
        self._segmenting = 0
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "sam2sgp_http_requests", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self._durations = Histogram(
            "sam2sgp_http_request_duration_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("method", "route"),
            buckets=REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._segmentations = Counter(
            "sam2sgp_segmentations", "Segmentations by outcome.", ("outcome",), registry=self._registry
        )
        self._segmentation_seconds = Histogram(
            "sam2sgp_segmentation_duration_seconds",
            "Seconds of work on an image, without waiting for its turn.",
            buckets=SEGMENTATION_BUCKETS,
            registry=self._registry,
        )
        self._decisions = Counter(
            "sam2sgp_decisions", "Decisions about labels that were carried out.", ("action",), registry=self._registry
        )
        self._ended_tasks = Counter(
            "sam2sgp_tasks", "Background tasks that have ended.", ("kind", "status"), registry=self._registry
        )
        self._trainings = Counter(
            "sam2sgp_trainings", "Trainings that have ended.", ("outcome",), registry=self._registry
        )
        self._errors = Counter(
            "sam2sgp_log_messages", "Lines of the log that tell of trouble.", ("level",), registry=self._registry
        )
        for outcome in ("done", "refused"):
            self._segmentations.labels(outcome)
        for action in DECISIONS.values():
            self._decisions.labels(action)
        for state in STATES:
            self._trainings.labels(state)
        for level in ("warning", "error"):
            self._errors.labels(level)
        self._registry.register(_Looked(self._looked))

    # What is counted

    def requested(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        method = method if method in HTTP_METHODS else OTHER
        self._requests.labels(method, route, str(status)).inc()
        self._durations.labels(method, route).observe(seconds)
        action = DECISIONS.get((method, route))
        if action and status < 300:
            self._decisions.labels(action).inc()

    @contextmanager
    def segmenting(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A segmentation, from when it is asked for; the block calls what it gets with the result parameters."""
        with self._lock:
            self._segmenting += 1
        outcome = "refused"

        def done(params: dict[str, Any]) -> None:
            nonlocal outcome
            outcome = "done"
            seconds = params.get("latencies", {})
            self._segmentation_seconds.observe(sum(seconds.get(step, 0.0) for step in WORK))

        try:
            yield done
        finally:
            with self._lock:
                self._segmenting -= 1
            self._segmentations.labels(outcome).inc()

    def task_ended(self, kind: str, status: str, training: str | None = None) -> None:
        """A background task has ended. `training`: what came of it, as its stats say."""
        self._ended_tasks.labels(kind, status.lower()).inc()
        if kind == "train":
            outcome = training if status == "DONE" and training in STATES else "failed"
            self._trainings.labels("stopped" if status == "STOPPED" else outcome).inc()

    def logged(self) -> logging.Handler:
        """A handler that counts warnings and errors, for the root logger."""
        return _Counting(self._errors)

    # What is looked at

    def _looked(self) -> Iterator[Callable[[], Iterable[Metric]]]:
        yield self._about_segmentations
        yield self._about_tasks
        yield self._about_images
        yield self._about_disks

    def _about_segmentations(self) -> Iterator[Metric]:
        info = InfoMetricFamily("sam2sgp_server", "The server's version and the weights in use.")
        state = self._segmenter.state()
        info.add_metric([], {"version": sam2sgp.__version__, "weights": state.weights})
        yield info
        running = int(self._segmenter.is_at_work)
        with self._lock:
            waiting = max(self._segmenting - running, 0)
        yield GaugeMetricFamily("sam2sgp_segmenter_busy", "1 while an image or the support set is worked on.", running)
        yield GaugeMetricFamily("sam2sgp_segmentations_waiting", "Segmentations that wait for their turn.", waiting)
        yield GaugeMetricFamily("sam2sgp_support_items", "Slices that guide.", len(state.items))
        yield GaugeMetricFamily("sam2sgp_support_cases", "Labelled images that guide.", len(state.cases))
        yield GaugeMetricFamily("sam2sgp_support_errors", "Approved labels that can't be used.", len(state.errors))
        yield CounterMetricFamily(
            "sam2sgp_decoder_restarts", "Processes for compressed pixels that were replaced.", decoding.restarts()
        )

    def _about_tasks(self) -> Iterator[Metric]:
        if self._tasks is None:
            return
        running = GaugeMetricFamily("sam2sgp_tasks_running", "Background tasks that run.", labels=["kind"])
        waiting = GaugeMetricFamily("sam2sgp_tasks_waiting", "Background tasks that wait.", labels=["kind"])
        for kind in TASKS:
            running.add_metric([kind], float(self._tasks.running(kind) is not None))
            waiting.add_metric([kind], self._tasks.waiting(kind))
        yield from (running, waiting)

    def _about_images(self) -> Iterator[Metric]:
        if hasattr(self._datastore, "pairs_at_hand"):
            reachable = float(self._datastore.state()["reachable"])
            yield GaugeMetricFamily("sam2sgp_archive_up", "Whether the archive's lists are up to date.", reachable)
        yield GaugeMetricFamily("sam2sgp_images", "Images.", len(self._datastore.list_images()))
        approved = len(self._datastore.get_labeled_images())
        yield GaugeMetricFamily("sam2sgp_approved_images", "Images with an approved label.", approved)

    def _about_disks(self) -> Iterator[Metric]:
        free = GaugeMetricFamily("sam2sgp_disk_free_bytes", "Free on the disk of a folder.", labels=["folder"])
        for name, folder in self._folders.items():
            free.add_metric([name], shutil.disk_usage(folder).free)
        yield free

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class Measured:
    """ASGI middleware around all others: how many requests, by route, and how long they take.

    Args:
        app: what answers.
        metrics: what counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        # It stays so where the app raises, or the client goes away before there is an answer.
        status = 500

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, answering)
        finally:
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._metrics.requested(scope["method"], route, status, time.perf_counter() - started)


def measure(app: FastAPI, metrics: Metrics) -> None:
    """Have an app's requests counted; to be called after `lib.http.guard.install`."""
    app.user_middleware = [Middleware(Measured, metrics=metrics), *app.user_middleware]
    app.middleware_stack = app.build_middleware_stack()


def metrics_routes(metrics: Metrics) -> Any:
    """The route."""
    made = router()

    @made.get("/sam2sgp/metrics")
    def told() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST, headers={"Cache-Control": "no-store"})

    return made


class _Looked:
    """A collector of what is looked at, part by part."""

    def __init__(self, parts: Callable[[], Iterable[Callable[[], Iterable[Metric]]]]) -> None:
        self._parts = parts

    def describe(self) -> list[Metric]:
        # Nothing is read before somebody asks.
        return []

    def collect(self) -> Iterator[Metric]:
        for part in self._parts():
            try:
                yield from list(part())
            except Exception:
                logger.warning("A part of the metrics can't be read", exc_info=True)


class _Counting(logging.Handler):
    """Counts lines of the log by their level."""

    def __init__(self, counter: Counter) -> None:
        super().__init__(logging.WARNING)
        self._counter = counter

    def emit(self, record: logging.LogRecord) -> None:
        self._counter.labels("error" if record.levelno >= logging.ERROR else "warning").inc()
