"""Every command of the pages is run as it stands there, but on little data, or stands in a table here with the reason.

Run are those of `sam2sgp` and of the bundle; of commands that start the same run with the same options, in a short form
or a long one, the first is run (`test_cli.py` shows that they are the same). What is in the table is at least read by
its program's own parser, and the files that it names are there.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from sam2sgp import cli, options
from sam2sgp.data import phantom
from sam2sgp.networks import SAM2SGP, save_weights
from tests.helpers import command_checks as checks
from tests.helpers.bundle_runs import SMALL, run
from tests.helpers.command_checks import GROUP, options_of_scripts
from tests.helpers.doc_commands import NOTEBOOK, PAGES, ROOT, blocks, shell_lines, spans

SEGMENTING = {"image_size": 64, "progress": False, "support_max_items": 6, "report_figures": 1}
TRAINING = {**SMALL, "max_epochs": 1}
# What makes each run short, by the word that follows the program.
SHORTER = {
    **{name: SEGMENTING for name in ("check", "evaluate", "evaluating", "inferring")},
    "segment": SEGMENTING | {"adapt_steps": 1},
    **{name: TRAINING for name in ("train", "training")},
    **{name: {"image_size": 64} for name in ("export", "exporting")},
    "demo": {},
    "doctor": {},
}
# Fine-tuning has to start from the embedded weights, and no checkpoint is at hand.
FURTHER = {"finetune.json": {"weights": str(ROOT / "bundle/models/model.pt")}, "small.json": {"checkpoint": "$None"}}
# What the runs that a short command starts are called, and their configs.
RUNS = {
    "segment": ("inferring", ["inference.json"]),
    "check": ("check", []),
    "train": ("training", ["train.json"]),
    "evaluate": ("evaluating", ["train.json", "evaluate.json"]),
    "export": ("exporting", ["train.json", "export.json"]),
    "demo": ("demo", []),
    "doctor": ("doctor", []),
}
# Settings of the options of short commands.
OPTIONS = {
    **dict.fromkeys(("-s", "--support"), "support_dir"),
    **dict.fromkeys(("-q", "--queries", "-d", "--data"), "dataset_dir"),
    **dict.fromkeys(("-o", "--output"), "output_dir"),
    **dict.fromkeys(("-w", "--weights"), "model_file"),
    "--adapt": "adapt_seconds",
    "--mirror": "mirror",
}


class Elsewhere(NamedTuple):
    """Commands that aren't run here."""

    pattern: str  # of the whole command
    reason: str  # why not, and what runs them instead
    check: Callable[[list[str], Path], None]


ELSEWHERE = [
    Elsewhere(
        r"(python )?benchmarks/\w+\.py\b.*",
        "minutes to hours, on data of one's own; tests/test_benchmarks.py runs them on phantoms",
        checks.script,
    ),
    Elsewhere(
        r"torchrun .* run .*",
        "two processes; tests/test_distributed.py and tests/test_bundle.py start such runs",
        checks.run_of_the_bundle,
    ),
    Elsewhere(
        r"python -m monai\.bundle run training .*pretrain\.json.*",
        "takes a collection of data sets; tests/test_pretraining.py makes one",
        checks.run_of_the_bundle,
    ),
    Elsewhere(
        r"python -m monai\.bundle run inferring --config_file \S+",
        "without folders; with them it is run",
        checks.run_of_the_bundle,
    ),
    Elsewhere(
        r"python -m monai\.bundle download_large_files .*",
        "1.6 GB; tests/networks/test_checkpoints.py downloads from a server of its own",
        checks.large_files,
    ),
    Elsewhere(r"python -m sam2sgp\.data\.phantom .*", "tests/data/test_phantom.py calls it", checks.phantoms),
    Elsewhere(
        r"sam2sgp serve\b.*",
        "a server; tests/e2e/test_service.py and others start it",
        checks.served,
    ),
    Elsewhere(
        r"sam2sgp (backup|restore)\b.*", "takes a server's folders; tests/test_administration.py has them", checks.short
    ),
    Elsewhere(r"sam2sgp --install-completion", "writes into the start-up file of the user's shell", checks.short),
    Elsewhere(r"monailabel start_server\b.*", "a server; tests/e2e/server.py starts it", checks.launcher),
    Elsewhere(
        r"(SAM2_BUILD_CUDA=0 )?pip (install|wheel) .+",
        "takes an index of packages; tests/test_packaging.py and tests/test_containers.py install without it",
        checks.pip,
    ),
    Elsewhere(r"(\.venv/bin/)?python -m build", "tests/test_packaging.py does it", checks.module),
    Elsewhere(
        r"python3\.11 -m venv \S+|\. \S+/bin/activate",
        "an environment for what pip installs; tests/test_containers.py makes one",
        checks.environment,
    ),
    Elsewhere(r"make .+", ".ci/run calls them on a clean checkout, and these are this test", checks.make),
    Elsewhere(r"(\w+=\S+ )?docker .+", "takes Docker; tests/test_containers.py does what the files say", checks.docker),
    Elsewhere(
        r"mkdir -p secrets|openssl req .* -keyout secrets/.*|echo .* >> secrets/.*",
        "tests/test_containers.py runs the block",
        checks.in_a_block_that_is_run,
    ),
    Elsewhere(
        r"(systemctl|journalctl|systemd-analyze) .*", "systemd; tests/e2e/test_service.py reads the unit", checks.unit
    ),
    Elsewhere(r"(curl|htpasswd) .*", "takes nginx; tests/e2e/test_proxy.py starts one", checks.nginx),
    Elsewhere(r"install -o sam2sgp .*", "takes the service's user", checks.nothing),
    Elsewhere(r"15 2 \* \* \* sam2sgp .*", "tests/test_administration.py compares it", checks.nothing),
    Elsewhere(r"\.venv/bin/python -m pytest tests/support", "this is what runs now", checks.place),
    Elsewhere(r"jupyter execute .*", "tests/test_notebook.py executes it", checks.notebook),
    Elsewhere(r"tensorboard --logdir .*", "a server; tests/test_training.py reads the same files", checks.tensorboard),
    Elsewhere(r"du -sh \.venv", "takes what make setup makes", checks.nothing),
    Elsewhere(r"cd bundle", "the runs below it are started there", checks.place),
    # Words that only look like a command.
    Elsewhere(r"sam2sgp (segment|check)|pip install|python -m monai\.bundle( run)?", "a name", checks.nothing),
    Elsewhere(r"python -P -m lib\.tasks\.worker <method>", "started by the app", checks.module),
    Elsewhere(r"--k 4 .*", "the end of a command", checks.option),
    Elsewhere(r"kill -9|query key: trian", "a signal; a message", checks.nothing),
]


def words_of(line: str) -> list[str]:
    """Of a command; what is left out of one that segments are its folders."""
    line = line.replace("sam2sgp segment …", "sam2sgp segment -s SUPPORT -q QUERIES -o OUT")
    return [word for word in shlex.split(line.replace("…", ""), comments=True) if word]


def is_run(words: list[str]) -> bool:
    """Whether it is a whole command of those that are run here."""
    if words[0] == "sam2sgp":
        return words[1] in ("demo", "doctor") or "--help" in words or (words[1] in RUNS and len(words) > 2)
    is_run = "python -m monai.bundle run" in " ".join(words) and "--output_dir" in words
    return is_run and "pretrain.json" not in " ".join(words)


def key(words: list[str]) -> tuple[object, ...]:
    """What a command starts; where two have the same key they do the same."""
    if "--help" in words:
        return tuple(words)
    given = {OPTIONS.get(word, word.removeprefix("--")) for word in words if re.match("-[a-z-]", word)} - {"-m"}
    if words[0] == "sam2sgp":
        run_id, configs = RUNS[words[1]]
        more = ["finetune.json"] if "--fine-tune" in words else []
        return run_id, tuple(sorted(configs + more)), frozenset(given - {"fine-tune"}), False
    named = cli._value(words[words.index("--config_file") + 1])
    configs = sorted(Path(name).name for name in (named if isinstance(named, list) else [named]))
    return words[words.index("run") + 1], tuple(configs), frozenset(given - {"config_file"}), "BUNDLE" in words


def shown() -> list[str]:
    """Commands that are run, each once."""
    found = [words for page in PAGES for line in shell_lines(page) if is_run(words := words_of(line))]
    return [shlex.join(words) for words in {key(words): words for words in reversed(found)}.values()][::-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with what the commands name: SUPPORT, QUERIES, LABELLED, and RUN with a training."""
    folder = tmp_path_factory.mktemp("commands")
    labelled = phantom.make_phantoms(folder / "LABELLED", 6, (64, 64), 6, seed=1, modalities=("us",), progress=False)
    shutil.copytree(labelled / "support" / "us", folder / "SUPPORT")
    shutil.copytree(labelled / "queries" / "us", folder / "QUERIES")
    run("training", "train.json", dataset_dir=str(labelled), output_dir=str(folder / "RUN"), **TRAINING)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """The current folder of a command; what it writes to RUN is its own."""
    for name in ("SUPPORT", "QUERIES", "LABELLED"):
        (tmp_path / name).symlink_to(made / name)
    shutil.copytree(made / "RUN", tmp_path / "RUN")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(words: list[str]) -> None:
    """A command of `sam2sgp`, or of the bundle in this process."""
    if words[0] == "sam2sgp":
        shorter = {} if "--help" in words else SHORTER[words[1]]
        settings = {name: value for name, value in shorter.items() if f"--{name}" not in words}
        more = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        result = CliRunner().invoke(cli.app, [*words[1:], *more])
        assert result.exit_code == 0, (result.output, result.exception)
        return
    run_id, *rest = words[words.index("run") + 1 :]
    settings = {name.removeprefix("--"): cli._value(value) for name, value in zip(rest[::2], rest[1::2], strict=True)}
    files = settings.pop("config_file")
    names = [name.rpartition("configs/")[2] for name in (files if isinstance(files, list) else [files])]
    settings.pop("bundle_root", None)
    for name in names:
        settings |= FURTHER.get(Path(name).name, {}) if run_id == "training" else {}
    run(run_id, *names, **{**SHORTER[run_id], **settings, **({"max_epochs": 1} if run_id == "training" else {})})


@pytest.mark.slow
@pytest.mark.parametrize("command", shown())
def test_a_command_of_the_pages_runs(place, command, monkeypatch):
    words = shlex.split(command)
    small = phantom.make_phantoms
    monkeypatch.setattr(phantom, "make_phantoms", lambda folder, **_: small(folder, 6, (64, 64), 6, progress=False))
    if "--fine-tune" in words or "backbones/small" in command:
        network = "small" if "small" in command else "lite"
        save_weights(SAM2SGP(network, 64, lora={"r": 8, "alpha": 16}), place / "RUN" / "model.pt")
    if "train" in words[1] or "training" in words:
        shutil.rmtree(place / "RUN")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    call(words)
    written = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file() and path not in before}
    if words[1] in ("check", "doctor") or "--help" in words:
        assert not written
    elif words[1] == "demo":
        assert len([name for name in written if name.endswith("report.html")]) == 4
    elif "OUT" in words:
        assert {"OUT/report.html", "OUT/summary.csv"} <= written
    elif words[1] == "train" or "training" in words:
        assert {"RUN/model.pt", "RUN/last.pt"} <= written
    elif words[1] == "evaluate" or "evaluating" in words:
        assert {"RUN/evaluation/report.html", "RUN/evaluation/metrics.csv"} <= written
    else:
        assert written == {words[-1]}


def test_commands_are_found_in_blocks_tables_and_sentences(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `make\nlint`, not `a.py`, `x = 3` or `--k 4`.\n\n```\ncd bundle\nls\n```\n\n```text\nno command\n```\n\n"
        "| `sam2sgp demo` |\n\n    0 2 * * * root ls\n"
    )
    assert shell_lines(page) == ["cd bundle", "ls", "0 2 * * * root ls", "make lint", "sam2sgp demo"]
    assert len(shown()) > 15 and key(words_of("sam2sgp train -d A -o B")) == key(
        words_of("python -m monai.bundle run training --config_file configs/train.json --dataset_dir A --output_dir B")
    )


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_command_that_is_not_run_stands_in_the_table_and_its_program_takes_it(page):
    lines = dict.fromkeys(shell_lines(page))
    if page.name == "administration.md":
        # tests/test_administration.py runs the lines of all of its blocks.
        lines = dict.fromkeys(line for line in lines if not any(line in block for block in blocks(page)))
    for line in lines:
        words = words_of(line)
        if is_run(words):
            continue
        kinds = [kind for kind in ELSEWHERE if re.fullmatch(kind.pattern, " ".join(words))]
        assert len(kinds) == 1, f"{line}: run it here, or say in ELSEWHERE why not"
        kinds[0].check(words, page)


# Options of other programs that sentences name, and one of which a page says what becomes of it.
FOREIGN = {
    "--cacert": "curl",
    "--build-arg": "docker",
    **dict.fromkeys(("--dry-run", "--extra-index-url", "--force-reinstall", "--no-deps", "--report"), "pip"),
    "--trian::x": "none",
}


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_sentences_name_exist(page):
    ends = [span for span in spans(page) if span.startswith("--")]
    found = {option for end in ends for option in re.findall(r"(?<!\S)--[\w:-]+", end)}
    configs = [json.loads(file.read_text()) for file in (ROOT / "bundle/configs").glob("*.json")]
    of_runs = {f"--{name}" for name in {*options.ALL, "config_file"}.union(*configs)}
    parameters = [each for command in GROUP.commands.values() for each in command.params]
    of_commands = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
    known = of_runs | of_commands | options_of_scripts(page) | FOREIGN.keys()
    assert sorted(found - known) == []


def test_options_of_pip_that_sentences_name_are_some_of_its_own():
    told = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True, check=True
    )
    own = set(re.findall(r"--[\w-]+", told.stdout))
    assert {name for name, owner in FOREIGN.items() if owner == "pip"} <= own
