"""Ids that are accepted; those that are not are tried on the datastores."""

from lib.checks import check_id


def test_ordinary_ids_are_accepted():
    for text in ("A", "patient 7", "1.2.840.1", "Süd_3", "患者", "x" * 180):
        assert check_id(text) == text
