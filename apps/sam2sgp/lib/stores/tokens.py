"""Tokens by which scripts sign in: made and revoked by the administrator, checked by the server.

In: a name and a role; later the token, as a script sends it. Out: the token, once; later who that is. The file holds
only SHA-256 of each token, which has 256 random bits, so that nobody who reads the file can sign in. It is readable by
the server's user only, and is replaced as a whole; a server that runs sees a new file with the next request. Programs
that change it at once do so one after the other.
"""

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from filelock import FileLock
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter

from lib.checks import RequestError, Unauthorized
from lib.roles import Role, role_of
from lib.stamps import Stamp, stamp
from sam2sgp.errors import ConfigError
from sam2sgp.files import replacing

FILE = "tokens.json"
# By this one can tell a token from anything else, such as in a repository into which it must not get.
PREFIX = "sam2sgp_"
BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
DAY = 24 * 3600.0
MODE = 0o600


class Unreadable(RequestError):
    """The tokens can't be read, so nobody can be let in by one."""

    status = 503


class Token(BaseModel):
    """What is known about a token.

    Attributes:
        name: as the audit log has it. role: what it may do. sha256: of the token, hexadecimal digits.
        made: when, in seconds since 1970. ends: from when on it is refused; None for never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: Annotated[Role, BeforeValidator(role_of), PlainSerializer(lambda role: role.name)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    made: float
    ends: float | None = None

    def is_over(self) -> bool:
        """Whether its time has come."""
        return self.ends is not None and time.time() >= self.ends


FORM = TypeAdapter(list[Token])


class Tokens:
    """The tokens of a server.

    Args:
        folder: its state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._read: tuple[Stamp | None, tuple[Token, ...]] | None = None

    def all(self) -> tuple[Token, ...]:
        """All that were made and not revoked, in the order in which they were made.

        Raises:
            Unreadable: the file is damaged or can't be read.
        """
        before, known = stamp(self._path), self._read
        if known is None or known[0] != before:
            known = before, self._load()
            self._read = known
        return known[1]

    def find(self, text: str) -> tuple[str, Role]:
        """Name and role of a token as it was sent; it takes as long for a wrong one.

        Raises:
            Unauthorized: it is none, was revoked, or its time is over.
            Unreadable: as of `all`.
        """
        digest = _digest(text)
        found = [token for token in self.all() if hmac.compare_digest(token.sha256, digest)]
        if not found or found[0].is_over():
            was = "one whose time is over" if found else "an unknown or revoked one"
            raise Unauthorized(
                f"token: expected a valid one, found {was}; ask the administrator of this server for one."
            )
        return found[0].name, found[0].role

    def add(self, name: str, role: Role, days: float | None = None) -> str:
        """Make a token, which can't be read again afterwards.

        Args:
            name: of the script, for the audit log.
            role: what it may do.
            days: for how many; None for as long as it isn't revoked.

        Raises:
            ConfigError: the name is in use, or can't be one.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"name: expected up to 64 letters, digits and ._@+- after a letter or digit, found {name!r:.80}."
            )
        text = PREFIX + secrets.token_urlsafe(BYTES)
        now = time.time()
        with self._changing() as tokens:
            if any(token.name == name for token in tokens):
                raise ConfigError(f"name: expected a new one, found a token named {name!r}; revoke that first.")
            ends = None if days is None else now + days * DAY
            tokens.append(Token(name=name, role=role, sha256=_digest(text), made=now, ends=ends))
        return text

    def revoke(self, name: str) -> None:
        """Have a token refused from now on. Raises ConfigError where there is none of this name."""
        with self._changing() as tokens:
            kept = [token for token in tokens if token.name != name]
            if len(kept) == len(tokens):
                names = ", ".join(token.name for token in tokens) or "there is none"
                raise ConfigError(f"revoke: expected the name of a token ({names}), found {name!r:.80}.")
            tokens[:] = kept

    @contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """All tokens, to be changed; what they are at the end is stored."""
        with FileLock(self._path.with_suffix(".lock"), mode=MODE):
            tokens = list(self._load())
            yield tokens
            content = FORM.dump_json(tokens, indent=1)
            with replacing(self._path) as part:
                file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
                with open(file, "wb") as opened:
                    opened.write(content)

    def _load(self) -> tuple[Token, ...]:
        try:
            return tuple(FORM.validate_json(self._path.read_bytes()))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            raise Unreadable(
                f"{FILE}: expected the tokens of this server, found it damaged or unreadable; its administrator has to "
                "delete it and make new ones."
            ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
