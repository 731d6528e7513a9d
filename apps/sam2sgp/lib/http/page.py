"""The support page: what the model is being told, and what waits for a decision.

    GET  /sam2sgp/                             support set, predictions waiting, next images, training
    GET  /sam2sgp/item?content=…               thumbnail of a support item
    GET  /sam2sgp/picture?image=…[&label_tag=…]  an image, with one of its labels drawn
    POST /sam2sgp/{approve,reject,remove,restore}  {"image": …, "label_tag": …[, "seen": …]}, as JSON

Approving a prediction gives it the tag `final`, which is what joins the support set. `seen` names the state of the
label that the page showed; nothing is decided about a newer one in its place. Removing an approved label from
the support set gives it the tag `removed`, restoring it the tag `final` again; the file itself stays. Nothing is loaded
from elsewhere.

Handlers run in the server's threads, at the same time as requests to MONAI Label. Decisions are the datastore's
(`lib.stores.decisions`); nothing here waits for an image that is being segmented.
"""

import io
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import fastapi
import numpy as np
import torch
from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from pydantic import Field

from lib.checks import NotFound
from lib.http.access import not_offered
from lib.http.routing import LOGIN_ANNOTATOR, LOGIN_USER, Id, Query, Tag, in_threads
from lib.serving.options import Declared
from lib.serving.usage import Usage
from lib.stores.decisions import FINAL, REMOVED, Decisions, state_of
from lib.stores.dicomweb import DicomWebDatastore
from sam2sgp.data import read_image, read_label
from sam2sgp.drawing import class_colour, draw_overlay, to_display
from sam2sgp.errors import DataError
from sam2sgp.transforms import choose_scaling, scale_intensity

logger = logging.getLogger(__name__)

PREFIX = "/sam2sgp"
TEMPLATES = Path(__file__).parents[2] / "templates"
PER_PAGE = 24
EDGE = 256
PICTURES_KEPT = 256
# At once: for a picture, and for an approval, an image is read whole, and it may be a volume of gigabytes.
DRAWING, DECIDING = 2, 4
# Only this page's own files: no script or style in the page itself, and no frame around it.
OWN = ("img-src", "style-src", "script-src", "connect-src")
SECURITY = "; ".join(["default-src 'none'", *(f"{kind} 'self'" for kind in OWN), "frame-ancestors 'none'"])
ASSETS = {"page.css": "text/css", "page.js": "text/javascript"}
CURVE = (360, 90)
Part = Annotated[int, Field(ge=1, le=1_000_000)]


class PartsQuery(Query):
    """Which part of each list of the page."""

    support: Part = 1
    waiting: Part = 1
    removed: Part = 1
    next: Part = 1


class ItemQuery(Query):
    """A support item by its content."""

    content: Annotated[str, Field(max_length=256)]


class PictureQuery(Query):
    """An image, and one of its labels to draw over it."""

    image: Id
    label_tag: Annotated[str, Field(max_length=64)] = ""


class Decision(Declared):
    """A label by its image and its tag, and `seen`: the state of the label that the page showed, if it tells."""

    image: Id
    label_tag: Tag
    seen: Annotated[str, Field(max_length=256)] = ""


class Removal(Decision):
    """Which label leaves the support set, by default the approved one."""

    label_tag: Tag = FINAL


class Reinstatement(Decision):
    """Which label joins the support set again, by default the one that was removed."""

    label_tag: Tag = REMOVED


@dataclass(frozen=True)
class Threads:
    """Decorators of handlers that hold an image in memory: those of both pages share their limits."""

    drawing: Callable = field(default_factory=lambda: in_threads(DRAWING))
    deciding: Callable = field(default_factory=lambda: in_threads(DECIDING))


class SupportPage:
    """Routes of the page.

    Args:
        datastore: images and labels; approving, rejecting, removing and restoring happens there.
        segmenter: holds the support bank.
        usage: how often items were used.
        ranked: puts ids of unlabelled images in the order in which they should be labelled.
        training: stats of the last training.
        saved: called with image id and label id when an approved label has come or gone.
    """

    def __init__(
        self,
        datastore: Decisions,
        segmenter: Any,
        usage: Usage,
        ranked: Callable[[list[str]], list[str]],
        training: Callable[[], dict],
        saved: Callable[[str, str], object] = lambda image, label: None,
    ) -> None:
        self.datastore = datastore
        self.segmenter = segmenter
        self.usage = usage
        self.ranked = ranked
        self.training = training
        self.saved = saved
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self.template = environment.get_template("page.html.j2")

    def router(self, threads: Threads | None = None) -> APIRouter:
        """The routes; their own threads by default."""
        threads = threads or Threads()
        made = APIRouter(prefix=PREFIX, include_in_schema=False, dependencies=[LOGIN_USER])

        @made.get("/")
        def show(query: Annotated[PartsQuery, fastapi.Query()]) -> HTMLResponse:
            return self.show(**query.model_dump())

        @made.get("/item")
        def item(query: Annotated[ItemQuery, fastapi.Query()]) -> Response:
            return self.item(query.content)

        @made.get("/picture")
        @threads.drawing
        def picture(query: Annotated[PictureQuery, fastapi.Query()]) -> Response:
            return self.picture(query.image, query.label_tag)

        made.add_api_route("/assets/{name}", self.asset, methods=["GET"])

        @made.post("/approve", dependencies=[LOGIN_ANNOTATOR])
        @threads.deciding
        def approve(decision: Decision) -> dict[str, Any]:
            return self.approve(decision)

        @made.post("/reject", dependencies=[LOGIN_ANNOTATOR])
        @threads.deciding
        def reject(decision: Decision) -> dict[str, Any]:
            return self.reject(decision)

        @made.post("/remove", dependencies=[LOGIN_ANNOTATOR])
        @threads.deciding
        def remove(decision: Removal) -> dict[str, Any]:
            return self.remove(decision)

        @made.post("/restore", dependencies=[LOGIN_ANNOTATOR])
        @threads.deciding
        def restore(decision: Reinstatement) -> dict[str, Any]:
            return self.restore(decision)

        return made

    # Pages and pictures

    def show(self, support: int = 1, waiting: int = 1, removed: int = 1, next: int = 1) -> HTMLResponse:
        """The page; the numbers say which part of each list."""
        self.segmenter.keep_up()
        state = self.segmenter.state()
        # Those that came with labels are better than the bank's own.
        names = {**state.class_names, **state.segmentable}
        labelled = set(self.datastore.get_labeled_images())
        known = {None, *labelled}
        # Labels that came or went while an image is segmented are taken in or out afterwards.
        items = [item for item in state.items if state.images.get(item.source) in known]
        labels = self._labels()
        counts = self.usage.counts()
        seen = self._seen({state.images.get(item.source) for item in _part(items, support)} - {None})
        shown = [
            {
                "id": item.id,
                "content": item.content,
                "classes": ", ".join(names[value] for value in item.info.holds) or "nothing of any class",
                "used": counts.get(item.content, 0),
                "image": state.images.get(item.source),
                "seen": seen.get(state.images.get(item.source), ""),
            }
            for item in _part(items, support)
        ]
        unlabelled = self.ranked(self.datastore.get_unlabeled_images())
        stats = self.training()
        page = self.template.render(
            classes=names,
            colours={value: class_colour(value) for value in names},
            errors=state.errors,
            warnings=state.warnings,
            joining=len(labelled - state.cases),
            support=_paged("support", shown, len(items), support),
            waiting=_paged("waiting", self._shown(_part(labels["waiting"], waiting)), len(labels["waiting"]), waiting),
            removed=_paged("removed", self._shown(_part(labels["removed"], removed)), len(labels["removed"]), removed),
            unlabelled=_paged("next", _part(unlabelled, next), len(unlabelled), next),
            archive=self.datastore.state() if isinstance(self.datastore, DicomWebDatastore) else None,
            training=stats,
            adaptation=state.adaptation and state.adaptation.told(),
            curves=_curves(stats.get("history", [])),
            curve_size=CURVE,
            final=FINAL,
            removed_tag=REMOVED,
            not_offered=not_offered(),
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": SECURITY, "Cache-Control": "no-store"})

    def asset(self, name: str) -> Response:
        if name not in ASSETS:
            raise NotFound(f"{ascii(name)[:80]}: expected one of {', '.join(ASSETS)}; load the page again.")
        return FileResponse(TEMPLATES / name, media_type=ASSETS[name])

    def item(self, content: str) -> Response:
        """A support item with its mask, PNG."""
        thumbnail = self.segmenter.thumbnail(content)
        if thumbnail is None:
            raise DataError("This support item has changed or gone; load the page again.")
        return _png(thumbnail)

    def picture(self, image: str, label_tag: str = "") -> Response:
        """An image, and over it the label of a tag; of a volume the slice that shows most of it. PNG."""
        source = Path(self.datastore.get_image_uri(image))
        label = Path(self._label_path(image, label_tag)) if label_tag else None
        stamps = tuple(path.stat().st_mtime_ns for path in (source, label) if path is not None)
        return _png(_drawn(source, label, stamps))

    # Decisions

    def approve(self, decision: Decision) -> dict[str, Any]:
        """A prediction joins the support set."""
        return self._decided(self.datastore.approve, decision, FINAL)

    def restore(self, decision: Reinstatement) -> dict[str, Any]:
        """A removed label joins the support set again."""
        return self._decided(self.datastore.approve, decision, FINAL)

    def remove(self, decision: Removal) -> dict[str, Any]:
        """An approved label leaves the support set; it can be restored."""
        return self._decided(self.datastore.remove, decision, REMOVED)

    def reject(self, decision: Decision) -> dict[str, Any]:
        """A prediction is deleted. Approved labels are not deleted here."""
        return self._decided(self.datastore.reject, decision, None)

    def _decided(self, decide: Callable[[str, str, str], None], decision: Decision, tag: str | None) -> dict[str, Any]:
        """Decide, and tell the tag that the label has by now; None if it is gone."""
        decide(decision.image, decision.label_tag, decision.seen)
        if tag is not None:
            self.saved(decision.image, decision.image)
        return {"image": decision.image, "label_tag": tag}

    def _seen(self, images: set[str]) -> dict[str, str]:
        """States of images' approved labels; nothing is fetched for it."""
        datastore = self.datastore
        if isinstance(datastore, DicomWebDatastore):
            paths = {image: label for image, (_, label) in datastore.pairs_at_hand().items() if image in images}
        else:
            paths = {image: datastore.path_of_label(image, FINAL) for image in images}
        return {image: state for image, path in paths.items() if path and (state := state_of(path))}

    def _shown(self, entries: list[dict]) -> list[dict]:
        """With the state of each label, but for those that have gone since they were listed."""
        states = [(entry, state_of(self.datastore.get_label_uri(entry["image"], entry["tag"]))) for entry in entries]
        return [{**entry, "seen": state} for entry, state in states if state]

    def _label_path(self, image: str, tag: str) -> str:
        path = self.datastore.path_of_label(image, tag)
        if not path:
            raise DataError(f"{image}: expected a label with the tag {tag!r}, found none; load the page again.")
        return path

    def _labels(self) -> dict[str, list[dict]]:
        """Images whose label waits for approval, and those whose label was removed from the support set."""
        found: dict[str, list[dict]] = {"waiting": [], "removed": []}
        for image, tags in self.datastore.tags().items():
            if FINAL in tags:
                continue
            found["waiting"] += [{"image": image, "tag": tag} for tag in tags if tag != REMOVED]
            found["removed"] += [{"image": image, "tag": tag} for tag in tags if tag == REMOVED]
        return found


def _part(values: list, page: int) -> list:
    return values[max(page - 1, 0) * PER_PAGE : max(page, 1) * PER_PAGE]


def _paged(name: str, shown: list, total: int, page: int) -> dict:
    page = max(page, 1)
    first = (page - 1) * PER_PAGE + 1
    return {
        "name": name,
        "shown": shown,
        "total": total,
        "page": page,
        "pages": -(-total // PER_PAGE) or 1,
        "first": first,
    }


def _curves(history: list[dict]) -> list[str]:
    """Points of an SVG polyline for each part of a training: Dice of 0 to 1 upwards over all epochs."""
    width, height = CURVE
    step = width / max(len(history) - 1, 1)
    points = defaultdict(list)
    for place, entry in enumerate(history):
        points[entry.get("part")].append(f"{step * place:.1f},{height * (1 - entry['metric']):.1f}")
    return [" ".join(of_part) for of_part in points.values()]


@lru_cache(maxsize=PICTURES_KEPT)
def _drawn(source: Path, label: Path | None, stamps: tuple) -> np.ndarray:
    """(H, W, 3) uint8, at most `EDGE` pixels a side. `stamps`: when the files were changed."""
    image = read_image(source)
    masks = None if label is None else read_label(label, image.geometry)
    place = len(image.slices) // 2
    if masks is not None and masks.any():
        place = int((masks > 0).reshape(len(masks), -1).sum(1).argmax())
    chosen = torch.from_numpy(image.slices[place : place + 1])
    scaling = choose_scaling(chosen, image.is_rgb, image.geometry.is_picture, image.modality)
    picture = to_display(scale_intensity(chosen, scaling)[0])
    scale = min(1.0, EDGE / max(picture.shape[:2]))
    return draw_overlay(picture, None if masks is None else masks[place], scale=scale)


def _png(picture: np.ndarray) -> Response:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "PNG")
    return Response(buffer.getvalue(), media_type="image/png", headers={"Cache-Control": "no-store"})
