"""Temporary files of a server that has ended, however it did, go at the next start."""

import os
import subprocess
import sys
from pathlib import Path

APP = Path(__file__).parents[2] / "apps" / "sam2sgp"
PROGRAM = """
import sys, tempfile
from pathlib import Path
from lib.scratch import own_temporary_folder
own_temporary_folder(Path(sys.argv[1]))
tempfile.mkstemp()
print(tempfile.gettempdir(), flush=True)
sys.stdin.readline()
"""


def start(tmp: Path, state: str) -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, state],
        env={**os.environ, "TMPDIR": str(tmp), "PYTHONPATH": str(APP)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def test_temporary_files_of_a_server_that_was_killed_are_deleted_at_the_next_start(tmp_path):
    (tmp_path / "of somebody else").touch()
    (tmp_path / "sam2sgp.without.lock").mkdir()
    processes = [start(tmp_path, "/state/a"), start(tmp_path, "/state/b")]
    try:
        (first, killed), (_, alive) = processes
        assert {folder.parent for folder in (killed, alive)} == {tmp_path}
        assert len(list(killed.iterdir())) == 2 and killed.stat().st_mode & 0o777 == 0o700
        first.kill()
        first.wait()
        assert killed.is_dir()
        processes.append(start(tmp_path, "/state/a"))
        after = processes[-1][1]
        assert not killed.exists() and alive.is_dir() and after.is_dir()
        others = {"of somebody else", "sam2sgp.without.lock"}
        assert {path.name for path in tmp_path.iterdir()} == {*others, alive.name, after.name}
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
