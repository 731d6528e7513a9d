"""The commands of README, model card and the page on running do what they say: run as they stand there, but shorter.

What other tests run is left out: the server's (`test_administration.py`, `e2e/`), pre-training (`test_pretraining.py`),
several processes (`test_distributed.py`) and large backbones (`test_training.py`). Of commands that start the same run
with the same options, in a short form or a long one, the first is run (`test_cli.py` shows that they are the same).
"""

import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sam2sgp import cli
from sam2sgp.data import phantom
from sam2sgp.networks import SAM2SGP, save_weights
from tests.helpers.bundle_runs import SMALL, run
from tests.helpers.doc_commands import ROOT, commands

PAGES = [ROOT / "README.md", ROOT / "docs" / "running.md", ROOT / "bundle" / "docs" / "README.md"]
ELSEWHERE = {"serve", "backup", "restore", "token", "tokens"}
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
# Fine-tuning has to start from the embedded weights.
FURTHER = {"finetune.json": {"weights": str(ROOT / "bundle/models/model.pt")}}


# What the runs that a short command starts are called, and their configs.
RUNS = {
    "segment": ("inferring", ["inference.json"]),
    "check": ("evaluating", ["train.json", "evaluate.json"]),
    "train": ("training", ["train.json"]),
    "evaluate": ("evaluating", ["train.json", "evaluate.json"]),
    "export": ("exporting", ["train.json", "export.json"]),
}
SHORT_OPTIONS = {"-s": "--support", "-q": "--queries", "-o": "--output", "-d": "--data", "-w": "--weights"}


def shown() -> list[str]:
    """Commands that can be run, each once: with options, or without where they need none."""
    short = [words for words in commands("sam2sgp", PAGES) if len(words) > 2 or words[1] in ("demo", "doctor")]
    short = [words for words in short if words[1] not in ELSEWHERE and not words[-1].startswith("--help")]
    first = {
        (words[1], frozenset(SHORT_OPTIONS.get(word, word) for word in words if word[0] == "-")): words
        for words in reversed(short)
    }
    long = [words for words in commands("python -m monai.bundle run", PAGES) if "_dir" in " ".join(words)]
    long = [words for words in long if "BUNDLE" in words or _run_of(words) not in RUNS.values()]
    shown = dict.fromkeys(map(shlex.join, [*reversed(first.values()), *long]))
    return [command for command in shown if "pretrain.json" not in command and "backbones" not in command]


def _run_of(words: list[str]) -> tuple[str, list[str]]:
    """The run's id and the names of its configs."""
    files = cli._value(words[words.index("--config_file") + 1])
    return words[words.index("run") + 1], [Path(name).name for name in (files if isinstance(files, list) else [files])]


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
        settings = {key: value for key, value in SHORTER[words[1]].items() if f"--{key}" not in words}
        more = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        result = CliRunner().invoke(cli.app, [*words[1:], *more])
        assert result.exit_code == 0, (result.output, result.exception)
        return
    run_id, *rest = words[words.index("run") + 1 :]
    settings = {name.removeprefix("--"): cli._value(value) for name, value in zip(rest[::2], rest[1::2], strict=True)}
    files = settings.pop("config_file")
    names = [Path(name).name for name in (files if isinstance(files, list) else [files])]
    settings.pop("bundle_root", None)
    for name in names:
        settings |= FURTHER.get(name, {}) if run_id == "training" else {}
    run(run_id, *names, **{**SHORTER[run_id], **settings, **({"max_epochs": 1} if run_id == "training" else {})})


@pytest.mark.slow
@pytest.mark.parametrize("command", shown())
def test_a_command_of_the_pages_runs(place, command, monkeypatch):
    words = shlex.split(command)
    small = phantom.make_phantoms
    monkeypatch.setattr(phantom, "make_phantoms", lambda folder, **_: small(folder, 6, (64, 64), 6, progress=False))
    if "--fine-tune" in words:
        save_weights(SAM2SGP("lite", 64, lora={"r": 8, "alpha": 16}), place / "RUN" / "model.pt")
    if "train" in words[1] or "training" in words:
        shutil.rmtree(place / "RUN")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    call(words)
    written = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file() and path not in before}
    if words[1] in ("check", "doctor"):
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
