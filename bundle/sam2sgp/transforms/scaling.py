"""How intensities are scaled to [0, 1]: by a CT window, as colours, or by percentiles; and why.

In: slices with the file's own intensities, and what is stated about them. Out: a `Scaling`, by which the slices, the
log, the tables and the server's results say the same. Training, evaluation, inference and the app all come through
`choose_scaling`.

What is stated decides first: the datalist, the DICOM header, the setting `modality` of the run. Where nothing is
stated, a volume is scaled like the support set that guides it, and without one by its voxels: by shares of them, never
by one.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from monai.transforms import ScaleIntensityRange
from monai.transforms.utils_pytorch_numpy_unification import percentile
from torch import Tensor

CT, COLOUR, PERCENTILES = "ct", "colour", "percentiles"
SHOWN = {CT: "CT window", COLOUR: "colours", PERCENTILES: "percentiles"}
# In HU, and in percent; the shipped configs set the same.
DEFAULT_CT_WINDOW = (-160.0, 240.0)
DEFAULT_PERCENTILES = (0.5, 99.5)

# Hounsfield units: air and lung, and soft tissue with fat and fresh blood.
AIR, TISSUE = (-1100.0, -500.0), (-200.0, 300.0)
# Fat, and the noise of water, lie below this; in other modalities what little lies below 0 comes from resampling.
BELOW_WATER = -10.0
# CT stored without its rescale intercept lies this much too high.
STORED_OFFSET = 1024.0
# A share of voxels below this is noise, artefacts or padding.
LEAST_SHARE = 0.01
MOST_SHARE = 0.5
# In HU, between the 0.5th and the 99.5th percentile: less is not even the noise of a scanner.
LEAST_RANGE = 20.0
VOXELS_LOOKED_AT = 200_000
# Evidence that tells a CT, or that it is none, without anything else.
KNOWN = ("hu", "below", "positive", "narrow")
SCALED_AT_A_TIME = 32

CT_WORDS = {"ct", "cbct", "cect", "ncct", "ldct", "hrct", "cta"}
# Values of a modality that don't tell whether intensities are Hounsfield units.
UNTOLD = {"", "ot", "sc", "unknown", "none", "na", "n/a", "image", "medical", "intensity"}


@dataclass(frozen=True)
class Scaling:
    """How one image is scaled.

    Attributes:
        kind: "ct" (a window of Hounsfield units), "colour" (divided by the range of the colours) or "percentiles".
        because: what decided, as the end of a sentence.
        evidence: of a volume's voxels: "hu" (air and tissue), "stored" (the same, 1024 too high), "below" (too low for
            HU), "narrow" (a range too small for HU), "positive" (hardly a value below 0) or "open"; None for 2D images.
        stated: whether `kind` is stated for this image, and not concluded.
        offset: added to the values before the window.
        warnings: sentences on what may be wrong.
    """

    kind: str
    because: str
    evidence: str | None = None
    stated: bool = False
    offset: float = 0.0
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_dict(cls, known: Mapping) -> "Scaling":
        """From JSON types, the inverse of `dataclasses.asdict`."""
        return cls(**{**known, "warnings": tuple(known["warnings"])})

    def __str__(self) -> str:
        moved = f", {self.offset:+g}" if self.offset else ""
        return f"{SHOWN[self.kind]}{moved} ({self.because})"


@dataclass(frozen=True)
class SupportScaling:
    """How the images of a support set are scaled: the kinds of its volumes, and of its 2D images."""

    volumes: frozenset[str] = frozenset()
    pictures: frozenset[str] = frozenset()

    @classmethod
    def of(cls, scalings: Iterable[Scaling]) -> "SupportScaling":
        scalings = list(scalings)
        return cls(
            frozenset(scaling.kind for scaling in scalings if scaling.evidence),
            frozenset(scaling.kind for scaling in scalings if not scaling.evidence),
        )

    @property
    def kinds(self) -> frozenset[str]:
        return self.volumes | self.pictures

    @property
    def of_volumes(self) -> str | None:
        """The kind of a volume of which nothing is stated; None where the support set leaves that open."""
        kinds = self.volumes - {COLOUR}
        return next(iter(kinds)) if len(kinds) == 1 else None


def choose_scaling(
    slices: Tensor,
    is_rgb: bool = False,
    is_picture: bool = False,
    modality: str | None = None,
    stated_by: str = "stated",
    support: SupportScaling | None = None,
) -> Scaling:
    """How slices (Z, C, H, W) are to be scaled.

    Args:
        is_rgb: they are colours. is_picture: they come from a picture file, which holds no Hounsfield units.
        modality: what is stated for them, such as "CT", "MR" or "T1"; None or a word that says nothing: nothing is.
        stated_by: who states it, for people.
        support: how the support set is scaled, where there is one.
    """
    told = is_ct(modality)
    evidence = None if is_picture or is_rgb else hounsfield_evidence(slices)
    wanted = support.of_volumes if support else None
    if is_rgb:
        chosen = Scaling(COLOUR, "a colour image", evidence, stated=True)
    elif is_picture:
        chosen = Scaling(PERCENTILES, "a grey picture", stated=True)
    elif told is not None:
        chosen = _checked(CT if told else PERCENTILES, f"{stated_by}: {modality}", evidence, stated=True)
    elif wanted is not None:
        chosen = _checked(wanted, "like the support set", evidence, stated=False)
    elif evidence == "hu":
        chosen = Scaling(CT, "air and tissue in Hounsfield units", evidence)
    else:
        chosen = Scaling(PERCENTILES, "no modality is stated, and the voxels don't look like CT", evidence)
    if support and support.kinds and chosen.kind not in support.kinds and not chosen.warnings:
        others = " and ".join(SHOWN[kind] for kind in sorted(support.kinds))
        return _warned(
            chosen,
            f"It is scaled by {SHOWN[chosen.kind]} ({chosen.because}), but the support set by {others}: expect a poor "
            "result; use a support set of the same kind of image, or state the modality of both (setting `modality`, "
            "or `modality` in the JSON file).",
        )
    return chosen


def _checked(kind: str, because: str, evidence: str | None, stated: bool) -> Scaling:
    """A kind that is stated, or is that of the support set, with what the voxels say to it."""
    chosen = Scaling(kind, because, evidence, stated)
    if kind != CT:
        if evidence == "hu" and not stated:
            return _warned(
                chosen,
                "Its voxels look like Hounsfield units, but it is scaled by percentiles like the support set; if both "
                "are CT, state it (setting `modality` CT, or `modality` in the JSON file).",
            )
        return chosen
    if evidence == "stored":
        return _warned(
            replace(chosen, offset=-STORED_OFFSET),
            "Its CT values seem to be stored 1024 too high (hardly any below 0, air near 0, tissue near 1024), so 1024 "
            "is subtracted; export Hounsfield units.",
        )
    if evidence == "narrow" or (evidence in ("below", "positive") and not stated):
        found = {
            "narrow": "the range of its values is too small",
            "below": "many of its values lie below those of air",
            "positive": "it has hardly a value below 0",
        }[evidence]
        return _warned(
            replace(chosen, kind=PERCENTILES, because=f"no Hounsfield units: {found}"),
            f"{because[:1].upper()}{because[1:]}, it would be a CT, but {found}, so it is scaled by percentiles; "
            "export Hounsfield units, or state the true modality.",
        )
    if evidence == "below":
        return _warned(chosen, "Many of its values lie below those of air (-1100 HU); check whether it is a CT in HU.")
    if evidence == "positive":
        return _warned(
            chosen,
            "It has hardly a value below 0, which air, lung and fat have in Hounsfield units; check whether it is a CT "
            "in HU, because its values are cut off by a window of HU.",
        )
    return chosen


def _warned(scaling: Scaling, sentence: str) -> Scaling:
    return replace(scaling, warnings=(*scaling.warnings, sentence))


def is_ct(modality: str | None) -> bool | None:
    """Whether a stated modality is CT; None where it does not say, as "OT", or names several, as "PET/CT"."""
    text = str(modality or "").strip().lower()
    if text in UNTOLD:
        return None
    words = set(re.findall(r"[a-z]+", text))
    if "computed" in words and "tomography" in words:
        return True
    if not words & CT_WORDS:
        return False
    others = words & {"pet", "pt", "mr", "mri", "us", "spect", "nm"}
    return None if others else True


def hounsfield_evidence(slices: Tensor) -> str:
    """What the values say on whether they are Hounsfield units, see `Scaling.evidence`; by shares of the voxels."""
    values = voxels_looked_at(slices).float()
    lowest = values.min()
    if lowest < AIR[0]:
        # Scanners fill what lies outside the field of view with one value far below air.
        inside = values[values > lowest]
        values = inside if len(inside) else values
    low, high = torch.quantile(values, torch.tensor([0.005, 0.995])).tolist()
    if high - low < LEAST_RANGE:
        return "narrow"
    if _share(values, -torch.inf, AIR[0]) > LEAST_SHARE:
        return "below"
    if _share(values, *AIR) >= LEAST_SHARE and _share(values, *TISSUE) >= LEAST_SHARE:
        return "hu"
    if _share(values, -torch.inf, BELOW_WATER) >= LEAST_SHARE and _share(values, AIR[0], TISSUE[1]) >= MOST_SHARE:
        return "open"
    moved = values - STORED_OFFSET
    air, tissue = _share(moved, -STORED_OFFSET - 1, -800.0), _share(moved, *TISSUE)
    between = _share(moved, -750.0, -300.0)
    return "stored" if air >= LEAST_SHARE and tissue >= 5 * LEAST_SHARE and 2 * between < tissue else "positive"


def voxels_looked_at(slices: Tensor) -> Tensor:
    """The values (N,), at most `VOXELS_LOOKED_AT`, by which `hounsfield_evidence` judges; all of them where given."""
    values = slices.flatten()
    if len(values) <= VOXELS_LOOKED_AT:
        return values
    return values[torch.randint(len(values), (VOXELS_LOOKED_AT,), generator=torch.Generator().manual_seed(0))]


def _share(values: Tensor, low: float, high: float) -> float:
    return float(((values >= low) & (values < high)).float().mean())


def agreed(scalings: Iterable[Scaling]) -> SupportScaling | None:
    """What the volumes of one set have to agree on; None: each is scaled as it is.

    A CT that shows no air is known by the others of its set: where at least half of the volumes that are stated or show
    what they are, are CT, those whose voxels leave it open are too.
    """
    volumes = [scaling for scaling in scalings if scaling.evidence and scaling.kind != COLOUR]
    known = [scaling for scaling in volumes if scaling.stated or scaling.evidence in KNOWN]
    ct = sum(scaling.kind == CT for scaling in known)
    return SupportScaling(frozenset({CT})) if ct and 2 * ct >= len(known) else None


def scaling_hint(case: Mapping) -> list[str] | None:
    """What `support_scaling` of a case decides, as JSON types for the keys of caches."""
    support = case.get("support_scaling")
    return support and [sorted(support.volumes), sorted(support.pictures)]


def is_open(scaling: Scaling) -> bool:
    """Whether an image may have to follow the others of its set, see `agreed`."""
    return not scaling.stated and scaling.kind == PERCENTILES and scaling.evidence in ("open", "stored")


def window_of(
    values: Tensor, scaling: Scaling, ct_window: tuple[float, float], percentiles: tuple[float, float]
) -> tuple[float, float]:
    """The raw intensities that become 0 and 1; equal ones where all values are.

    Args:
        values: (Z, H, W) of one channel, or all of a colour image.
        ct_window, percentiles: as of `scale_intensity`.
    """
    if scaling.kind == CT:
        return ct_window[0] - scaling.offset, ct_window[1] - scaling.offset
    if scaling.kind == COLOUR:
        return 0.0, 255.0 if values.max() <= 255 else 65535.0
    low, high = (float(percentile(values, percent)) for percent in percentiles)
    if not high > low:
        # Percentiles coincide in an image such as a small object on an empty ground.
        low, high = float(values.min()), float(values.max())
    return low, high


def scale_intensity(
    slices: Tensor,
    scaling: Scaling,
    ct_window: tuple[float, float] = DEFAULT_CT_WINDOW,
    percentiles: tuple[float, float] = DEFAULT_PERCENTILES,
) -> Tensor:
    """Scale raw intensities (Z, C, H, W) to [0, 1].

    Args:
        ct_window: "ct": values (lower, upper) in HU are mapped to [0, 1] and clipped.
        percentiles: "percentiles": these, of each channel over all slices, are mapped to [0, 1] and clipped.

    "colour": values of 8 or 16 bits are divided by their range, so that hues stay. A constant channel becomes 0.
    """
    slices = slices.float()
    if scaling.kind == CT:
        return _scaled(slices, *window_of(slices, scaling, ct_window, percentiles))
    if scaling.kind == COLOUR:
        return slices / window_of(slices, scaling, ct_window, percentiles)[1]
    out = torch.zeros_like(slices)
    for channel in range(slices.shape[1]):
        values = slices[:, channel]
        low, high = window_of(values, scaling, ct_window, percentiles)
        if high > low:
            out[:, channel] = _scaled(values, low, high)
    return out


def _scaled(slices: Tensor, low: float, high: float) -> Tensor:
    """Values [low, high] to [0, 1], clipped; some slices at a time, because a long CT is gigabytes."""
    scale = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True, dtype=torch.float32)
    out = torch.empty_like(slices)
    for start in range(0, len(slices), SCALED_AT_A_TIME):
        part = slice(start, start + SCALED_AT_A_TIME)
        out[part] = scale(slices[part])
    return out


def log_scalings(logger: logging.Logger, what: str, names: Iterable[str], scalings: Iterable[Scaling]) -> None:
    """Say how the images of a set are scaled, in one line, and what may be wrong, in one line an image."""
    counts: Counter[str] = Counter()
    for name, scaling in zip(names, scalings, strict=True):
        counts[str(scaling)] += 1
        for sentence in scaling.warnings:
            logger.warning("%s: %s", name, sentence)
    if counts:
        listed = "; ".join(f"{count} by {how}" for how, count in counts.most_common())
        logger.info("%s, scaling: %s.", what, listed)
