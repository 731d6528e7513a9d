"""How often support items were used."""

from concurrent.futures import ThreadPoolExecutor

from lib.serving.usage import Usage


def test_each_answer_counts_an_item_once_and_restarts_keep_the_counts(tmp_path):
    path = tmp_path / "state" / "usage.sqlite"
    assert Usage(path).counts() == {}
    Usage(path).add(["a", "a", "b"])
    Usage(path).add(["a"])
    assert Usage(path).counts() == {"a": 2, "b": 1}


def test_no_count_is_lost_between_threads(tmp_path):
    usage = Usage(tmp_path / "usage.sqlite")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(usage.add, [["a", "b"]] * 40))
    assert usage.counts() == {"a": 40, "b": 40}


def test_a_damaged_file_costs_the_counts_alone(tmp_path, caplog):
    path = tmp_path / "usage.sqlite"
    path.write_bytes(b"no database at all, " * 100)
    Usage(path).add(["a"])
    assert Usage(path).counts() == {}
    assert "delete the file" in caplog.text
