"""A settings file as an operator writes it: TOML or JSON.

In: a path. Out: the file's content as a dictionary. What its keys mean, and which there are, is said by `lib.settings`.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sam2sgp.errors import ConfigError

# Settings take a few kB.
LARGEST = 1 << 20


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """The content of a settings file.

    Args:
        path: of the file, whose suffix says how it is written: `.toml` or `.json`.

    Raises:
        ConfigError: it can't be read, has another suffix, isn't what its suffix says, or names a key twice.
    """
    path = Path(path).expanduser()
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(f"{path}: expected a settings file with a name that ends in {' or '.join(PARSERS)}.")
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{path}: expected a settings file, found {error.strerror}; correct its path.") from error
    if len(content) > LARGEST:
        raise ConfigError(f"{path}: expected settings of at most 1 MB, found more; give another file.")
    try:
        found = parse(content.decode())
    except (ValueError, RecursionError) as error:
        # Both parsers tell the line.
        kind = path.suffix[1:].upper()
        raise ConfigError(f"{path}: expected {kind} in UTF-8, found a mistake: {error}; correct it.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected an object of settings, found another value; put them in braces.")
    return found


def _toml(text: str) -> Any:
    return json.loads(json.dumps(tomllib.loads(text), default=_no_date))


def _no_date(value: object) -> Any:
    raise ValueError(f"the date or time {value}, which has to stand in quotes")


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name}, which is no number of JSON")


PARSERS: dict[str, Callable[[str], Any]] = {".toml": _toml, ".json": _json}
