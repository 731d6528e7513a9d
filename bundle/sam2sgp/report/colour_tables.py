"""Names and colours of the classes beside label files, for the programs that open these.

In: class names by value. Out: `labels.json` (which names the classes of a data folder), `labels.txt` (ITK-SNAP:
Segmentation, Import Label Descriptions) and `labels.ctbl` (3D Slicer: add it as data, and choose it as the colour table
of the label map). Colours are those of the report.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from sam2sgp.drawing import class_colour
from sam2sgp.files import write_text

SNAP_HEAD = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
    0     0    0    0        0  0  0    "Clear Label"
"""


def write_colour_tables(folder: str | Path, class_names: Mapping[int, str]) -> None:
    """Write `labels.json`, `labels.txt` and `labels.ctbl` into a folder of label files.

    Where class 1 is the only one, the value 255 has its name and colour in both tables too: binary pictures are written
    as 0 and 255.
    """
    folder = Path(folder)
    named = json.dumps({str(value): name for value, name in class_names.items()}, indent=2, ensure_ascii=False)
    write_text(folder / "labels.json", f"{named}\n")
    values = {value: (class_colour(value), " ".join(name.split())) for value, name in sorted(class_names.items())}
    if list(values) == [1]:
        values[255] = values[1]
    snap, slicer = SNAP_HEAD, "# 3D Slicer color table\n0 Background 0 0 0 0\n"
    for value, ((red, green, blue), name) in values.items():
        quoted = name.replace('"', "'")
        snap += f'{value:5d} {red:5d}{green:5d}{blue:5d}        1  1  1    "{quoted}"\n'
        # The words of a name are told from the numbers behind it by blanks.
        slicer += f"{value} {name.replace(' ', '_') or '_'} {red} {green} {blue} 255\n"
    write_text(folder / "labels.txt", snap)
    write_text(folder / "labels.ctbl", slicer)
