"""A network with its support bank: built from the bundle's `configs/inference.json`, it segments prepared cases.

    weights ─ LoadedNetwork.load ─ network, bank, transforms
    prepared case, options ─ segment ─ entries of its `CaseResult`, in whatever memory there is

Nothing of network, bank, transforms and inferer is declared here. For one thread at a time.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cachetools import LRUCache
from monai.bundle import ConfigParser

from lib.checks import RequestError
from lib.serving.adapted import ServedAdaptation, Standing
from lib.serving.options import Options
from lib.serving.published_weights import Version
from lib.settings import Settings
from sam2sgp.inferers import CaseSegmenter, SupportSetInferer
from sam2sgp.inferers.precision import autocast
from sam2sgp.inferers.query_cache import QueryCache
from sam2sgp.inferers.support_set import Step
from sam2sgp.networks import SAM2SGP, load_weights
from sam2sgp.support import SupportBank
from sam2sgp.support.lru import ByteLRU
from sam2sgp.transforms.cases import PreparedCase

logger = logging.getLogger(__name__)

# Inferers for other options than the last ones, each with what it learned from the support set.
INFERERS_KEPT = 8


class OutOfMemory(RequestError):
    """The machine's memory is too small for the image."""

    status = 507


@dataclass(eq=False)
class LoadedNetwork:
    """A network with the bank of its tokens and all that is built on them."""

    version: Version
    """The weights."""

    parser: ConfigParser
    """What it was built from."""

    network: SAM2SGP
    """In evaluation mode."""

    bank: SupportBank
    """The inferer's; filled by `reconcile`."""

    segmenter: CaseSegmenter
    """Prepares and segments cases with the options of inference.json."""

    device: torch.device
    """What is computed on."""

    results: ByteLRU
    """Results that are kept for the next request."""

    adaptation: ServedAdaptation | None = None
    """What was published with the weights; None: they serve as they are."""

    inferers: LRUCache = field(default_factory=lambda: LRUCache(INFERERS_KEPT))
    """`SupportSetInferer`s by the options that differ from those of inference.json."""

    @classmethod
    def load(cls, settings: Settings, version: Version) -> "LoadedNetwork":
        """Build it, with an empty bank. Raises Sam2SgpError where the weights can't be loaded."""
        parser = inference_parser(settings)
        network = parser.get_parsed_content("network")
        load_weights(network, version.path)
        network.eval()
        inferer = parser.get_parsed_content("inferer")
        adaptation = ServedAdaptation.of(version, network, inferer.bank)
        return cls(
            version,
            parser,
            network,
            inferer.bank,
            CaseSegmenter(network, inferer, parser.get_parsed_content("preprocessing")),
            parser.get_parsed_content("device"),
            ByteLRU(settings.query_cache_mb, tensor_bytes),
            adaptation,
        )

    def inferer(self, options: Options, adapted: bool = False) -> SupportSetInferer:
        """One for these options, with the adaptation or without, kept with what it learned from the bank."""
        chosen = {
            name: getattr(options, name)
            for name in ("k", "retrieval", "three_d_memory")
            if getattr(options, name) is not None
        }
        key = (adapted, *sorted(chosen.items()))
        if key not in self.inferers:
            if adapted:
                self.inferers[key] = replace(self.inferer(options), adaptation=self.adaptation)
            else:
                settings = ConfigParser({**self.parser.config, **chosen}).get_parsed_content("inferer::settings")
                self.inferers[key] = replace(self.segmenter.inferer, settings=settings, gate=None, signs=None)
        return self.inferers[key]

    def standing(self) -> Standing | None:
        """How the adaptation stands to the bank as it is now; None: there is none."""
        return None if self.adaptation is None else self.adaptation.standing()

    def adapts(self, case: PreparedCase) -> bool:
        """Whether the result of an image is adapted; not where its own labels were learned from."""
        found = self.adaptation
        return found is not None and not found.obstacle and not found.has_learned_from(case["name"], case["patient"])

    def encode(self, step: Step | None = None) -> None:
        """Make all tokens that are not there yet, and what the inferer learns from them.

        `step` is called between the items that are encoded or learned from, and ends that by what it raises.
        """
        with torch.no_grad():
            inferer = self.inferer(Options())
            with autocast(self.device.type, inferer.settings.precision):
                self.bank.encode_missing(self.network, self.device, step)
                inferer.thresholds(self.network, self.device, step=step)
                inferer.least_signs(self.network, step=step)
            mirror = inferer.settings.mirror
            # With "auto", no volume is mirrored.
            if mirror is True or (mirror == "auto" and any(item.slice is None for item in self.bank.items)):
                inferer.mirrored(self.network, step)

    def work(self, case: PreparedCase, options: Options) -> int:
        """What the numbers add up to that `segment` tells of its progress."""
        return replace(self.segmenter, inferer=self.inferer(options, self.adapts(case))).work(case)

    def segment(self, case: PreparedCase, options: Options, step: Step) -> tuple[dict[str, Any], list[str]]:
        """Segment a case, in smaller batches and at last on the CPU if memory runs out.

        Returns:
            The entries of its `CaseResult`, with `device` and `adapted`; and sentences on what was done for lack of
            memory.

        Raises:
            OutOfMemory: it is too large even for the CPU, slice by slice.
        """
        adapted = self.adapts(case)
        inferer = self.inferer(options, adapted)
        whole = inferer.settings.batch_size
        for device, batch_size in attempts(self.device, whole):
            try:
                with self._on(device, inferer) as usable, torch.no_grad():
                    if batch_size != whole:
                        usable = replace(usable, settings=replace(usable.settings, batch_size=batch_size))
                    segmenter = replace(self.segmenter, inferer=usable, uncertainty=options.uncertainty)
                    result = segmenter.segment(case, step)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                logger.warning("Out of memory on %s with %d slices at a time", device, batch_size)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            warnings = []
            if (device, batch_size) != (self.device, whole):
                where = f"{batch_size} slices at a time"
                if device != self.device:
                    where += ", on the CPU, without the adaptation" if adapted else ", on the CPU"
                    adapted = False
                warnings.append(f"Memory ran out, so the image was segmented with {where}; that takes longer.")
            return result.entries() | {"device": str(device), "adapted": adapted}, warnings
        raise OutOfMemory(
            "image: expected one that fits into the server's memory, found that it does not even slice by slice; crop "
            "it, or choose a smaller image_size."
        )

    @contextmanager
    def _on(self, device: torch.device, inferer: SupportSetInferer) -> Iterator[SupportSetInferer]:
        """An inferer with the network on another device for a while; the bank has that device's tokens meanwhile.

        There it has no adaptation, whose correctors stay where they are.
        """
        if device == self.device:
            yield inferer
            return
        moved = replace(inferer, query_cache=None)
        moved.reset()
        self.network.to(device)
        try:
            yield moved
        finally:
            self.network.to(self.device)
            inferer.reset()
            # An inferer that was reset has lost its adaptation, too.
            self.inferers.clear()


def inference_parser(settings: Settings) -> ConfigParser:
    """The bundle's inference without data, and with a support set that leaves out what can't be used."""
    parser = ConfigParser(settings.config())
    parser.update(
        {
            "support_data": [],
            "class_names": {},
            "queries": [],
            "support_cache_dir": str(settings.state_dir / "support"),
            "support_bank::rules::skip_errors": True,
            "support_bank::rules::allow_empty": True,
            "inferer::query_cache": QueryCache(settings.query_cache_mb),
        }
    )
    return parser


def attempts(device: torch.device, batch_size: int) -> Iterator[tuple[torch.device, int]]:
    """Devices and batch sizes to try in turn when memory runs out: halved down to 1, then the CPU."""
    while batch_size >= 1:
        yield device, batch_size
        batch_size //= 2
    if device.type != "cpu":
        yield torch.device("cpu"), 1


def tensor_bytes(value: Any) -> int:
    """Size of the tensors in a value of a case or of a result."""
    if torch.is_tensor(value):
        return value.nbytes
    parts = list(value.values()) if isinstance(value, dict) else value
    return sum(map(tensor_bytes, parts)) if isinstance(parts, tuple | list) else 0


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own type on a GPU; on a CPU only the allocator's message tells."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
