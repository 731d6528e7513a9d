"""The documentation as a site: `make docs` builds it from the repository's own pages, whose links stay as they are.

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
exclude_patterns = [".*", "out", "build", "docs/conf.py", "bundle/sam2sgp", "apps/sam2sgp/lib"]

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
html_copy_source = False
# The excerpts of a search are fetched, which browsers forbid to pages that lie in a folder.
html_show_search_summary = False
html_show_sphinx = False
html_extra_path = ["site"]
html_theme_options = {"footer_icons": []}

# The site's menu. It is added to the README here, because GitHub would show it as it is.
MENU = """
:::{toctree}
:hidden:
:caption: Using it

docs/install
docs/first_hour
docs/data
docs/running
docs/settings
docs/output
docs/adaptation
apps/sam2sgp/README
docs/administration
docs/containers
docs/federated
docs/security
:::

:::{toctree}
:hidden:
:caption: What it can do

docs/method
docs/results
docs/speed
docs/weights
Model card <bundle/docs/README>
:::

:::{toctree}
:hidden:
:caption: Changing it

docs/reference
docs/architecture
CONTRIBUTING
:::
"""


def _add_menu(app, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += MENU


def setup(app) -> None:
    app.connect("source-read", _add_menu)
