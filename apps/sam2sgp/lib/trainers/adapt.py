"""Adaptation to the approved labels, as a MONAI Label train task of a minute.

    approved labels, weights in use ── `sam2sgp.adaptation.adapt` ── clear gain on patients that were left out?
                                                                     the same weights with the adaptation ─ published

What is published are the weights in use once more, as a version of their own with the adaptation beside them; so it is
put in use, named in results and rolled back as weights are. Where there is no clear gain the weights stay as they are,
and an adaptation to earlier labels is taken away.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lib.serving.adapted import is_adapted, write_adaptation
from lib.serving.options import ROLL_BACK, TRAIN, AdaptParams
from lib.serving.published_weights import Version, Weights
from lib.serving.segmenter import NOTHING_APPROVED, NoSupport, ServerSegmenter
from lib.trainers.finetune import HALF_FILES, HALVES_FILE
from lib.trainers.publishing import KEPT, PUBLISHED, Publishing, no_storage
from sam2sgp.adaptation import Adaptation, adapt
from sam2sgp.support import SupportBank


class AdaptTask(Publishing):
    """Train task that adapts to the approved labels, where that is clearly better.

    Request: `action` ("train", the default, or "roll_back") and `seconds`.

    Args:
        state_dir: the app's; everything is written below `training/`.
        weights: where weights come from and go to.
        segmenter: of this process; has the approved labels and the network.
        audit: as of `Publishing`.
    """

    params = AdaptParams

    def __init__(
        self,
        state_dir: Path,
        weights: Weights,
        segmenter: ServerSegmenter,
        audit: Callable[..., None] = lambda action, **details: None,
    ) -> None:
        super().__init__(
            "Adaptation to the approved labels in a minute; used only as far as it is better on patients left out",
            state_dir,
            weights,
            audit,
        )
        self.segmenter = segmenter

    def config(self) -> dict[str, Any]:
        """The options of a request with their defaults."""
        return {"action": [TRAIN, ROLL_BACK], "seconds": AdaptParams().seconds}

    def _make_weights(self, request: Mapping[str, Any], history: Sequence[Mapping]) -> None:
        seconds = AdaptParams.of_request(request).seconds
        self.segmenter.refresh()
        inferer, bank, start = self.segmenter.inferer, self.segmenter.bank, self.segmenter.version
        if not bank.items:
            raise NoSupport(NOTHING_APPROVED)
        state = self.segmenter.state()
        if state.errors:
            self.status.update(left_out=[error["error"] for error in state.errors])
        labels = len(state.cases) - len(state.errors)
        details = {"labels": labels, "patients": len(bank.patients), "start_weights": start.name}
        self.status.update(message=f"Adapting for {seconds:g} s.", **details)
        self.audit("train", adaptation=True, seconds=seconds, **details)
        adaptation = adapt(self.segmenter.network, bank, seconds, progress=False, inferer=inferer)
        figures = figures_of(adaptation)
        files = self._written(adaptation, bank) if adaptation.correctors else {}
        # Where time ran out, nothing is known against the one of before.
        if files or (is_adapted(start) and not adaptation.record.is_unfinished):
            version = self._publish(start, {**figures, **details}, files)
            self.audit("publish", weights=version.name, replaced=start.name, **figures)
            verdict = f"The adapted weights {version.name!r} are in use."
            if not files:
                verdict = f"The adaptation of before is taken away: the weights {version.name!r} are in use."
            self.status.finish(PUBLISHED, f"{adaptation.record} {verdict}", **figures)
        else:
            self.audit("keep", weights=start.name, **figures)
            self.status.finish(KEPT, f"{adaptation.record} The weights {start.name!r} stay in use.", **figures)

    def _written(self, adaptation: Adaptation, bank: SupportBank) -> dict[str, Path]:
        """The adaptation's files, by the names that they are published under."""
        folder = self.folder / "adaptation"
        shutil.rmtree(folder, ignore_errors=True)
        files = write_adaptation(folder, adaptation, bank)
        if not all(path.is_file() for path in files.values()):
            raise no_storage("that the adaptation can't be written")
        return files

    def _publish(self, start: Version, metrics: Mapping[str, Any], files: Mapping[str, Path]) -> Version:
        """Put weights in use once more, with other files beside them and those that a fine-tuning goes on from."""
        of_training = {name: start.path.with_name(name) for name in (HALVES_FILE, *HALF_FILES)}
        kept = {name: path for name, path in of_training.items() if path.is_file()}
        version = self.weights.publish(start.path, metrics, {**kept, **files})
        for path in files.values():
            path.unlink()
        return version


def figures_of(adaptation: Adaptation) -> dict[str, float]:
    """Mean Dice over the classes, without the adaptation and with it, and on how many groups that was measured; {} if
    nothing was."""
    choices = [choice for choice in adaptation.record.choices.values() if choice.groups]
    if not choices:
        return {}
    return {
        "dice_before": mean(choice.plain for choice in choices),
        "dice": mean(choice.adapted for choice in choices),
        "judged": max(choice.groups for choice in choices),
    }
