"""Work in the background: one run at a time, shared by those who may share it, and never waited for too long."""

import threading
import time

import pytest

from lib.refresher import Refresher

SOON = 10.0


class Work:
    """Waits in each run until it may go on; numbers of the runs that were begun and done."""

    def __init__(self) -> None:
        self.at_work, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.begun = self.done = 0

    def __call__(self) -> None:
        self.begun += 1
        self.at_work.release()
        assert self.go_on.acquire(timeout=SOON)
        self.done += 1


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def refresher(work):
    made = Refresher(work, "test")
    assert not made.run(0.0) and work.at_work.acquire(timeout=SOON)
    return made


def test_what_is_asked_for_during_a_run_is_done_from_its_beginning_by_one_more(work, refresher):
    assert not any(refresher.run(0.0) for _ in range(20))
    work.go_on.release()
    assert work.at_work.acquire(timeout=SOON) and not refresher.run(0.0)
    work.go_on.release(2)
    assert refresher.run(SOON) and (work.begun, work.done) == (3, 3)
    work.go_on.release()
    assert refresher.run(SOON) and work.done == 4


def test_a_run_that_began_late_enough_is_shared(work, refresher):
    assert not refresher.run(0.0, since=time.monotonic() - 100.0)
    work.go_on.release()
    assert refresher.run(SOON, since=time.monotonic() - 100.0)
    assert work.done == work.begun == 1


def test_nobody_waits_for_a_run_that_takes_longer_than_they_would(work, refresher):
    started = time.monotonic()
    assert not any(refresher.run(0.05) for _ in range(100))
    assert time.monotonic() - started < 100 * 0.05 / 2
    work.go_on.release(2)


def test_work_that_fails_is_told_and_done_again(caplog):
    outcomes = [None, ValueError("torn")]

    def work():
        if (outcome := outcomes.pop()) is not None:
            raise outcome

    refresher = Refresher(work, "fragile")
    assert refresher.run(SOON) and "fragile failed" in caplog.text and "torn" in caplog.text
    assert refresher.run(SOON) and outcomes == []
