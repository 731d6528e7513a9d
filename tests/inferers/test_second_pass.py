"""The second pass in regions of interest."""

from types import SimpleNamespace

import pytest
import torch

from sam2sgp.errors import ConfigError
from sam2sgp.inferers import InferenceSettings, second_pass
from sam2sgp.inferers.second_pass import SecondPass
from sam2sgp.networks import SAM2SGP
from sam2sgp.support import SupportBank, SupportSampler
from sam2sgp.transforms import FitToSquared
from sam2sgp.transforms.array import REGION_FACTOR, Region

SIZE = 64
FULL = 256


def picture(number: int) -> dict:
    """A bright disc of 20 pixels in a large dark image."""
    generator = torch.Generator().manual_seed(number)
    label = torch.zeros(1, FULL, FULL, dtype=torch.long)
    y, x = torch.randint(40, 180, (2,), generator=generator).tolist()
    label[:, y : y + 20, x : x + 20] = 1
    image = 0.2 * torch.rand(1, 1, FULL, FULL, generator=generator) + 0.7 * label[:, None]
    return {"name": str(number), "image": image, "label": label, "patient": str(number), "group": "a"}


def prepare(case: dict) -> dict:
    return FitToSquared(size=SIZE)({**case, "geometry": SimpleNamespace(spacing=None, slice_axis=2)})


def bank(count: int = 4) -> SupportBank:
    return SupportBank([picture(i) for i in range(count)], prepare, progress=False)


def test_region_is_a_square_around_the_mask_and_its_way_back_is_exact():
    mask = torch.zeros(200, 300, dtype=torch.bool)
    mask[50:90, 100:120] = True
    region = Region.around(mask, SIZE)
    rows, columns = region.place
    assert (rows.stop - rows.start, columns.stop - columns.start) == (40 * REGION_FACTOR, 40 * REGION_FACTOR)
    assert ((rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2) == (70, 110)
    cut = region.apply_label(mask[None].to(torch.uint8))
    back = region.restore(cut[:, None].float())[0, 0] > 0.5
    assert (back == mask[rows, columns]).float().mean() > 0.97


def test_region_at_the_border_stays_inside_and_anisotropic_pixels_count_in_mm():
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[:10, 95:] = True
    region = Region.around(mask, SIZE, pixel=(1.0, 2.0))
    rows, columns = region.place
    assert rows.start == 0 and columns.stop == 100
    assert rows.stop - rows.start > columns.stop - columns.start


def test_strays_do_not_stretch_the_region():
    mask = torch.zeros(200, 200, dtype=torch.bool)
    mask[20:60, 20:60] = True
    alone = Region.around(mask, SIZE)
    mask[190, 190] = True
    assert Region.around(mask, SIZE) == alone


def test_large_and_absent_objects_have_no_region():
    mask = torch.zeros(100, 100, dtype=torch.bool)
    assert Region.around(mask, SIZE, below=0.5) is None
    mask[:60, :60] = True
    assert Region.around(mask, SIZE, below=0.5) is None
    assert Region.around(mask, SIZE, below=0.7) is not None


def test_items_hold_their_object_enlarged():
    item = bank().items[0]
    (image,), (mask,) = item.regions[1]
    assert image.shape == (1, SIZE, SIZE) and mask.shape == (SIZE, SIZE)
    assert mask.float().mean() == pytest.approx(1 / REGION_FACTOR**2, rel=0.1)
    assert mask.float().mean() > 10 * (item.label > 0).float().mean()
    assert image.float()[0][mask].mean() > image.float()[0][~mask].mean() + 0.4


@torch.no_grad()
def test_second_pass_averages_in_the_region_and_leaves_the_rest():
    torch.manual_seed(0)
    network = SAM2SGP("nano", SIZE).eval()
    support = bank()
    query = picture(9)
    first = torch.where(query["label"][:, None] > 0, 3.0, -3.0)
    run = SecondPass(support, InferenceSettings(SupportSampler(k=2), region_below=0.4))
    result = run(first.clone(), query["image"], network)
    rows, columns = Region.around(query["label"][0] > 0, SIZE).place
    outside = torch.ones_like(first, dtype=torch.bool)
    outside[..., rows, columns] = False
    assert torch.equal(result[outside], first[outside])
    assert (result[..., rows, columns] != first[..., rows, columns]).float().mean() > 0.9
    off = SecondPass(support, InferenceSettings(SupportSampler(k=2), region_below=0))(
        first.clone(), query["image"], network
    )
    assert torch.equal(off, first)


@torch.no_grad()
def test_own_patient_never_guides_the_second_pass():
    torch.manual_seed(0)
    network = SAM2SGP("nano", SIZE).eval()
    support = bank(2)
    run = SecondPass(support, InferenceSettings(SupportSampler(k=4), region_below=0.4))
    query = picture(0)
    first = torch.where(query["label"][:, None] > 0, 3.0, -3.0)
    without = run(first.clone(), query["image"], network, patient="0")
    alone = SecondPass(
        SupportBank([picture(1)], prepare, progress=False), InferenceSettings(SupportSampler(k=4), region_below=0.4)
    )(first.clone(), query["image"], network)
    torch.testing.assert_close(without, alone, atol=1e-4, rtol=1e-4)


def test_share_must_be_one():
    with pytest.raises(ConfigError, match="region_below"):
        InferenceSettings(region_below=2)


def test_tiles_cover_the_image_overlap_and_are_the_smaller_the_smaller_their_share():
    for share, count in ((0.6, 4), (0.38, 9)):
        tiles = Region.tiles((200, 200), SIZE, share)
        seen = torch.zeros(200, 200)
        for tile in tiles:
            seen[tile.place] += 1
        assert len(tiles) == count and seen.min() >= 1 and seen.max() > 1
        assert all(tile.letterbox.original == (200 * share, 200 * share) for tile in tiles)
    assert len(Region.tiles((50, 200), SIZE, 0.38)) == 3
    (whole,) = Region.tiles((10, 20), SIZE, 1.0)
    assert whole.letterbox.original == (10, 20)


def test_windows_fall_towards_other_parts_of_the_image_only():
    first = Region.tiles((200, 200), SIZE, 0.6)[0].window((200, 200))
    assert first[0, 0] == 1 and first[60, 60] == 1
    assert 0 < first[-1, 0] < 0.1 and 0 < first[0, -1] < 0.1
    total = torch.zeros(200, 200)
    for tile in Region.tiles((200, 200), SIZE, 0.6):
        total[tile.place] += tile.window((200, 200))
    assert total.min() > 0.9


def lines(thickness: int, number: int) -> dict:
    """Bright lines over the whole of a large image, as vessels are."""
    label = torch.zeros(1, FULL, FULL, dtype=torch.long)
    for start in range(20 + number, FULL - 20, 60):
        label[:, start : start + thickness] = 1
    image = 0.2 * torch.rand(1, 1, FULL, FULL, generator=torch.Generator().manual_seed(number)) + 0.7 * label[:, None]
    return {"name": str(number), "image": image, "label": label, "patient": str(number), "group": "a"}


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [18, 5])
def test_thin_targets_are_seen_in_tiles_that_classes_share(monkeypatch, batch_size):
    shares = []
    for thickness in (40, 4, 2):
        made = SupportBank([lines(thickness, i) for i in range(3)], prepare, progress=False)
        shares.append(made.tile_share(0, SIZE))
        assert bool(made.items[0].tiles) == (thickness < 40)
    assert shares[0] is None and shares[1] > shares[2]

    torch.manual_seed(0)
    network = SAM2SGP("nano", SIZE).eval()
    cases = [lines(2, i) for i in range(3)]
    for case in cases:
        case["label"][case["label"].cumsum(1) > 2] *= 2  # all lines but the first are of another class
    made = SupportBank(cases, prepare, progress=False)
    query = lines(2, 7)
    first = torch.where(query["label"][:, None] > 0, 3.0, -3.0).expand(-1, 2, -1, -1).contiguous()
    encoded = []
    encode = network.encode
    run = SecondPass(made, InferenceSettings(SupportSampler(k=2), batch_size=batch_size))
    run(first, query["image"], network)  # encodes the support
    monkeypatch.setattr(network, "encode", lambda image: encoded.append(len(image)) or encode(image))
    result = run(first.clone(), query["image"], network)
    assert sum(encoded) == 9
    assert (result != first).all()


@pytest.mark.parametrize(("parts", "side", "crops"), [(9, 24, 9), (2, 24, 1), (5, 24, 0), (9, 70, 0)])
def test_many_small_parts_are_seen_in_tiles_and_few_or_large_ones_are_not(parts, side, crops, monkeypatch):
    cases = [picture(i) for i in range(3)]
    for case in cases:
        case["label"].zero_()
        for number in range(parts):
            top, left = (5 + 84 * step for step in divmod(number, 3))
            case["label"][:, top : top + side, left : left + side] = 1
    made = SupportBank(cases, prepare, progress=False)
    assert (made.tile_share(0, SIZE) is not None) == (crops == 9)
    network = SAM2SGP("nano", SIZE).eval()
    first = torch.where(cases[0]["label"][:, None] > 0, 3.0, -3.0)
    run = SecondPass(made, InferenceSettings(SupportSampler(k=2), batch_size=9))
    run(first, cases[0]["image"], network)  # encodes the support
    encoded = []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda image: encoded.append(len(image)) or encode(image))
    run(first, cases[0]["image"], network)
    assert sum(encoded) == crops


def test_of_many_classes_the_crops_that_show_most_of_each_come_first(monkeypatch):
    monkeypatch.setattr(second_pass, "MOST_CROPS", 4)
    masks = torch.zeros(3, FULL, FULL, dtype=torch.bool)
    masks[0, 40:60, 40:60], masks[1, :90, :90], masks[1, 200:210, 200:210] = True, True, True
    tiles = Region.tiles((FULL, FULL), SIZE, 0.38)
    crops = [second_pass._Crop(0, 1, tile, masks) for tile in tiles]
    crops += [second_pass._Crop(0, 0, Region.around(masks[0], SIZE), masks)]
    crops += [second_pass._Crop(0, 2, tile, masks) for tile in tiles]
    chosen = second_pass._most_useful(crops, masks)
    assert [(crop.class_index, crop.region) for crop in chosen[:2]] == [(1, tiles[0]), (0, crops[9].region)]
    # The next ones of the second class, and none of the one that isn't there.
    assert len(chosen) == 4 and {crop.class_index for crop in chosen[2:]} == {1}
