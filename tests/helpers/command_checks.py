"""Whether a command of the pages is one that its program takes, without running it.

Each check has the words of the command and the page that shows it, and asserts.
"""

import argparse
import importlib
import inspect
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import monai.bundle
from monai.bundle import ConfigParser
from nbclient.cli import NbClientApp
from packaging.requirements import Requirement
from typer.main import get_command
from typer.testing import CliRunner

from lib.admin.start import arguments
from sam2sgp import __version__, cli, options
from sam2sgp.data import phantom
from tests.e2e.programs import program
from tests.helpers.doc_commands import ROOT, blocks, shell_lines, text_of

GROUP = get_command(cli.app)
# Reads a command line as pip does; in a process of its own, because importing pip puts another `distutils` in place.
PIP_READ = """
import json, sys
from pip._internal.commands import create_command
given, targets = create_command(sys.argv[1]).parse_args(sys.argv[2:])
print(json.dumps([given.constraints, given.requirements, given.editables, targets]))
"""
PIP_GIVEN = re.compile(r"dist/sam2sgp-(?P<version>[\d.]+)-py3-none-any\.whl(\[app\])?")


class _ReadError(Exception):
    """In place of what a program does once its command line is read."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _settings(words: list[str]) -> dict[str, object]:
    """Of `--name value …`, the values as the bundle reads them."""
    return {name.removeprefix("--"): cli._value(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def short(words: list[str], page: Path) -> None:
    """A command of `sam2sgp`; options that a sentence leaves out are no fault of it."""
    name, *rest = words[words.index("sam2sgp") + 1 :]
    if name.startswith("-"):
        assert name in [option for parameter in GROUP.params for option in parameter.opts]
        return
    is_lenient = not rest or name in ("backup", "restore")
    with GROUP.commands[name].make_context(name, rest, resilient_parsing=is_lenient) as context:
        assert set(cli._more(context.args)) <= options.ALL.keys(), words


def served(words: list[str], page: Path) -> None:
    """`sam2sgp serve`, up to the program that starts the server."""
    seen: list[str] = []
    with patch.object(cli.os, "execv", lambda name, command: seen.extend(command)):
        ended = CliRunner().invoke(cli.app, words[1:])
    assert ended.exit_code == 0, ended.output
    arguments(seen[3:])


def run_of_the_bundle(words: list[str], page: Path) -> None:
    """`python -m monai.bundle run`, by one process or by several: its configs, the run in them, and its options."""
    run_id, *rest = words[words.index("run") + 1 :]
    given = _settings(rest)
    named = given.pop("config_file")
    files = [name.removeprefix("BUNDLE/") for name in (named if isinstance(named, list) else [named])]
    parser = ConfigParser(ConfigParser.load_config_files([str(ROOT / "bundle" / name) for name in files]))
    parser.update(given)
    options.check(parser)
    assert run_id in parser


def _parser(main: Callable[[], object]) -> argparse.ArgumentParser:
    """What a program reads its command line with; it does nothing more."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _ReadError(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main()
        except _ReadError as found:
            return found.parser
    raise AssertionError(f"{main.__module__} reads no command line")


def _parse(main: Callable[[], object], words: list[str]) -> None:
    """Have a program's parser read words; those in capitals stand for any choice."""
    parser = _parser(main)
    for action in parser._actions:
        if action.choices is not None:
            action.choices = [*action.choices, *filter(str.isupper, words)]

    def fail(message: str) -> None:
        raise AssertionError(f"{parser.prog}: {message}")

    with patch.object(parser, "error", fail):
        parser.parse_args(words)


def _script(name: str) -> Callable[[], object]:
    """What a benchmark does when it is started; the scripts import each other from their own folder."""
    with patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]), warnings.catch_warnings():
        # Of MONAI Label, where it is imported first.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name).main


def script(words: list[str], page: Path) -> None:
    """A benchmark that there is, or of which the page says in which commit it was."""
    place = words[0] == "python"
    name = Path(words[place]).stem
    if (ROOT / words[place]).is_file():
        _parse(_script(name), words[place + 1 :])
    else:
        assert re.search(rf"benchmarks/{name}\.py[^`]*`\s+at\s+commit\s+\w+", page.read_text()), words


def options_of_scripts(page: Path) -> set[str]:
    """Options of the benchmarks that a page names."""
    names = set(re.findall(r"benchmarks/([a-z]\w+)\.py", text_of(page)))
    parsers = [_parser(_script(name)) for name in names if (ROOT / f"benchmarks/{name}.py").is_file()]
    return {option for parser in parsers for action in parser._actions for option in action.option_strings}


def phantoms(words: list[str], page: Path) -> None:
    """`python -m sam2sgp.data.phantom`."""
    _parse(phantom.main, words[3:])


def large_files(words: list[str], page: Path) -> None:
    """`python -m monai.bundle download_large_files`."""
    given = _settings(words[4:])
    inspect.signature(monai.bundle.download_large_files).bind(**given)
    assert (ROOT / "bundle" / str(given["bundle_path"]) / "large_files.yml").is_file()


def launcher(words: list[str], page: Path) -> None:
    """MONAI Label's own command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from monailabel.main import Main

    given = Main().args_parser().parse_args(words[1:])
    assert given.app is None or (ROOT / given.app / "main.py").is_file()


def pip(words: list[str], page: Path) -> None:
    """What pip is asked for: files of the repository, its own wheel by its name, and requirements."""
    name, *rest = words[next(place for place, word in enumerate(words) if Path(word).name == "pip") + 1 :]
    read = subprocess.run([sys.executable, "-c", PIP_READ, name, *rest], capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    constraints, requirements, editables, targets = json.loads(read.stdout)
    for file in (*constraints, *requirements):
        assert (ROOT / file).is_file(), file
    assert set(editables) <= {"."}
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    for target in targets:
        if "/" in target:
            wheel = PIP_GIVEN.fullmatch(target)
            assert wheel and wheel["version"] == __version__, target
        elif Requirement(target).specifier:
            assert target in tested, target


def environment(words: list[str], page: Path) -> None:
    """A virtual environment that is made, or used on the page that says how it is made."""
    lines = shell_lines(page)
    folder = words[-1].removesuffix("/bin/activate")
    assert f"python3.11 -m venv {folder}" in lines or any(line.startswith("make setup") for line in lines)


def make(words: list[str], page: Path) -> None:
    """A target whose recipe names configs and scripts that there are."""
    command = [program("make", "make"), "--dry-run", "--old-file", ".venv/.installed", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"configs/\w+\.json", done.stdout)
    assert all((ROOT / "bundle" / name).is_file() for name in named)
    assert named or words[1] not in ("demo", "train", "evaluate")


def docker(words: list[str], page: Path) -> None:
    """What Docker would be given: the command within the image, the service, folders and variables of the files."""
    compose, dockerfile = ((ROOT / name).read_text() for name in ("compose.yaml", "Dockerfile"))
    for name, follows in zip(words, words[1:], strict=False):
        if name == "exec":
            assert f"\n  {follows}:\n" in compose
        if name == "-v" and follows.split(":")[1] == "/studies":
            assert '"/studies"' in dockerfile
        if name == "-v" and follows.split(":")[1] == "/data":
            assert 'VOLUME ["/data"]' in dockerfile
        if name == "sam2sgp" and follows in GROUP.commands:
            short(words[words.index(follows) - 1 :], page)
    for name in re.findall(r"^(\w+)=", words[0]):
        assert f"${{{name}:" in compose


def unit(words: list[str], page: Path) -> None:
    """systemd is asked about the service whose unit is in the repository."""
    assert words[-1] in ("sam2sgp", "security")
    assert (ROOT / "apps/sam2sgp/deploy/sam2sgp.service").is_file()


def nginx(words: list[str], page: Path) -> None:
    """Files and addresses that the example of nginx has, too."""
    text = (ROOT / "apps/sam2sgp/deploy/nginx.conf").read_text()
    names = [word for word in words if word.startswith(("/etc/nginx/", "https://"))]
    assert names
    for name in names:
        assert name in text or re.sub(r"^https://([^/]+)/.+", r"server_name \1;", name) in text


def notebook(words: list[str], page: Path) -> None:
    """`jupyter execute`."""
    app = NbClientApp()
    app.parse_command_line(words[2:])
    assert app.inplace and [Path(name) for name in app.extra_args] == [Path("docs/first_hour.ipynb")]


def tensorboard(words: list[str], page: Path) -> None:
    """TensorBoard's own options, and the folder that a training writes."""
    with warnings.catch_warnings():
        # Of a library within it.
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugins.core.core_plugin import CorePluginLoader
    parser = argparse.ArgumentParser()
    CorePluginLoader().define_flags(parser)
    assert parser.parse_args(words[1:]).logdir == "RUN/tensorboard"
    assert "'/tensorboard'" in (ROOT / "bundle/configs/train.json").read_text()


def place(words: list[str], page: Path) -> None:
    """A folder of the repository."""
    assert (ROOT / words[-1]).is_dir()


def module(words: list[str], page: Path) -> None:
    """`python -m NAME`."""
    assert find_spec(words[words.index("-m") + 1])


def option(words: list[str], page: Path) -> None:
    """The end of a run's command: settings."""
    assert _settings(words).keys() <= options.ALL.keys()


def in_a_block_that_is_run(words: list[str], page: Path) -> None:
    """It is in a block, all of whose lines the test runs."""
    assert any(words[0] in block for block in blocks(page))


def nothing(words: list[str], page: Path) -> None:
    """There is nothing to check."""
