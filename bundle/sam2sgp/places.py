"""Where things are: the bundle's configs and weights and the MONAI Label app beside the package, and studies."""

from pathlib import Path

from sam2sgp.errors import ConfigError

PACKAGE = Path(__file__).parent
# A wheel holds copies of both inside the package, see setup.py; in a clone they stand where they are written.
IS_INSTALLED = (PACKAGE / "_bundle").is_dir()
BUNDLE = PACKAGE / "_bundle" if IS_INSTALLED else PACKAGE.parent
APP = PACKAGE / "_app" if IS_INSTALLED else BUNDLE.parent / "apps" / "sam2sgp"
# That of the configs without an overlay, and of the embedded weights.
DEFAULT_BACKBONE = "lite"


def is_address(place: str) -> bool:
    """Whether a place is the address of a server, not a path."""
    return place.startswith(("http://", "https://"))


def overlays_of(backbone: str) -> list[str]:
    """Names in `configs/` of what follows a run's own configs for a backbone; the default one needs nothing.

    Raises:
        ConfigError: there is no such backbone.
    """
    known = sorted(path.stem for path in (BUNDLE / "configs" / "backbones").glob("*.json"))
    if backbone not in known:
        raise ConfigError(f"backbone: expected one of {', '.join(known)}, found {backbone!r}.")
    return [] if backbone == DEFAULT_BACKBONE else [f"backbones/{backbone}.json"]
