"""The app's settings: what an operator gives with `--conf <key> <value>`, checked once at the start.

In: the app's folder, the studies (a folder or a DICOMweb address) and the `--conf` pairs, all strings. Out: `Settings`.
Everything about the method has its default in the bundle's `configs/inference.json`, and its `--conf` key is the
config's own; only what the server needs by itself is declared here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from sam2sgp.errors import ConfigError
from sam2sgp.places import BUNDLE

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
)
PATH_KEYS = ("bundle_root", "state_dir", "support_dir", "model_file")
# MONAI Label's own, which it puts among them.
FOREIGN_KEYS = ("server_mode",)
NUMBERS = {
    "max_upload_mb": "MiB",
    "max_image_mb": "MiB",
    "query_cache_mb": "MiB",
    "dicomweb_expiry": "seconds",
    "dicomweb_cache_gb": "GiB",
    "dicomweb_cache_days": "days",
    "dicomweb_timeout": "seconds",
    "max_connections": "connections",
    "max_connections_per_address": "connections",
}
NOT_ZERO = ("max_upload_mb", "max_image_mb", "dicomweb_timeout", "max_connections", "max_connections_per_address")
HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
CODE_MARKS = ("$", "@", "%")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Settings:
    """What the app was started with.

    Attributes:
        app_dir: the app's folder.
        studies: folder of the images, or the address of a DICOMweb server.
        bundle_root: the bundle. By default the one that was installed, or stands in the clone, with the package.
        state_dir: the app's own files: `support/` (the bank's cache), `weights/`, `training/`, scores, audit log. By
            default a folder of its own for each `studies` in the app's `model/state`.
        support_dir: a data folder of labelled pairs that belong to the support set from the start; None for none.
        backbone: name of an overlay in the bundle's `configs/backbones`; None for what inference.json says.
        model_file: weights to start from; None for the bundle's own, which fit only its default backbone.
        overrides: keys of inference.json with other values than the bundle's, see `METHOD_KEYS`.
        query_cache_mb: MiB of features, of prepared images, and of results, of the queries used last.
        max_upload_mb: MiB that a request may hold.
        max_image_mb: MiB that an image of a client or an archive may take in memory, as float32; reading holds it up to
            three times for a moment.
        cors_origins: other sites whose pages may use the server from a browser; none by default.
        hosts: names by which browsers reach the server, besides those that the machine knows of itself.
        user_header: HTTP header with the user's name, which a reverse proxy sets; None for none.
        dicomweb_filter: what series of a DICOMweb archive must match to be listed, such as {"Modality": "CT"}. MONAI
            Label's own variable for this is ignored: its default hides all that isn't CT.
        dicomweb_expiry: seconds for which the archive's lists are kept.
        dicomweb_cache_gb, dicomweb_cache_days: how much of the archive's series is kept on the disk, in GiB, and for
            how many days after they were last asked for.
        dicomweb_timeout: seconds after which an archive that sends nothing is given up.
        max_connections, max_connections_per_address: that the server keeps open at once, of all clients and of one.
        allow_overrides: whether clients may choose the device of a training.

    Raises:
        ConfigError: by `from_conf`, for an unknown key or a value that can't work.
    """

    app_dir: Path
    studies: str
    bundle_root: Path
    state_dir: Path
    support_dir: Path | None = None
    backbone: str | None = None
    model_file: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    query_cache_mb: float = 256.0
    max_upload_mb: float = 2048.0
    max_image_mb: float = 2048.0
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    user_header: str | None = None
    dicomweb_filter: Mapping[str, Any] = field(default_factory=dict)
    dicomweb_expiry: float = 10.0
    dicomweb_cache_gb: float = 50.0
    dicomweb_cache_days: float = 30.0
    dicomweb_timeout: float = 20.0
    max_connections: float = 1000.0
    max_connections_per_address: float = 200.0
    allow_overrides: bool = False

    @classmethod
    def from_conf(cls, app_dir: str | Path, studies: str, conf: Mapping[str, str] | None = None) -> "Settings":
        """Check `--conf` pairs and fill in the rest."""
        given = {key: value for key, value in (conf or {}).items() if key not in FOREIGN_KEYS}
        own = {entry.name for entry in fields(cls)} - {"app_dir", "studies", "overrides"}
        known = sorted(own | set(METHOD_KEYS))
        for key in given:
            if key not in known:
                raise ConfigError(f"--conf {key}: expected one of {', '.join(known)}, found an unknown key.")
        app_dir = Path(app_dir).resolve()
        values: dict[str, Any] = {
            "bundle_root": BUNDLE,
            "state_dir": _state_dir(app_dir, studies),
        }
        for key in own & given.keys():
            values[key] = _own_value(key, given[key])
        values["overrides"] = {key: _method_value(key, given[key]) for key in METHOD_KEYS if key in given}
        settings = cls(app_dir=app_dir, studies=studies, **values)
        settings._check()
        return settings

    @property
    def is_remote(self) -> bool:
        """Whether `studies` is a DICOMweb server."""
        return self.studies.startswith(("http://", "https://"))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the app's files are: no client gets to know."""
        given = (self.app_dir, self.bundle_root, self.state_dir, self.support_dir, self.model_file)
        studies = () if self.is_remote else (Path(self.studies),)
        return (*studies, *(path for path in given if path))

    @property
    def overlays(self) -> tuple[str, ...]:
        """Config files on top of inference.json, relative to the bundle."""
        return (f"configs/backbones/{self.backbone}.json",) if self.backbone else ()

    @property
    def audit_file(self) -> Path:
        """The audit log."""
        return self.state_dir / "audit.jsonl"

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


def _state_dir(app_dir: Path, studies: str) -> Path:
    """A folder for each studies folder or address, so that the states of two never mix."""
    name = studies.rstrip("/")
    if not name.startswith(("http://", "https://")):
        name = str(Path(name).resolve())
    return app_dir / "model" / "state" / hashlib.sha256(name.encode()).hexdigest()[:16]


def _own_value(key: str, text: Any) -> Any:
    if key in PATH_KEYS:
        return Path(str(text)).expanduser().resolve()
    if key == "allow_overrides":
        value = WORDS.get(str(text).strip().lower())
        if value is None:
            raise ConfigError(f"--conf {key}: expected true or false, found {text!r}.")
        return value
    if key == "dicomweb_filter":
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ConfigError(
                f'--conf {key}: expected attributes as JSON such as {{"Modality": "CT"}}, found {text!r}.'
            )
        return value
    if key in NUMBERS:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf") or (key in NOT_ZERO and value == 0):
            raise ConfigError(f"--conf {key}: expected a number of {NUMBERS[key]}, found {text!r}.")
        return value
    if key == "hosts":
        hosts = tuple(part.strip().lower() for part in str(text).split(",") if part.strip())
        for host in hosts:
            if not HOST.fullmatch(host):
                raise ConfigError(f"--conf {key}: expected names such as viewer.example, found {host!r}.")
        return hosts
    if key == "cors_origins":
        origins = tuple(part.strip().rstrip("/") for part in str(text).split(",") if part.strip())
        for origin in origins:
            if not origin.startswith(("http://", "https://")):
                raise ConfigError(f"--conf {key}: expected origins such as https://viewer.example, found {origin!r}.")
        return origins
    return str(text)


def _method_value(key: str, text: Any) -> Any:
    """A value of inference.json: JSON, or a bare word."""
    if not isinstance(text, str):
        return text
    if text.startswith(CODE_MARKS):
        raise ConfigError(f"--conf {key}: expected a value, found {text!r}, which a config would run as code.")
    try:
        return json.loads(text)
    except ValueError:
        return WORDS.get(text.strip().lower(), text)
