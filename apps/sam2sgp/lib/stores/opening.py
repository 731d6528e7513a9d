"""The datastore of a server: a folder, or a DICOMweb archive by its address."""

from lib.checks import image_limit
from lib.settings import Settings
from lib.stores.audit import Audit
from lib.stores.decisions import Decisions
from lib.stores.dicomweb import DicomWebDatastore
from lib.stores.folder import ConfinedDatastore


def open_datastore(settings: Settings) -> Decisions:
    """The confined datastore of `settings.studies`: a folder, or a DICOMweb archive by its address.

    Raises:
        StorageError: the folder can't be opened.
    """
    opened = _opened(settings)
    opened.approve_own = settings.approve_own
    return opened


def _opened(settings: Settings) -> Decisions:
    audit = Audit(settings.state_dir / "audit.jsonl")
    limit = image_limit(settings)
    if settings.is_remote:
        return DicomWebDatastore(
            settings.studies,
            settings.state_dir / "archive",
            limit,
            audit,
            settings.dicomweb_filter,
            settings.dicomweb_expiry,
            settings.dicomweb_cache_gb,
            settings.dicomweb_cache_days,
            settings.dicomweb_timeout,
        )
    return ConfinedDatastore(settings.studies, settings.state_dir, limit, audit)
