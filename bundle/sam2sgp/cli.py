"""The `sam2sgp` command: short forms of the bundle's runs.

In: options and paths, relative to the current folder. Out: what the run of `python -m monai.bundle` writes that a
subcommand starts in this process, with the same configs, overrides and exit codes:

    0: done. 1: at least one image failed, or the run could not start. 2: the command line is wrong.
"""

import ast
import csv
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from sam2sgp import __version__
from sam2sgp.errors import ConfigError
from sam2sgp.files import sha256_of
from sam2sgp.places import APP, BUNDLE, DEFAULT_BACKBONE, is_address, overlays_of
from sam2sgp.startup import import_monai

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
MORE_SETTINGS = "Any setting of the run may follow, as in --ct_window '[-1000, 400]'; docs/settings.md lists them."
EXIT_CODES = "Exit codes: 0 done; 1 an image failed or the run could not start; 2 wrong command line."
# Packages whose versions `doctor` tells.
PACKAGES = ("torch", "torchvision", "monai", "sam2", "peft", "timm", "nibabel", "pydicom", "monailabel", "itk")
# Only the server needs them.
OF_THE_APP = {"monailabel", "itk"}
GIB = 2**30

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Segment medical images by example: a few labelled images guide the segmentation of new ones.",
    epilog=f"Research software, not for diagnosis. {EXIT_CODES}",
)

DATA, METHOD, RUN = "Data", "Method", "Run"
Support = Annotated[Path, typer.Option("--support", "-s", help="Folder of labelled images.", rich_help_panel=DATA)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.", rich_help_panel=DATA)]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", "-w", help="Weights file; default: the embedded weights.", rich_help_panel=METHOD),
]
Backbone = Annotated[
    str, typer.Option(help="A name from configs/backbones; it must be that of the weights.", rich_help_panel=METHOD)
]
Items = Annotated[
    int | None,
    typer.Option(
        "--k", help="Support items per query and class; default: that of the configs.", rich_help_panel=METHOD
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda:0, …; default: a GPU if there is one.", rich_help_panel=RUN)
]
Resume = Annotated[bool, typer.Option(help="Keep what an earlier run has finished.", rich_help_panel=RUN)]
Adapt = Annotated[
    float, typer.Option("--adapt", help="Seconds of adaptation to the support set first.", rich_help_panel=METHOD)
]
Mirror = Annotated[
    bool | None,
    typer.Option(
        "--mirror/--no-mirror",
        help="Segment each image mirrored, too, and average: twice the time; default: single images in doubt.",
        rich_help_panel=METHOD,
    ),
]


@app.command(context_settings=SETTINGS, epilog=f"{MORE_SETTINGS} {EXIT_CODES}")
def segment(
    context: typer.Context,
    support: Support,
    queries: Annotated[
        Path, typer.Option("--queries", "-q", help="Folder of images, or one image.", rich_help_panel=DATA)
    ],
    output: Output,
    adapt: Adapt = 0,
    mirror: Mirror = None,
    k: Items = None,
    weights: Weights = None,
    backbone: Backbone = DEFAULT_BACKBONE,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="Also segment the images of the support set.", rich_help_panel=DATA)
    ] = False,
    dicom_seg: Annotated[bool, typer.Option(help="Also write DICOM-SEG.", rich_help_panel=DATA)] = False,
    probability: Annotated[bool, typer.Option(help="Also write probabilities.", rich_help_panel=DATA)] = False,
    uncertainty: Annotated[bool, typer.Option(help="Also write uncertainty.", rich_help_panel=DATA)] = False,
    overlay: Annotated[
        bool, typer.Option(help="Also write PNGs of the images with contours.", rich_help_panel=DATA)
    ] = False,
    coloured: Annotated[
        bool, typer.Option(help="Also write coloured PNGs of pictures' labels.", rich_help_panel=DATA)
    ] = False,
    device: Device = None,
    resume: Resume = True,
) -> None:
    """Segment images guided by a support set.

    Writes a label file per image, summary.csv and report.html.
    """
    settings = {
        "support_dir": _absolute(support),
        "dataset_dir": _absolute(queries),
        "output_dir": _absolute(output),
        "segment_labelled": labelled,
        "dicom_seg": dicom_seg,
        "save_probability": probability,
        "save_uncertainty": uncertainty,
        "save_overlay": overlay,
        "save_coloured": coloured,
    }
    settings |= _common(context, k, weights, device, resume, adapt, mirror)
    _run("inferring", ["inference.json", *_overlay(backbone)], settings)


@app.command(context_settings=SETTINGS, epilog=f"{MORE_SETTINGS} {EXIT_CODES}")
def check(
    context: typer.Context,
    labelled: Annotated[Path, typer.Argument(help="Folder of labelled images.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the report here.", rich_help_panel=DATA)
    ] = None,
    mirror: Mirror = None,
    k: Items = None,
    weights: Weights = None,
    backbone: Backbone = DEFAULT_BACKBONE,
    device: Device = None,
) -> None:
    """Tell what to expect: segment each labelled image guided by those of the other patients, and measure Dice."""
    with tempfile.TemporaryDirectory(prefix="sam2sgp-check-") as temporary:
        folder = Path(_absolute(output) if output else temporary)
        settings = {
            "support_dir": _absolute(labelled),
            "dataset_dir": _absolute(labelled),
            "output_dir": str(folder),
            "split": [0, 0, 1],
        }
        settings |= _common(context, k, weights or BUNDLE / "models" / "model.pt", device, True, mirror=mirror)
        with suppress(SystemExit):  # images failed; they are told below, after the others
            _run("evaluating", ["train.json", *_overlay(backbone), "evaluate.json"], settings, kept=output is not None)
        from sam2sgp.evaluation.far_below import far_below  # which brings PyTorch along, that `_run` says it loads

        # Dice by class, the image's name, and whether its label has the class: where not, a find has a Dice of 0.
        dice: dict[str, list[tuple[float, str, bool]]] = defaultdict(list)
        with (folder / "evaluation" / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if row.get("dice"):
                dice[row["class_name"]].append((float(row["dice"]), row["case"], float(row["truth_voxels"]) > 0))
        if dice:
            typer.echo("\nDice of each labelled image, guided only by the other patients' images:")
        for name, found in dice.items():
            values, (worst, case, _) = [value for value, *_ in found], min(found)
            typer.echo(
                f"  {name}: mean {statistics.mean(values):.3f}, median {statistics.median(values):.3f}, "
                f"worst {worst:.3f} of {case} ({len(found)} images)"
            )
            held = [(value, image) for value, image, holds in found if holds]
            doubted = [held[number][1] for number in far_below([value for value, _ in held])]
            if doubted:
                typer.echo(
                    f"    Far below all others, so see whether the label is of its image: {', '.join(sorted(doubted))}."
                )
        if output:
            typer.echo(f"Report: {folder / 'evaluation' / 'report.html'}")
        elif dice:
            typer.echo("With --output FOLDER, a report with pictures of them is kept.")
        failed = [f"  {row['case']}: {row['error']}" for row in rows if row.get("error")]
        if failed:
            count = len({row["source"] for row in rows if not row.get("skipped")})
            _refuse("\n".join([f"{len(failed)} of {count} images failed:", *failed]))


@app.command(context_settings=SETTINGS, epilog=f"{MORE_SETTINGS} {EXIT_CODES}")
def train(
    context: typer.Context,
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder of labelled images.", rich_help_panel=DATA)],
    output: Output,
    fine_tune: Annotated[
        bool, typer.Option("--fine-tune", help="LoRA only, for a few labels.", rich_help_panel=METHOD)
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Epochs in all.", rich_help_panel=METHOD)] = None,
    backbone: Backbone = DEFAULT_BACKBONE,
    device: Device = None,
    resume: Resume = True,
) -> None:
    """Train on labelled images; the same command goes on with a stopped training.

    Writes model.pt, which `segment --weights` takes.
    """
    settings: dict[str, Any] = {"dataset_dir": _absolute(data), "output_dir": _absolute(output)}
    settings |= _common(context, None, None, device, resume)
    if epochs is not None:
        settings["max_epochs"] = epochs
    overlays = [*_overlay(backbone), *(["finetune.json"] if fine_tune else [])]
    _run("training", ["train.json", *overlays], settings)


@app.command(context_settings=SETTINGS, epilog=f"{MORE_SETTINGS} {EXIT_CODES}")
def evaluate(
    context: typer.Context,
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder of labelled images.", rich_help_panel=DATA)],
    output: Output,
    support: Annotated[
        Path | None,
        typer.Option("--support", "-s", help="Default: the training patients of the data.", rich_help_panel=DATA),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="All images, not only the test section's.", rich_help_panel=DATA)
    ] = False,
    adapt: Adapt = 0,
    mirror: Mirror = None,
    k: Items = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", "-w", help="Default: model.pt in OUTPUT.", rich_help_panel=METHOD)
    ] = None,
    backbone: Backbone = DEFAULT_BACKBONE,
    device: Device = None,
    resume: Resume = True,
) -> None:
    """Measure Dice, IoU, HD95 and NSD; an image is never guided by its own patient's labels.

    Writes evaluation/metrics.csv, metrics_summary.csv and report.html.
    """
    settings: dict[str, Any] = {"dataset_dir": _absolute(data), "output_dir": _absolute(output)}
    settings |= _common(context, k, weights, device, resume, adapt, mirror)
    trained = Path(settings["output_dir"], "model.pt")
    if settings.keys().isdisjoint({"model_file", "ckpt_dir", "args_file"}) and not trained.is_file():
        _refuse(
            f"{trained}: expected the weights that `sam2sgp train` writes there, found no such file; train first, or "
            "give --weights. `sam2sgp check` measures the embedded weights."
        )
    if support:
        settings["support_dir"] = _absolute(support)
    if whole:
        settings["split"] = [0, 0, 1]
    _run("evaluating", ["train.json", *_overlay(backbone), "evaluate.json"], settings)


@app.command(context_settings=SETTINGS, epilog=f"{MORE_SETTINGS} {EXIT_CODES}")
def export(
    context: typer.Context,
    weights: Annotated[
        Path, typer.Option("--weights", "-w", help="A file that `train` wrote, RUN/model.pt.", rich_help_panel=DATA)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, .pt.", rich_help_panel=DATA)],
    fine_tune: Annotated[
        bool, typer.Option("--fine-tune", help="The file is of `train --fine-tune`.", rich_help_panel=METHOD)
    ] = False,
    backbone: Backbone = DEFAULT_BACKBONE,
) -> None:
    """Write trained weights as one file to pass on: half the size, LoRA merged; `segment --weights` takes it."""
    if output.exists() and weights.exists() and output.samefile(weights):
        _refuse(f"{output}: expected another file than --weights, found the same; it would lose half of its precision.")
    settings = {**_more(context.args), "model_file": _absolute(weights), "export_file": _absolute(output)}
    overlays = [*_overlay(backbone), *(["finetune.json"] if fine_tune else [])]
    _run("exporting", ["train.json", *overlays, "export.json"], settings)


@app.command(epilog=EXIT_CODES)
def serve(
    studies: Annotated[
        str | None, typer.Argument(help="Folder of images, or the address of a DICOMweb server.")
    ] = None,
    settings: Annotated[Path | None, typer.Option(help="TOML or JSON file with settings of the app.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: 8000.")] = None,
    conf: Annotated[
        list[str] | None, typer.Option("--conf", metavar="NAME=VALUE", help="A setting of the app; may be repeated.")
    ] = None,
) -> None:
    """Start the MONAI Label server for 3D Slicer and OHIF.

    The settings file may also say studies, host and port; what is given here comes first. docs/administration.md.
    """
    words = _words(
        {"--studies": _studies(studies), "--settings": settings and _absolute(settings), "--host": host, "--port": port}
    )
    for setting in conf or []:
        name, separator, value = setting.partition("=")
        if not separator:
            raise typer.BadParameter(f"expected NAME=VALUE, found {setting!r}.", param_hint="--conf")
        words += ["--conf", name, value]
    _manage("serve", words)


Studies = Annotated[
    str | None, typer.Option(help="Folder of images, or the address of a DICOMweb server; default: of the settings.")
]
ServerSettings = Annotated[Path | None, typer.Option(help="Settings file that the server is started with.")]
StateDir = Annotated[Path | None, typer.Option(help="The server's state folder, where it isn't the default one.")]


@app.command(epilog=EXIT_CODES)
def backup(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, such as backup.tar.")],
    studies: Studies = None,
    settings: ServerSettings = None,
    state_dir: StateDir = None,
    images: Annotated[bool, typer.Option("--images", help="Save the images, too.")] = False,
) -> None:
    """Save labels, audit log and trained weights of a server in one file, also while it serves."""
    words = _words({"--output": _absolute(output), **_server(studies, settings, state_dir)})
    _manage("backup", [*words, *(["--images"] if images else [])])


@app.command(epilog=EXIT_CODES)
def restore(
    file: Annotated[Path, typer.Argument(help="A file that `backup` wrote.")],
    studies: Studies = None,
    settings: ServerSettings = None,
    state_dir: StateDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there; it is kept.")] = False,
) -> None:
    """Restore what `backup` saved, for a server that does not run."""
    words = [_absolute(file), *_words(_server(studies, settings, state_dir))]
    _manage("restore", [*words, *(["--overwrite"] if overwrite else [])])


@app.command(epilog=EXIT_CODES)
def token(
    name: Annotated[str, typer.Option(help="Of the script, as the audit log is to have it.")],
    role: Annotated[str, typer.Option(help="reader, annotator, approver or admin.")],
    days: Annotated[int | None, typer.Option(min=1, help="For how many days; default: until it is revoked.")] = None,
    studies: Studies = None,
    settings: ServerSettings = None,
    state_dir: StateDir = None,
) -> None:
    """Make a token by which a script signs in to a server, and print it: it isn't shown again."""
    _manage("token", _words({"--name": name, "--role": role, "--days": days, **_server(studies, settings, state_dir)}))


@app.command(epilog=EXIT_CODES)
def tokens(
    revoke: Annotated[str | None, typer.Option(metavar="NAME", help="Have this one refused from now on.")] = None,
    studies: Studies = None,
    settings: ServerSettings = None,
    state_dir: StateDir = None,
) -> None:
    """List the tokens of a server's scripts, or revoke one."""
    _manage("tokens", _words({"--revoke": revoke, **_server(studies, settings, state_dir)}))


@app.command(epilog=EXIT_CODES)
def demo(output: Output = Path("sam2sgp-demo")) -> None:
    """Make phantoms of four looks and segment them with the embedded weights, with no training."""
    from sam2sgp.data.phantom import make_phantoms

    folder = Path(_absolute(output))
    data = make_phantoms(folder / "phantoms", patients_per_modality=8)
    for look in ("ct", "mr", "us", "rgb"):
        settings = {
            "support_dir": str(data / "support" / look),
            "dataset_dir": str(data / "queries" / look),
            "output_dir": str(folder / look),
        }
        _run("inferring", ["inference.json"], settings)
    for report in sorted(folder.glob("*/report.html")):
        typer.echo(f"Report: {report}")


@app.command()
def doctor() -> None:
    """Tell versions, devices, memory, and the embedded weights with their licence."""
    import psutil
    import torch

    typer.echo(f"sam2sgp {__version__}, Python {platform.python_version()}, {platform.platform()}")
    missing = []
    for name in PACKAGES:
        try:
            typer.echo(f"  {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"  {name} is not installed")
            missing.append(name)
    memory = psutil.virtual_memory()
    typer.echo(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    typer.echo(f"Memory: {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available")
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    for number, device in enumerate(devices):
        typer.echo(f"cuda:{number}: {device.name}, {device.total_memory / GIB:.0f} GiB")
    if not devices:
        typer.echo("GPU: none that PyTorch sees; everything runs on the CPU")
    weights = BUNDLE / "models" / "model.pt"
    if weights.is_file():
        typer.echo(f"Weights: {weights}, SHA-256 {sha256_of(weights)}")
        typer.echo("  non-commercial research use only, see docs/data_license.txt in the bundle")
    else:
        typer.echo(f"Weights: {weights} is missing; give --weights, or copy the bundle again")
        missing.append("weights")
    if set(missing) - OF_THE_APP:
        raise typer.Exit(1)


def _manage(what: str, words: list[str]) -> None:
    """Have the app do something in place of this process."""
    program = APP / "manage.py"
    if not program.is_file():
        _refuse(f"{APP}: expected the MONAI Label app there, found none; install sam2sgp again.")
    if find_spec("monailabel") is None:
        _refuse(f"{what}: expected MONAI Label, found that it is not installed; install sam2sgp[app].")
    if not os.access(".", os.X_OK):
        # A service's user in root's folder, where MONAI Label fails to look for its `.env`. All paths are absolute.
        os.chdir("/")
    os.execv(sys.executable, [sys.executable, str(program), what, *words])


def _words(options: dict[str, Any]) -> list[str]:
    """The words of a command line for the options that have a value."""
    return [word for name, value in options.items() if value is not None for word in (name, str(value))]


def _server(studies: str | None, settings: Path | None, state_dir: Path | None) -> dict[str, Any]:
    """Options that say which server is meant."""
    return {
        "--studies": _studies(studies),
        "--settings": settings and _absolute(settings),
        "--state-dir": state_dir and _absolute(state_dir),
    }


def _studies(given: str | None) -> str | None:
    return given if given is None or is_address(given) else _absolute(Path(given))


def _absolute(path: Path) -> str:
    return str(path.expanduser().absolute())


def _overlay(backbone: str) -> list[str]:
    try:
        return overlays_of(backbone)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--backbone") from None


def _common(
    context: typer.Context,
    k: int | None,
    weights: Path | None,
    device: str | None,
    resume: bool,
    adapt: float = 0,
    mirror: bool | None = None,
) -> dict[str, Any]:
    """Overrides that several commands share, and those that follow the options."""
    settings = {**_more(context.args), "resume": resume}
    if k is not None:
        settings["k"] = k
    if weights is not None:
        settings["model_file"] = _absolute(weights)
    if device is not None:
        settings["device"] = f"$torch.device({device!r})"
    if adapt:
        settings["adapt_seconds"] = adapt
    if mirror is not None:
        settings["mirror"] = mirror
    return settings


def _more(arguments: list[str]) -> dict[str, Any]:
    """["--ct_window", "[-1000, 400]", "--seed=1"] -> {"ct_window": [-1000, 400], "seed": 1}."""
    settings: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise typer.BadParameter(f"expected --NAME VALUE, found {word!r}; options need two dashes.")
        name, separator, given = word[2:].partition("=")
        value = given if separator else next(words, None)
        if value is None:
            raise typer.BadParameter(f"expected a value behind {word}.")
        # As for the options that are declared here, dashes may stand for underscores.
        settings[name.replace("-", "_")] = _value(value)
    return settings


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _run(run_id: str, configs: list[str], settings: dict[str, Any], kept: bool = True) -> None:
    """A run of the bundle in this process; its errors end the command as they end the run.

    Args:
        run_id: key of the configs that is run.
        configs: files in `configs`, each laid over those before it.
        settings: what the configs' values are replaced by.
        kept: whether the output folder outlives the command; where not, no path in it is told.
    """
    started = time.monotonic()
    if "monai" not in sys.modules:
        typer.echo("Loading PyTorch and MONAI …")
    # MONAI's tracking of a run is by mlflow; a file of arguments may ask for it.
    import_monai(whole=not settings.keys().isdisjoint({"tracking", "args_file"}))
    import monai.bundle

    from sam2sgp.errors import sentence_for_users
    from sam2sgp.options import check_places

    files = [str(BUNDLE / "configs" / name) for name in configs]
    _quieten_monai()
    output = str(settings.get("export_file") or settings.get("output_dir", ""))
    if not kept:
        settings = settings | {"job::kept": False}
    try:
        check_places(monai.bundle.ConfigParser.load_config_files(files), settings)
        monai.bundle.run(
            run_id=run_id,
            config_file=files,
            meta_file=str(BUNDLE / "configs" / "metadata.json"),
            logging_file=str(BUNDLE / "configs" / "logging.conf"),
            bundle_root=str(BUNDLE),
            **settings,
        )
    except Exception as error:
        told = sentence_for_users(error)
        if told is None:
            raise
        _refuse(told)
    typer.echo(f"Done in {time.monotonic() - started:.0f} s" + (f": {output}" if kept else ""))


def _quieten_monai() -> None:
    """Keep from the terminal what MONAI says of itself on every run and no user can do anything about."""
    # That configs can run code; these are the package's own.
    warnings.filterwarnings("ignore", "parsing config_file", UserWarning)
    # Its surface metrics call their own helper with an argument that it deprecated.
    warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges.*always_return_as_numpy", FutureWarning)
    # All settings as they were given, and the path of the package's logging.conf.
    for name in ("scripts", "workflows"):
        logging.getLogger(f"monai.bundle.{name}").setLevel(logging.WARNING)


def _refuse(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
