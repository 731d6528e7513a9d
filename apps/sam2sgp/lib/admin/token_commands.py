"""`sam2sgp token` and `sam2sgp tokens`: tokens of scripts are made, listed and revoked, also while the server serves.

In: a name and a role. Out: the token on standard output, and nothing else, so that a script can take it from there;
what is to be known about it goes to standard error. See `lib.stores.tokens`.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lib.admin.command_line import check_state, parser_of, settings_of
from lib.checks import StorageError
from lib.roles import role_of
from lib.settings import Settings
from lib.stores.audit import Audit
from lib.stores.tokens import Token, Tokens
from sam2sgp.errors import ConfigError

MOST_DAYS = 36500


def token(words: Sequence[str], app_dir: Path) -> None:
    """Make a token and print it.

    Args:
        words: `--name`, `--role`, `--days`, and which server (see `lib.admin.command_line`).
        app_dir: the app's folder.

    Raises:
        ConfigError: the name is in use or a user's, the role is none, the days are too few or too many, there is no
            such server.
        OSError: the file can't be written.
    """
    parser = parser_of("token")
    parser.add_argument("--name", required=True)
    parser.add_argument("--role", required=True)
    parser.add_argument("--days", type=int)
    given = parser.parse_args(words)
    if given.days is not None and not 1 <= given.days <= MOST_DAYS:
        raise ConfigError(f"days: expected a number from 1 to {MOST_DAYS}, found {given.days}.")
    settings = _settings(given, app_dir)
    try:
        role = role_of(given.role)
    except ValueError as error:
        raise ConfigError(f"role: {error}") from None
    if given.name in (settings.users or {}):
        raise ConfigError(
            f"name: expected none of a user, found {given.name!r}; the audit log couldn't tell them apart."
        )
    kept = Tokens(settings.state_dir)
    text = kept.add(given.name, role, given.days)
    try:
        Audit(settings.audit_file).write("make token", token=given.name, role=role.name, days=given.days)
    except StorageError:
        kept.revoke(given.name)
        raise
    print(text)
    until = f"for {given.days} days" if given.days else f"until `sam2sgp tokens --revoke {given.name}`"
    print(f"Keep it now: it isn't stored and not shown again. It is valid {until}.", file=sys.stderr)


def tokens(words: Sequence[str], app_dir: Path) -> None:
    """List the tokens, or revoke the one named by `--revoke`; other words and errors as of `token`."""
    parser = parser_of("tokens")
    parser.add_argument("--revoke")
    given = parser.parse_args(words)
    settings = _settings(given, app_dir)
    kept = Tokens(settings.state_dir)
    if given.revoke is not None:
        kept.revoke(given.revoke)
        Audit(settings.audit_file).write("revoke token", token=given.revoke)
        print(f"{given.revoke}: revoked")
        return
    found = kept.all()
    for entry in found:
        print(f"{entry.name}: {entry.role.name}, made {_day(entry.made)}, {_end(entry)}")
    if not found:
        print("No tokens.")


def _settings(given: argparse.Namespace, app_dir: Path) -> Settings:
    settings = settings_of(given, app_dir)
    check_state(settings)
    return settings


def _end(token: Token) -> str:
    if token.ends is None:
        return "without an end"
    return f"{'over since' if token.is_over() else 'until'} {_day(token.ends)}"


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
