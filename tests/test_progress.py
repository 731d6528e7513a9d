"""Progress bars on a terminal and in a log file."""

import io

import pytest

from sam2sgp import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "least", "most"), [(io.StringIO, 2, 3), (Terminal, 50, 300)])
def test_a_log_file_gets_a_line_now_and_then_and_a_terminal_every_step(stream, least, most):
    file = stream()
    with progress.Bar(desc="Segmenting", total=100, file=file, mininterval=0) as bar:
        for step in range(100):
            bar.set_postfix_str(f"case: {step}%")
            bar.update()
    written = file.getvalue().split("\r" if file.isatty() else "\n")
    assert least <= sum("Segmenting" in line for line in written) <= most
    assert "100/100" in "".join(written[-2:])


def test_a_log_file_has_nothing_but_whole_lines_also_of_a_bar_within_another_that_goes_when_done():
    file = io.StringIO()
    with (
        progress.Bar(desc="Encoding", total=2, file=file),
        progress.Bar(desc="Regions", total=2, file=file, leave=False) as inner,
    ):
        inner.update(2)
    assert file.getvalue().endswith("\n")
    assert [line.partition(":")[0] for line in file.getvalue().splitlines()] == ["Encoding", "Regions", "Encoding"]
    assert not {"\r", "\x1b"} & set(file.getvalue())


def test_without_a_console_there_is_no_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress.Bar(range(3))) == [0, 1, 2]


def test_a_line_comes_again_after_a_while(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.Bar(desc="Segmenting", total=10, file=file) as bar:
        for step in range(10):
            bar.set_postfix_str(f"case: {step}")
    assert sum("case" in line for line in file.getvalue().splitlines()) >= 10
