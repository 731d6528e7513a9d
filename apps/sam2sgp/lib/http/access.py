"""Who asks, and whether he may: the role of each user, and of each route the one that it needs.

In: a request's method, path and headers, before anything else of it is read. Out: `current_user` and `current_role` for
whoever answers it, or 401 or 403 with one sentence. Where roles are off, everybody may do everything; a token restricts
whoever sends it all the same.

A user's name comes from the reverse proxy in a header, and his role from the settings: `users`, or `default_role` for
those who aren't there. A script's come from its token, and nothing else that it sends counts then.

MONAI Label's own login, where it is on, has roles besides, for which handlers ask (`LOGIN_…` in `lib.http.routing`).
They are chosen by the table here, which counts: a request has to pass both.

What a route needs may depend on what it is asked for, such as the tag under which a label is saved: its handler then
asks by `need`.
"""

import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from monailabel.config import settings as server_settings
from starlette.datastructures import Headers
from starlette.routing import compile_path

from lib.checks import Forbidden, Unauthorized
from lib.roles import Role
from lib.stores.audit import current_user
from lib.stores.decisions import DRAFT, FINAL, REMOVED
from lib.stores.tokens import PREFIX, Tokens

logger = logging.getLogger(__name__)

LONGEST_NAME = 256
# The role of whoever sent the request that is being answered; the highest outside of requests.
current_role: ContextVar[Role] = ContextVar("current_role", default=Role.admin)

READER, ANNOTATOR, APPROVER, ADMIN = Role
# By method and path of each route; HEAD is as GET, None is for everybody. What isn't here needs an admin.
NEEDED: Mapping[str, Role | None] = {
    # Whoever watches the server, and MONAI Label's login.
    "GET /sam2sgp/health/live": None,
    "GET /sam2sgp/health/ready": None,
    "GET /auth/": None,
    "POST /auth/token": None,
    "GET /auth/token/valid": None,
    # Looking
    "GET /": READER,
    "GET /favicon.ico": READER,
    "GET /openapi.json": READER,
    "GET /ohif/{path:path}": READER,
    "GET /proxy/dicom/{path:path}": READER,
    "GET /info/": READER,
    "GET /datastore/": READER,
    "GET /datastore/image": READER,
    "GET /datastore/image/info": READER,
    "GET /datastore/label": READER,
    "GET /datastore/label/info": READER,
    "GET /session/{session_id}": READER,
    "GET /train/": READER,
    "GET /scoring/": READER,
    "GET /batch/infer": READER,
    # Numbers only, and whoever collects them should be able to do no more.
    "GET /sam2sgp/metrics": READER,
    "GET /sam2sgp/": READER,
    "GET /sam2sgp/item": READER,
    "GET /sam2sgp/picture": READER,
    "GET /sam2sgp/assets/{name}": READER,
    "GET /sam2sgp/review/": READER,
    "GET /sam2sgp/review/assets/{name}": READER,
    "GET /sam2sgp/review/queue": READER,
    "GET /sam2sgp/review/case": READER,
    "GET /sam2sgp/review/slices": READER,
    "GET /sam2sgp/review/labels": READER,
    "GET /sam2sgp/review/history": READER,
    "GET /sam2sgp/review/progress": READER,
    "GET /sam2sgp/review/segmenting": READER,
    "GET /sam2sgp/review/batch": READER,
    # With `save_label` what its tag needs.
    "POST /infer/{model}": READER,
    # Adding
    "POST /activelearning/{strategy}": ANNOTATOR,
    "GET /datastore/dataset": ANNOTATOR,
    "PUT /datastore/": ANNOTATOR,
    "PUT /datastore/image": ANNOTATOR,
    "PUT /session/": ANNOTATOR,
    "DELETE /session/{session_id}": ANNOTATOR,
    # Both by what the tag needs.
    "PUT /datastore/label": ANNOTATOR,
    "POST /sam2sgp/review/correct": ANNOTATOR,
    "POST /sam2sgp/review/bring_back": ANNOTATOR,
    # Deciding
    "POST /sam2sgp/approve": APPROVER,
    "POST /sam2sgp/reject": APPROVER,
    "POST /sam2sgp/remove": APPROVER,
    "POST /sam2sgp/restore": APPROVER,
    # Everything
    "PUT /datastore/image/info": ADMIN,
    "PUT /datastore/label/info": ADMIN,
    "DELETE /datastore/image": ADMIN,
    "DELETE /datastore/label": ADMIN,
    "POST /train/": ADMIN,
    "POST /train/adapt": ADMIN,
    "POST /train/{model}": ADMIN,
    "DELETE /train/": ADMIN,
    "POST /scoring/": ADMIN,
    "POST /scoring/{method}": ADMIN,
    "DELETE /scoring/": ADMIN,
    "POST /batch/infer/{model}": ADMIN,
    "DELETE /batch/infer": ADMIN,
    "GET /logs/": ADMIN,
}
# What saving a label needs by its tag; drafts, predictions and the like need an annotator.
OF_TAGS = {FINAL: APPROVER, REMOVED: APPROVER}
# What the pages offer.
OFFERED = {
    "segment": ANNOTATOR,
    "batch": NEEDED["POST /batch/infer/{model}"],
    "adapt": NEEDED["POST /train/adapt"],
    "draft": NEEDED["POST /sam2sgp/review/correct"],
    "bring_back": NEEDED["POST /sam2sgp/review/bring_back"],
    **{name: NEEDED[f"POST /sam2sgp/{name}"] for name in ("approve", "reject", "remove", "restore")},
}
GIVEN_BY = "The administrator of this server gives roles."
NO_APPROVER = "Saved as a draft: an approver has to approve it."
SECOND_PAIR = "Saved as a draft: somebody else has to approve it, because you changed it."


def _pattern(place: str, role: Role | None) -> tuple[str, re.Pattern[str], Role | None]:
    method, _, path = place.partition(" ")
    return method, compile_path(path)[0], role


_PATTERNS = [_pattern(place, role) for place, role in NEEDED.items()]


class Access:
    """Tells who asks, and lets him in or not.

    Args:
        settings: the app's; reads `user_header`, `users`, `default_role` and `state_dir`.
    """

    def __init__(self, settings: Any) -> None:
        self._header = settings.user_header
        self._users = settings.users or {}
        self._default = settings.default_role
        self._is_on = settings.users is not None or settings.default_role is not None
        self._tokens = Tokens(settings.state_dir)

    def enter(self, method: str, path: str, headers: Headers) -> None:
        """Set `current_user` and `current_role` for a request.

        Raises:
            Unauthorized: nobody is named, or by a token that is none.
            Forbidden: the role isn't enough; or the header with the name came twice.
        """
        sent = _token(headers)
        user = self._named(headers) if sent is None else None
        current_user.set(user)
        role: Role | None = ADMIN
        if sent is not None:
            name, role = self._tokens.find(sent)
            current_user.set(name)
        elif self._is_on:
            role = self._users.get(user, self._default) if user else None
        needed = needed_for(method, path) if role is not ADMIN else None
        if needed is not None:
            asked = f"{method} {ascii(path)[1:-1][:80]}"
            if role is None and user is None:
                raise Unauthorized(
                    f"role: expected {_or_higher(needed)} for {asked}, found no user; come through the reverse proxy, "
                    "or with a token."
                )
            _check(needed, role, asked)
        # Where nobody has to be somebody, nothing more is allowed.
        current_role.set(role or READER)

    def _named(self, headers: Headers) -> str | None:
        names = headers.getlist(self._header) if self._header else []
        if len(names) > 1:
            raise Forbidden(
                f"{self._header}: expected it once, from the reverse proxy, found it {len(names)} times; have the "
                "proxy replace what clients send."
            )
        if not names or not names[0]:
            return None
        try:
            # Headers come as bytes, of which Starlette makes letters one by one.
            return names[0].encode("latin-1").decode()[:LONGEST_NAME]
        except UnicodeError:
            return names[0][:LONGEST_NAME]


def needed_for(method: str, path: str) -> Role | None:
    """What a request needs; None for nothing. Of several routes that it may be for, the highest."""
    method = "GET" if method == "HEAD" else method
    # What only a slash at its end is wrong with is sent to the right one.
    for text in (path, path[:-1] if path.endswith("/") else f"{path}/"):
        found = [role for its, pattern, role in _PATTERNS if its == method and pattern.fullmatch(text)]
        if found:
            return max(found, key=lambda role: role or 0)
    return ADMIN


def need(role: Role, what: str) -> None:
    """Refuse what the client asks for if that needs a higher role than his. Raises Forbidden."""
    _check(role, current_role.get(), what)


def need_for_tag(tag: str) -> None:
    """Refuse to save a label under a tag that needs a higher role than the client's. Raises Forbidden.

    A tag that differs in case only is in the same folder on a disk that knows no case.
    """
    need(OF_TAGS.get(tag.lower(), ANNOTATOR), f"saving a label as {tag!r}")


def default_tag() -> str:
    """The tag of a label that a viewer submits without one: that of the highest kind that the client may save."""
    return FINAL if current_role.get() >= OF_TAGS[FINAL] else DRAFT


def not_offered() -> dict[str, str]:
    """What the client may not do of all that the pages offer, and why."""
    mine = current_role.get()
    return {
        action: f"This needs the role {needed.name}; yours is {mine.name}. {GIVEN_BY}"
        for action, needed in OFFERED.items()
        if needed is not None and mine < needed
    }


def told(settings: Any) -> str:
    """One line for the log: who may do what."""
    if settings.users is None and settings.default_role is None:
        return "Roles are off: everybody who reaches this server may do everything (settings users, default_role)"
    counts = [f"{list((settings.users or {}).values()).count(role)} {role.name}" for role in reversed(Role)]
    others = f"everybody else is {settings.default_role.name}" if settings.default_role else "nobody else gets in"
    return f"Roles are on: users by role: {', '.join(counts)}; {others}"


def _token(headers: Headers) -> str | None:
    """What a request brings as its token, "" for nothing where one belongs; None if it is by no token.

    The reverse proxy lets in whoever brings one, so nothing that looks like one may be passed over.
    """
    for value in headers.getlist("authorization"):
        scheme, *rest = value.split(None, 1) or [""]
        text = rest[0] if rest else ""
        if scheme.lower() == "bearer" and (text.startswith(PREFIX) or not server_settings.MONAI_LABEL_AUTH_ENABLE):
            return text
    return None


def _check(needed: Role, role: Role | None, asked: str) -> None:
    if role is None or role < needed:
        found = "none" if role is None else role.name
        raise Forbidden(
            f"role: expected {_or_higher(needed)} for {asked}, found {found} of {current_user.get()!r}. {GIVEN_BY}"
        )


def _or_higher(role: Role) -> str:
    return role.name if role is ADMIN else f"{role.name} or higher"
