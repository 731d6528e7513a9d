"""Confined sessions: packed files that lead out, hold links or unpack to too much, and ids that aren't the server's."""

import io
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.checks import NotFound, RequestError, TooLarge, UnsupportedFile
from lib.stores.sessions import ConfinedSessions
from tests.helpers.dicom_files import write_series

LIMIT = 1 << 20


@pytest.fixture
def sessions(tmp_path, monkeypatch) -> ConfinedSessions:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return ConfinedSessions(str(tmp_path / "sessions"), 3600, LIMIT)


def packed(path: Path, *members: tuple[str, bytes], kind: bytes | None = None, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if kind is not None:
                member.type, member.linkname, member.size = kind, "/etc/passwd", 0
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path: Path, *members: tuple[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def rewritten(path: Path, old: bytes, new: bytes) -> Path:
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


ATTACKS = {
    "parent": lambda path: packed(path, ("../evil", b"x")),
    "parent within": lambda path: packed(path, ("a/../../evil", b"x")),
    "absolute": lambda path: packed(path, ("/tmp/evil", b"x")),
    "backslash": lambda path: packed(path, ("..\\evil", b"x")),
    "link": lambda path: packed(path, ("a", b""), kind=tarfile.SYMTYPE),
    "hard link": lambda path: packed(path, ("a", b""), kind=tarfile.LNKTYPE),
    "device": lambda path: packed(path, ("a", b""), kind=tarfile.CHRTYPE),
    "pipe": lambda path: packed(path, ("a", b""), kind=tarfile.FIFOTYPE),
    "twice": lambda path: packed(path, ("a", b"x"), ("a", b"y")),
    "file as folder": lambda path: packed(path, ("a", b"x"), ("a/b", b"y")),
    "zip parent": lambda path: zipped(path, ("../evil", b"x")),
    "zip without a name": lambda path: rewritten(zipped(path, ("Xx", b"x")), b"Xx", b"\0x"),
    "zip link": lambda path: zipped(path, ("a", b"/etc/passwd"), mode=0o120777),
    "bomb": lambda path: packed(path, ("a", bytes(LIMIT + 1))),
    "zip bomb": lambda path: zipped(path, ("a", bytes(LIMIT + 1))),
    "many small": lambda path: packed(path, *((str(number), bytes(LIMIT // 4)) for number in range(5))),
    "empty": lambda path: packed(path),
    "deep": lambda path: zipped(path, ("d/" * 40 + "a.nii", b"x")),
    "endless path": lambda path: zipped(path, (("d" * 200 + "/") * 20 + "a.nii", b"x")),
    "wrong image": lambda path: packed(path, ("a.png", b"no picture")),
    "no archive": lambda path: path.write_bytes(b"x" * 1000) and path,
    "cut": lambda path: path.write_bytes(packed(path, ("a", bytes(range(256)) * 99)).read_bytes()[:-60]) and path,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_packed_files_that_lead_out_or_hold_too_much_are_refused_whole(sessions, tmp_path, attack):
    (tmp_path / "upload").mkdir()
    upload = ATTACKS[attack](tmp_path / "upload" / "a.tar.gz")
    with pytest.raises(RequestError) as caught:
        sessions.add_session(str(upload), uncompress=True)
    assert caught.value.status in (413, 415)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    # The upload is its sender's.
    assert left == [upload] and dict(sessions) == {}


def test_a_header_of_many_megabytes_is_not_taken_into_memory(sessions, tmp_path):
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.XHDTYPE, 1 << 25
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(TooLarge, match="short headers"):
        sessions.add_session(str(tmp_path / "a.tar"), uncompress=True)


@pytest.mark.parametrize("pack", [packed, zipped])
def test_of_a_packed_file_only_images_are_kept(sessions, tmp_path, pack):
    series = [
        path.read_bytes() for path in sorted(write_series(tmp_path / "ct", np.zeros((2, 8, 8), np.int16)).iterdir())
    ]
    others = [("series/sitecustomize.py", b"import os"), ("series/._1", b"x"), ("__MACOSX/._1.dcm", b"x")]
    upload = pack(tmp_path / "a", ("series/1", series[0]), ("series/2", series[1]), *others)
    session_id, session = sessions.add_session(str(upload), uncompress=True)
    files = {path.name: path.read_bytes() for path in Path(session.path).rglob("*") if path.is_file()}
    assert files.pop("meta.info", None) is not None
    assert files == {"1": series[0], "2": series[1]} and session.image.endswith("/series")
    assert sessions.get_session(session_id).image == session.image
    sessions.remove_session(session_id)
    assert sessions.get_session(session_id) is None and not Path(session.path).exists()


def test_an_upload_without_an_image_becomes_no_session(sessions, tmp_path):
    for name, pack in (("sitecustomize.py", None), ("b.zip", zipped)):
        upload = pack(tmp_path / "b", ("a.py", b"x"), ("c/d.txt", b"y")) if pack else tmp_path / "up" / name
        if not pack:
            upload.parent.mkdir()
            upload.write_bytes(b"import os")
        with pytest.raises(UnsupportedFile, match="expected images"):
            sessions.add_session(str(upload), uncompress=pack is not None)
    assert not list((tmp_path / "sessions").glob("*/*"))


def test_a_single_image_becomes_a_session_if_its_content_is_its_names(sessions, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert sessions.add_session(str(tmp_path / "a.png"))[1].image.endswith("a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UnsupportedFile):
        sessions.add_session(str(tmp_path / "b.png"))


@pytest.mark.parametrize("session_id", ["..", ".", "../x", "/etc", "", "x", "a\0b", "{" + "0" * 32 + "}"])
def test_ids_that_the_server_did_not_give_touch_nothing(sessions, tmp_path, session_id):
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "kept").write_text("x")
    (tmp_path / "meta.info").write_text('{"image": "/etc/passwd"}')
    for call in (sessions.get_session, sessions.remove_session):
        with pytest.raises(NotFound):
            call(session_id)
    assert (tmp_path / "sessions" / "kept").exists() and (tmp_path / "meta.info").exists()


def test_a_session_whose_record_names_a_file_elsewhere_is_none(sessions, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    session_id, session = sessions.add_session(str(tmp_path / "a.png"))
    session.image = "/etc/passwd"
    assert sessions.get_session(session_id) is None


def test_only_expired_sessions_of_the_server_are_removed(sessions, tmp_path):
    for name in "ab":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    old, _ = sessions.add_session(str(tmp_path / "a.png"), expiry=10)
    new, _ = sessions.add_session(str(tmp_path / "b.png"), expiry=3000)
    (tmp_path / "sessions" / "stranger").mkdir()
    sessions[old].last_access_ts -= 100
    sessions._write_meta_info(old, sessions[old])
    assert sessions.remove_expired() == 1
    assert sorted(path.name for path in (tmp_path / "sessions").iterdir()) == sorted([new, "stranger"])


def test_a_packed_file_that_unpacks_to_a_hundred_times_its_size_is_a_bomb(tmp_path):
    """However much an upload may unpack to, filling the disk with zeros takes an attacker nothing."""
    sessions = ConfinedSessions(str(tmp_path / "sessions"), 3600, 1 << 40)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("zeros", "w") as member:
            for _ in range(80):
                member.write(bytes(1 << 20))
    with pytest.raises(TooLarge, match="at most 64 MB"):
        sessions.add_session(str(tmp_path / "a.zip"), uncompress=True)


def test_folders_of_a_packed_file_are_made_for_files_only_and_counted(sessions, tmp_path, monkeypatch):
    """A hundred bytes of a packed file make thirty folders, and each takes the disk its time."""
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "PNG")
    few = zipped(tmp_path / "few.zip", *((f"d{n}/", b"") for n in range(50)), ("a.png", picture.getvalue()))
    made: list[Path] = []
    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda self, *given, **more: (made.append(self), mkdir(self, *given, **more)))
    sessions.add_session(str(few), uncompress=True)
    assert not [path for path in made if path.name.startswith("d")]
    monkeypatch.setattr("lib.stores.sessions.MOST_MEMBERS", 100)
    members = [("/".join([f"d{n}", *"b" * 30, "x.png"]), picture.getvalue()) for n in range(4)]
    with pytest.raises(TooLarge, match="members and folders"):
        sessions.add_session(str(zipped(tmp_path / "deep.zip", *members)), uncompress=True)
    sessions.add_session(str(zipped(tmp_path / "less.zip", *members[:3])), uncompress=True)


def tar_of(path: Path, *blocks: tuple[bytes, bytes]) -> Path:
    """A TAR file of raw members: type and content."""
    content = b""
    for number, (kind, body) in enumerate(blocks):
        member = tarfile.TarInfo(f"{number}.nii")
        member.type, member.size = kind, len(body)
        content += member.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % tarfile.BLOCKSIZE)
    path.write_bytes(content + bytes(2 * tarfile.BLOCKSIZE))
    return path


LONG_HEADERS = {
    "long": [(tarfile.XHDTYPE, b"6 a=b\n" * 20_000)],
    "together": [(tarfile.XHDTYPE, b"60008 a=" + b"x" * 59_999 + b"\n"), (tarfile.REGTYPE, b"")] * 4,
    "digits": [(tarfile.XHDTYPE, b"1" * 60_000)],
    "records": [(tarfile.XHDTYPE, b"6 a=b\n" * 85), (tarfile.REGTYPE, b"")] * 20,
    "keys": [(tarfile.XGLTYPE, b"".join(b"8 %03d=b\n" % key for key in range(200)))],
}


@pytest.mark.parametrize("name", LONG_HEADERS)
def test_a_tar_file_whose_headers_are_long_is_refused_before_they_are_understood(sessions, tmp_path, monkeypatch, name):
    monkeypatch.setattr("lib.stores.sessions.ALL_HEADERS", 200_000)
    monkeypatch.setattr("lib.stores.sessions.MOST_RECORDS", 1000)
    sent = tar_of(tmp_path / "a.tar", *LONG_HEADERS[name], (tarfile.REGTYPE, b"x"))
    with pytest.raises(TooLarge, match="short headers"):
        sessions.add_session(str(sent), uncompress=True)


def test_headers_as_programs_write_them_are_read(sessions, tmp_path):
    image = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(image, "PNG")
    name = f"2.25.{'7' * 39}/{'long' * 40}.png"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size, member.mtime = len(image.getvalue()), 1.5
        member.pax_headers = {"SCHILY.xattr.user.note": "n" * 3000}
        archive.addfile(member, io.BytesIO(image.getvalue()))
    _, session = sessions.add_session(str(tmp_path / "a.tar.gz"), uncompress=True)
    assert Path(session.image).read_bytes() == image.getvalue()


def test_members_of_a_zip_file_are_counted_before_one_is_unpacked(sessions, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.stores.sessions.MOST_MEMBERS", 10)
    sent = zipped(tmp_path / "a.zip", *((f"{number}.nii", b"x") for number in range(11)))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *arguments: pytest.fail("unpacked"))
    with pytest.raises(TooLarge, match="at most 10 members"):
        sessions.add_session(str(sent), uncompress=True)


def test_what_is_left_out_of_a_packed_file_counts_too(sessions, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.stores.sessions.SMALL_ENOUGH", LIMIT)
    sent = packed(tmp_path / "a.tar.gz", (".hidden", bytes(LIMIT + 1)), ("a.nii", b"x"))
    with pytest.raises(TooLarge, match="unpacked"):
        sessions.add_session(str(sent), uncompress=True)


def test_no_folder_is_made_for_a_file_that_is_kept_as_it_is(sessions, tmp_path, monkeypatch):
    made = []
    original = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *given: made.append(given) or original(*given))
    write_series(tmp_path / "s", np.zeros((5, 4, 4), np.int16))
    members = ((path.name, path.read_bytes()) for path in (tmp_path / "s").iterdir())
    _, session = sessions.add_session(str(zipped(tmp_path / "a.zip", *members)), uncompress=True)
    assert len(list(Path(session.image).iterdir())) == 5 and len(made) == 1
