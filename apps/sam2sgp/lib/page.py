"""The support page: what the model is being told, and what waits for a decision.

    GET  /sam2sgp/                             support set, predictions waiting, next images, training
    GET  /sam2sgp/item?content=…               thumbnail of a support item
    GET  /sam2sgp/picture?image=…[&label_tag=…]  an image, with one of its labels drawn
    POST /sam2sgp/{approve,reject,remove,restore}  {"image": …, "label_tag": …[, "seen": …]}, as JSON

Approving a prediction saves it under the tag `final`, which is what joins the support set. `seen` names the state of
the label that the page showed; a newer one is not approved in its place. Removing an approved label from the support
set gives it the tag `removed`, restoring it the tag `final` again; the file itself stays. It is saved under the new tag
before the old one is deleted, so a kill between the two loses nothing. Nothing is loaded from elsewhere.

Handlers run in the server's threads, at the same time as requests to MONAI Label; the bank is only touched under the
segmenter's lock.
"""

import io
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import APIRouter, Body, Depends, HTTPException, Query
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from monailabel.config import settings as server_settings
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from PIL import Image

from lib.checks import Conflict
from lib.dicomweb import DicomWebDatastore
from lib.guard import refuse
from lib.usage import Usage
from sam2sgp.data import read_image, read_label
from sam2sgp.errors import DataError
from sam2sgp.report.overlays import class_colour, draw_overlay, to_display
from sam2sgp.transforms import choose_scaling, scale_intensity

logger = logging.getLogger(__name__)

PREFIX = "/sam2sgp"
FINAL, REMOVED = DefaultLabelTag.FINAL.value, "removed"
TEMPLATES = Path(__file__).parents[1] / "templates"
PER_PAGE = 24
EDGE = 256
PICTURES_KEPT = 256
# Only this page's own files: no script or style in the page itself, and no frame around it.
OWN = ("img-src", "style-src", "script-src", "connect-src")
SECURITY = "; ".join(["default-src 'none'", *(f"{kind} 'self'" for kind in OWN), "frame-ancestors 'none'"])
ASSETS = {"page.css": "text/css", "page.js": "text/javascript"}
CURVE = (360, 90)


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
        datastore: Datastore,
        segmenter: Any,
        usage: Usage,
        ranked: Callable[[list[str]], list[str]],
        training: Callable[[], dict],
        saved: Callable[[str, str], None] = lambda image, label: None,
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

    def router(self) -> APIRouter:
        # Where MONAI Label is set up to ask for a login, the page asks for the same.
        user, annotator = (
            Depends(RBAC(role))
            for role in (server_settings.MONAI_LABEL_AUTH_ROLE_USER, server_settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)
        )
        router = APIRouter(prefix=PREFIX, include_in_schema=False, dependencies=[user])
        router.add_api_route("/", self.show, methods=["GET"])
        router.add_api_route("/item", self.item, methods=["GET"])
        router.add_api_route("/picture", self.picture, methods=["GET"])
        router.add_api_route("/assets/{name}", self.asset, methods=["GET"])
        for name in ("approve", "reject", "remove", "restore"):
            router.add_api_route(f"/{name}", getattr(self, name), methods=["POST"], dependencies=[annotator])
        return router

    # Pages and pictures

    def show(self, support: int = 1, waiting: int = 1, removed: int = 1, next: int = 1) -> HTMLResponse:
        """The page; the numbers say which part of each list."""
        with self.segmenter.lock:
            self.segmenter.refresh()
            bank = self.segmenter.bank
            # Those that came with labels are better than the bank's own.
            names = {**bank.class_names, **self.segmenter.class_names()}
            items, errors = list(bank.items), list(bank.errors)
        labels = self._labels()
        counts = self.usage.counts()
        images = self.segmenter.cases.images()
        shown = [
            {
                "id": item.id,
                "content": item.content,
                "classes": ", ".join(names[value] for value in item.facts.holds) or "nothing of any class",
                "used": counts.get(item.content, 0),
                "image": images.get(item.source),
            }
            for item in _part(items, support)
        ]
        unlabelled = self.ranked(self.datastore.get_unlabeled_images())
        stats = self.training()
        page = self.template.render(
            classes=names,
            colours={value: class_colour(value) for value in names},
            errors=errors,
            support=_paged("support", shown, len(items), support),
            waiting=_paged("waiting", self._shown(_part(labels["waiting"], waiting)), len(labels["waiting"]), waiting),
            removed=_paged("removed", _part(labels["removed"], removed), len(labels["removed"]), removed),
            unlabelled=_paged("next", _part(unlabelled, next), len(unlabelled), next),
            archive=self.datastore.state() if isinstance(self.datastore, DicomWebDatastore) else None,
            training=stats,
            curves=_curves(stats.get("history", [])),
            curve_size=CURVE,
            final=FINAL,
            removed_tag=REMOVED,
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": SECURITY, "Cache-Control": "no-store"})

    def asset(self, name: str) -> Response:
        if name not in ASSETS:
            raise refuse(DataError(f"{name}: expected one of {', '.join(ASSETS)}."))
        return FileResponse(TEMPLATES / name, media_type=ASSETS[name])

    def item(self, content: str) -> Response:
        """A support item with its mask, PNG."""
        with self.segmenter.lock:
            found = next((item for item in self.segmenter.bank.items if item.content == content), None)
            if found is None:
                raise refuse(DataError("This support item has changed or gone; load the page again."))
            thumbnail = found.thumbnail.numpy()
        return _png(thumbnail)

    def picture(self, image: str, label_tag: Annotated[str, Query(max_length=64)] = "") -> Response:
        """An image, and over it the label of a tag; of a volume the slice that shows most of it. PNG."""
        try:
            source = Path(self.datastore.get_image_uri(image))
            label = Path(self._label_path(image, label_tag)) if label_tag else None
            stamps = tuple(path.stat().st_mtime_ns for path in (source, label) if path is not None)
            return _png(_drawn(source, label, stamps))
        except Exception as error:
            raise refuse(error) from error

    # Decisions

    def approve(
        self, image: Annotated[str, Body()], label_tag: Annotated[str, Body()], seen: Annotated[str, Body()] = ""
    ) -> dict:
        """A prediction joins the support set."""
        return self._moved(image, label_tag, FINAL, seen)

    def restore(self, image: Annotated[str, Body()], label_tag: Annotated[str, Body()] = REMOVED) -> dict:
        """A removed label joins the support set again."""
        return self._moved(image, label_tag, FINAL)

    def remove(self, image: Annotated[str, Body()], label_tag: Annotated[str, Body()] = FINAL) -> dict:
        """An approved label leaves the support set; it can be restored."""
        return self._moved(image, label_tag, REMOVED)

    def reject(self, image: Annotated[str, Body()], label_tag: Annotated[str, Body()]) -> dict:
        """A prediction is deleted. Approved labels are not deleted here."""
        try:
            if label_tag in (FINAL, REMOVED):
                raise DataError(f"{image}: only a prediction can be rejected; an approved label can be removed.")
            self.datastore.remove_label(self._label(image, label_tag), label_tag)
        except Exception as error:
            raise self._refused(error, image, label_tag) from error
        return {"image": image, "label_tag": None}

    def _moved(self, image: str, old: str, new: str, seen: str = "") -> dict:
        place = old
        try:
            if old == new:
                raise DataError(f"{image}: its label has the tag {new!r} already; load the page again.")
            # Nobody takes the support set in between the two steps.
            with self.segmenter.lock:
                label = self._label(image, old)
                path = self.datastore.get_label_uri(label, old)
                if seen and seen != _state(path):
                    raise Conflict(
                        f"{image}: expected the label that was shown, found a newer one; load the page and look at it."
                    )
                saved = self.datastore.save_label(image, path, new, dict(self.datastore.get_label_info(label, old)))
                self.datastore.remove_label(label, old)
                place = new
                self.saved(image, saved)
        except Exception as error:
            raise self._refused(error, image, place) from error
        return {"image": image, "label_tag": new}

    def _shown(self, entries: list[dict]) -> list[dict]:
        """With the state of each label, but for those that have gone since they were listed."""
        paths = [(entry, self.datastore.get_label_uri(entry["image"], entry["tag"])) for entry in entries]
        return [{**entry, "seen": _state(path)} for entry, path in paths if path and os.path.exists(path)]

    def _label(self, image: str, tag: str) -> str:
        label = self.datastore.get_labels_by_image_id(image).get(tag)
        if label is None:
            raise DataError(f"{image}: expected a label with the tag {tag!r}, found none; load the page again.")
        return label

    def _label_path(self, image: str, tag: str) -> str:
        return self.datastore.get_label_uri(self._label(image, tag), tag)

    def _refused(self, error: Exception, image: str, tag: str) -> HTTPException:
        """As `refuse`; whatever failed because somebody took the label away meanwhile says that."""
        try:
            self._label(image, tag)
        except Exception as gone:
            return refuse(gone)
        return refuse(error)

    def _labels(self) -> dict[str, list[dict]]:
        """Images whose label waits for approval, and those whose label was removed from the support set."""
        found: dict[str, list[dict]] = {"waiting": [], "removed": []}
        for image in self.datastore.list_images():
            tags = self.datastore.get_labels_by_image_id(image)
            if FINAL in tags:
                continue
            found["waiting"] += [{"image": image, "tag": tag} for tag in tags if tag != REMOVED]
            found["removed"] += [{"image": image, "tag": tag} for tag in tags if tag == REMOVED]
        return found


def _state(path: str) -> str:
    """Changes with every save of a file."""
    found = os.stat(path)
    return f"{found.st_ino}-{found.st_mtime_ns}"


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
