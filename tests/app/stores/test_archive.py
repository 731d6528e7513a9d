"""An archive that is silent, drips, redirects, answers nonsense or too much: each request ends, with one sentence."""

import asyncio
import gzip
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lib.checks import NotFound
from lib.stores import archive as module
from lib.stores.archive import Archive, ArchiveBusy, ArchiveError, Breaker, Unreachable
from tests.helpers.archives import Handler, fake_archive, multipart, series_entry, series_files

SILENCE = 0.2
# A machine that is busy with other things may take this many seconds for what takes a moment.
SOON = 10.0


@pytest.fixture
def fake():
    with fake_archive() as made:
        made.foreign = True
        yield made


@pytest.fixture
def archive(fake):
    return Archive(fake.address, silence=SILENCE, breaker=Breaker(retry=0.0))


def forwarded(archive: Archive, path: str) -> bytes:
    """What a viewer gets."""

    async def read() -> bytes:
        try:
            _, content = await archive.forward(path)
            return b"".join([data async for data in content])
        finally:
            if archive._viewers is not None:
                await archive._viewers.aclose()
                archive._viewers = None

    return asyncio.run(read())


def drip(handler, first: bytes) -> bool:
    """Send a byte every moment, and never the last one."""
    handler.wfile.write(first)
    while not handler.archive.let_go.wait(SILENCE / 4):
        handler.wfile.write(b" ")
    return True


BEHAVIOURS = {
    "silent": lambda handler: handler.silent(),
    "drips its head": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nx-a:"),
    "drips its answer": lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n["),
    "drips its chunks": lambda handler: drip(
        handler, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n[\r\n1;"
    ),
    "hangs up": lambda handler: handler.connection.close() or True,
    "is down": lambda handler: handler.answer(b"", status=503) or True,
}


@pytest.mark.parametrize("how", BEHAVIOURS)
def test_a_request_without_an_answer_ends_in_time(fake, archive, how):
    fake.behave = BEHAVIOURS[how]
    started = time.monotonic()
    with pytest.raises(Unreachable, match="archive: expected a list of series, found no answer"):
        archive.search_series({}, ())
    assert time.monotonic() - started < module.LIST * SILENCE + SOON
    with pytest.raises(Unreachable):
        archive.search_series({}, ())
    assert archive.breaker.since is not None


@pytest.mark.parametrize("how", ["silent", "drips its answer"])
def test_viewers_get_an_error_in_time_and_do_not_stop_others(fake, archive, how, monkeypatch):
    monkeypatch.setattr(module, "BULK", 3)
    fake.behave = BEHAVIOURS[how]

    with pytest.raises(Unreachable, match="an answer for a viewer"):
        forwarded(archive, "studies/1.2/series")
    assert archive.breaker.since is None


@pytest.mark.parametrize(
    "content", [b"<html>", b'"text"', b"[" * 100_000, b"17", b"\xff\xfe", b'{"a":'], ids=lambda text: repr(text[:6])
)
def test_answers_that_are_no_lists_are_refused(fake, archive, content):
    fake.behave = lambda handler: handler.answer(content) or True
    with pytest.raises(ArchiveError, match="found (an answer that isn't JSON|JSON of another kind)"):
        archive.search_series({}, ())


def test_answers_that_are_too_large_are_not_taken(fake, tmp_path):
    archive = Archive(fake.address, silence=SOON, largest_json=1000, largest_series=1000)
    fake.behave = lambda handler: handler.answer(json.dumps([" " * 2000]).encode()) or True
    with pytest.raises(ArchiveError, match="found more"):
        archive.search_series({}, ())
    fake.behave = lambda handler: False
    fake.files = [bytes(2000)]
    with pytest.raises(ArchiveError, match="found more"):
        archive.fetch_series("1.2", "1.2.3", tmp_path)


@pytest.mark.parametrize("knows_offset", [True, False])
def test_a_list_ends_also_where_offset_is_ignored(fake, archive, knows_offset, caplog):
    fake.series = [series_entry(f"1.{n}") for n in range(5)]
    if not knows_offset:
        fake.behave = lambda handler: handler.query.clear()
    assert archive.search_series({}, ()) == fake.series
    assert archive.search_series({}, ()) == fake.series
    assert len(fake.asked) == 4
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["offset" in message for message in told] == ([] if knows_offset else [True])


def test_pages_are_put_together(fake, archive):
    entries = [series_entry(f"1.{n}") for n in range(7)]

    def page(handler) -> bool:
        offset = int(handler.query["offset"])
        handler.answer(json.dumps(entries[offset : offset + 3]).encode())
        return True

    fake.behave = page
    assert archive.search_series({}, ()) == entries


def test_redirects_are_followed_on_the_archive_alone(fake, archive):
    fake.series = [series_entry("1.2")]

    def redirect_to(target: str) -> Callable[[Handler], bool]:
        def redirect(handler) -> bool:
            if handler.path.startswith("/dicom-web/series"):
                query = handler.path.partition("?")[2]
                handler.answer(b"", status=307, location=f"{target}/series?{query}")
            else:
                handler.lists()
            return True

        return redirect

    with fake_archive() as other:
        other.series = [series_entry("6.6")]
        for target, allowed in (("/moved", True), (other.address, False), ("file:///etc", False), ("http://[", False)):
            fake.behave = redirect_to(target)
            if allowed:
                assert archive.search_series({}, ()) == fake.series
            else:
                with pytest.raises(ArchiveError, match="redirect"):
                    archive.search_series({}, ())
                with pytest.raises(ArchiveError, match="redirect"):
                    forwarded(archive, "series")
        assert other.asked == []


def test_a_label_is_not_sent_where_a_redirect_leads(fake, archive, tmp_path):
    (tmp_path / "label.dcm").write_bytes(b"label")

    def redirect(handler) -> bool:
        handler.rfile.read(int(handler.headers["content-length"]))
        handler.answer(b"", status=302, location="/dicom-web/elsewhere")
        return True

    fake.behave = redirect
    with pytest.raises(ArchiveError, match="redirect"):
        archive.store(tmp_path / "label.dcm")
    assert fake.asked == ["/dicom-web/studies"]


def test_files_are_kept_as_they_come(fake, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    fake.files = series_files(tmp_path / "source")
    (tmp_path / "copy").mkdir()
    found = archive.fetch_series("1.2", "1.2.3", tmp_path / "copy")
    assert [path.read_bytes() for path in found] == fake.files
    assert fake.asked == ["/dicom-web/studies/1.2/series/1.2.3"]


def test_a_single_file_without_a_boundary_is_taken(fake, archive, tmp_path):
    fake.behave = lambda handler: handler.answer(b"one file", "application/dicom") or True
    assert archive.fetch_instance("1.2", "1.2.3", "1.2.3.4", tmp_path).read_bytes() == b"one file"


@pytest.mark.parametrize(
    "content, kind",
    [
        (multipart([b"a"])[:-20], "multipart/related; boundary=part"),
        (b"no boundary at all", "multipart/related; boundary=part"),
        (b"<html>", "text/html"),
        (b"", ""),
    ],
)
def test_messages_that_are_cut_or_of_another_kind_are_refused(fake, archive, tmp_path, content, kind):
    fake.behave = lambda handler: handler.answer(content, kind) or True
    with pytest.raises(ArchiveError):
        archive.fetch_series("1.2", "1.2.3", tmp_path)


def test_a_label_arrives_whole_and_a_refusal_is_told(fake, archive, tmp_path):
    content = bytes(range(256)) * 3000
    (tmp_path / "label.dcm").write_bytes(content)
    nothing_failed = json.dumps({"00081198": {"vr": "SQ"}, "00081199": {"vr": "SQ", "Value": [{}]}}).encode()
    fake.told = nothing_failed
    archive.store(tmp_path / "label.dcm")
    [stored] = fake.stored
    assert content in stored and stored.startswith(b"--")
    failed = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [272]}}]}}

    def refuse(handler) -> bool:
        handler.rfile.read(int(handler.headers["content-length"]))
        handler.answer(json.dumps(failed).encode(), status=202)
        return True

    fake.behave = refuse
    with pytest.raises(ArchiveError, match="found that it doesn't"):
        archive.store(tmp_path / "label.dcm")


def test_after_two_failures_one_request_in_a_while_is_let_through_until_one_is_answered(caplog):
    now = [0.0]
    breaker = Breaker(retry=5.0, clock=lambda: now[0])
    breaker.check()
    with caplog.at_level(logging.INFO):
        # One by itself is none.
        breaker.failed("silent")
        breaker.check()
        breaker.answered()
        breaker.failed("silent")
        breaker.check()
        breaker.failed("silent")
        for now[0], passes in ((0.1, False), (4.9, False), (5.1, True), (5.2, False), (10.2, True)):
            if passes:
                breaker.check()
            else:
                with pytest.raises(Unreachable, match=r"found none since .* UTC \(silent\)"):
                    breaker.check()
        breaker.answered()
        breaker.answered()
    breaker.check()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "The archive does not answer",
        "The archive answers again",
    ]


def test_a_silent_archive_takes_no_more_threads_than_there_are_places(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "TRANSFERS", 2)
    monkeypatch.setattr(module, "WAITING", 1)
    archive = Archive(fake.address, silence=2 * SILENCE)
    arrived = threading.Semaphore(0)

    def silent(handler) -> bool:
        arrived.release()
        return handler.silent()

    fake.behave = silent

    def fetch(number: int) -> type:
        try:
            archive.metadata("1.2", f"1.{number}")
        except Exception as error:
            return type(error)

    with ThreadPoolExecutor(8) as threads:
        first = [threads.submit(fetch, number) for number in range(2)]
        for _ in first:
            assert arrived.acquire(timeout=SOON)
        rest = [threads.submit(fetch, number) for number in range(2, 8)]
        kinds = [future.result() for future in (*first, *rest)]
    assert kinds.count(Unreachable) == 3 and kinds.count(ArchiveBusy) == 5
    assert len(fake.asked) <= 3


def test_viewers_reach_dicomweb_alone(fake, archive):
    for path in ("system", "qido/servers", "", "instancesx", "wado/../system"):
        with pytest.raises(module.NotFound):
            forwarded(archive, path)
    assert fake.asked == []


def one_list(fake, series: int = 1, **headers: str):
    """A list as the archive sends it, packed as `headers` say."""
    content = json.dumps([series_entry(f"1.{number}") for number in range(series)]).encode()
    packed = headers.get("content-encoding", "identity")
    for _ in range(packed.count("gzip")):
        content = gzip.compress(content)
    fake.behave = lambda handler: handler.answer(content, **headers) or True


@pytest.mark.parametrize("packed", ["gzip, gzip", "br", "gzip, identity"])
def test_an_answer_that_is_packed_more_than_once_or_otherwise_is_refused(fake, packed):
    one_list(fake, **{"content-encoding": packed})
    with pytest.raises(ArchiveError, match="packed"):
        Archive(fake.address).metadata("1", "2")
    one_list(fake, **{"content-encoding": "gzip"})
    assert len(Archive(fake.address).metadata("1", "2")) == 1


def test_an_answer_of_more_values_than_memory_is_refused_unparsed(fake, monkeypatch):
    monkeypatch.setattr("lib.stores.archive.MOST_VALUES", 1000)
    fake.behave = lambda handler: handler.answer(b"[" + b"[]," * 1000 + b"[]]") or True
    with pytest.raises(ArchiveError, match="values"):
        Archive(fake.address).metadata("1", "2")


def test_lists_without_end_are_given_up_by_their_size(fake, monkeypatch):
    monkeypatch.setattr("lib.stores.archive.LARGEST_LIST", 10_000)

    def page(handler) -> bool:
        handler.answer(json.dumps([series_entry(f"1.{handler.query['offset']}") | {"00081030": "x" * 3000}]).encode())
        return True

    fake.behave = page
    with pytest.raises(ArchiveError, match="found more"):
        Archive(fake.address).search_series({}, ())
    assert len(fake.asked) < 6


def test_a_message_of_too_many_parts_is_given_up(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.stores.archive.MOST_PARTS", 5)
    fake.files = [b"x"] * 6
    with pytest.raises(ArchiveError, match="at most 5 files"):
        Archive(fake.address).fetch_series("1", "2", tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "studies/..;/..;/secret",
        "studies/1.2;x=/series",
        "studies/1 2",
        "studies//evil",
        "studies/%2e%2e/x",
        "studies\\x",
    ],
)
def test_viewers_get_addresses_of_dicomweb_only(fake, path):
    with pytest.raises(NotFound, match="proxy"):
        forwarded(Archive(fake.address), path)
    assert fake.asked == []


def test_a_failure_of_the_archive_is_told_as_one(fake):
    fake.behave = lambda handler: handler.answer(b"/srv/archive/secret", status=500) or True
    with pytest.raises(ArchiveError, match="HTTP status 500"):
        forwarded(Archive(fake.address), "studies/1.2/series")
