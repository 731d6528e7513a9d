"""The review page in a real browser, on a real server: strokes, keys, pixels, and what is stored of them."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import requests
import SimpleITK as sitk
from PIL import Image
from playwright.sync_api import expect

from lib.stores.audit import Audit
from sam2sgp.data import Geometry, load_datalist, read_image, read_label
from tests.e2e.browsers import keep, page
from tests.e2e.server import serving

USER = "dr.who"
BATCH = "Segment all without a label"


@pytest.fixture(scope="module")
def server(phantoms, tmp_path_factory):
    """Volumes and pictures of phantoms: of each look two have an approved label, the others a prediction."""
    folder = tmp_path_factory.mktemp("review")
    studies = folder / "studies"
    for tag in ("final", "original"):
        (studies / "labels" / tag).mkdir(parents=True)
    for look in ("mr_", "us_"):
        cases = [case for case in load_datalist(phantoms) if case["name"].startswith(look)][:7]
        for place, case in enumerate(cases):
            name = Path(case["image"]).name
            shutil.copy(case["image"], studies / name)
            tag = "final" if place < 2 else "original"
            shutil.copy(case["label"], studies / "labels" / tag / Path(case["label"]).name)
    (studies / "labels.json").write_text(json.dumps({"1": "disc", "2": "ellipse", "3": "ring"}))
    with serving(folder, studies, {"user_header": "X-Remote-User"}) as found:
        yield found


@pytest.fixture
def opened(server):
    with page(1280, 800, extra_http_headers={"X-Remote-User": USER}) as found:
        found.problems, found.hosts = [], set()
        found.on("console", lambda message: found.problems.append(message.text) if message.type == "error" else None)
        found.on("pageerror", lambda error: found.problems.append(str(error)))
        found.on("request", lambda request: found.hosts.add(urlsplit(request.url).netloc))
        # The first route takes hold of a page that is there already a little after Playwright says so, and a request
        # of that moment reaches the server. One that matches nothing is there from the start; more are heeded at once.
        found.route("**/nothing", lambda route: route.abort())
        found.goto(f"{server.url}/sam2sgp/review/")
        yield found


def waiting(server, look: str) -> str:
    """An image with a prediction and no approved label."""
    return min(all_waiting(server, look))


def all_waiting(server, look: str) -> set[str]:
    labels = Path(server.studies) / "labels"
    names = {tag: {path.name for path in (labels / tag).glob(f"{look}*")} for tag in ("final", "original")}
    return {name.split(".")[0] for name in names["original"] - names["final"]}


def files(server, image: str) -> tuple[Path, Path, Path]:
    """Image, prediction and where its approved label will be."""
    studies = Path(server.studies)
    suffix = next(studies.glob(f"{image}.*")).name.removeprefix(image)
    return studies / f"{image}{suffix}", *(
        studies / "labels" / tag / f"{image}{suffix}" for tag in ("original", "final")
    )


def show(opened, image: str) -> None:
    """Open an image by looking for its name."""
    opened.locator("[name=name]").fill(image)
    opened.locator(f"#list [data-image='{image}']").click()
    is_shown(opened, image)
    opened.locator("#picture").focus()


def is_shown(opened, image: str) -> None:
    expect(opened.locator("#panel h2")).to_have_text(image)
    expect(opened.locator("#picture[data-drawn^='" + image + "/']")).to_have_count(1)
    expect(opened.locator("body[aria-busy]")).to_have_count(0)


def place(opened, row: float, column: float) -> tuple[float, float]:
    """Where the centre of a pixel is on the screen, once the picture is drawn at the size that it has by now."""
    opened.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    zoom, stretch, left, top = json.loads(opened.locator("#picture").get_attribute("data-view"))
    box = opened.locator("#picture").bounding_box()
    return box["x"] + left + (column + 0.5) * zoom, box["y"] + top + (row + 0.5) * zoom * stretch


def draw(opened, *pixels: tuple[float, float]) -> None:
    """A stroke through pixels."""
    opened.mouse.move(*place(opened, *pixels[0]))
    opened.mouse.down()
    for pixel in pixels[1:]:
        opened.mouse.move(*place(opened, *pixel), steps=4)
    opened.mouse.up()


def go_to(opened, slice_index: int) -> None:
    opened.keyboard.press("Home")
    for _ in range(slice_index):
        opened.keyboard.press("ArrowDown")
    expect(opened.locator("#picture[data-drawn$='/" + str(slice_index) + "']")).to_have_count(1)


def use_pencil(opened) -> None:
    """A brush of one pixel."""
    opened.locator("#size").fill("1")
    opened.locator("#picture").focus()
    opened.keyboard.press("b")


def colour_at(opened, row: int, column: int) -> list[int]:
    x, y = place(opened, row, column)
    box = opened.locator("#picture").bounding_box()
    read = "(c, [x, y]) => [...c.getContext('2d').getImageData(Math.round(x), Math.round(y), 1, 1).data.slice(0, 3)]"
    return opened.locator("#picture").evaluate(read, [x - box["x"], y - box["y"]])


def approve(opened) -> None:
    with opened.expect_response(lambda answer: answer.url.endswith(("/correct", "/approve"))) as answer:
        opened.keyboard.press("a")
    assert answer.value.status == 200, answer.value.text()


def test_a_stroke_on_one_slice_is_stored_voxel_by_voxel_on_the_images_own_grid(server, opened):
    image = waiting(server, "mr_")
    source, prediction, final = files(server, image)
    geometry = read_image(source).geometry
    before = read_label(prediction, geometry)
    show(opened, image)
    keep(opened, "review_page")
    go_to(opened, 2)
    use_pencil(opened)
    opened.keyboard.press("3")
    grey = colour_at(opened, 5, 10)
    draw(opened, (5, 4), (5, 20))
    expect(opened.locator("#changed")).to_have_text("17 voxels changed")
    green = opened.evaluate("getComputedStyle(document.querySelector('.class.active .swatch')).backgroundColor")
    seen = colour_at(opened, 5, 10)
    assert seen != grey and green == "rgb(0, 158, 115)" and seen[1] > seen[0]
    # Another stroke, taken back.
    draw(opened, (30, 4), (40, 4))
    opened.keyboard.press("Control+z")
    expect(opened.locator("#changed")).to_have_text("17 voxels changed")
    approve(opened)
    expect(opened.locator("#message")).to_have_text(f"Approved {image}.")
    expected = before.copy()
    expected[2, 5, 4:21] = 3
    assert np.array_equal(read_label(final, geometry), expected)
    one, other = sitk.ReadImage(str(source)), sitk.ReadImage(str(final))
    assert one.GetSize() == other.GetSize()
    for what in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert np.allclose(getattr(one, what)(), getattr(other, what)(), atol=1e-6)
    info = requests.get(f"{server.url}/datastore/label/info", params={"label": image, "tag": "final"}).json()
    assert info["user"] == USER and info["corrected"] == {"voxels": 17, "from": "original"}
    log = [json.loads(line) for line in (server.state / "audit.jsonl").read_text().splitlines()]
    assert (log[-1]["action"], log[-1]["image"], log[-1]["user"]) == ("approve", image, USER)
    assert opened.problems == [] and opened.hosts == {urlsplit(server.url).netloc}


def test_one_key_approves_what_is_shown_and_opens_the_next(server, opened):
    image = waiting(server, "us_")
    _, prediction, final = files(server, image)
    content = prediction.read_bytes()
    opened.locator("[name=name]").fill("us_")
    opened.locator("[name=order]").select_option("name")
    # The list in this order: what comes next is taken from it.
    expect(opened.locator(f"#list[data-total='{len(all_waiting(server, 'us_'))}']")).to_have_count(1)
    expect(opened.locator("#row-0")).to_have_attribute("data-image", image)
    opened.locator("#row-0").click()
    is_shown(opened, image)
    opened.locator("#picture").focus()
    # A key that is held decides once.
    sent = []
    opened.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    with opened.expect_response(lambda answer: answer.url.endswith("/approve")):
        for _ in range(3):
            opened.keyboard.down("a")
    after = waiting(server, "us_")
    is_shown(opened, after)
    assert final.read_bytes() == content and after != image and len(sent) == 1
    assert opened.evaluate("document.activeElement.id") == "picture"
    expect(opened.locator(f"#list [data-image='{image}']")).to_have_count(0)
    assert opened.problems == []


def picture_to_paint(server, opened) -> tuple[str, Path, Geometry]:
    """A picture with a prediction, opened with a pencil for class 1; where its draft will be; and its geometry."""
    image = waiting(server, "us_")
    source, _, _ = files(server, image)
    show(opened, image)
    use_pencil(opened)
    opened.keyboard.press("1")
    return image, Path(server.studies) / "labels" / "draft" / source.name, read_image(source).geometry


def test_a_picture_is_erased_filled_and_kept_as_a_draft_and_its_earlier_state_comes_back(server, opened):
    image, draft, geometry = picture_to_paint(server, opened)
    # The outline of a square is painted, its inside filled, one pixel erased; the picture stays where it is.
    box = opened.locator("#picture").bounding_box()
    draw(opened, (2, 2), (2, 8), (8, 8), (8, 2), (2, 2))
    expect(opened.locator("#changed")).to_have_text("24 voxels changed")
    assert opened.locator("#picture").bounding_box() == box
    opened.keyboard.press("f")
    opened.mouse.click(*place(opened, 5, 5))
    opened.keyboard.press("e")
    opened.mouse.click(*place(opened, 4, 6))
    expected = np.ones((7, 7), int)
    expected[2, 4] = 0
    with opened.expect_response(lambda answer: answer.url.endswith("/correct")):
        opened.keyboard.press("d")
    expect(opened.locator("#panel button.tag.shown")).to_have_text("draft")
    assert np.array_equal(read_label(draft, geometry)[0, 2:9, 2:9], expected)
    # The hole is filled and saved; the state before is brought back from the history.
    opened.keyboard.press("h")
    with opened.expect_response(lambda answer: answer.url.endswith("/correct")):
        opened.keyboard.press("d")
    expect(opened.locator("#changed")).to_have_text("")
    assert read_label(draft, geometry)[0, 2:9, 2:9].all()
    opened.get_by_role("button", name="Bring back the draft").click()
    expect(opened.locator("#message")).to_contain_text("The earlier label is a draft now")
    assert np.array_equal(read_label(draft, geometry)[0, 2:9, 2:9], expected)
    with opened.expect_response(lambda answer: answer.url.endswith("/reject")):
        opened.keyboard.press("x")
    assert not draft.exists() and opened.problems == []
    # Another picture comes under its name.
    source = files(server, image)[0]
    content = source.read_bytes()
    with Image.open(source) as picture:
        other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    try:
        other.save(source)
        opened.reload()
        show(opened, image)
        history = opened.locator("#panel [data-part=history]")
        expect(history).to_contain_text("draft by dr.who (of another image, which had this name before)")
        expect(history.get_by_role("button")).to_have_count(0)
    finally:
        source.write_bytes(content)


def test_a_label_that_changed_meanwhile_is_not_written_over_and_nothing_painted_is_lost(server, opened):
    image = waiting(server, "mr_")
    source, prediction, final = files(server, image)
    geometry = read_image(source).geometry
    show(opened, image)
    go_to(opened, 1)
    use_pencil(opened)
    opened.keyboard.press("2")
    draw(opened, (3, 3), (3, 9))
    # Meanwhile a batch inference puts another prediction in its place: without the first class.
    newer = sitk.ReadImage(str(prediction))
    newer = sitk.Cast(newer * sitk.Cast(newer != 1, newer.GetPixelID()), sitk.sitkUInt8)
    other = Path(server.folder) / "newer.nii.gz"
    sitk.WriteImage(newer, str(other))
    with open(other, "rb") as file:
        query = {"image": image, "tag": "original"}
        assert requests.put(f"{server.url}/datastore/label", params=query, files={"label": file}).ok
    with opened.expect_response(lambda answer: answer.url.endswith("/correct")) as answer:
        opened.keyboard.press("a")
    assert answer.value.status == 409 and not final.exists()
    expect(opened.get_by_role("alert")).to_contain_text("expected its label 'original' as it was shown")
    opened.get_by_role("button", name="Put my changes on the newer label").click()
    expect(opened.locator("#message")).to_contain_text("Your changes are on top of the newer label")
    expect(opened.locator("#changed")).to_have_text("7 voxels changed")
    approve(opened)
    expected = read_label(other, geometry)
    expected[1, 3, 3:10] = 2
    assert not (expected == 1).any() and np.array_equal(read_label(final, geometry), expected)
    # The browser itself logs that it was answered 409.
    assert all("409" in problem for problem in opened.problems)


def test_who_may_only_read_is_told_so_and_keeps_what_was_painted(server, opened):
    image = waiting(server, "us_")
    refusal = {"status": 403, "json": {"detail": "You may look, but not change labels."}}
    opened.route("**/correct", lambda route: route.fulfill(**refusal))
    show(opened, image)
    use_pencil(opened)
    draw(opened, (3, 3), (3, 5))
    opened.keyboard.press("a")
    expect(opened.locator("#message.problem")).to_have_text("You may look, but not change labels.")
    expect(opened.locator("#changed")).to_have_text("3 voxels changed")
    expect(opened.locator("#panel h2")).to_have_text(image)


def test_what_a_user_may_not_do_is_disabled_and_what_became_a_draft_is_said(server, opened):
    image = waiting(server, "us_")
    reason = "This needs the role annotator; yours is reader."
    notice = "Saved as a draft: somebody else has to approve it."
    actions = ("segment", "batch", "draft", "bring_back", "approve", "reject")

    def as_reader(route):
        route.fulfill(json={**route.fetch().json(), "not_offered": dict.fromkeys(actions, reason)})

    opened.route("**/queue?*", as_reader)
    opened.reload()
    show(opened, image)
    for name in ("Segment G", "Reject X", "Save draft D", "Approve, next A", "Brush", "Eraser", "Fill", "Holes", BATCH):
        button = opened.get_by_role("button", name=name, exact=True)
        expect(button).to_be_disabled()
        expect(button).to_have_attribute("title", reason)
    expect(opened.get_by_role("button", name="Pan")).to_have_attribute("aria-pressed", "true")
    sent = []
    opened.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    for key in "bagdx":
        opened.keyboard.press(key)
        expect(opened.locator("#message.problem")).to_have_text(reason)
    draw(opened, (3, 3), (3, 5))
    expect(opened.locator("#changed")).to_have_text("")
    assert sent == []
    # As an approver whose own label somebody else has to approve.
    opened.unroute("**/queue?*")
    opened.reload()
    show(opened, image)
    use_pencil(opened)
    draw(opened, (3, 3), (3, 5))
    expect(opened.locator("#changed")).to_have_text("3 voxels changed")
    saved = {"image": image, "label_tag": "draft", "seen": "1-1", "voxels": 3, "notice": notice}
    opened.route("**/correct", lambda route: route.fulfill(json=saved))
    opened.keyboard.press("a")
    expect(opened.locator("#message")).to_have_text(f"{image}: {notice}")
    assert opened.problems == []


def test_what_is_painted_where_slices_have_not_come_is_said_and_a_ball_reaches_all_that_it_should(server, opened):
    image = waiting(server, "mr_")
    held, corrections = [], []

    def slice_by_slice(route):
        """Slices that are thin and come one at a time."""
        case = route.fetch().json()
        route.fulfill(json={**case, "labels_per_request": 1, "spacing": [0.5, 1, 1]})

    def correct(route):
        corrections.append(route.request.post_data_json)
        route.fulfill(status=403, json={"detail": "kept"})

    opened.route("**/case?*", slice_by_slice)
    opened.route("**/labels?*&first=5&*", lambda route: held.append(route))
    opened.route("**/correct", correct)
    # The image may be the one that the page opened first.
    opened.reload()
    show(opened, image)
    go_to(opened, 2)
    use_pencil(opened)
    opened.keyboard.press("1")
    opened.keyboard.press("End")
    message, loading = opened.locator("#message"), re.compile("still loading: paint again in a moment")
    canvas = opened.locator("#picture")
    expect(canvas).to_have_attribute("data-drawn", "")
    for act in (lambda: draw(opened, (3, 3), (3, 5)), lambda: opened.keyboard.press("h")):
        act()
        expect(message).to_have_text(loading)
        message.evaluate("message => (message.textContent = '')")
    assert len(held) == 1
    # A ball of six pixels reaches six slices of half a pixel's thickness: the one that has not come, too.
    opened.keyboard.press("Home")
    opened.keyboard.press("t")
    opened.locator("#size").fill("6")
    canvas.focus()
    draw(opened, (64, 5))
    expect(message).to_have_text(loading)
    expect(opened.locator("#changed")).to_have_text("")
    held.pop().continue_()
    opened.keyboard.press("End")
    is_shown(opened, image)
    opened.keyboard.press("Home")
    draw(opened, (64, 5))
    opened.keyboard.press("d")
    expect(message).to_have_text("kept")
    assert [change["slice"] for change in corrections[0]["changes"]] == [0, 1, 2, 3, 4, 5]


def test_a_list_that_is_overtaken_by_another_opens_what_the_newer_one_holds(server, opened):
    image = waiting(server, "us_")
    held = []
    opened.route("**/queue?*", lambda route: held.append(route))
    opened.reload()
    with opened.expect_request(f"**/queue?*name={image}*"):
        opened.locator("[name=name]").fill(image)
    for route in held:
        with opened.expect_response("**/queue?*"):
            route.continue_()
    is_shown(opened, image)
    expect(opened.locator("#message")).to_have_text("")


def test_a_picture_is_drawn_at_its_new_size_in_the_frame_in_which_it_gets_it(server, opened):
    show(opened, waiting(server, "us_"))
    drawn = opened.locator("#picture").evaluate(
        """async (canvas) => {
            canvas.style.flex = "0 0 300px";
            // Told after the page itself is, before anybody sees the frame.
            await new Promise((done) => new ResizeObserver(done).observe(canvas));
            const { data } = canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1);
            const [zoom] = JSON.parse(canvas.dataset.view);
            return [canvas.height, data[3], Math.round((zoom * 128) / 0.94)];
        }"""
    )
    assert drawn == [300, 255, 300]


def test_an_image_that_cant_be_opened_is_named_marked_and_passed_by_the_keys(server, opened):
    studies = Path(server.studies)
    sound = files(server, waiting(server, "us_"))[0]
    for name in ("zz_a", "zz_d"):
        shutil.copy(sound, studies / f"{name}{sound.suffix}")
    for name in ("zz_b", "zz_c"):
        (studies / f"{name}{sound.suffix}").write_bytes(b"no picture")
    problem = opened.locator("#message.problem")
    try:
        opened.locator("[name=order]").select_option("name")
        show(opened, "zz_a")
        opened.locator("[name=name]").fill("zz_")
        expect(opened.locator("#list[data-total='4']")).to_have_count(1)
        opened.locator("#picture").focus()
        opened.keyboard.press("n")
        is_shown(opened, "zz_d")
        for name in ("zz_b", "zz_c"):
            expect(problem).to_contain_text(f"{name} can't be opened: ")
            expect(opened.locator(f"#list [data-image='{name}']")).to_contain_text("can't be opened")
        opened.keyboard.press("p")
        is_shown(opened, "zz_a")
        # Chosen by hand it is tried again; what is shown stays.
        opened.locator("#list [data-image='zz_b']").click()
        expect(problem).to_have_text(re.compile("^zz_b can't be opened: "))
        is_shown(opened, "zz_a")
        shutil.copy(sound, studies / f"zz_b{sound.suffix}")
        opened.locator("#list [data-image='zz_b']").click()
        is_shown(opened, "zz_b")
        expect(opened.locator("#list [data-image='zz_b']")).not_to_contain_text("can't be opened")
        assert all("422" in text for text in opened.problems)
    finally:
        for path in studies.glob("zz_*"):
            path.unlink()


def test_keys_are_text_where_text_is_typed(server, opened):
    image = waiting(server, "us_")
    show(opened, image)
    sent = []
    opened.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    opened.keyboard.press("/")
    opened.keyboard.type("axdg")
    assert opened.locator("[name=name]").input_value().endswith("axdg")
    opened.get_by_role("textbox", name="Name of a new class").fill("")
    opened.get_by_role("textbox", name="Name of a new class").type("axdg")
    expect(opened.locator("#panel h2")).to_have_text(image)
    assert sent == []


def first_asked(request) -> int:
    """Where the part of the list begins that is asked for."""
    return int(parse_qs(urlsplit(request.url).query)["first"][0])


def part_of_list(first: int, total: int) -> dict:
    """The server's answer for a part of a list of images without a label."""
    entry = {"tag": "", "state": "unlabelled", "confidence": None, "unlike": False, "absent": [], "classes": []}
    places = range(first, min(first + 100, total))
    return {
        "entries": [{**entry, "image": f"image_{place}", "user": None, "time": None} for place in places],
        "first": first,
        "total": total,
        "counts": {"predicted": 0, "draft": 0, "unlabelled": total, "removed": 0, "approved": 0},
        "origins": {"unchanged": 0, "corrected": 0, "others": 0},
        "classes": [],
        "place": None,
    }


def to_the_end_of_the_list(opened) -> None:
    opened.locator("#list").evaluate("list => list.scrollTop = list.scrollHeight")


def test_ten_thousand_images_are_a_short_list_of_rows(server, opened):
    asked = []

    def answer(route):
        asked.append(first_asked(route.request))
        route.fulfill(json=part_of_list(asked[-1], 10_000))

    opened.route("**/queue?*", answer)
    opened.locator("[name=show]").select_option("all")
    expect(opened.locator("#list [data-image='image_3']")).to_have_count(1)
    to_the_end_of_the_list(opened)
    expect(opened.locator("#list [data-image='image_9999']")).to_be_visible()
    assert opened.locator("#list .row").count() < 40 and asked == [0, 9900]


def test_a_list_that_has_shrunk_or_grown_is_as_long_as_the_part_says_that_comes_last(server, opened):
    asked, totals = [], [250, 230, 240, 240]

    def answer(route):
        asked.append(first_asked(route.request))
        route.fulfill(json=part_of_list(asked[-1], totals.pop(0)))

    opened.route("**/queue?*", answer)
    opened.locator("[name=show]").select_option("all")
    expect(opened.locator("#list[data-total='250']")).to_have_count(1)
    to_the_end_of_the_list(opened)
    expect(opened.locator("#list [data-image='image_229']")).to_be_visible()
    expect(opened.locator("#list[data-total='230']")).to_have_count(1)
    assert opened.locator("#list .row:not([data-image])").count() == 0
    # The part before it tells that there are more again, which the last part that is here doesn't hold.
    opened.locator("#list").evaluate("list => list.scrollTop = 130 * 54")
    expect(opened.locator("#list [data-image='image_130']")).to_be_visible()
    to_the_end_of_the_list(opened)
    expect(opened.locator("#list [data-image='image_239']")).to_be_visible()
    assert asked == [0, 200, 100, 200]


def test_a_part_of_the_list_that_does_not_come_is_said_once_and_asked_for_again_by_scrolling(server, opened):
    asked = []

    def answer(route):
        asked.append(first_asked(route.request))
        if len(asked) == 2:
            route.fulfill(status=503, json={"detail": "Later, please."})
        else:
            route.fulfill(json=part_of_list(asked[-1], 250))

    opened.route("**/queue?*", answer)
    opened.locator("[name=show]").select_option("all")
    expect(opened.locator("#list[data-total='250']")).to_have_count(1)
    to_the_end_of_the_list(opened)
    expect(opened.locator("#message.problem")).to_have_text("Later, please.")
    assert opened.locator("#list .row:not([data-image])").count() > 3
    opened.locator("#list").evaluate("list => list.scrollTop -= 54")
    expect(opened.locator("#list [data-image='image_245']")).to_be_visible()
    assert asked == [0, 200, 200]


def test_what_is_painted_while_a_decision_is_carried_out_gets_into_no_other_label(server, opened):
    image, draft, geometry = picture_to_paint(server, opened)
    before = read_label(files(server, image)[1], geometry)[0]
    held = []
    opened.route("**/correct", lambda route: held.append(route))
    opened.mouse.move(*place(opened, 2, 2))
    opened.mouse.down()
    opened.mouse.move(*place(opened, 2, 6), steps=4)
    with opened.expect_request("**/correct"):
        opened.keyboard.press("d")
    opened.mouse.move(*place(opened, 2, 12), steps=4)
    opened.mouse.up()
    draw(opened, (6, 2), (6, 9))
    expect(opened.locator("#message")).to_have_text("Wait until this is done, then paint.")
    held.pop().continue_()
    expect(opened.locator("#panel button.tag.shown")).to_have_text("draft")
    expected = before.copy()
    expected[2, 2:7] = 1
    assert np.array_equal(read_label(draft, geometry)[0], expected)
    opened.keyboard.press("Control+z")
    expect(opened.locator("#message")).to_have_text("Nothing to undo.")
    # What was painted when an earlier state is brought back becomes an earlier state as well.
    opened.unroute("**/correct")
    draw(opened, (8, 2), (8, 5))
    with opened.expect_response(lambda answer: answer.url.endswith("/correct")):
        opened.keyboard.press("d")
    expect(opened.locator("#changed")).to_have_text("")
    draw(opened, (9, 2), (9, 5))
    opened.get_by_role("button", name="Bring back the draft").first.click()
    expect(opened.locator("#message")).to_contain_text("The earlier label is a draft now")
    assert np.array_equal(read_label(draft, geometry)[0], expected)
    expected[8:10, 2:6] = 1
    kept = max((server.state / "history").glob("*/*-draft.*[!n]"), key=lambda path: path.name)
    assert np.array_equal(read_label(kept, geometry)[0], expected)
    with opened.expect_response(lambda answer: answer.url.endswith("/reject")):
        opened.keyboard.press("x")
    assert opened.problems == []


def test_changes_of_any_size_go_in_requests_that_the_server_takes(opened):
    sizes = opened.evaluate(
        """async () => {
            const { pieces } = await import("/sam2sgp/review/assets/slices.js");
            const runs = (number) => Array.from({ length: 3 * number }, (_, place) => place);
            const small = runs(3000).map((place) => ({ slice: 1 + place, runs: runs(1) }));
            const changes = [{ slice: 0, runs: runs(45000) }, ...small];
            const parts = pieces(changes);
            const back = parts.flat().filter(({ slice }) => slice === 0);
            return {
                numbers: parts.map((part) => part.reduce((sum, { runs }) => sum + runs.length, 0)),
                slices: parts.map((part) => part.length),
                same: String(back.flatMap(({ runs }) => runs)) === String(changes[0].runs),
            };
        }"""
    )
    assert max(sizes["numbers"]) <= 60_000 and max(sizes["slices"]) <= 4096 and sizes["same"]
    assert sum(sizes["numbers"]) == 135_000 + 27_000 and sum(sizes["slices"]) == 3 + 9000


def test_a_segmentation_shows_how_far_it_is_and_is_cancelled(server, opened):
    """What the page makes of the server's answers; that a segmentation ends with its client is tested elsewhere."""
    show(opened, waiting(server, "mr_"))
    held = []
    opened.route("**/infer/**", lambda route: held.append(route))
    opened.route("**/review/segmenting?**", lambda route: route.fulfill(json={"done": 6, "total": 24}))
    bar, message = opened.locator("#segmenting"), opened.locator("#message")
    for cancel in (lambda: opened.keyboard.press("Escape"), bar.get_by_role("button", name="Cancel").click):
        opened.keyboard.press("g")
        expect(message).to_contain_text(re.compile(r"Segmenting mr_\d+: 25 %, about \d+ s left"))
        assert bar.get_by_role("progressbar").evaluate("bar => bar.value / bar.max") == 0.25
        cancel()
        expect(message).to_contain_text("was cancelled")
        expect(bar).to_be_hidden()
    assert len(held) == 2
    opened.unroute("**/infer/**")
    with opened.expect_response(lambda answer: "/infer/" in answer.url):
        opened.keyboard.press("g")
    expect(message).to_contain_text("Segmented mr_")
    assert opened.problems == []


def test_a_batch_is_started_followed_and_cancelled_while_one_works_on(server, opened):
    """What the page makes of the server's answers; batches themselves are tested without a browser."""
    known = {"total": 4, "skipped": 9, "done": 1, "failed": 1, "seconds_left": 150.0}
    failures = [{"image": "broken", "reason": "broken: expected a readable image."}]
    answers = {"state": "none"}
    asked = []

    def started(route):
        asked.append((route.request.method, urlsplit(route.request.url).query))
        answers.update(known, failures=failures, state="running" if route.request.method == "POST" else "stopped")
        route.fulfill(json={})

    opened.route("**/review/batch", lambda route: route.fulfill(json=answers))
    opened.route("**/batch/infer**", started)
    opened.reload()
    batch = opened.locator("#batch")
    batch.get_by_role("button", name="Segment all without a label").click()
    expect(batch).to_contain_text("2 of 4 images, 1 failed, about 3 min left")
    assert batch.get_by_role("progressbar").evaluate("bar => bar.value / bar.max") == 0.5
    show(opened, waiting(server, "mr_"))
    batch.get_by_text("1 image failed").click()
    expect(batch.get_by_role("listitem")).to_have_text("broken expected a readable image.")
    batch.get_by_role("button", name="Cancel").click()
    expect(batch).to_contain_text("The batch was stopped after 2 of 4 images, 1 failed.")
    batch.get_by_role("button", name="Go on segmenting (2 left)").click()
    expect(batch.get_by_role("button", name="Cancel")).to_be_visible()
    answers |= {"state": "done", "done": 3}
    expect(batch).to_contain_text("Batch: 3 of 4 images segmented, 1 failed.")
    # One whose report couldn't be written.
    batch.get_by_role("button", name="Segment all without a label").click()
    expect(batch.get_by_role("button", name="Cancel")).to_be_visible()
    answers.clear()
    answers["state"] = "done"
    expect(batch).to_contain_text("The batch is done. How many images failed, the server's log says.")
    assert asked == [("POST", "images=unannotated"), ("DELETE", ""), *2 * [("POST", "images=unannotated")]]
    assert not opened.problems


def test_progress_is_told_as_a_curve_and_as_the_same_numbers_in_tables(server, opened):
    studies = Path(server.studies)
    shutil.copy(next(studies.glob("us_*.png")), studies / "zz.png")
    measured = {"labels": 2, "images": 2, "dice": 0.8, "low": 0.6, "high": 0.9, "weights": "embedded", "sha256": ""}
    Audit(server.state / "progress.jsonl").write("left out", **measured)
    opened.reload()
    show(opened, "zz")
    opened.keyboard.press("g")
    expect(opened.locator("#message")).to_have_text("Segmented zz.")
    approve(opened)
    opened.keyboard.press("i")
    progress = opened.get_by_role("dialog", name="Progress")
    expect(progress).to_contain_text("Enough labels? Too few labels to say: 1 of at least 10")
    expect(progress.locator("rect.left-out")).not_to_have_count(0)
    progress.get_by_text("The curves as tables").click()
    rows = progress.get_by_role("table", name="Predictions as shown").get_by_role("row")
    expect(rows).to_have_text(["LabelDice", "11.00"])
    rows = progress.get_by_role("table", name="Labelled images left out").get_by_role("row")
    expect(rows.filter(has_text="0.80")).to_contain_text("0.60 to 0.902embedded")
    assert "at last 1.00" in progress.get_by_role("img").get_attribute("aria-label")
    keep(opened, "progress")
    assert not opened.problems
