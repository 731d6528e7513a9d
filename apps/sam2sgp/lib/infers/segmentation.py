"""MONAI Label's infer task: one image in, a label file and what is known about it out."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.serving.options import ALL, InferParams, Options
from lib.serving.result_files import uncertainty_map, write_result
from lib.serving.segmenter import ServerSegmenter
from sam2sgp.support.familiarity import is_unlike
from sam2sgp.support.sampler import MODES


class SegmentationTask(InferTask):
    """Segmentation of pictures and volumes, guided by the approved labels.

    Request: `image` (a path), `image_id` if it is an image of the datastore, `k`, `classes`, `retrieval`,
    `three_d_memory`, `uncertainty`, `result_extension`, `gone` (as for `ServerSegmenter.segment`). Viewers show
    `config` as a panel of options.

    Args:
        segmenter: does the work.
    """

    def __init__(self, segmenter: ServerSegmenter) -> None:
        super().__init__(
            type=InferType.SEGMENTATION,
            labels={},
            dimension=3,
            description="SAM2-SGP: segments pictures and volumes, guided by the approved labels, without a prompt",
        )
        self.segmenter = segmenter
        value = segmenter.settings.value
        modes = sorted(MODES, key=lambda mode: mode != value("retrieval"))
        self._config = {
            "k": value("k"),
            "retrieval": modes,
            "three_d_memory": value("three_d_memory"),
            "uncertainty": False,
            "save_label": False,
        }

    def is_valid(self) -> bool:
        return True

    def info(self) -> dict[str, Any]:
        """As MONAI Label's, with `options`, the schema of a request's `params`.

        `labels` are the classes that can be segmented now, by name.
        """
        self.labels = {name: value for value, name in self.segmenter.class_names().items()}
        return {**super().info(), "options": InferParams.described()}

    def config(self) -> dict[str, Any]:
        """The options of a request with their defaults, which are the bundle's; of a list the first."""
        return {**self._config, "classes": [ALL, *self.segmenter.class_names().values()]}

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Returns the path of the label file, which the caller removes, and the result parameters.

        Raises:
            RequestError: an invalid option, no support, memory too small.
            DataError: the image can't be used.
        """
        started = time.perf_counter()
        options = Options.of_request(request)
        output = self.segmenter.segment(request["image"], options, request.get("image_id"), request.get("gone"))
        written = time.perf_counter()
        geometry = output["geometry"]
        path = write_result(output["pred"].numpy(), geometry, request.get("result_extension"))
        names = output["names"]
        maybe_absent = [names[value] for value in output["maybe_absent"] if value in names]
        sentences = [
            f"There is less sign of {name} than in any approved image: it may be absent." for name in maybe_absent
        ]
        params = {
            "label_names": {name: value for value, name in output["names"].items()},
            "confidence": output["confidence"],
            "support": output["used"],
            "support_items": output["support_items"],
            "scaling": output["scaling"],
            "unlike_support": is_unlike(output["support_distance"]),
            "maybe_absent": maybe_absent,
            "weights": output["weights"],
            "device": output["device"],
            "adapted": output["adapted"],
            "warnings": [*output["warnings"], *sentences],
        }
        if options.uncertainty:
            params["uncertainty"] = uncertainty_map(output["uncertainty"].numpy(), geometry)
        finished = time.perf_counter()
        params["latencies"] = {
            **output["latencies"],
            "write": round(finished - written, 4),
            "total": round(finished - started, 4),
        }
        return str(Path(path)), params
