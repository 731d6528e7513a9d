"""MONAI Label's batch inference: many images of the datastore, one after the other, each saved as a label."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.utils.others.generic import remove_file

from lib.checks import RequestError
from lib.refusals import refuse
from lib.serving.published_weights import Version, Weights
from lib.serving.segmenter import NOTHING_APPROVED
from lib.serving.turns import Requests
from lib.tasks.batch_report import BatchReport

logger = logging.getLogger(__name__)

UNANNOTATED = "unannotated"


class BatchInference(BatchInferTask):
    """Segments images one at a time, on whatever the server computes on; people's requests go before the next one.

    Request: `images` ("all", "labeled", "unlabeled", "unannotated" or a list of ids), `label_tag`, `max_batch_size`
    (the number of images, 0 for all), and the options of the infer task. Devices and workers that MONAI Label's clients
    send are ignored: there is one network, which has the machine for itself.

    "unannotated" are images without any label, and those with nothing but a prediction of other weights than those in
    use. What people made (approved and removed labels, drafts, labels of other tags) stays as it is, and a batch that
    was stopped goes on where it was.

    Args:
        weights: tells which are in use.
        requests: tells whether the server works on one.
        report: path of the file that tells how it gets on.
    """

    def __init__(self, weights: Weights, requests: Requests, report: Path) -> None:
        super().__init__()
        self.weights = weights
        self.requests = requests
        self.report = report

    def get_images(self, request: Mapping[str, Any], datastore: Datastore) -> list[str]:
        """Ids of the images that a request means, ordered."""
        if request.get("images") == UNANNOTATED:
            return [image for image in sorted(datastore.list_images()) if self._is_unannotated(image, datastore)]
        return sorted(super().get_images(request, datastore))

    def __call__(self, request: Mapping[str, Any], datastore: Datastore, infer: Callable) -> dict[str, Any]:
        """Segment and save; an image that fails ends no other's.

        Returns:
            {image id: {"label": id, "tag", "confidence", "warnings"}}, or {"error": sentence} for one that failed.

        Raises:
            RequestError: the tag is `final`: unseen predictions are no truth to learn from. Or nothing is approved yet.
        """
        tag = request.get("label_tag") or DefaultLabelTag.ORIGINAL
        if tag == DefaultLabelTag.FINAL:
            raise RequestError(
                "label_tag: expected a tag for predictions, such as 'original', found 'final', which approves labels; "
                "look at the predictions and approve them one by one."
            )
        image_ids = self.get_images(request, datastore)
        skipped = len(datastore.list_images()) - len(image_ids) if request.get("images") == UNANNOTATED else 0
        limit = int(request.get("max_batch_size") or 0)
        image_ids = image_ids[:limit] if limit > 0 else image_ids
        report = BatchReport(self.report, len(image_ids), skipped)
        results: dict[str, Any] = {}
        for number, image_id in enumerate(self._in_turn(image_ids, request, datastore, report), 1):
            try:
                result = infer({**request, "image": image_id, "save_label": True, "label_tag": tag}, datastore)
            except Exception as error:
                answer = refuse(error)
                if answer.detail == NOTHING_APPROVED:
                    # So it is for all others.
                    raise
                if answer.status_code >= 500:
                    logger.exception("%s", image_id)
                results[image_id] = {"error": answer.detail}
                report.failed(image_id, str(answer.detail))
                logger.warning("%d of %d: %s: %s", number, len(image_ids), image_id, answer.detail)
                continue
            remove_file(result.pop("file", None))
            kept = {key: result["params"][key] for key in ("confidence", "warnings")}
            results[image_id] = {"label": result["label"], "tag": result["tag"], **kept}
            report.done()
            logger.info("%d of %d: %s", number, len(image_ids), image_id)
        report.end()
        return results

    def _in_turn(
        self, image_ids: list[str], request: Mapping[str, Any], datastore: Datastore, report: BatchReport
    ) -> Iterator[str]:
        """Each image when nobody waits for an answer, but for those that got a label meanwhile."""
        for image_id in image_ids:
            self.requests.wait()
            if request.get("images") == UNANNOTATED and not self._is_unannotated(image_id, datastore):
                report.left()
                continue
            yield image_id

    def _is_unannotated(self, image_id: str, datastore: Datastore) -> bool:
        tags = set(datastore.get_labels_by_image_id(image_id))
        if not tags:
            return True
        if tags != {DefaultLabelTag.ORIGINAL.value}:
            return False
        record = datastore.get_label_info(image_id, DefaultLabelTag.ORIGINAL.value)
        params = record.get("params")
        if not record.get("model") or not isinstance(params, dict):
            # Somebody put it there.
            return False
        version = self.weights.active()
        return params.get("weights") != version.name or _is_older(record, version)


def _is_older(record: Mapping[str, Any], version: Version) -> bool:
    """Whether a prediction was made before the weights' file came, as those of the bundle do with an upgrade."""
    made = record.get("ts")
    return isinstance(made, int | float) and made < int(version.path.stat().st_mtime)
