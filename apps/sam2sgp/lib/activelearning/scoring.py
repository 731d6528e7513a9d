"""Scores of images, computed in the background and kept on disk for the strategies.

    datastore ─ images ─ examine ─ scores.sqlite ─ strategies

MONAI Label runs a scoring method in a process of its own, in which the app is built again. For every unlabelled image
there is a row with its embedding, which depends on the image and the weights, and its uncertainty, which depends on the
support set as well; for every labelled one there is its embedding. A row names what it was computed from, so a run goes
on where another one ended, and what is up to date is not computed again.

Concurrency: any number of processes may read and write; SQLite in WAL mode keeps them apart. Each row is written by
itself, so a kill at any moment loses one image's score. Memory use does not grow with the size of images' scores: only
what a row was computed from is held for all images.
"""

import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.checks import StorageError
from lib.serving.segmenter import ServerSegmenter
from lib.stamps import image_stamp
from sam2sgp.active import ImageScore, embed, examine
from sam2sgp.errors import cause_of
from sam2sgp.support.content import digest_of

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_PATIENCE = 30.0
TABLES = """
CREATE TABLE IF NOT EXISTS scores (
    id TEXT PRIMARY KEY, signature TEXT NOT NULL, weights TEXT NOT NULL, support TEXT, embedding BLOB,
    uncertainty REAL, parts TEXT, error TEXT, serial INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS scores_serial ON scores (serial);
CREATE TABLE IF NOT EXISTS offers (id TEXT PRIMARY KEY, time REAL NOT NULL);
"""


@dataclass(frozen=True)
class Row:
    """A row as strategies read it: embedding (D,) float16 or None where the image can't be read."""

    id: str
    weights: str
    embedding: torch.Tensor | None
    uncertainty: float | None
    serial: int


class Scores:
    """The file of scores, which may be deleted at any time. A damaged one is thrown away and rebuilt.

    Args:
        path: of the SQLite file; made at the first use.

    Raises:
        StorageError: by every method: the file can't be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            try:
                connection = self._connect()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                self._throw_away(error)
                connection = self._connect()
            with closing(connection):
                yield connection
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from error
        except sqlite3.DatabaseError as error:
            self._throw_away(error)
            raise StorageError(
                f"{self.path.name}: expected the scores of images, found them damaged; they are rebuilt: try again."
            ) from error
        except OSError as error:
            raise self._unusable(error) from error

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=SECONDS_OF_PATIENCE, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            # Nobody waits for the disk: what a power failure damages is computed again.
            connection.execute("PRAGMA synchronous=OFF")
            connection.executescript(TABLES)
        except BaseException:
            connection.close()
            raise
        return connection

    def _throw_away(self, error: sqlite3.Error) -> None:
        logger.warning("%s: the scores are damaged (%s): they are deleted and rebuilt.", self.path, error)
        # A log without its database is never applied to another one.
        for suffix in ("-wal", "-shm", ""):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _unusable(self, error: Exception) -> StorageError:
        return StorageError(
            f"{self.path.name}: expected to read and write the scores of images, found {error}; free some space or "
            "correct the permissions of the state folder, or delete the file: it is rebuilt."
        )

    def origins(self) -> dict[str, tuple[str, str, str | None]]:
        """What each row was computed from: signature of the image, weights, state of the support set."""
        with self._open() as connection:
            rows = connection.execute("SELECT id, signature, weights, support FROM scores")
            return {name: tuple(origin) for name, *origin in rows}

    def write(
        self,
        image_id: str,
        signature: str,
        weights: str,
        support: str | None,
        score: ImageScore | None,
        error: str | None = None,
    ) -> None:
        """Put an image's row in place of the one it had. `support` is None where only the embedding was computed."""
        packed = None if score is None else score.embedding.half().numpy().tobytes()
        values = (None, None) if score is None else (score.uncertainty, json.dumps(score.parts))
        with self._open() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO scores VALUES "
                "(?, ?, ?, ?, ?, ?, ?, ?, (SELECT COALESCE(MAX(serial), 0) + 1 FROM scores))",
                (image_id, signature, weights, support, packed, *values, error),
            )

    def newer(self, serial: int) -> list[Row]:
        """Rows written after the one of this serial number."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT id, weights, embedding, uncertainty, serial FROM scores WHERE serial > ? ORDER BY serial",
                (serial,),
            ).fetchall()
        return [Row(i, w, e and torch.frombuffer(bytearray(e), dtype=torch.half), u, s) for i, w, e, u, s in rows]

    def keep_only(self, image_ids: set[str]) -> None:
        """Remove the rows of images that are gone."""
        gone = [(image_id,) for image_id in self.origins() if image_id not in image_ids]
        if gone:
            with self._open() as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany("DELETE FROM scores WHERE id = ?", gone)
                connection.execute("COMMIT")

    def offers(self) -> dict[str, float]:
        """When each image was last offered, in seconds since the epoch."""
        with self._open() as connection:
            return dict(connection.execute("SELECT id, time FROM offers"))

    def offer(self, image_id: str, now: float) -> None:
        """Note that an image is offered now."""
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO offers VALUES (?, ?)", (image_id, now))


class Scoring(ScoringMethod):
    """Scores all images of the datastore that have no score of the present weights and support set.

    Args:
        segmenter: network, support bank and inferer.
        scores: where they go.
    """

    def __init__(self, segmenter: ServerSegmenter, scores: Scores) -> None:
        super().__init__("Embeddings and uncertainties of images, for the strategies")
        self.segmenter = segmenter
        self.scores = scores

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Returns how many images there are, were scored now, were up to date and can't be read.

        An archive's image that has a score by the present weights is not fetched for a newer one.
        """
        self.segmenter.refresh()
        labelled = {case["name"]: case["image"] for case in self.segmenter.bank.data}
        unlabelled = [name for name in datastore.get_unlabeled_images() if name not in labelled]
        self.scores.keep_only({*labelled, *unlabelled})
        origins = self.scores.origins()
        # What has no row at all comes first: it can't be offered for a reason.
        names = sorted([*labelled, *unlabelled], key=lambda name: (name in origins, name))
        done = {"total": len(names), "executed": 0, "skipped": 0, "failed": 0}
        started = said = time.monotonic()
        # An archive's images come over the network, and not all of them stay here.
        is_at_hand = getattr(datastore, "is_at_hand", lambda name: True)
        for number, name in enumerate(names, 1):
            known = origins.get(name)
            if known and known[1] == self.segmenter.version.name and not is_at_hand(name):
                done["skipped"] += 1
            else:
                path = labelled.get(name) or datastore.get_image_uri(name)
                done[self._score(name, path, name in labelled, known)] += 1
            if time.monotonic() - said > SECONDS_BETWEEN_LINES or number == len(names):
                said = time.monotonic()
                logger.info("Scoring: %d of %d images, %.0f s", number, len(names), said - started)
        return done

    def _score(self, name: str, path: str, labelled: bool, known: tuple | None) -> str:
        """Score an image unless that is done. Returns the entry under which to count it."""
        segmenter = self.segmenter
        with segmenter.lock:
            segmenter.refresh()
            weights = segmenter.version.name
            items = sorted(item.content for item in segmenter.bank.items)
            support = None if labelled else digest_of(items)
            found = image_stamp(path)
            if found is None:
                # Gone since it was listed.
                return "failed"
            signature = digest_of(found)
            if known is not None and known[:2] == (signature, weights) and (labelled or known[2] == support):
                return "skipped"
            try:
                case = segmenter.prepare(path, name)
                inferer, network = segmenter.inferer, segmenter.network
                settings = inferer.settings
                if labelled:
                    embedding = embed(network, case["image"], settings.batch_size, settings.precision)
                    score = ImageScore(embedding, None, {})
                else:
                    score = examine(inferer, network, {**case, "group": None})
            except Exception as error:  # whatever one image does must not end the run
                cause = cause_of(error)
                logger.warning("Not scored: %s: %s", name, cause)
                self.scores.write(name, signature, weights, support, None, str(cause))
                return "failed"
            self.scores.write(name, signature, weights, support, score)
            return "executed"
