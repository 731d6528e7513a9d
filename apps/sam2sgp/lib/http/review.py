"""The review page: look at every prediction slice by slice, correct it, approve it, go to the next.

    GET  /sam2sgp/review/                          the page; its files under assets/
    GET  /sam2sgp/review/queue?show=&order=&…      images in the order in which it pays to look at them, in parts
    GET  /sam2sgp/review/case?image=[&label_tag=]  what is known about an image and one of its labels
    GET  /sam2sgp/review/slices?image=&seen=&first=&count=             voxels, as `lib.http.volumes` stores them
    GET  /sam2sgp/review/labels?image=&label_tag=&seen=&first=&count=  class values
    GET  /sam2sgp/review/history?image=            who did what, and earlier states
    POST /sam2sgp/review/correct                   voxel changes of a label, saved as draft or approved
    POST /sam2sgp/review/bring_back                an earlier state becomes a draft

Approving as it is, rejecting, removing and restoring are the support page's (`lib.http.page`). Voxels come as plain
little-endian integers, row by row, gzipped; a browser keeps them and asks by ETag whether they still hold. The client
names the states of image and label that it shows, so that it never mixes two, and never decides about something else
than was on the screen. The server writes labels, on the image's own grid; a client only says which voxels change.

Handlers run in the server's threads. Whoever asks for slices of an image that isn't in memory waits until it is read.
"""

import gzip
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import fastapi
import numpy as np
from fastapi import APIRouter, Header
from fastapi.responses import FileResponse, Response
from pydantic import Field

from lib.checks import Conflict, NotFound, RequestError
from lib.http.access import SECOND_PAIR, need_for_tag, not_offered
from lib.http.corrections import Correction, Restoration, State, corrected, tags_seen
from lib.http.page import PREFIX, SECURITY, Threads
from lib.http.routing import LOGIN_ANNOTATOR, LOGIN_USER, Id, OptionalTag, Query, Tag, in_threads
from lib.http.volumes import ShownImage, ShownLabel, Volumes
from lib.http.work_list import Order, Shown, entry_of, listed, origins, prediction_of, shown_first
from lib.serving.segmenter import ServerSegmenter
from lib.stores.audit import current_user
from lib.stores.decisions import DRAFT, FINAL, OF_ANOTHER, Decisions, state_of
from lib.stores.image_identity import is_of_another
from lib.stores.naming import declared
from lib.stores.records import voxels_corrected
from lib.stores.trail import Trail
from sam2sgp.data import write_label
from sam2sgp.data.io import output_suffix
from sam2sgp.drawing import class_colour
from sam2sgp.errors import DataError
from sam2sgp.transforms import ScaleIntensityByModalityd

FILES = Path(__file__).parents[2] / "templates" / "review"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The voxels of one answer; a slice that is larger comes by itself.
BYTES_SENT = 8 << 20
MOST_SLICES = 64
MOST_ENTRIES = 200
FASTEST = 1
# Requests for voxels at once; most of them are answered from memory.
LOOKING = 6

Number = Annotated[int, Field(ge=0, le=1 << 31)]


class QueueQuery(Query):
    """Which part of which list; `find`: an image whose place in it is told."""

    show: Shown = Shown.open
    order: Order = Order.pays
    name: Annotated[str, Field(max_length=256)] = ""
    of_class: Annotated[str, Field(max_length=64)] = ""
    first: Number = 0
    count: Annotated[int, Field(ge=1, le=MOST_ENTRIES)] = 100
    find: Annotated[str, Field(max_length=1024)] = ""


class CaseQuery(Query):
    """An image, and the tag of the label to show; by default the one that is shown first."""

    image: Id
    label_tag: OptionalTag = ""


class SlicesQuery(Query):
    """Some slices of an image."""

    image: Id
    seen: State
    first: Number
    count: Annotated[int, Field(ge=1, le=MOST_SLICES)]


class LabelsQuery(SlicesQuery):
    """The same of a label; `seen`: the label's state."""

    label_tag: Tag


class HistoryQuery(Query):
    """An image."""

    image: Id


class ReviewPage:
    """Routes of the page.

    Args:
        datastore: images and labels.
        segmenter: knows the classes.
        ranked: puts ids of images without an approved label in the order in which they should be labelled.
        audit_log: path of the audit log.
        scale: how the network gets to see intensities.
        saved: called with image id and label id when an approved label has come.
    """

    def __init__(
        self,
        datastore: Decisions,
        segmenter: ServerSegmenter,
        ranked: Callable[[list[str]], list[str]],
        audit_log: Path,
        scale: ScaleIntensityByModalityd,
        saved: Callable[[str, str], Any] = lambda image, label: None,
    ) -> None:
        self.datastore = datastore
        self.segmenter = segmenter
        self.ranked = ranked
        self.trail = Trail(audit_log)
        self.saved = saved
        self.volumes = Volumes(scale)
        self.files = {path.name: path for path in FILES.iterdir() if path.suffix in KINDS}

    def router(self, threads: Threads | None = None) -> APIRouter:
        """The routes; their own threads by default."""
        threads = threads or Threads()
        looking = in_threads(LOOKING)
        made = APIRouter(prefix=f"{PREFIX}/review", include_in_schema=False, dependencies=[LOGIN_USER])
        tag = Annotated[str | None, Header(alias="if-none-match")]

        @made.get("/")
        def page() -> Response:
            return self.file("review.html")

        @made.get("/assets/{name}")
        def file(name: str) -> Response:
            return self.file(name)

        @made.get("/queue")
        def queue(query: Annotated[QueueQuery, fastapi.Query()]) -> dict[str, Any]:
            return self.queue(query)

        @made.get("/case")
        @threads.drawing
        def case(query: Annotated[CaseQuery, fastapi.Query()]) -> dict[str, Any]:
            return self.case(query.image, query.label_tag)

        @made.get("/slices")
        @looking
        def slices(query: Annotated[SlicesQuery, fastapi.Query()], known: tag = None) -> Response:
            return self.slices(query, known)

        @made.get("/labels")
        @looking
        def labels(query: Annotated[LabelsQuery, fastapi.Query()], known: tag = None) -> Response:
            return self.labels(query, known)

        @made.get("/history")
        def history(query: Annotated[HistoryQuery, fastapi.Query()]) -> dict[str, Any]:
            return self.history(query.image)

        @made.post("/correct", dependencies=[LOGIN_ANNOTATOR])
        @threads.deciding
        def correct(correction: Correction) -> dict[str, Any]:
            return self.correct(correction)

        @made.post("/bring_back", dependencies=[LOGIN_ANNOTATOR])
        @threads.deciding
        def bring_back(restoration: Restoration) -> dict[str, Any]:
            return self.bring_back(restoration)

        return made

    # The page, and what it shows

    def file(self, name: str) -> Response:
        """A file of the page itself."""
        if name not in self.files:
            raise NotFound(f"{ascii(name)[:80]}: expected a file of the page, found none; load it again.")
        path = self.files[name]
        headers = {"Content-Security-Policy": SECURITY, "Cache-Control": "no-cache"}
        return FileResponse(path, media_type=KINDS[path.suffix], headers=headers)

    def queue(self, query: QueueQuery) -> dict[str, Any]:
        """A part of the list: its entries, how many there are in all and in each state, how approved labels came about,
        the place of an image, and what the client may not do.
        """
        records = self.datastore.records()
        entries, counts = listed(records, self.ranked, query.show, query.order, query.name, query.of_class)
        images = [entry.image for entry in entries] if query.find else []
        return {
            "entries": [vars(entry) for entry in entries[query.first : query.first + query.count]],
            "first": query.first,
            "total": len(entries),
            "counts": counts,
            "origins": origins(records),
            "classes": sorted(set(self._names({}).values())),
            "place": images.index(query.find) if query.find in images else None,
            "not_offered": not_offered(),
        }

    def case(self, image: str, label_tag: str = "") -> dict[str, Any]:
        """All that the page needs to know about an image and one of its labels, but for the voxels."""
        self.segmenter.keep_up(certain=False)
        path = self.datastore.get_image_uri(image)
        image_seen = state_of(path)
        shown = self.volumes.image(path)
        tags = list(self.datastore.get_labels_by_image_id(image))
        records = {tag: self.datastore.get_label_info(image, tag) for tag in tags}
        tag = label_tag or shown_first(records)[0]
        if tag and tag not in tags:
            raise DataError(f"{image}: expected a label with the tag {tag!r}, found none; load the list again.")
        label = self.datastore.get_label_uri(image, tag) if tag else ""
        seen = state_of(label) if label else None
        looked_at = self.volumes.label(label, path) if label else None
        if image_seen is None or image_seen != state_of(path) or (label and seen != state_of(label)):
            raise Conflict(f"image {image}: expected it to stay as it was while it was read; load it again.")
        return {
            **vars(entry_of(image, records)),
            "image_seen": image_seen,
            **self._about_image(shown),
            "label_tag": tag,
            "seen": seen or "",
            "label_bytes": looked_at.slices.dtype.itemsize if looked_at else 1,
            "labels_per_request": _per_request(looked_at.slices) if looked_at else 1,
            "of_another_image": bool(tag) and self.datastore.is_of_another_image(image, tag),
            "labels": {other: self.datastore.state_of_label(image, other) for other in tags},
            "classes": [
                {
                    "value": value,
                    "name": name,
                    "colour": class_colour(value),
                    "counts": looked_at.counts.get(value) if looked_at else None,
                }
                for value, name in sorted(self._names(records.get(tag, {}), looked_at).items())
            ],
            "prediction": _about_prediction(prediction_of(records, tag)) if tag else None,
        }

    def slices(self, query: SlicesQuery, known: str | None = None) -> Response:
        """Slices [first, first + count) of an image: (count, H, W, C) of `bytes` each."""
        path = self.datastore.get_image_uri(query.image)
        if state_of(path) != query.seen:
            raise Conflict(f"image {query.image}: expected the image that was shown, found another one; load it again.")
        etag = _etag(query.image, query.seen, query.first, query.count)
        if known == etag:
            return Response(status_code=304, headers=_kept(etag))
        shown = self.volumes.image(path)
        if state_of(path) != query.seen:
            raise Conflict(f"image {query.image}: expected it to stay as it was while it was read; load it again.")
        return _voxels(shown.slices, query, etag)

    def labels(self, query: LabelsQuery, known: str | None = None) -> Response:
        """The same slices of a label: (count, H, W) of `label_bytes` each."""
        image = self.datastore.get_image_uri(query.image)
        label = self._label(query.image, query.label_tag, query.seen)
        etag = _etag(query.image, query.label_tag, query.seen, query.first, query.count)
        if known == etag:
            return Response(status_code=304, headers=_kept(etag))
        shown = self.volumes.label(label, image)
        self._label(query.image, query.label_tag, query.seen)
        return _voxels(shown.slices, query, etag)

    def history(self, image: str) -> dict[str, Any]:
        """What was done to an image's labels, and the earlier states that can be brought back."""
        self.datastore.get_image_info(image)
        path, earlier = self.datastore.get_image_uri(image), self.datastore.history
        versions = []
        for entry in earlier.versions(image):
            # The oldest one may go meanwhile.
            with suppress(NotFound):
                file, info = earlier.get(image, entry["version"])
                versions.append({**entry, "of_another_image": is_of_another(info, path, file)})
        return {"events": self.trail.events_of(image), "versions": versions}

    # What changes

    def correct(self, correction: Correction) -> dict[str, Any]:
        """Save what was painted, as a draft or approved, and tell the new state.

        What the client wants to approve becomes a draft where somebody else has to, and `notice` says so.
        """
        image = correction.image
        need_for_tag(correction.save_as)
        path = self.datastore.get_image_uri(image)
        shown = self.volumes.image(path)
        if list(shown.geometry.shape) != correction.shape:
            raise Conflict(
                f"image {image}: expected slices of {' x '.join(map(str, shown.geometry.shape))}, found "
                f"{' x '.join(map(str, correction.shape))}; load it again."
            )
        classes = {entry.idx: str(entry.name) for entry in correction.classes if entry.idx and entry.name}
        info: dict[str, Any] = {}
        before, values = np.zeros(shown.geometry.shape, np.uint8), set(classes)
        if correction.label_tag:
            label = self.volumes.label(self._label(image, correction.label_tag, correction.seen), path)
            before, values = label.slices, values | label.counts.keys()
            info = self.datastore.get_label_info(image, correction.label_tag)
        after = corrected(before, correction.changes, values)
        changed = int((after != before).sum())
        earlier = voxels_corrected(info)
        info = {key: info[key] for key in ("model", "params") if key in info}
        info["label_info"] = [{"idx": value, "name": name} for value, name in sorted(classes.items())]
        info["corrected"] = {"voxels": earlier + changed, "from": correction.label_tag}
        tag = self._save(image, after, shown, correction.save_as, info, correction.image_seen, tags_seen(correction))
        if tag == FINAL and correction.label_tag == DRAFT:
            # Somebody else may have saved another one meanwhile, which stays.
            with suppress(DataError):
                self.datastore.reject(image, DRAFT, correction.seen)
        notice = {"notice": SECOND_PAIR} if tag != correction.save_as else {}
        return {**self._saved(image, tag), "voxels": changed, **notice}

    def bring_back(self, restoration: Restoration) -> dict[str, Any]:
        """Make an earlier state of a label a draft."""
        image = restoration.image
        path = self.datastore.get_image_uri(image)
        shown = self.volumes.image(path)
        file, info = self.datastore.history.get(image, restoration.version)
        if is_of_another(info, path, file):
            raise Conflict(f"{image}: expected an earlier label of this image, found one {OF_ANOTHER}")
        kept: dict[str, Any] = {key: info[key] for key in ("model", "params", "label_info", "corrected") if key in info}
        # Who brought it back hasn't made it, and the audit log knows him.
        kept["user"] = info.get("user")
        seen = {DRAFT: restoration.replaces}
        labels = self.volumes.label(file, path).slices
        self._save(image, labels, shown, DRAFT, kept, restoration.image_seen, seen)
        return self._saved(image, DRAFT)

    def _save(
        self,
        image: str,
        labels: np.ndarray,
        shown: ShownImage,
        tag: str,
        info: dict[str, Any],
        image_seen: str,
        seen: dict[str, str],
    ) -> str:
        """Save a label; the tag that it got."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"label{output_suffix(shown.geometry)}")
            write_label(file, labels, shown.geometry)
            known = {"user": current_user.get(), **info}
            tag = self.datastore.correct(image, str(file), tag, known, image_seen, seen)
            if tag == DRAFT:
                # Whoever saves one goes on with it. It may have gone by now.
                with suppress(OSError, DataError):
                    path = self.datastore.get_label_uri(image, tag)
                    self.volumes.keep_label(path, self.datastore.get_image_uri(image), labels, file)
        return tag

    def _saved(self, image: str, tag: str) -> dict[str, Any]:
        if tag == FINAL:
            self.saved(image, image)
        return {"image": image, "label_tag": tag, "seen": self.datastore.state_of_label(image, tag)}

    # Parts

    def _label(self, image: str, tag: str, seen: str) -> str:
        """The path of a label as it was seen. Raises Conflict."""
        path = self.datastore.path_of_label(image, tag)
        if not path or state_of(path) != seen:
            raise Conflict(f"{image}: expected its label {tag!r} as it was shown, found another one; load it again.")
        return path

    def _about_image(self, shown: ShownImage) -> dict[str, Any]:
        """What the page needs to show an image's voxels."""
        window, kind = self.volumes.window(shown, self.segmenter.state().scaling)
        return {
            "shape": shown.geometry.shape,
            "spacing": shown.geometry.spacing,
            "plane": shown.plane,
            "edges": shown.edges,
            "channels": shown.slices.shape[3],
            "bytes": shown.slices.dtype.itemsize,
            "per_request": _per_request(shown.slices),
            "slope": shown.slope,
            "intercept": shown.intercept,
            "range": [shown.lowest, shown.highest],
            "window": window,
            "kind": kind,
        }

    def _names(self, record: dict[str, Any], label: ShownLabel | None = None) -> dict[int, str]:
        """Names of the classes that a label may have, by value: what it says itself comes first."""
        state = self.segmenter.state()
        names = {**state.class_names, **state.segmentable, **self.segmenter.cases.declared(), **declared(record)}
        values = label.counts if label else ()
        return names | {value: f"class_{value}" for value in values if value not in names}


def _about_prediction(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the model said of a label; None where it said nothing."""
    if not found:
        return None
    return {
        "confidence": found.get("confidence") or {},
        "support": found.get("support") or {},
        "unlike_support": bool(found.get("unlike_support")),
        "maybe_absent": found.get("maybe_absent") or [],
        "warnings": found.get("warnings") or [],
        "weights": found.get("weights"),
    }


def _per_request(slices: np.ndarray) -> int:
    return max(1, min(MOST_SLICES, BYTES_SENT // slices[0].nbytes))


def _voxels(slices: np.ndarray, query: SlicesQuery, etag: str) -> Response:
    most = _per_request(slices)
    if query.first >= len(slices) or query.count > most:
        raise RequestError(
            f"slices: expected at most {most} from 0 to {len(slices) - 1}, found {query.count} from {query.first}; ask "
            "for fewer."
        )
    part = slices[query.first : query.first + query.count]
    content = gzip.compress(part.astype(part.dtype.newbyteorder("<")).tobytes(), FASTEST, mtime=0)
    headers = {**_kept(etag), "content-encoding": "gzip"}
    return Response(content, media_type="application/octet-stream", headers=headers)


def _etag(*parts: Any) -> str:
    return f'"{"/".join(quote(str(part), safe="") for part in parts)}"'


def _kept(etag: str) -> dict[str, str]:
    """A browser may keep it, but has to ask whether it still holds; nobody between may."""
    return {"etag": etag, "cache-control": "private, no-cache"}
