"""What people open in a browser: the first page, and OHIF as MONAI Label brings it.

Nothing of it is loaded from another host: MONAI Label's own first page and log page take scripts and styles from
elsewhere into this server's origin, and are not served. OHIF gets a policy of its own, because it runs inline scripts
and WebAssembly; its page asks for a font of another host, which the policy leaves out.
"""

import base64
import hashlib
import re
from pathlib import Path

import monailabel
from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse
from jinja2 import Environment, FileSystemLoader
from monailabel.interfaces.app import MONAILabelApp

from lib.http.routing import router

STATIC = Path(monailabel.__file__).parent / "endpoints" / "static"
OHIF = STATIC / "ohif"
TEMPLATES = Path(__file__).parents[2] / "templates"
HOME_POLICY = "default-src 'none'; style-src 'self'; img-src 'self'; frame-ancestors 'none'"


def viewer_routes(app: MONAILabelApp) -> APIRouter:
    """All of these routes. `app`: reads its `settings`."""
    made = router()
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    home = environment.get_template("home.html.j2").render(has_archive=app.settings.is_remote)
    index = (OHIF / "index.html").read_bytes()
    policy = _ohif_policy(index.decode())
    files = {str(file.relative_to(OHIF)): file for file in OHIF.rglob("*") if file.is_file()}

    @made.get("/", include_in_schema=False)
    def first_page() -> HTMLResponse:
        return HTMLResponse(home, headers={"content-security-policy": HOME_POLICY})

    @made.get("/favicon.ico", include_in_schema=False)
    def icon() -> FileResponse:
        return FileResponse(STATIC / "favicon.ico", media_type="image/x-icon")

    @made.get("/ohif/{path:path}", include_in_schema=False)
    def ohif(path: str) -> FileResponse:
        # Other paths are places within OHIF, which its page knows.
        file = files.get(path, OHIF / "index.html")
        return FileResponse(file, headers={"content-security-policy": policy})

    return made


def _ohif_policy(page: str) -> str:
    """What OHIF needs: its own files, the scripts within its page, workers, and pictures that it makes."""
    inline = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in inline]
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'self' 'wasm-unsafe-eval' blob: {' '.join(hashes)}",
            "worker-src 'self' blob:",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' blob: data:",
            "font-src 'self' data:",
            "connect-src 'self' blob: data:",
            "manifest-src 'self'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    )
