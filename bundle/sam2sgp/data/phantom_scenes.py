"""Pictures and volumes of phantoms: targets among distractors, in the looks of four modalities.

Every picture or volume shows up to three target structures, a disc, an ellipse and a ring, in random places among
structures that belong to no class. Each target is a class of its own, told by how it looks and never by where it lies,
so a network that doesn't read its support set can't know which of them is asked for. How a class looks differs between
modalities and is consistent within one:

    ====  ================================  =========================  ==============================================
    look  disc                              ellipse                    ring
    ====  ================================  =========================  ==============================================
    ct    bright, even (contrast-enhanced)  darker than tissue         wall brighter than tissue around gas
    mr    bright, even                      dark                       spoked wall, as bright as the disc, dark lumen
    us    bright, shadow behind             black, enhancement behind  bright wall around a dark lumen
    rgb   red                               pale blue, striped         purple spoked wall around a white lumen
    ====  ================================  =========================  ==============================================

On a 128 x 128 px image a disc is 28..38 px wide, an ellipse 36..44 x 21..26 px, a ring 34..42 px with a wall of at
least 9 px: each covers 3..8 % of the image (of a volume, in its largest slice). One image in four lacks one class.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve

from sam2sgp.errors import ConfigError

CLASS_NAMES = {1: "disc", 2: "ellipse", 3: "ring"}
VOLUME_LOOKS = {"ct": "CT", "mr": "MR"}
PICTURE_LOOKS = {"us": "US", "rgb": "RGB"}
LOOKS = VOLUME_LOOKS | PICTURE_LOOKS

SPACING_MM = (0.8, 0.8, 3.0)
# The sizes below are for an image of this many pixels and scale with the square root of the image's area.
REFERENCE_SIDE = 128
GAP = 3.5
LACKING_PROBABILITY = 0.25
MIN_SIDE, MIN_SLICES = 64, 6


@dataclass(frozen=True)
class _Shape:
    """A lobed ellipse, possibly hollow, that tapers off along z. Lengths in pixels, z in slices."""

    kind: str
    half_axes: tuple[float, float]
    angle: float = 0.0
    hole: float = 0.0  # share of the half axes
    lobes: tuple[tuple[int, float, float], ...] = ()  # (order, amplitude, phase)
    centre: tuple[float, float] = (0.0, 0.0)  # (row, column)
    z: float = 0.0
    half_depth: float = 1.0

    def polar(self, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(2, H, W) pixel coordinates -> along the long axis (px), angle (rad), radius (1: the outline), all (H, W)."""
        rows, columns = grid[0] - self.centre[0], grid[1] - self.centre[1]
        along = columns * np.cos(self.angle) + rows * np.sin(self.angle)
        across = rows * np.cos(self.angle) - columns * np.sin(self.angle)
        along_unit, across_unit = along / self.half_axes[0], across / self.half_axes[1]
        theta = np.arctan2(across_unit, along_unit)
        outline = 1.0 + sum(amplitude * np.cos(order * theta + phase) for order, amplitude, phase in self.lobes)
        return along, theta, np.hypot(along_unit, across_unit) / outline

    def depths(self, grid: np.ndarray, num_slices: int) -> tuple[np.ndarray, np.ndarray]:
        """Depth under the surface, of the structure and of its lumen: two (Z, H, W) in px, positive inside."""
        offset = (np.arange(num_slices) - self.z) / self.half_depth
        scale = np.sqrt(np.maximum(0.0, 1.0 - offset**4))[:, None, None]
        radius = self.polar(grid)[2]
        pixels = np.sqrt(self.half_axes[0] * self.half_axes[1])
        lumen = (scale * self.hole - radius) * pixels
        wall = np.minimum((scale - radius) * pixels, -lumen) if self.hole else (scale - radius) * pixels
        absent = np.broadcast_to(scale == 0, wall.shape)
        return np.where(absent, -np.inf, wall), np.where(absent, -np.inf, lumen)


@dataclass(frozen=True)
class _Scene:
    """What lies where in an image. body: (H, W) depth under its surface in px, positive inside. unit: px per 1/128."""

    grid: np.ndarray
    body: np.ndarray
    shapes: tuple[_Shape, ...]
    num_slices: int
    unit: float

    def label(self) -> np.ndarray:
        """(Z, H, W) uint8 class map."""
        label = np.zeros((self.num_slices, *self.body.shape), np.uint8)
        numbers = {name: number for number, name in CLASS_NAMES.items()}
        for shape in self.shapes:
            if shape.kind in numbers:
                label[shape.depths(self.grid, self.num_slices)[0] > 0] = numbers[shape.kind]
        return label


def _draw_shape(kind: str, rng: Generator, unit: float, num_slices: int) -> _Shape:
    """A structure of that kind with a random size, angle, outline and place along z, its centre still at (0, 0)."""
    hole, wobble = 0.0, 0.025
    if kind == "disc":
        long = short = rng.uniform(14, 19)
    elif kind == "ellipse":
        long, short = rng.uniform(18, 22), rng.uniform(10.5, 13)
    elif kind == "ring":
        long = short = rng.uniform(17, 21)
        hole = 1.0 - rng.uniform(9.5, 10.5) / long
    elif kind == "dot":
        long = short = rng.uniform(2.5, 4)
    elif kind == "bar":
        long, short = rng.uniform(11, 15), rng.uniform(2.5, 3.5)
    elif kind == "blob":
        long, short, wobble = rng.uniform(8, 10), rng.uniform(7, 8), 0.14
    else:  # bone
        long, short, wobble = rng.uniform(10, 12), rng.uniform(7.5, 9), 0.05
    half_depth = rng.uniform(0.28, 0.4) * num_slices
    inside = min(half_depth, (num_slices - 1) / 2)
    return _Shape(
        kind=kind,
        half_axes=(long * unit, short * unit),
        angle=0.0 if kind == "bone" else rng.uniform(0, np.pi),
        hole=hole,
        lobes=tuple((order, wobble * rng.uniform(0.3, 1), rng.uniform(0, 2 * np.pi)) for order in (2, 3, 5)),
        z=rng.uniform(inside, num_slices - 1 - inside) if num_slices > 1 else 0.0,
        half_depth=10.0 * num_slices if kind in ("bone", "bar") else half_depth,
    )


def _place(shape: _Shape, free: np.ndarray, gap: float, rng: Generator) -> _Shape | None:
    """The shape at a place drawn evenly from all places where it and the gap around it lie in free space (H, W)."""
    reach = int(np.ceil(1.3 * shape.half_axes[0] + gap)) + 1
    grid = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    # Without its hole: nothing else may lie inside a ring.
    footprint = replace(shape, hole=0.0, half_depth=np.inf).depths(grid, 1)[0][0] > -gap
    taken = np.pad(~free, reach, constant_values=True).astype(np.float32)
    hits = fftconvolve(taken, footprint[::-1, ::-1].astype(np.float32), mode="valid")
    rows, columns = np.nonzero(hits < 0.5)
    if not len(rows):
        return None
    chosen = rng.integers(len(rows))
    return replace(shape, centre=(float(rows[chosen]), float(columns[chosen])))


def _fan(grid: np.ndarray, half_angle: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A convex probe's field of view: depth inside it (px), distance from the probe (px), beam angle (rad), (H, W)."""
    height, width = grid.shape[1:]
    rows, columns = grid[0] + 0.3 * height, grid[1] - (width - 1) / 2
    distance, angle = np.hypot(rows, columns), np.arctan2(columns, rows)
    nearest, farthest = 0.33 * height, 1.27 * height
    inside = np.minimum(np.minimum(distance - nearest, farthest - distance), (half_angle - np.abs(angle)) * distance)
    return inside, distance - nearest, angle


def _draw_scene(look: str, rng: Generator, height: int, width: int, num_slices: int) -> _Scene:
    unit = np.sqrt(height * width) / REFERENCE_SIDE
    grid = np.mgrid[:height, :width].astype(np.float32)
    # A draw whose targets don't all fit is thrown away whole, so that none is squeezed into what the others left.
    for _ in range(100):
        if look == "us":
            body, probe_distance, _ = _fan(grid, rng.uniform(0.47, 0.51))
            free = (body > 2 * unit) & (probe_distance > 0.1 * height)
        else:
            outline = _Shape(
                "body",
                (width * rng.uniform(0.45, 0.475), height * rng.uniform(0.425, 0.46)),
                lobes=((2, 0.015, rng.uniform(0, 2 * np.pi)), (3, 0.015, rng.uniform(0, 2 * np.pi))),
                centre=((height - 1) / 2 + rng.uniform(-2, 2) * unit, (width - 1) / 2 + rng.uniform(-2, 2) * unit),
            )
            body = outline.depths(grid, 1)[0][0]
            free = body > 5 * unit
        shapes = []
        if look == "ct":
            bone = _draw_shape("bone", rng, unit, num_slices)
            row = np.nonzero(free.any(1))[0].max() - bone.half_axes[1]
            bone = replace(bone, centre=(row, (width - 1) / 2 + rng.uniform(-6, 6) * unit))
            shapes.append(bone)
            free &= bone.depths(grid, 1)[0][0] < -1.5 * unit
        targets = list(rng.permutation(list(CLASS_NAMES.values())))
        if rng.random() < LACKING_PROBABILITY:
            targets.pop()
        others = ["blob", "bar"] + ["dot"] * int(rng.integers(2, 5))
        for kind in targets + others:
            shape = _place(_draw_shape(kind, rng, unit, num_slices), free, GAP * unit / 2, rng)
            if shape is not None:
                shapes.append(shape)
                solid = replace(shape, hole=0.0, half_depth=np.inf)
                free &= solid.depths(grid, 1)[0][0] < -GAP * unit / 2
        if {shape.kind for shape in shapes} >= set(targets):
            return _Scene(grid, body, tuple(shapes), num_slices, unit)
    raise ConfigError(f"The structures of a phantom don't fit into {height} x {width} px; choose a squarer size.")


def _cover(depth: np.ndarray, softness: float = 1.5) -> np.ndarray:
    """Share of each pixel inside a surface whose edge is `softness` px wide: 0.5 at depth 0."""
    return np.clip(0.5 + depth / softness, 0.0, 1.0)


def _mix(below: np.ndarray, above: np.ndarray | float, cover: np.ndarray) -> np.ndarray:
    return below + cover * (above - below)


def _noise(rng: Generator, shape: tuple[int, ...], sigma: float | tuple[float, ...]) -> np.ndarray:
    """Gaussian noise smoothed by sigma px (along z not at all), of standard deviation 1."""
    in_plane = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    noise = gaussian_filter(rng.standard_normal(shape, np.float32), (0.0, *in_plane), mode="reflect")
    return noise / noise.std()


def draw_patient(look: str, rng: Generator) -> dict:
    """What one patient's images have in common: a level, or a colour, for each kind of structure, and the scanner's."""
    u = rng.uniform
    if look == "ct":
        return {
            "fat": u(-115, -90), "tissue": u(42, 62), "disc": u(170, 205), "ellipse": u(-50, -25), "ring": u(112, 135),
            "lumen": u(-750, -550), "bone": u(380, 560), "dot": u(215, 245), "bar": u(-95, -75), "blob": u(72, 84),
            "noise": u(9, 15), "ras": bool(rng.integers(2)),
        }  # fmt: skip
    if look == "mr":
        return {
            "fat": u(0.8, 1.0), "tissue": u(0.40, 0.5), "disc": u(0.76, 0.95), "ellipse": u(0.10, 0.2),
            "ring": u(0.7, 0.95), "lumen": u(0.12, 0.28), "dot": u(0.0, 0.1), "bar": u(0.62, 0.72),
            "blob": u(0.52, 0.60), "noise": u(0.025, 0.045), "scale": 10 ** u(1.5, 3.3), "offset": u(0.0, 0.3),
            "ras": bool(rng.integers(2)),
        }  # fmt: skip
    if look == "us":
        return {
            "tissue": u(0.08, 0.11), "disc": u(0.7, 0.95), "ellipse": u(0.006, 0.01), "ring": u(0.3, 0.42),
            "lumen": u(0.015, 0.025), "dot": u(0.5, 0.9), "bar": u(0.25, 0.4), "blob": u(0.04, 0.06),
            "attenuation_db": u(8, 13),
        }  # fmt: skip
    gain = u(0.93, 1.04, 3)
    colours = {
        "slide": (0.95, 0.94, 0.95), "tissue": (0.90, 0.66, 0.78), "disc": (0.72, 0.17, 0.20),
        "ellipse": (0.66, 0.77, 0.90), "ring": (0.46, 0.27, 0.62), "lumen": (0.94, 0.92, 0.95),
        "dot": (0.30, 0.18, 0.48), "bar": (0.80, 0.42, 0.56), "blob": (0.93, 0.78, 0.70),
    }  # fmt: skip
    return {kind: np.array(colour) * gain + u(-0.025, 0.025, 3) for kind, colour in colours.items()}


def _spokes(shape: _Shape, grid: np.ndarray, unit: float) -> np.ndarray:
    """(H, W) in [-1, 1]: spokes about 6 px apart half way through a ring's wall."""
    middle = shape.half_axes[0] * (1 + shape.hole) / 2
    return np.cos(round(2 * np.pi * middle / (6 * unit)) * shape.polar(grid)[1])


def _render_ct(scene: _Scene, patient: dict, rng: Generator) -> np.ndarray:
    """(Z, H, W) int16 in HU."""
    size = (scene.num_slices, *scene.body.shape)
    hu = _mix(np.full(size, -1000.0), patient["fat"], _cover(scene.body))
    tissue = patient["tissue"] + 5 * _noise(rng, size, 4 * scene.unit)
    hu = _mix(hu, tissue, _cover(scene.body - 4 * scene.unit))
    for shape in scene.shapes:
        wall, lumen = shape.depths(scene.grid, scene.num_slices)
        if shape.kind == "bone":
            hu = _mix(hu, patient["bone"], _cover(wall))
            hu = _mix(hu, 0.4 * patient["bone"], _cover(wall - 2.5 * scene.unit, 3.0))  # marrow
            continue
        if shape.hole:
            hu = _mix(hu, patient["lumen"], _cover(lumen))
        hu = _mix(hu, patient[shape.kind], _cover(wall))
    hu += patient["noise"] * _noise(rng, size, 0.7)
    return np.clip(np.round(hu), -1024, 1500).astype(np.int16)


def _render_mr(scene: _Scene, patient: dict, rng: Generator) -> np.ndarray:
    """(Z, H, W) float32 in arbitrary units."""
    size = (scene.num_slices, *scene.body.shape)
    signal = _mix(np.zeros(size), patient["fat"], _cover(scene.body))
    tissue = patient["tissue"] + 0.03 * _noise(rng, size, 3 * scene.unit)
    signal = _mix(signal, tissue, _cover(scene.body - 3.5 * scene.unit))
    for shape in scene.shapes:
        wall, lumen = shape.depths(scene.grid, scene.num_slices)
        level = patient[shape.kind]
        if shape.hole:
            signal = _mix(signal, patient["lumen"], _cover(lumen))
            level = level * (0.8 + 0.25 * _spokes(shape, scene.grid, scene.unit))
        signal = _mix(signal, level, _cover(wall))
    rows, columns = (2 * axis / axis.max() - 1 for axis in scene.grid)
    slope, bend = rng.uniform(-0.18, 0.18, 2), rng.uniform(-0.1, 0.1, 2)
    signal = signal * np.exp(slope[0] * rows + slope[1] * columns + bend[0] * rows**2 + bend[1] * rows * columns)
    real, imaginary = patient["noise"] * rng.standard_normal((2, *size))
    return (patient["scale"] * (np.hypot(signal + real, imaginary) + patient["offset"])).astype(np.float32)


def _render_us(scene: _Scene, patient: dict, rng: Generator) -> np.ndarray:
    """(1, H, W) uint8: log-compressed echoes over 50 dB."""
    height, size = scene.body.shape[0], (1, *scene.body.shape)
    _, probe_distance, beam = _fan(scene.grid, 0.0)
    echo = patient["tissue"] * np.exp(0.25 * _noise(rng, size, (2 * scene.unit, 5 * scene.unit)))
    layers = np.cos(probe_distance / (1.1 * scene.unit)) > 0.2
    echo = np.where((probe_distance < 0.09 * height) & layers, 3.5 * patient["tissue"], echo)
    behind = np.zeros(size)
    for shape in scene.shapes:
        wall, lumen = shape.depths(scene.grid, 1)
        if shape.hole:
            echo = _mix(echo, patient["lumen"], _cover(lumen))
        echo = _mix(echo, patient[shape.kind], _cover(wall, 2.5))
        decibel = {"disc": -7.0, "ellipse": 4.0}.get(shape.kind)
        if decibel is not None:
            row, column = (int(c) for c in shape.centre)
            half_width = 0.85 * shape.half_axes[1] / (probe_distance[row, column] + 0.33 * height)
            across = _cover(half_width - np.abs(beam - beam[row, column]), 0.05)
            along = _cover(probe_distance - probe_distance[row, column], 4 * scene.unit)
            behind += decibel * across * along * (wall < 0)
    real, imaginary = (_noise(rng, size, (0.5 * scene.unit, 1.0 * scene.unit)) for _ in range(2))
    decibel = 20 * np.log10(echo * np.hypot(real, imaginary) + 1e-4) + behind
    decibel -= patient["attenuation_db"] * probe_distance / height
    grey = np.clip(1.05 + decibel / 50, 0, 1) * _cover(scene.body)
    return np.round(255 * grey).astype(np.uint8)


def _render_rgb(scene: _Scene, patient: dict, rng: Generator) -> np.ndarray:
    """(1, H, W, 3) uint8: a stained tissue section on a bright slide."""
    size, grid = (1, *scene.body.shape), scene.grid
    fibres = _noise(rng, size, (0.8 * scene.unit, 4 * scene.unit))[..., None]
    tissue = patient["tissue"] * (1 + 0.05 * fibres)
    nuclei = (_noise(rng, size, 0.9 * scene.unit) > 2.2)[..., None]
    tissue = np.where(nuclei, 0.5 * (tissue + patient["dot"]), tissue)
    picture = _mix(np.broadcast_to(patient["slide"], (*size, 3)), tissue, _cover(scene.body, 3.0)[None, ..., None])
    grain = _noise(rng, size, 0.8 * scene.unit)[..., None]
    for shape in scene.shapes:
        wall, lumen = (depth[..., None] for depth in shape.depths(grid, 1))
        colour = patient[shape.kind]
        if shape.kind == "disc":
            colour = colour * (1 + 0.12 * grain)
        elif shape.kind == "ellipse":
            stripes = np.cos(2 * np.pi * shape.polar(grid)[0] / (6 * scene.unit))
            colour = colour * (1 + 0.13 * stripes[None, ..., None])
        elif shape.kind == "ring":
            picture = _mix(picture, patient["lumen"], _cover(lumen))
            colour = colour * (1 + 0.22 * _spokes(shape, grid, scene.unit)[None, ..., None])
        picture = _mix(picture, colour, _cover(wall))
    picture = picture * (1 + rng.uniform(-0.1, 0.1) * (grid[1] / grid[1].max() - 0.5))[None, ..., None]
    picture = picture + 0.012 * rng.standard_normal(picture.shape)
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)


_RENDERERS = {"ct": _render_ct, "mr": _render_mr, "us": _render_us, "rgb": _render_rgb}


def check_size(size: Sequence[int]) -> None:
    """Raise ConfigError for a size (height, width) on which the targets have no place."""
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise ConfigError(f"A phantom's size is (height, width) of at least {MIN_SIDE} px each, not {tuple(size)}.")


def draw_picture(look: str, patient: dict, rng: Generator, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A picture of a patient of `draw_patient` and its label map, see `phantom_picture`."""
    height, width = size
    scene = _draw_scene(look, rng, height, round(1.25 * width) if look == "us" else width, 1)
    return _RENDERERS[look](scene, patient, rng)[0], scene.label()[0]


def phantom_picture(look: str, rng: Generator, size: Sequence[int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """One picture of a new patient.

    Args:
        look: "us" or "rgb".
        rng: source of all random choices.
        size: (height H, width W) in pixels; an ultrasound picture is a quarter wider than W.

    Returns:
        image: "us" (H, 1.25 W) uint8 grey, "rgb" (H, W, 3) uint8. label: (rows, columns) uint8 map of `CLASS_NAMES`.

    Raises:
        ConfigError: a look that isn't made as pictures, or a size that is too small.
    """
    if look not in PICTURE_LOOKS:
        raise ConfigError(f"Phantom pictures come in the looks {', '.join(PICTURE_LOOKS)}, not {look!r}.")
    check_size(size)
    return draw_picture(look, draw_patient(look, rng), rng, size)


def phantom_volume(
    look: str, rng: Generator, size: Sequence[int] = (128, 128), num_slices: int = 12, oblique: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One axial volume of a new patient, stored in RAS or LPS order as the patient will have it.

    Args:
        look: "ct" or "mr".
        rng: source of all random choices.
        size: (height Y, width X) of a slice in pixels.
        num_slices: Z; the first and the last slice hold no target.
        oblique: tilt the slices out of the axial plane by 4 to 9 degrees about two axes.

    Returns:
        image: (X, Y, Z), "ct" int16 in HU, "mr" float32 in arbitrary units. label: (X, Y, Z) uint8 map of
        `CLASS_NAMES`. affine: (4, 4) voxel index -> RAS+ mm, as nibabel has it, with a spacing of 0.8 x 0.8 x 3 mm.

    Raises:
        ConfigError: a look that isn't made as volumes, a size that is too small or too few slices.
    """
    if look not in VOLUME_LOOKS:
        raise ConfigError(f"Phantom volumes come in the looks {', '.join(VOLUME_LOOKS)}, not {look!r}.")
    check_size(size)
    if num_slices < MIN_SLICES:
        raise ConfigError(f"A phantom volume needs at least {MIN_SLICES} slices, not {num_slices}.")
    patient = draw_patient(look, rng)
    scene = _draw_scene(look, rng, size[0], size[1], num_slices)
    # Rows run to posterior and columns to the patient's left: transposed, that is LPS.
    image, label = (array.transpose(2, 1, 0) for array in (_RENDERERS[look](scene, patient, rng), scene.label()))
    directions = np.diag([-1.0, -1.0, 1.0])
    if patient["ras"]:
        image, label, directions = image[::-1, ::-1], label[::-1, ::-1], np.eye(3)
    tilt = np.radians(rng.uniform(4, 9, 2))
    if oblique:
        (cx, cz), (sx, sz) = np.cos(tilt), np.sin(tilt)
        about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        directions = about_z @ about_x @ directions
    affine = np.eye(4)
    affine[:3, :3] = directions * SPACING_MM
    middle = (np.array(image.shape) - 1) / 2
    affine[:3, 3] = rng.uniform(-60, 60, 3) - affine[:3, :3] @ middle
    return np.ascontiguousarray(image), np.ascontiguousarray(label), affine
