"""The app's settings: what an operator gives with `--conf <key> <value>` or in a file, checked once at the start.

In: the app's folder, the studies (a folder or a DICOMweb address), the `--conf` pairs, all strings, and the settings
file (`--conf settings FILE`), whose values have types of their own; `--conf` comes first. Out: `Settings`. Everything
about the method has its default in the bundle's `configs/inference.json`, and its `--conf` key is the config's own;
only what the server needs by itself is declared here.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

from monai.bundle import ConfigParser
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from lib.roles import Role, role_of
from lib.settings_file import read_settings_file
from lib.state_folder import at_its_place, default_folder
from sam2sgp.errors import ConfigError
from sam2sgp.options import ALL as OPTIONS
from sam2sgp.options import Expected
from sam2sgp.places import BUNDLE, is_address

CONFIG = "configs/inference.json"
# Keys of inference.json that an operator may set; the others are the app's own or make no sense in a server.
METHOD_KEYS = (
    "precision",
    "image_size",
    "freeze_encoder",
    "lora",
    "pmg",
    "refinement",
    "pma",
    "retrieval",
    "k",
    "slices_per_class",
    "support_max_items",
    "support_seed",
    "support_cache_mb",
    "modality",
    "slice_axis",
    "ct_window",
    "percentiles",
    "patient_pattern",
    "val_batch_size",
    "region_below",
    "three_d_memory",
    "memory_frames",
    "object_gate",
    "one_piece",
    "mirror",
)
# MONAI Label's own, which it puts among them.
FOREIGN_KEYS = ("server_mode",)
# A file with more settings.
FILE_KEY = "settings"
# These of that file are for the start of the server itself: only `sam2sgp serve --settings` reads them.
START_KEYS = ("studies", "host", "port")
PATH_KEYS = ("bundle_root", "state_dir", "support_dir", "model_file")
HOST = r"^[a-z0-9_-]+(\.[a-z0-9_-]+)*$"
ORIGIN = r"^https?://"
CODE_MARKS = ("$", "@", "%")
# Fields of `Settings` that no key sets.
OTHER_FIELDS = {"app_dir", "studies", "overrides", "given"}
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _resolved(text: Any) -> Path:
    return Path(str(text)).expanduser().resolve()


def _entries(text: Any) -> Any:
    """The entries of a text with commas; anything else as it is."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if isinstance(text, str) else text


def _from_json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


ResolvedPath = Annotated[Path, BeforeValidator(_resolved)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Megabytes = Expected("a number of MiB")
Connections = Expected("a number of connections")


class Settings(BaseModel):
    """What the app was started with.

    Raises:
        ConfigError: by `from_conf`, for an unknown key or a value that can't work.
    """

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    app_dir: Path
    """The app's folder."""

    studies: str
    """Folder of the images, or the address of a DICOMweb server."""

    bundle_root: ResolvedPath
    """The bundle. By default the one that was installed, or stands in the clone, with the package."""

    state_dir: ResolvedPath
    """The app's own files: `support/` (the bank's cache), `weights/`, `training/`, scores, audit log. By default a
    folder of its own for each `studies`, see `lib.state_folder`."""

    support_dir: ResolvedPath | None = None
    """A data folder of labelled pairs that belong to the support set from the start; None for none."""

    backbone: str | None = None
    """Name of an overlay in the bundle's `configs/backbones`; None for what inference.json says."""

    model_file: ResolvedPath | None = None
    """Weights to start from; None for the bundle's own, which fit only its default backbone."""

    overrides: Mapping[str, Any] = {}
    """Keys of inference.json with other values than the bundle's, see `METHOD_KEYS`."""

    query_cache_mb: Annotated[Amount, Megabytes] = 256.0
    """MiB of features, of prepared images, and of results, of the queries used last."""

    max_upload_mb: Annotated[Positive, Megabytes] = 2048.0
    """MiB that a request may hold."""

    max_image_mb: Annotated[Positive, Megabytes] = 2048.0
    """MiB that an image of a client or an archive may take in memory, as float32; reading holds it up to three times
    for a moment."""

    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(lambda text: text.rstrip("/")), Field(pattern=ORIGIN)], ...],
        BeforeValidator(_entries),
        Expected("origins such as https://viewer.example"),
    ] = ()
    """Other sites whose pages may use the server from a browser; none by default."""

    hosts: Annotated[
        tuple[Annotated[str, Field(pattern=HOST), BeforeValidator(str.lower)], ...],
        BeforeValidator(_entries),
        Expected("names such as viewer.example"),
    ] = ()
    """Names by which browsers reach the server, besides those that the machine knows of itself."""

    user_header: str | None = None
    """HTTP header with the user's name, which a reverse proxy sets; None for none."""

    users: Annotated[
        dict[str, Annotated[Role, BeforeValidator(role_of)]] | None,
        BeforeValidator(_from_json),
        Expected('a table of users and their roles such as {"anna": "admin"}'),
    ] = None
    """The role of each user, see `lib.roles`. Without it, and without `default_role`, everybody may do everything."""

    default_role: Annotated[Role | None, BeforeValidator(role_of)] = None
    """The role of users who are not among `users`; None for no way in."""

    approve_own: Annotated[bool, Expected("true or false")] = True
    """Whether people may approve labels that they made, or changed last, themselves."""

    dicomweb_filter: Annotated[
        dict[str, Any],
        BeforeValidator(_from_json),
        Expected('attributes as JSON such as {"Modality": "CT"}'),
    ] = {}
    """What series of a DICOMweb archive must match to be listed, such as {"Modality": "CT"}. MONAI Label's own variable
    for this is ignored: its default hides all that isn't CT."""

    dicomweb_expiry: Annotated[Amount, Expected("a number of seconds")] = 10.0
    """Seconds for which the archive's lists are kept."""

    dicomweb_cache_gb: Annotated[Amount, Expected("a number of GiB")] = 50.0
    """How much of the archive's series is kept on the disk, in GiB."""

    dicomweb_cache_days: Annotated[Amount, Expected("a number of days")] = 30.0
    """For how many days after they were last asked for."""

    dicomweb_timeout: Annotated[Positive, Expected("a number of seconds")] = 20.0
    """Seconds after which an archive that sends nothing is given up."""

    max_connections: Annotated[Positive, Connections] = 1000.0
    """That the server keeps open at once, of all clients."""

    max_connections_per_address: Annotated[Positive, Connections] = 200.0
    """That it keeps open of one client."""

    allow_overrides: Annotated[bool, Expected("true or false")] = False
    """Whether clients may choose the device of a training."""

    given: Mapping[str, Any] = {}
    """What was given by file and `--conf`: text, or of the file what JSON has."""

    @classmethod
    def from_conf(
        cls, app_dir: str | Path, studies: str, conf: Mapping[str, Any] | None = None, starts: bool = False
    ) -> Self:
        """Check `--conf` pairs and the settings file that they may name, and fill in the rest.

        Args:
            app_dir: the app's folder.
            studies: folder of the images, or the address of a DICOMweb server.
            conf: keys and values; `settings` names a file.
            starts: whether the file's `studies`, `host` and `port` are read by the caller, see `start_values`; else
                they are refused, as they would be of no effect.
        """
        given, places = _given(conf or {}, starts)
        own = cls.model_fields.keys() - OTHER_FIELDS
        known = sorted(own | set(METHOD_KEYS))
        for key in given:
            if key not in known:
                near = get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]}?" if near else "."
                raise ConfigError(f"{places[key]}: expected one of {', '.join(known)}, found an unknown key{hint}")
        app_dir = Path(app_dir).resolve()
        values: dict[str, Any] = {"bundle_root": BUNDLE, **{key: given[key] for key in own & given.keys()}}
        if "state_dir" not in values:
            values["state_dir"] = default_folder(app_dir, studies)
        values["overrides"] = {key: _method_value(places[key], key, given[key]) for key in METHOD_KEYS if key in given}
        try:
            settings = cls(app_dir=app_dir, studies=studies, given=given, **values)
        except ValidationError as error:
            raise ConfigError(_sentence(error, places)) from error
        settings._check()
        return settings

    def in_place(self) -> Self:
        """For a server that starts: with a state folder of an older version moved out of the code's folder."""
        return self.model_copy(update={"state_dir": at_its_place(self.state_dir, self.app_dir, self.studies)})

    def for_tasks(self) -> dict[str, Any]:
        """As `conf` of the processes that work for a server: what it was given, whatever becomes of the file."""
        return {**self.given, "state_dir": str(self.state_dir)}

    @property
    def is_remote(self) -> bool:
        """Whether `studies` is a DICOMweb server."""
        return is_address(self.studies)

    @property
    def studies_folders(self) -> tuple[Path, ...]:
        """The folder of the images, if they are in one."""
        return () if self.is_remote else (Path(self.studies),)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the app's files are: no client gets to know."""
        given = (self.app_dir, self.bundle_root, self.state_dir, self.support_dir, self.model_file)
        return (*self.studies_folders, *(path for path in given if path))

    @property
    def overlays(self) -> tuple[str, ...]:
        """Config files on top of inference.json, relative to the bundle."""
        return (f"configs/backbones/{self.backbone}.json",) if self.backbone else ()

    @property
    def audit_file(self) -> Path:
        """The audit log."""
        return self.state_dir / "audit.jsonl"

    @property
    def progress_file(self) -> Path:
        """The log of how good predictions were."""
        return self.state_dir / "progress.jsonl"

    def config(self) -> dict[str, Any]:
        """The content of inference.json with overlay and overrides, for a `ConfigParser`."""
        content = ConfigParser.load_config_files([str(self.bundle_root / name) for name in (CONFIG, *self.overlays)])
        content.update(self.overrides, bundle_root=str(self.bundle_root), progress=False)
        if self.model_file:
            content["model_file"] = str(self.model_file)
        return content

    @property
    def start_weights(self) -> Path:
        """The weights file in use until others are published."""
        return Path(ConfigParser(self.config()).get_parsed_content("model_file"))

    def value(self, key: str) -> Any:
        """The value of a key of inference.json as the app uses it."""
        return ConfigParser(self.config()).get_parsed_content(key)

    def _check(self) -> None:
        if not self.user_header and (self.users is not None or self.default_role or not self.approve_own):
            raise ConfigError(
                "user_header: expected the header in which the reverse proxy names the user, because users, "
                "default_role and approve_own are of no use without, found none; give it, such as X-Remote-User."
            )
        if not (self.bundle_root / CONFIG).is_file():
            raise ConfigError(
                f"bundle_root: expected a bundle with {CONFIG}, found none in {self.bundle_root}; give its folder."
            )
        for overlay in self.overlays:
            if not (self.bundle_root / overlay).is_file():
                names = sorted(path.stem for path in (self.bundle_root / overlay).parent.glob("*.json"))
                raise ConfigError(f"backbone: expected one of {', '.join(names)}, found {self.backbone!r}.")
        if self.support_dir and not self.support_dir.exists():
            raise ConfigError(f"support_dir: expected a folder of labelled pairs, found no {self.support_dir}.")
        if not self.start_weights.is_file():
            raise ConfigError(f"model_file: expected a weights file, found no {self.start_weights}; give its path.")


def start_values(path: str | Path) -> dict[str, Any]:
    """What a settings file says of the start: `studies`, `host` and `port`, as far as they are there.

    Raises:
        ConfigError: the file can't be read, or one of them can't work.
    """
    path = Path(path).expanduser().absolute()
    found = read_settings_file(path)
    values = {key: found[key] for key in START_KEYS if key in found}
    for key in ("studies", "host"):
        if key in values and not (isinstance(values[key], str) and values[key]):
            raise ConfigError(f"{path}, {key}: expected a text, found {values[key]!r}.")
    port = values.get("port", 1)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 1 << 16:
        raise ConfigError(f"{path}, port: expected a number from 1 to 65535, found {port!r}.")
    if "studies" in values and not is_address(values["studies"]):
        values["studies"] = _from_folder(path.parent, values["studies"])
    return values


def _given(conf: Mapping[str, Any], starts: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """What is given by the settings file and by `--conf`, and where each of it stands, as errors say it."""
    pairs = {key: value for key, value in conf.items() if key not in (*FOREIGN_KEYS, FILE_KEY)}
    places = {key: f"--conf {key}" for key in pairs}
    if FILE_KEY not in conf:
        return pairs, places
    path = Path(str(conf[FILE_KEY])).expanduser().absolute()
    found = read_settings_file(path)
    for key in START_KEYS:
        if key in found and not starts:
            raise ConfigError(
                f"{path}, {key}: expected a setting of the app, found one of `sam2sgp serve`; start by `sam2sgp serve "
                f"--settings`, or take it out of the file and give --{key}."
            )
        found.pop(key, None)
    for key in PATH_KEYS:
        if isinstance(found.get(key), str):
            found[key] = _from_folder(path.parent, found[key])
    return {**found, **pairs}, {**{key: f"{path}, {key}" for key in found}, **places}


def _from_folder(folder: Path, text: str) -> str:
    """A path as it is written in a file of a folder."""
    return str(folder / Path(text).expanduser())


def _sentence(error: ValidationError, places: Mapping[str, str]) -> str:
    """The first mistake, with what the setting's declaration expects."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "value_error":
        # It says what is expected itself.
        within = f", {first['loc'][1]}" if len(first["loc"]) > 1 else ""
        return f"{places.get(key, key)}{within}: {first['ctx']['error']}"
    marks = Settings.model_fields[key].metadata
    expected = next((mark.words for mark in marks if isinstance(mark, Expected)), first["msg"])
    return f"{places.get(key, key)}: expected {expected}, found {first['input']!r}."


def _method_value(place: str, key: str, text: Any) -> Any:
    """A value of inference.json: JSON, or a bare word."""
    value = text
    if isinstance(text, str):
        if text.startswith(CODE_MARKS):
            raise ConfigError(f"{place}: expected a value, found {text!r}, which a config would run as code.")
        try:
            value = json.loads(text)
        except ValueError:
            value = WORDS.get(text.strip().lower(), text)
    if not OPTIONS[key].allows(value):
        raise ConfigError(f"{place}: expected {OPTIONS[key].expected}, found {text!r}.")
    return value
