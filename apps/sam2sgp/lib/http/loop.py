"""How the loop gets on, for the review page: figures of progress, what is being segmented, and the batch that segments
what has no label.

    GET /sam2sgp/review/progress    Dice as labels come, predictions approved unchanged, labels an hour, enough labels?
    GET /sam2sgp/review/segmenting  ?image=  how far the segmentation of an image is; whoever asked for it cancels it by
                                    going away
    GET /sam2sgp/review/batch       the last batch inference: numbers, time left, failures

A batch is started and stopped by MONAI Label's own addresses, `POST /batch/infer/sam2sgp?images=unannotated` and
`DELETE /batch/infer`. Nothing here waits for the network.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter

from lib.activelearning.progress import Progress
from lib.http.page import PREFIX
from lib.http.routing import LOGIN_USER
from lib.processes import KEYS, mark_in
from lib.serving.underway import Underway
from lib.tasks.background import DONE, ERROR, RUNNING, SUBMITTED, BackgroundTasks
from lib.tasks.batch_report import last_report

METHOD = "batch_infer"
STARTING, STOPPED, FAILED, NONE = "starting", "stopped", "failed", "none"


def loop_routes(progress: Progress, underway: Underway, tasks: BackgroundTasks, report: Path) -> APIRouter:
    """The routes.

    Args:
        progress: what is known of it.
        underway: the segmentations that requests wait for.
        tasks: follows the batch.
        report: file in which the batch tells how it gets on.
    """
    made = APIRouter(prefix=f"{PREFIX}/review", include_in_schema=False, dependencies=[LOGIN_USER])

    @made.get("/progress")
    def told() -> dict[str, Any]:
        return progress.told()

    @made.get("/segmenting")
    def segmenting(image: str) -> dict[str, int]:
        return underway.told(image)

    @made.get("/batch")
    def batch() -> dict[str, Any]:
        return state_of_batch(tasks, report)

    return made


def state_of_batch(tasks: BackgroundTasks, report: Path) -> dict[str, Any]:
    """The last batch: its `state` ("none", "starting", "running", "done", "stopped", "failed"), for one that failed the
    `reason`, and what its report tells, see `BatchReport`.

    One that is done, but couldn't write its report, tells its state only. A batch that was stopped, or whose server
    ended, can be started again and goes on where it was.
    """
    found = last_report(report)
    task = next(iter(tasks.all(METHOD)[-1:]), None)
    # The report of a task that has just begun is that of the one before.
    is_old = task is not None and mark_in(found) != (tasks.mark(METHOD) or None)
    found = {key: value for key, value in found.items() if key not in KEYS}
    if task is not None and task["status"] in (SUBMITTED, RUNNING):
        return {"state": STARTING} if is_old or not found else {**found, "state": RUNNING.lower()}
    found = {} if is_old else found
    if task is not None and task["status"] == ERROR:
        _, said, sentence = (task["details"] or [""])[-1].rpartition(f"{METHOD}: ")
        return {**found, "state": FAILED, "reason": sentence if said else "Its process was ended; the log says more."}
    if task is None and not found:
        return {"state": NONE}
    if task is not None and task["status"] == DONE and not found.get("ended"):
        # It couldn't write its report to the end.
        return {"state": DONE.lower()}
    return {**found, "state": DONE.lower() if found.get("ended") else STOPPED}
