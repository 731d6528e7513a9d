"""Routes that the app answers in place of MONAI Label's own, at the same addresses and to the same clients.

    POST /infer/{model}             as MONAI Label's, with `output=dicom_seg` for every image that is DICOM
    GET  /datastore/image           of an archive: a series as one file, for clients that don't speak DICOM
    GET  /proxy/dicom/{path}        of an archive: what viewers read from it

MONAI Label answers these on its event loop, so that nobody else is answered until they are done, leaves refused uploads
in the temporary folder, makes DICOM-SEG with another datastore than the app's alone, and waits for an archive forever.
Here they run in the server's threads, and segmentations still come one after the other; what viewers read is handed
through on the event loop without waiting for anything there.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from fastapi.responses import FileResponse, Response, StreamingResponse
from monailabel.config import settings as server_settings
from monailabel.endpoints.infer import ResultType
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.app import MONAILabelApp
from monailabel.utils.others.generic import get_mime_type
from requests_toolbelt import MultipartEncoder
from starlette.background import BackgroundTask

from lib.checks import NotFound, RequestError, check_content, suffix_of, unpacked_limit
from lib.dicomweb import DicomWebDatastore
from sam2sgp.data import read_image, read_label, write_dicom_seg
from sam2sgp.data.io import is_dicom

DICOM = "application/dicom"
# Of the archive's answers; the others are about its connection, not about the content.
HEADERS_KEPT = ("content-type", "content-length", "content-encoding", "etag", "warning")


def routes(app: MONAILabelApp) -> APIRouter:
    """To be put before MONAI Label's own.

    Args:
        app: does the work; reads its `settings`, datastore and sessions.
    """
    # Where MONAI Label is set up to ask for a login, these ask for the same.
    login = Depends(RBAC(server_settings.MONAI_LABEL_AUTH_ROLE_USER))
    router = APIRouter(include_in_schema=False, dependencies=[login])

    @router.post("/infer/{model}")
    def infer(
        model: str,
        image: str = "",
        session_id: str = "",
        params: Annotated[str, Form()] = "{}",
        file: Annotated[UploadFile | None, File()] = None,
        output: ResultType | None = None,
    ) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            request = {"model": model, "image": image, **json.loads(params or "{}")}
            if file:
                request["image"] = _taken(file, Path(folder), unpacked_limit(app.settings.max_upload_mb))
            elif session_id:
                request["image"] = _lent(app, session_id)
            if output == ResultType.dicom_seg:
                request["result_extension"] = ".nii.gz"
            result = app.infer(request)
            made = Path(result["file"])
            try:
                if output == ResultType.dicom_seg:
                    source = request["image"] if file or session_id else app.datastore().get_image_uri(request["image"])
                    return _as_dicom_seg(made, source, result["params"]["label_names"], Path(folder))
                return _answer(made, result["params"], output)
            finally:
                made.unlink(missing_ok=True)

    datastore = app.datastore()
    if isinstance(datastore, DicomWebDatastore):

        @router.get("/datastore/image")
        @router.head("/datastore/image")
        def download(image: str) -> FileResponse:
            path = datastore.image_file(image)
            return FileResponse(path, media_type="application/gzip", filename=path.name)

        @router.get("/proxy/dicom/{path:path}")
        async def proxy(path: str, request: Request) -> StreamingResponse:
            answer, content = await datastore.forward(path, request.url.query)
            headers = {name: answer.headers[name] for name in HEADERS_KEPT if name in answer.headers}
            return StreamingResponse(content, answer.status_code, headers, background=BackgroundTask(answer.aclose))

    return router


def _taken(upload: UploadFile, folder: Path, limit: int) -> str:
    """The path of an upload, in a folder. Raises RequestError for a file of another kind or too large."""
    path = folder / f"image{suffix_of(upload.filename or '')}"
    with open(path, "wb") as file:
        shutil.copyfileobj(upload.file, file)
    check_content(path, limit, f"image{suffix_of(path)}")
    return str(path)


def _lent(app: MONAILabelApp, session_id: str) -> str:
    sessions = app.sessions()
    session = sessions.get_session(session_id) if sessions is not None else None
    if session is None:
        raise NotFound("session: expected one that exists, found none; create a session first.")
    return session.image


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
    geometry = read_image(source).geometry
    path = folder / "segmentation.dcm"
    class_names = {value: name for name, value in names.items()}
    write_dicom_seg(path, read_label(made, geometry), geometry, source, class_names, keep_empty=True)
    headers = {"content-disposition": f'attachment; filename="{path.name}"'}
    return Response(path.read_bytes(), media_type=DICOM, headers=headers)
