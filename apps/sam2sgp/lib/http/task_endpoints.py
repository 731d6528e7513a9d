"""The routes of training, scoring and batch inference, which run in processes of their own.

    GET, DELETE /train/ /scoring/ /batch/infer    the last task, and its end
    POST /train/{model}, /train/adapt, /scoring/{method}, /batch/infer/{model}
    POST /train/                                  all models, as OHIF's panel asks for it

`run_sync` is refused: long work would keep a thread of the server for hours.
"""

from typing import Annotated, Any, Literal

import fastapi
from fastapi import APIRouter
from monailabel.interfaces.app import MONAILabelApp
from pydantic import AfterValidator

from lib.checks import NotFound, RequestError
from lib.http.routing import LOGIN_ADMIN, Query, router
from lib.serving.options import ROLL_BACK, AdaptParams, AllTrainParams, BatchParams, ScoringParams, TrainParams
from lib.tasks.background import BackgroundTasks, Busy


def _in_background(run_sync: bool) -> bool:
    if run_sync:
        raise ValueError("expected a task in the background, found one to wait for; leave it out and ask for the task.")
    return run_sync


class StartQuery(Query):
    """Whether a task may wait for its turn while another one runs."""

    enqueue: bool = False
    run_sync: Annotated[bool, AfterValidator(_in_background)] = False


class BatchQuery(Query):
    """Which images; a list of them comes in the body."""

    images: Literal["all", "labeled", "unlabeled", "unannotated"] | None = None
    run_sync: Annotated[bool, AfterValidator(_in_background)] = False


class StatusQuery(Query):
    """All tasks in place of the last one, or only one that runs."""

    all: bool = False
    check_if_running: bool = False


def task_routes(app: MONAILabelApp, tasks: BackgroundTasks) -> APIRouter:
    """All of these routes.

    Args:
        app: tells the names of models and methods.
        tasks: starts and follows the processes.
    """
    made = router()
    for path, method in (("/train/", "train"), ("/scoring/", "scoring"), ("/batch/infer", "batch_infer")):
        _add_status(made, tasks, path, method)

    _add_training(made, app, tasks)
    _add_scoring(made, app, tasks)
    _add_batch(made, app, tasks)
    return made


def _add_training(made: APIRouter, app: MONAILabelApp, tasks: BackgroundTasks) -> None:
    @made.post("/train/adapt", dependencies=[LOGIN_ADMIN])
    def adapt(query: Annotated[StartQuery, fastapi.Query()], params: AdaptParams | None = None) -> dict[str, Any]:
        return tasks.start("train", {"model": "adapt", **(params or AdaptParams()).given()}, query.enqueue)

    @made.post("/train/{model}", dependencies=[LOGIN_ADMIN])
    def train(
        model: str, query: Annotated[StartQuery, fastapi.Query()], params: TrainParams | None = None
    ) -> dict[str, Any]:
        _check(model, app.info()["trainers"], "model")
        return tasks.start("train", {"model": model, **(params or TrainParams()).given()}, query.enqueue)

    @made.post("/train/", dependencies=[LOGIN_ADMIN])
    def train_all(
        query: Annotated[StartQuery, fastapi.Query()], params: AllTrainParams | None = None
    ) -> dict[str, Any]:
        options = params or AllTrainParams()
        requests = {model: getattr(options, model).given() for model in app.info()["trainers"]}
        # The weights are those of all models: they are rolled back once, and nothing is made of them at once.
        back = [model for model, given in requests.items() if given.get("action") == ROLL_BACK][:1]
        started: dict[str, Any] = {}
        for model in back or requests:
            request = {"model": model, **requests[model]}
            try:
                # One after the other.
                result, detail = tasks.start("train", request, query.enqueue or bool(started)), None
            except Busy as error:
                # What was started or waits by now is told in any case.
                if not started:
                    raise
                result, detail = None, str(error)
            started[model] = {"result": result, "detail": detail}
        return started


def _add_scoring(made: APIRouter, app: MONAILabelApp, tasks: BackgroundTasks) -> None:
    @made.post("/scoring/{method}", dependencies=[LOGIN_ADMIN])
    def score(
        method: str, query: Annotated[StartQuery, fastapi.Query()], params: ScoringParams | None = None
    ) -> dict[str, Any]:
        _check(method, app.info()["scoring"], "method")
        return tasks.start("scoring", {"method": method}, query.enqueue)

    @made.post("/scoring/", dependencies=[LOGIN_ADMIN], include_in_schema=False)
    def score_all() -> None:
        names = ", ".join(f"/scoring/{name}" for name in app.info()["scoring"])
        raise RequestError(f"scoring: expected the name of a method, found none; use {names}.")


def _add_batch(made: APIRouter, app: MONAILabelApp, tasks: BackgroundTasks) -> None:
    @made.post("/batch/infer/{model}", dependencies=[LOGIN_ADMIN])
    def batch(
        model: str, query: Annotated[BatchQuery, fastapi.Query()], params: BatchParams | None = None
    ) -> dict[str, Any]:
        _check(model, app.info()["models"], "model")
        request = {"model": model, **(params or BatchParams()).given()}
        if query.images:
            request["images"] = query.images
        if isinstance(images := request.get("images"), list):
            known = set(app.datastore().list_images())
            if unknown := next((image for image in images if image not in known), None):
                raise NotFound(
                    f"images: expected ids of the datastore, found {ascii(unknown)[:80]}; take them from the list."
                )
        return tasks.start("batch_infer", request)


def _add_status(made: APIRouter, tasks: BackgroundTasks, path: str, method: str) -> None:
    @made.get(path, name=f"{method} status")
    def status(query: Annotated[StatusQuery, fastapi.Query()]) -> Any:
        found = tasks.running(method) if query.check_if_running else next(iter(tasks.all(method)[-1:]), None)
        if found is None:
            raise NotFound(f"{method}: expected a task, found none; start one first.")
        return tasks.all(method) if query.all and not query.check_if_running else found

    @made.delete(path, dependencies=[LOGIN_ADMIN], name=f"{method} stop")
    def stop() -> dict[str, Any] | None:
        return tasks.stop(method)


def _check(name: str, known: Any, what: str) -> None:
    if name not in known:
        raise NotFound(f"{what}: expected one of {', '.join(known)}, found {ascii(name)[:80]}; choose one of them.")
