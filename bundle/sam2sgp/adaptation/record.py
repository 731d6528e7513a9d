"""What is said of an adaptation: the content of `adaptation.json`."""

import json
from dataclasses import asdict, dataclass, field

from sam2sgp.adaptation.judging import MIN_GROUPS, Choice
from sam2sgp.adaptation.patient_groups import PatientGroups
from sam2sgp.adaptation.plan import Plan


@dataclass
class AdaptationRecord:
    """What was done, what was found, and what was made of it.

    cases: labelled images. groups: of them, see `sam2sgp.adaptation.patient_groups`. owners: the patient group of each
    support item.
    plan: what the correctors see. planned, steps: steps that each corrector was to make and made; there is one for each
    fold. judged: cases that were segmented unseen. choices: by class name, what that told. elapsed: seconds. settings:
    of the adaptation. files: hashes of what is stored.
    """

    cases: int
    groups: PatientGroups
    owners: list[str]
    plan: Plan | None = None
    planned: int = 0
    steps: list[int] = field(default_factory=list)
    judged: int = 0
    choices: dict[str, Choice] = field(default_factory=dict)
    elapsed: float = 0.0
    settings: dict = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """`of_json` leads back."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def of_json(cls, text: str) -> "AdaptationRecord":
        """The inverse of `to_json`. Raises `ValueError`, `KeyError` or `TypeError` for another text."""
        values = json.loads(text)
        groups = PatientGroups(tuple(values["groups"]["owner"]), values["groups"]["by"])
        plan = values["plan"] and Plan(**values["plan"])
        choices = {name: Choice(**choice) for name, choice in values["choices"].items()}
        return cls(**values | {"groups": groups, "plan": plan, "choices": choices})

    @property
    def is_adapted(self) -> bool:
        """Whether the result differs from the plain network's."""
        return any(choice.share for choice in self.choices.values())

    @property
    def is_unfinished(self) -> bool:
        """Whether time ran out before anything was told."""
        return self.plan is not None and not self.choices

    def __str__(self) -> str:
        """A few sentences for people."""
        support = f"{self.cases} labelled images, {self.groups}."
        if self.is_unfinished:
            return (
                f"Not adapted: {support} Time ran out when {self.judged} of them were judged, before it was known "
                "whether adapting helps. Give it more seconds."
            )
        if self.plan is None:
            return (
                f"Not adapted: {support} The evidence is thin: at least {MIN_GROUPS} groups are needed to tell whether "
                "adapting helps. Label images of more patients."
            )
        seen = f"patches of {self.plan.size} px" if self.plan.patches else f"whole images at {self.plan.size} px"
        steps = f"{len(self.steps)} correctors, {max(self.steps)} steps"
        text = f"Adapted for {self.elapsed:.0f} s: {steps} on {seen}. {support}"
        for name, choice in self.choices.items():
            text += f" {name}, on {choice.groups} groups never seen: Dice {choice.plain:.3f} before, "
            if choice.share:
                text += f"{choice.adapted:.3f} after (gain {choice.gain:.3f} ± {choice.error:.3f}); "
                text += f"the correctors' share is {choice.share:.2f}."
            else:
                text += f"{choice.corrected:.3f} by the correctors; no clear gain, so it stays as it was."
            if choice.groups < 2 * MIN_GROUPS:
                text += f" The evidence is thin: {choice.groups} groups."
        return text
