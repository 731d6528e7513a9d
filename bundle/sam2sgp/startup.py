"""A short start of the commands: MONAI without the optional packages that no run of ours uses.

`import monai` imports all of MONAI's modules, and with them every optional package that is installed, by
`monai.utils.optional_import`: half of the time in which a command segments one picture. That function takes a package
that can't be imported for one that is not installed, and then only what needs the package raises
`monai.utils.OptionalImportError`, when it is used. So these packages can't be imported for as long as MONAI is being
imported, and for nothing else: afterwards they are what they were, for `peft` that needs `transformers`, and for
whoever asks.

Only for a process that is a command of ours. In somebody else's program, parts of MONAI that we don't use must work.
"""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder

# What they are for in MONAI: tracking (mlflow); tables of data (pandas); plots and notebooks (matplotlib, IPython);
# transformers' networks; metrics of an embedding and of instances (sklearn, scipy.optimize); readers and stores in
# place of which we have our own (itk, lmdb, openslide, tifffile); filters of one-dimensional signals (scipy.signal);
# downloads from MONAI's own places (bs4, gdown, requests); checks of a bundle's metadata (jsonschema).
UNUSED = frozenset(
    ("IPython", "bs4", "gdown", "itk", "jsonschema", "lmdb", "matplotlib", "mlflow", "openslide", "pandas", "requests")
    + ("scipy.optimize", "scipy.signal", "sklearn", "tifffile", "transformers")
)


def import_monai(whole: bool = False) -> None:
    """Import MONAI's bundles, without `UNUSED` unless `whole`; nothing happens where MONAI has been imported."""
    if "monai" in sys.modules:
        return
    with _no_garbage(), _absent(frozenset() if whole else UNUSED):
        importlib.import_module("monai.bundle")


class _Absent(MetaPathFinder):
    """Finds nothing, and says of some modules that there are none."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in self.names:
            raise ModuleNotFoundError(f"{fullname} is left out of this command, see sam2sgp.startup", name=fullname)


@contextmanager
def _absent(names: frozenset[str]) -> Iterator[None]:
    finder = _Absent(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """No search for garbage, neither now nor ever among what is there at the end: modules stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
