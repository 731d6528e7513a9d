"""Which server a command is about: `--studies` and `--state-dir`, or the settings file that the server starts with."""

import argparse
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
        ConfigError: no studies are named, or a setting can't work.
    """
    start = start_values(given.settings) if given.settings else {}
    studies = given.studies or start.get("studies")
    if not studies:
        raise ConfigError(
            "studies: expected a folder of images or the address of an archive, found none; give --studies, or "
            "--settings with a file that names it."
        )
    conf: dict[str, Any] = {"settings": given.settings} if given.settings else {}
    if given.state_dir:
        conf["state_dir"] = given.state_dir
    return Settings.from_conf(app_dir, studies, conf, starts=True)
