"""The start of the server, by `sam2sgp serve`.

    command line, settings file ── checked ── MONAI Label's server in this process

In: arguments and a settings file. Out: a server, or one sentence on standard error and exit status 1 before anything is
loaded. MONAI Label gets values with their types and paths with their spaces, because its own launcher, which splits
arguments at spaces, is not used. It makes folders in the app's folder and writes its first lines there, so it is given
one in the state folder that only links to the code: code may be read-only, and belong to somebody else.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lib.admin.command_line import with_file
from lib.layout import check_layout
from lib.settings import Settings
from lib.state_folder import make_private
from sam2sgp.errors import ConfigError

# What MONAI Label makes in an app's folder.
MADE = ("bin", "logs", "model")
HOST, PORT = "127.0.0.1", 8000


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line: `studies`, `host`, `port`, `conf` (pairs) and `settings`, each None where it isn't given."""
    parser = argparse.ArgumentParser("serve")
    parser.add_argument("--studies")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--conf", nargs=2, action="append", default=[])
    return parser.parse_args(words)


def chosen(given: argparse.Namespace, app_dir: Path) -> tuple[Settings, str, int]:
    """Settings, host and port: of the command line where they stand there, else of the file, else the defaults.

    Raises:
        ConfigError: a setting can't work, or no studies are named.
    """
    remedy = "give it on the command line, or as studies in the settings file."
    settings, start = with_file(given, dict(given.conf), app_dir, remedy)
    if not settings.is_remote and not Path(settings.studies).is_dir():
        # MONAI Label would make an empty one.
        raise ConfigError(
            f"studies: expected a folder of images, found no folder {settings.studies}; correct its path."
        )
    return settings, given.host or start.get("host", HOST), given.port or start.get("port", PORT)


def address(host: str, port: int) -> str:
    """Where a browser on this machine finds a server that listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def linked_app(app_dir: Path, folder: Path) -> Path:
    """An app's folder that may be written to, whose code is the app's own by links.

    Args:
        app_dir: where the code is.
        folder: to make, or to bring in line with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path.resolve() for path in app_dir.iterdir() if path.name not in (*MADE, "__pycache__")}
    for entry in folder.iterdir():
        if entry.is_symlink() and (entry.name not in wanted or entry.resolve() != wanted[entry.name]):
            entry.unlink()
    for name, path in wanted.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(path)
    return folder


def serve(words: Sequence[str], app_dir: Path) -> None:
    """Start the server in this process.

    Args:
        words: the command line, see `arguments`.
        app_dir: the app's folder.

    Raises:
        ConfigError: as of `chosen`, or a newer version has used the folders.
    """
    settings, host, port = chosen(arguments(words), app_dir)
    settings = settings.in_place()
    for folder in (settings.state_dir, *settings.studies_folders):
        check_layout(folder)
    make_private(settings.state_dir)
    app = linked_app(app_dir, settings.state_dir / "app")
    print(f"Starting the server, which takes some seconds; its pages are at {address(host, port)}", flush=True)
    # MONAI Label's packages take seconds, and mistakes are told before.
    from monailabel.main import Main

    main = Main(actions="start_server")
    words = ["start_server", "--app", str(app), "--studies", settings.studies, "--host", host, "--port", str(port)]
    options = main.args_parser().parse_args(words)
    options.conf = list(settings.for_tasks().items())
    main.action_start_server(options)
