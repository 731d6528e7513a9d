"""The documentation as a site: `make docs` builds it from the repository's own pages, so links among them stay as they are.

The source folder is the repository, and the pages are those of `include_patterns`. Nothing is loaded from elsewhere:
the site works offline, from a folder too, with its search.
"""

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bundle"))

project = "SAM2-SGP for MONAI"
copyright = "the SAM2-SGP for MONAI authors"
release = version = import_module("sam2sgp").__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/*", "bundle/docs/README.md", "apps/sam2sgp/README.md"]
exclude_patterns = [".*", "out", "build", "docs/conf.py", "docs/contents.md", "bundle/sam2sgp", "apps/sam2sgp/lib"]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
# The notebook keeps its outputs; a test executes it.
nb_execution_mode = "off"

# Names in docstrings become links where the reference has them.
default_role = "py:obj"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "imported-members": True}

html_theme = "furo"
html_title = project
html_baseurl = ""
html_copy_source = False
html_show_sphinx = False
html_extra_path = ["site"]
html_theme_options = {"footer_icons": []}


def _add_contents(app, name: str, source: list[str]) -> None:
    """The README as GitHub shows it has no table of all pages; the site's menu is made of one."""
    if name == root_doc:
        source[0] += "\n" + (ROOT / "docs" / "contents.md").read_text(encoding="utf-8")


def setup(app) -> None:
    app.connect("source-read", _add_contents)
