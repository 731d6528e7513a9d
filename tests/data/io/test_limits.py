"""What an image promises is judged before anything is allocated."""

import os

import pytest

from sam2sgp.data.io import limits
from sam2sgp.errors import DataError, TooLargeError


def test_an_image_may_take_a_quarter_of_the_machines_memory():
    assert limits.default_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def test_memory_is_counted_in_single_precision_and_by_channels(monkeypatch):
    monkeypatch.setattr(limits, "default_memory", lambda: 4 << 20)
    limits.check_memory("a.nii", (1 << 10, 1 << 10))
    for arguments in (((1 << 10, 1025),), ((1 << 10, 1 << 10), 3)):
        with pytest.raises(TooLargeError, match=r"a.nii: expected an image of at most 4 MB in memory, found 1024x102"):
            limits.check_memory("a.nii", *arguments)
    limits.check_memory("a.nii", (1 << 10, 1 << 10), 3, limit=12 << 20)
    with pytest.raises(TooLargeError):
        limits.check_memory("a.nii", (2, 2), limit=15)


def test_missing_voxels_are_told_in_bytes():
    limits.check_present("a.mha", 100, 100)
    with pytest.raises(DataError, match="a.mha: expected 100 bytes of voxels as its header says, found 99"):
        limits.check_present("a.mha", 100, 99)


def test_only_what_is_large_and_shrank_a_hundredfold_is_a_bomb():
    limits.check_ratio("a.nii.gz", limits.SMALL_ENOUGH, 1)
    limits.check_ratio("a.nii.gz", 100 << 20, 1 << 20)
    with pytest.raises(DataError, match="a.nii.gz: expected an image, found 1023 kB that claim to unpack to 100 MB"):
        limits.check_ratio("a.nii.gz", 100 << 20, (1 << 20) - 1024)
