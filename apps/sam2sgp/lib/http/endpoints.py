"""The routes of images, labels, sessions and segmentations: MONAI Label's addresses, answered by the app.

    GET  /info/                                   what can be segmented and how, the state of support set and training
    POST /infer/{model}?image=|session_id=        segment an image of the datastore, of a session, or sent along
    POST /activelearning/{strategy}               the image to label next
    GET  /datastore/?output=                      the list of images and labels
    GET, HEAD, PUT, DELETE /datastore/{image,label}, GET, PUT /datastore/{image,label}/info, GET /datastore/dataset
    PUT  /session/, GET, DELETE /session/{id}     images lent for a while
    GET  /proxy/dicom/{path}                      of an archive: what viewers read from it

MONAI Label's own handlers are not used. They take any JSON, run on the event loop, so that nobody else is answered
until they are done, leave refused uploads in the temporary folder, tell absolute paths and wait for an archive forever.
Here each route declares what it takes, and a name beyond that is refused. Images and labels are told by ids. What
viewers read from an archive is handed through on the event loop without waiting for anything there.
"""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import IO, Annotated, Any

import fastapi
from fastapi import APIRouter, Request, UploadFile
from fastapi.responses import FileResponse, Response, StreamingResponse
from monailabel.endpoints.infer import ResultType
from monailabel.endpoints.user.auth import User
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.utils.others.generic import get_mime_type
from monailabel.utils.sessions import SessionInfo
from pydantic import BeforeValidator, Field
from requests_toolbelt import MultipartEncoder
from starlette.background import BackgroundTask
from starlette.types import Receive, Scope, Send

from lib.checks import NotFound, RequestError, check_file_name, image_limit, supported_suffix
from lib.http.access import NO_APPROVER, SECOND_PAIR, default_tag, need_for_tag
from lib.http.routing import (
    LOGIN_ADMIN,
    LOGIN_ANNOTATOR,
    Form,
    Id,
    OptionalId,
    OptionalTag,
    Query,
    Tag,
    client_gone,
    in_threads,
    router,
    taken,
)
from lib.server_paths import open_plain
from lib.serving.options import ImageParams, InferParams, LabelNotes, LabelParams, Notes, SampleParams, in_form
from lib.stores.audit import current_user
from lib.stores.decisions import FINAL, Decisions
from lib.stores.dicomweb import DicomWebDatastore
from lib.stores.door import admit
from sam2sgp.data import read_geometry, read_label, write_dicom_seg
from sam2sgp.data.io import is_dicom

DICOM = "application/dicom"
# These of the archive's answers are handed on; the others are about its connection, not about the content.
HEADERS_KEPT = ("content-type", "content-length", "content-encoding", "etag", "warning")
# Segmentations come one after the other; a few requests prepare their images meanwhile.
SEGMENTING = 4
# All uploads together, whose voxels are looked at, and all whole images that are sent.
STORING, SENDING = 8, 8
LONGEST_EXPIRY = 30 * 24 * 3600


class Listing(Enum):
    """What `GET /datastore/` tells: numbers, everything, or the approved pairs."""

    stats = "stats"
    all = "all"
    train = "train"


class InferQuery(Query):
    """Which image, and what comes back."""

    image: OptionalId = ""
    session_id: str = ""
    output: ResultType | None = None


class InferForm(Form):
    """The options, and an image sent along."""

    params: Annotated[InferParams, BeforeValidator(in_form)] = InferParams()
    file: UploadFile | None = None


class ListingQuery(Query):
    """How much of the datastore."""

    output: Listing = Listing.stats


class ImageQuery(Query):
    """An image by its id."""

    image: Id


class NewImageQuery(Query):
    """The id of a new image; by default the stem of its file."""

    image: OptionalId = ""


class ImageForm(Form):
    """A new image."""

    file: UploadFile
    params: Annotated[ImageParams, BeforeValidator(in_form)] = ImageParams()


class RemovedImageQuery(Query):
    """An image to delete."""

    id: Id


class LabelQuery(Query):
    """A label by its image's id and its tag."""

    label: Id
    tag: Tag


class NewLabelQuery(Query):
    """Which image a label is of; the tag `final`, the default for those who may approve, approves it."""

    image: Id
    tag: OptionalTag = ""


class LabelForm(Form):
    """A label."""

    label: UploadFile
    params: Annotated[LabelParams, BeforeValidator(in_form)] = LabelParams()


class RemovedLabelQuery(Query):
    """A label to delete."""

    id: Id
    tag: Tag


class NotesForm(Form):
    """What is known about an image."""

    info: Annotated[Notes, BeforeValidator(in_form)] = Notes()


class LabelNotesForm(Form):
    """What is known about a label."""

    info: Annotated[LabelNotes, BeforeValidator(in_form)] = LabelNotes()


class DatasetQuery(Query):
    """How many of the approved pairs; all by default."""

    limit_cases: Annotated[int, Field(ge=1)] | None = None


class NewSessionQuery(Query):
    """Whether the file is packed (ZIP, TAR), and after how many seconds without use the session ends."""

    uncompress: bool = False
    expiry: Annotated[int, Field(ge=0, le=LONGEST_EXPIRY)] = 0


class SessionForm(Form):
    """The files of a session."""

    files: Annotated[list[UploadFile], Field(min_length=1)]
    client_id: str | None = None


class SessionQuery(Query):
    """Whether asking keeps the session alive, and whether its image is wanted."""

    update_ts: bool = False
    image: bool = False


def routes(app: MONAILabelApp) -> APIRouter:
    """All of these routes.

    Args:
        app: does the work; reads its `settings`, datastore and sessions.
    """
    made = router()
    datastore = app.datastore()

    @made.get("/info/")
    def info() -> dict[str, Any]:
        return app.info()

    @made.post("/activelearning/{strategy}", dependencies=[LOGIN_ANNOTATOR])
    def next_sample(strategy: str, params: SampleParams | None = None) -> dict[str, Any]:
        return app.next_sample({"strategy": strategy})

    storing, sending = in_threads(STORING), in_threads(SENDING)
    # Where the files lie that are sent.
    root = os.path.realpath(app.settings.state_dir if app.settings.is_remote else app.settings.studies)
    _add_segmentation(made, app)
    _add_lists(made, app, sending)
    _add_images(made, datastore, root, storing, sending)
    _add_labels(made, app, root, storing)
    _add_sessions(made, app, storing)
    if isinstance(datastore, DicomWebDatastore):
        _add_proxy(made, datastore)
    return made


def _add_segmentation(made: APIRouter, app: MONAILabelApp) -> None:
    datastore = app.datastore()
    limit = image_limit(app.settings)

    @made.post("/infer/{model}")
    @in_threads(SEGMENTING, last=True)
    def infer(
        model: str,
        query: Annotated[InferQuery, fastapi.Query()],
        gone: Annotated[threading.Event, fastapi.Depends(client_gone)],
        form: Annotated[InferForm, fastapi.Form()] = InferForm(),  # noqa: B008
    ) -> Any:
        if form.params.save_label:
            need_for_tag(form.params.label_tag or DefaultLabelTag.ORIGINAL.value)
        with tempfile.TemporaryDirectory() as folder:
            request = {"model": model, "image": query.image, "gone": gone, **form.params.given()}
            # A path says that the server made it: what clients name are ids, which are text.
            if form.file:
                image = taken(form.file, Path(folder), "image")
                admit(image, limit)
                request["image"] = image
            elif query.session_id:
                request["image"] = Path(_session(app, query.session_id).image)
            as_dicom = query.output == ResultType.dicom_seg
            if as_dicom:
                request["result_extension"] = ".nii.gz"
            result = app.infer(request)
            result_file = Path(result["file"])
            try:
                if as_dicom:
                    image = request["image"]
                    source = image if isinstance(image, Path) else datastore.get_image_uri(image)
                    return _as_dicom_seg(result_file, str(source), result["params"]["label_names"], Path(folder))
                return _answer(result_file, result["params"], query.output)
            finally:
                result_file.unlink(missing_ok=True)


def _add_lists(made: APIRouter, app: MONAILabelApp, sending: Callable) -> None:
    datastore = app.datastore()

    @made.get("/datastore/")
    def listing(query: Annotated[ListingQuery, fastapi.Query()]) -> Any:
        if query.output is Listing.all:
            return datastore.json()
        return datastore.datalist(full_path=False) if query.output is Listing.train else datastore.status()

    @made.get("/datastore/dataset", dependencies=[LOGIN_ANNOTATOR])
    @sending
    def dataset(query: Annotated[DatasetQuery, fastapi.Query()]) -> FileResponse:
        # Opened at once: the next request puts another one in its place.
        return _file(datastore.get_dataset_archive(query.limit_cases), os.path.realpath(app.settings.state_dir))


def _add_images(made: APIRouter, datastore: Decisions, root: str, storing: Callable, sending: Callable) -> None:
    @made.head("/datastore/image", include_in_schema=False)
    @made.get("/datastore/image")
    @sending
    def image(query: Annotated[ImageQuery, fastapi.Query()]) -> FileResponse:
        is_remote = isinstance(datastore, DicomWebDatastore)
        return _file(datastore.image_file(query.image) if is_remote else datastore.get_image_uri(query.image), root)

    @made.put("/datastore/", include_in_schema=False)
    @made.put("/datastore/image")
    @storing
    def add_image(
        query: Annotated[NewImageQuery, fastapi.Query()],
        form: Annotated[ImageForm, fastapi.Form()],
        user: Annotated[User, LOGIN_ANNOTATOR],
    ) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            path = taken(form.file, Path(folder), "image")
            image_id = query.image or _name(form.file)[: -len(supported_suffix(path))]
            return {"image": datastore.add_image(image_id, str(path), {"user": current_user.get() or user.username})}

    @made.delete("/datastore/image", dependencies=[LOGIN_ADMIN])
    def remove_image(query: Annotated[RemovedImageQuery, fastapi.Query()]) -> dict[str, str]:
        datastore.remove_image(query.id)
        return {}

    @made.get("/datastore/image/info")
    def image_info(query: Annotated[ImageQuery, fastapi.Query()]) -> dict[str, Any]:
        return without_path(datastore.get_image_info(query.image))

    @made.put("/datastore/image/info")
    def note_image(
        query: Annotated[ImageQuery, fastapi.Query()],
        user: Annotated[User, LOGIN_ADMIN],
        form: Annotated[NotesForm, fastapi.Form()] = NotesForm(),  # noqa: B008
    ) -> None:
        datastore.update_image_info(
            query.image, {**form.info.model_dump(), "user": current_user.get() or user.username}
        )


def _add_labels(made: APIRouter, app: MONAILabelApp, root: str, storing: Callable) -> None:
    datastore = app.datastore()

    @made.head("/datastore/label", include_in_schema=False)
    @made.get("/datastore/label")
    def label(query: Annotated[LabelQuery, fastapi.Query()]) -> FileResponse:
        return _file(datastore.get_label_uri(query.label, query.tag), root)

    @made.put("/datastore/label")
    @storing
    def save_label(
        query: Annotated[NewLabelQuery, fastapi.Query()],
        form: Annotated[LabelForm, fastapi.Form()],
        user: Annotated[User, LOGIN_ANNOTATOR],
    ) -> dict[str, Any]:
        # Viewers name no tag: what may not be approved becomes a draft.
        asked = query.tag or default_tag()
        need_for_tag(asked)
        tag = datastore.tag_of_own(asked)
        with tempfile.TemporaryDirectory() as folder:
            path = taken(form.label, Path(folder), "label")
            given = {**form.params.given(), "user": current_user.get() or user.username}
            label_id = datastore.save_label(query.image, str(path), tag, given)
        told = {**app.on_save_label(query.image, label_id), "image": query.image, "label": label_id}
        if tag != (query.tag or FINAL):
            told["notice"] = SECOND_PAIR if tag != asked else NO_APPROVER
        return told

    @made.delete("/datastore/label", dependencies=[LOGIN_ADMIN])
    def remove_label(query: Annotated[RemovedLabelQuery, fastapi.Query()]) -> dict[str, str]:
        datastore.remove_label(query.id, query.tag)
        return {}

    @made.get("/datastore/label/info")
    def label_info(query: Annotated[LabelQuery, fastapi.Query()]) -> dict[str, Any]:
        return without_path(datastore.get_label_info(query.label, query.tag))

    @made.put("/datastore/label/info", dependencies=[LOGIN_ADMIN])
    def note_label(
        query: Annotated[LabelQuery, fastapi.Query()],
        form: Annotated[LabelNotesForm, fastapi.Form()] = LabelNotesForm(),  # noqa: B008
    ) -> None:
        # Its user stays who made it.
        datastore.update_label_info(query.label, query.tag, form.info.model_dump(exclude_unset=True))


def _add_sessions(made: APIRouter, app: MONAILabelApp, storing: Callable) -> None:
    @made.put("/session/", dependencies=[LOGIN_ANNOTATOR])
    @storing
    def create(
        query: Annotated[NewSessionQuery, fastapi.Query()], form: Annotated[SessionForm, fastapi.Form()]
    ) -> dict[str, Any]:
        sessions = _sessions(app)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            files = [_stored(upload, Path(folder)) for upload in form.files]
            source = files[0] if len(files) == 1 else Path(folder)
            session_id, session = sessions.add_session(str(source), query.expiry, query.uncompress)
        return {"session_id": session_id, "session_info": _told(session)}

    @made.get("/session/{session_id}")
    def show(session_id: str, query: Annotated[SessionQuery, fastapi.Query()]) -> Any:
        session = _session(app, session_id, query.update_ts)
        return _file(session.image, os.path.realpath(session.path)) if query.image else _told(session)

    @made.delete("/session/{session_id}", dependencies=[LOGIN_ANNOTATOR])
    def remove(session_id: str) -> dict[str, Any]:
        session = _session(app, session_id)
        _sessions(app).remove_session(session_id)
        return _told(session)


def _add_proxy(made: APIRouter, datastore: DicomWebDatastore) -> None:
    @made.api_route("/proxy/dicom/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def proxy(path: str, request: Request) -> StreamingResponse:
        answer, content = await datastore.forward(path, request.url.query)
        headers = {name: answer.headers[name] for name in HEADERS_KEPT if name in answer.headers}
        return StreamingResponse(content, answer.status_code, headers, background=BackgroundTask(answer.aclose))


def without_path(info: Mapping[str, Any]) -> dict[str, Any]:
    """What is known about an image or a label, without where it is on the server."""
    return {key: value for key, value in info.items() if key != "path"}


def _name(upload: UploadFile) -> str:
    """The name of an upload. Some clients send the whole path on their machine."""
    return check_file_name((upload.filename or "").replace("\\", "/").rpartition("/")[2])


def _stored(upload: UploadFile, folder: Path) -> Path:
    """An upload as a file under its own name. Raises RequestError for a name that comes twice."""
    path = folder / _name(upload)
    try:
        with open(path, "xb") as file:
            shutil.copyfileobj(upload.file, file)
    except FileExistsError:
        raise RequestError(
            f"files: expected each name once, found {ascii(path.name)} twice; send a ZIP file."
        ) from None
    return path


class _Opened(FileResponse):
    """A file that was opened before: whatever comes to its place meanwhile, it is sent whole, and nothing else."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file = file
        super().__init__(
            f"/dev/fd/{file.fileno()}",
            media_type=get_mime_type(path),
            filename=os.path.basename(path),
            stat_result=os.fstat(file.fileno()),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


def _file(path: str | Path, within: str) -> FileResponse:
    try:
        if not path:
            raise FileNotFoundError()
        return _Opened(open_plain(os.path.realpath(path), within), str(path))
    except OSError:
        raise NotFound("file: expected one that exists, found none; load the list again.") from None


def _sessions(app: MONAILabelApp) -> Any:
    sessions = app.sessions()
    if sessions is None:
        raise NotFound("session: expected sessions to be enabled, found them switched off; upload the image instead.")
    return sessions


def _session(app: MONAILabelApp, session_id: str, update_ts: bool = True) -> SessionInfo:
    session = _sessions(app).get_session(session_id, update_ts)
    if session is None:
        raise NotFound("session: expected one that exists, found none; create a session first.")
    return session


def _told(session: SessionInfo) -> dict[str, Any]:
    """A session as clients see it: its files by their names within it."""
    return {**without_path(session.to_json()), "image": os.path.relpath(session.image, session.path)}


def _answer(made: Path, params: dict[str, Any], output: ResultType | None) -> Response:
    """A label file, its parameters, or both, as MONAI Label's clients expect them."""
    if output == ResultType.json:
        return Response(json.dumps(params), media_type="application/json")
    kind = get_mime_type(str(made))
    if output == ResultType.image:
        headers = {"content-disposition": f'attachment; filename="{made.name}"'}
        return Response(made.read_bytes(), media_type=kind, headers=headers)
    fields = {
        "params": (None, json.dumps(params), "application/json"),
        "image": (made.name, made.read_bytes(), kind),
    }
    message = MultipartEncoder(fields=fields)
    return Response(message.to_string(), media_type=message.content_type)


def _as_dicom_seg(made: Path, source: str, names: dict[str, int], folder: Path) -> Response:
    """A label file as DICOM Segmentation object, whose segments are called automatic.

    Raises:
        RequestError: the image is none that a segmentation object can refer to.
    """
    if not is_dicom(source):
        raise RequestError(
            "output: expected an image from DICOM for dicom_seg, found one of another kind; ask for output=image."
        )
    geometry = read_geometry(source)
    path = folder / "segmentation.dcm"
    class_names = {value: name for name, value in names.items()}
    write_dicom_seg(path, read_label(made, geometry), geometry, source, class_names, keep_empty=True)
    headers = {"content-disposition": f'attachment; filename="{path.name}"'}
    return Response(path.read_bytes(), media_type=DICOM, headers=headers)
