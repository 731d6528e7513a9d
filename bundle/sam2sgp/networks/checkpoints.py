"""SAM 2.1 checkpoints: fetched once, and loaded into SAM 2 as it is built.

In: the name of a backbone, or a file named by the user. Out: a model that holds exactly what the file says, or a
`WeightsError` that tells which key differs and what to change.
"""

import logging
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from monai.apps.utils import check_hash, download_url
from monai.bundle import ConfigParser
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.files import replacing
from sam2sgp.networks.backbones import BACKBONES
from sam2sgp.networks.backbones import backbone as backbone_definition
from sam2sgp.networks.states import identify_backbone, is_sgp, misfit, read_state

LARGE_FILES = "models/large_files.yml"
DOWNLOAD_COMMAND = "python -m monai.bundle download_large_files --bundle_path models"
PROBE_SECONDS = 30

logger = logging.getLogger(__name__)


def fetch_checkpoint(backbone: str, bundle_root: str | Path) -> Path:
    """The SAM 2.1 checkpoint of a backbone, downloaded if it is not there yet and checked against its hash.

    Address and hash are those of `<bundle_root>/models/large_files.yml`, in the format of MONAI's
    `download_large_files`.

    Args:
        backbone: one of `BACKBONES`.
        bundle_root: the bundle's folder; the file goes to its `models/`.

    Raises:
        ConfigError: unknown backbone, or one without a checkpoint.
        WeightsError: no entry in `large_files.yml`, a wrong hash, or a failed download.
    """
    filename = backbone_definition(backbone).checkpoint
    if filename is None:
        raise ConfigError(
            f"The {backbone!r} backbone has no SAM 2.1 checkpoint to fetch; leave `checkpoint` unset and load its "
            "weights (`models/model.pt`), or choose another backbone."
        )
    target = Path(bundle_root, "models", filename)
    url, hash_val, hash_type = _large_file(Path(bundle_root, LARGE_FILES), filename)
    if target.exists():
        if not check_hash(target, hash_val, hash_type):
            raise WeightsError(
                f"{target}: its {hash_type} differs from {hash_val} in {LARGE_FILES}, so it is damaged, incomplete or "
                "another file; delete it and run again."
            )
        return target
    logger.info("Downloading %s (%s) to %s", url, _remote_size(url), target)
    try:
        with replacing(target) as part:
            download_url(url, part, hash_val, hash_type)
            if not part.is_file():  # download_url logs nothing and returns when permission is denied
                raise PermissionError("permission denied")
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise WeightsError(
            f"{target}: could not be downloaded from {url} ({error}); run again, or fetch that address by other means "
            "and put the file there."
        ) from error
    return target


def _large_file(listing: Path, path: str) -> tuple[str, str, str]:
    """url, hash and hash type of one entry of a `large_files.yml`."""
    if not listing.is_file():
        raise WeightsError(f"{listing}: not found; give the bundle's folder as `bundle_root`.")
    entries = ConfigParser.load_config_file(str(listing)).get("large_files", [])
    for entry in entries:
        if entry.get("path") == path:
            if not entry.get("url") or not entry.get("hash_val"):
                raise WeightsError(f"{listing}: the entry of {path} needs both `url` and `hash_val`.")
            return entry["url"], entry["hash_val"], entry.get("hash_type") or "sha256"
    raise WeightsError(f"{listing}: expected an entry with path {path}, found none; restore the file.")


def _remote_size(url: str) -> str:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=PROBE_SECONDS) as response:
            return f"{int(response.headers['Content-Length']) / 1e6:.1f} MB"
    except (OSError, ValueError, TypeError, HTTPException):  # the download itself reports what is wrong
        return "unknown size"


def load_sam2_checkpoint(model: SAM2Base, path: str | Path, backbone: str) -> None:
    """Load a SAM 2.1 checkpoint strictly: `{"model": state dict}`, a plain state dict, or safetensors.

    Args:
        model: what `build_sam2(backbone, …)` builds.
        path: the file.
        backbone: what the model was built as, for messages.

    Raises:
        WeightsError: the file is missing, unreadable, or differs from the model in any key or shape.
    """
    path = Path(path)
    if not path.is_file():
        how = "check the path"
        if BACKBONES[backbone].checkpoint:
            how = (
                f"get it with `fetch_checkpoint({backbone!r}, bundle_root)` of sam2sgp.networks, or, in the bundle's "
                f"folder, `{DOWNLOAD_COMMAND}`"
            )
        raise WeightsError(f"{path}: no such file; expected a SAM 2.1 checkpoint of the {backbone!r} backbone: {how}.")
    state = read_state(path)
    difference = misfit(backbone, model.state_dict(), state)
    if difference:
        raise WeightsError(f"{path}: {difference} {_sam2_origin(state, backbone)}")
    model.load_state_dict(state)


def _sam2_origin(state: Mapping[str, Tensor], wanted: str) -> str:
    """What a file is that is no SAM 2.1 checkpoint of the backbone wanted, and what to do."""
    found = identify_backbone(state)
    if is_sgp(state):
        overlay = f" of configs/backbones/{found}.json" if found else ""
        return f"The file holds a SAM2SGP network{overlay}: load it with `load_weights`, not as `checkpoint`."
    if found is None:
        return f"The file is no SAM 2.1 checkpoint of any backbone ({', '.join(BACKBONES)})."
    if "maskmem_tpos_enc" in state and "no_obj_embed_spatial" not in state:
        return (
            f"The file is an older SAM 2.0 checkpoint of configs/backbones/{found}.json: use the SAM 2.1 one, "
            f"{BACKBONES[found].checkpoint}."
        )
    if found != wanted:
        return f"The file belongs to configs/backbones/{found}.json: use that overlay, or the file of {wanted!r}."
    return (
        f"The file belongs to configs/backbones/{found}.json, as it should, but is no whole SAM 2.1 checkpoint: use "
        "the original."
    )
