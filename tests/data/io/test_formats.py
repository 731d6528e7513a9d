"""Names of images."""

import pytest

from sam2sgp.data.io import (
    image_stem,
)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.b.nii.gz", "a.b"), ("x.NII", "x"), ("y.seg.nrrd", "y"), ("z.jpeg", "z"), ("1.2.840.7", "1.2.840.7")],
)
def test_stem(tmp_path, name, stem):
    assert image_stem(tmp_path / name) == stem
