"""Which server a command is about: `--studies` and `--state-dir`, or the settings file that the server starts with."""

import argparse
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.settings import Settings, start_values
from sam2sgp.errors import ConfigError


def parser_of(command: str) -> argparse.ArgumentParser:
    """A parser with the options that say which server is meant."""
    parser = argparse.ArgumentParser(command)
    parser.add_argument("--studies")
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--state-dir", type=Path)
    return parser


def settings_of(given: argparse.Namespace, app_dir: Path) -> Settings:
    """Settings of the server that is meant.

    Args:
        given: what such a parser made of a command line.
        app_dir: the app's folder.

    Raises:
        ConfigError: no studies are named, a setting can't work, or root is at work on another user's state.
    """
    conf = {"state_dir": given.state_dir} if given.state_dir else {}
    settings, _ = with_file(given, conf, app_dir, "give --studies, or --settings with a file that names it.")
    _check_user(settings.state_dir)
    return settings


def with_file(
    given: argparse.Namespace, conf: Mapping[str, Any], app_dir: Path, remedy: str
) -> tuple[Settings, dict[str, Any]]:
    """Settings of a command line and of the settings file that it may name, and what that file says of the start.

    Args:
        given: with `studies` and `settings`, each None where it isn't given.
        conf: settings that come before those of the file.
        app_dir: the app's folder.
        remedy: what to do where no studies are named.

    Raises:
        ConfigError: no studies are named, or a setting can't work.
    """
    start = start_values(given.settings) if given.settings else {}
    studies = given.studies or start.get("studies")
    if not studies:
        raise ConfigError(
            f"studies: expected a folder of images or the address of a DICOMweb server, found none; {remedy}"
        )
    named = {"settings": given.settings} if given.settings else {}
    return Settings.from_conf(app_dir, studies, {**conf, **named}, starts=True), start


def check_state(settings: Settings) -> None:
    """Raise ConfigError where there is no state folder, as of a server that was never started."""
    if not settings.state_dir.is_dir():
        raise ConfigError(
            f"state_dir: expected the state folder of the server, found no {settings.state_dir}; give --settings or "
            "--state-dir as the server has it."
        )


def _check_user(folder: Path) -> None:
    """Raise ConfigError where root would make files, such as locks, that the server's user can't write to."""
    owner = os.stat(folder).st_uid if folder.exists() else 0
    if os.geteuid() == 0 != owner:
        raise ConfigError(
            f"{folder}: expected to be run by the folder's user, found root, whose files the server couldn't write to; "
            f"run it as user {_name_of(owner)}."
        )


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
