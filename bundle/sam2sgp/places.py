"""Where the files beside the package are: the bundle's configs and weights, and the MONAI Label app."""

from pathlib import Path

PACKAGE = Path(__file__).parent
# A wheel holds copies of both inside the package, see setup.py; in a clone they stand where they are written.
IS_INSTALLED = (PACKAGE / "_bundle").is_dir()
BUNDLE = PACKAGE / "_bundle" if IS_INSTALLED else PACKAGE.parent
APP = PACKAGE / "_app" if IS_INSTALLED else BUNDLE.parent / "apps" / "sam2sgp"
