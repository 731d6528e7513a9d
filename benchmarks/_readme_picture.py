"""Draw the README's picture: what the embedded weights make of phantoms, a row for each of their looks.

python benchmarks/_readme_picture.py --phantoms out/demo/phantom --output docs/images/demo.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sam2sgp.data import load_datalist
from sam2sgp.drawing import draw_overlay, to_display
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.networks import SAM2SGP, load_weights
from sam2sgp.support import SupportBank
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd, label_map

TITLES = ("support image and mask", "query", "pseudo-mask and box", "segmentation (truth dashed)")
EDGE, GAP, HEAD = 240, 8, 24


def prepare(case: dict) -> dict:
    for step in (LoadCased(), ScaleIntensityByModalityd(), FitToSquared(size=256)):
        case = step(case)
    return case


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("phantoms", "output"):
        arguments.add_argument(f"--{name}", required=True, type=Path)
    arguments.add_argument("--weights", default=Path(__file__).parents[1] / "bundle/models/model.pt", type=Path)
    options = arguments.parse_args()
    network = SAM2SGP("lite", 256).eval()
    load_weights(network, options.weights)
    looks = sorted(path.name for path in (options.phantoms / "support").iterdir())
    sheet = Image.new("RGB", (4 * EDGE + 3 * GAP, HEAD + len(looks) * (EDGE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(TITLES):
        draw.text((column * (EDGE + GAP) + 4, 4), title, fill="black", font_size=14)
    for row, look in enumerate(looks):
        bank = SupportBank(load_datalist(options.phantoms / "support" / look), prepare, progress=False)
        case = prepare(next(c for c in load_datalist(options.phantoms, "test") if c["group"] == look))
        index = int((case["label"] > 0).flatten(1).sum(1).argmax())
        query, truth = case["image"][index : index + 1], case["label"][index].numpy()
        chunk = next(SupportSetInferer(bank).chunks(query, network))
        item = bank.items[int(chunk.retrieved[0].index[0, 0])]
        picture = to_display(query[0])
        boxes = dict(zip(bank.class_values, chunk.output.box[0].tolist(), strict=True))
        panels = (
            draw_overlay(to_display(item.image.float()), item.label.numpy(), scale=EDGE / 256),
            picture,
            draw_overlay(picture, label_map(chunk.output.pseudo_logits)[0].numpy(), box=boxes, scale=EDGE / 256),
            draw_overlay(picture, label_map(chunk.output.logits)[0].numpy(), truth=truth, scale=EDGE / 256),
        )
        for column, panel in enumerate(panels):
            tile = Image.fromarray(np.asarray(panel)).resize((EDGE, EDGE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * (EDGE + GAP), HEAD + row * (EDGE + GAP)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(200).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
