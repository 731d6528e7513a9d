"""MONAI Label's batch inference: many images of the datastore, one after the other, each saved as a label."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.utils.others.generic import remove_file

from lib.checks import RequestError
from lib.refusals import refuse

logger = logging.getLogger(__name__)


class BatchInference(BatchInferTask):
    """Segments images one at a time, on whatever the server computes on.

    Request: `images` ("all", "labeled", "unlabeled" or a list of ids), `label_tag`, `max_batch_size` (the number of
    images, 0 for all), and the options of the infer task. Devices and workers that MONAI Label's clients send are
    ignored: there is one network, which has the machine for itself.
    """

    def __call__(self, request: Mapping[str, Any], datastore: Datastore, infer: Callable) -> dict[str, Any]:
        """Segment and save; an image that fails ends no other's.

        Returns:
            {image id: {"label": id, "tag", "confidence", "warnings"}}, or {"error": sentence} for one that failed.

        Raises:
            RequestError: the tag is `final`: unseen predictions are no truth to learn from.
        """
        tag = request.get("label_tag") or DefaultLabelTag.ORIGINAL
        if tag == DefaultLabelTag.FINAL:
            raise RequestError(
                "label_tag: expected a tag for predictions, such as 'original', found 'final', which approves labels; "
                "look at the predictions and approve them one by one."
            )
        image_ids = sorted(self.get_images(request, datastore))
        limit = int(request.get("max_batch_size") or 0)
        image_ids = image_ids[:limit] if limit > 0 else image_ids
        results: dict[str, Any] = {}
        for number, image_id in enumerate(image_ids, 1):
            try:
                result = infer({**request, "image": image_id, "save_label": True, "label_tag": tag}, datastore)
            except Exception as error:
                answer = refuse(error)
                if answer.status_code >= 500:
                    logger.exception("%s", image_id)
                results[image_id] = {"error": answer.detail}
                logger.warning("%d of %d: %s: %s", number, len(image_ids), image_id, answer.detail)
                continue
            remove_file(result.pop("file", None))
            kept = {key: result["params"][key] for key in ("confidence", "warnings")}
            results[image_id] = {"label": result["label"], "tag": result["tag"], **kept}
            logger.info("%d of %d: %s", number, len(image_ids), image_id)
        return results
