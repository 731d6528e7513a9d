"""Inference with a support bank: who guides whom, and that batching changes nothing."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sam2sgp.errors import ConfigError, DataError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer, VolumeMemory, support_set
from sam2sgp.inferers.object_gate import Thresholds
from sam2sgp.inferers.support_set import ABSENT_LOGIT
from sam2sgp.networks import SAM2SGP
from sam2sgp.support import ItemRules, SupportBank, SupportSampler, encodings
from sam2sgp.support import bank as support_bank
from sam2sgp.transforms.array import Letterbox

SIZE = 64


def case(number: int, values: list[int], patient: str | None = None, group: str = "a", slices: int = 1) -> dict:
    generator = torch.Generator().manual_seed(number)
    label = torch.zeros(slices, SIZE, SIZE, dtype=torch.long)
    for place, value in enumerate(values):
        label[:, 10:30, 5 + 20 * place : 20 + 20 * place] = value
    return {
        "name": f"case{number}",
        "label_map": label,
        "picture": torch.rand(slices, 1, SIZE, SIZE, generator=generator),
        "label": f"case{number}.png",
        "patient": patient or f"p{number}",
        "group": group,
    }


def prepare(item: dict) -> dict:
    image, label = item["picture"], item["label_map"]
    full = {"image_full": image, "label_full": label, "geometry": SimpleNamespace(spacing=None, slice_axis=2)}
    return {**item, **full, "image": image, "label": label}


def bank(cases: list[dict], **settings) -> SupportBank:
    return SupportBank(cases, prepare, progress=False, **settings)


@pytest.fixture(scope="module")
def network() -> SAM2SGP:
    torch.manual_seed(0)
    return SAM2SGP("nano", SIZE).eval()


QUERY = torch.rand(5, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(99))


def test_batch_size_does_not_change_the_result(network):
    cases = [case(i, [1, 2]) for i in range(4)]
    results = [
        SupportSetInferer(bank(cases), InferenceSettings(SupportSampler(k=2), batch_size=b))(QUERY, network)
        for b in (1, 8)
    ]
    assert results[0].shape == (5, 2, SIZE, SIZE)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_many_classes_go_through_the_network_some_at_a_time(network, monkeypatch):
    cases = [case(i, [1, 2, 3]) for i in range(3)]
    inferer = SupportSetInferer(bank(cases), InferenceSettings(SupportSampler(k=2)))
    expected, rows = inferer(QUERY, network), []
    segment = SAM2SGP.segment

    def counted(net, features, support):
        rows.append(support.tokens.shape[0] * support.tokens.shape[1])
        return segment(net, features, support)

    monkeypatch.setattr(SAM2SGP, "segment", counted)
    monkeypatch.setattr(support_set, "ROWS", 10)
    torch.testing.assert_close(inferer(QUERY, network), expected, atol=1e-4, rtol=1e-4)
    assert rows == [10, 5]


def test_of_many_classes_an_image_is_searched_for_those_that_similar_items_hold(network, monkeypatch):
    monkeypatch.setattr(support_bank, "FEW_CLASSES", 1)
    monkeypatch.setattr(support_bank, "NEAREST_ITEMS", 1)
    cases = [case(i, [i + 1, 4]) for i in range(3)]
    inferer = SupportSetInferer(bank(cases), InferenceSettings(SupportSampler(k=2)))
    images = torch.cat([entry["picture"] for entry in cases])
    (chunk,) = inferer.chunks(images, network)
    likely = torch.stack([entry.likely for entry in chunk.retrieved], 1)
    assert likely.tolist() == [[value in (i + 1, 4) for value in (1, 2, 3, 4)] for i in range(3)]
    searched = (chunk.output.logits != ABSENT_LOGIT).flatten(2).any(2)
    assert torch.equal(searched, likely)
    monkeypatch.setattr(support_bank, "FEW_CLASSES", 4)
    (every,) = inferer.chunks(images, network)
    torch.testing.assert_close(chunk.output.logits[likely], every.output.logits[likely], atol=1e-4, rtol=1e-4)
    # Slices of a volume too, with their neighbours.
    monkeypatch.setattr(support_bank, "FEW_CLASSES", 1)
    (chunk,) = inferer.chunks(images, network, volume=True)
    assert torch.equal((chunk.output.logits != ABSENT_LOGIT).flatten(2).any(2), likely)


def test_regions_of_a_few_items_are_encoded_where_there_are_many_classes(network, monkeypatch):
    support = bank([case(i, [1], patient=f"p{i % 4}") for i in range(12)])
    support.encode(network)
    monkeypatch.setattr(encodings, "MAX_CROPPED", 6)
    monkeypatch.setattr(encodings, "LEAST_CROPPED", 2)
    features = network.encode(QUERY.expand(-1, 3, -1, -1))
    assert support.region_support(network, features, SupportSampler(k=8), 0).tokens.shape[2] == 6
    chosen = support.encodings._pools[encodings.Cut("regions", 1)].owner.unique().tolist()
    # A case that comes changes the choice only by itself.
    support.reconcile([*support.data, case(12, [1])])
    support.region_support(network, features, SupportSampler(k=8), 0)
    assert len(set(chosen) & set(support.encodings._pools[encodings.Cut("regions", 1)].owner.unique().tolist())) >= 5


@pytest.mark.parametrize("volume", [False, True])
def test_progress_is_told_slice_by_slice(network, volume):
    steps: list[int] = []
    memory = VolumeMemory() if volume else None
    inferer = SupportSetInferer(
        bank([case(i, [1]) for i in range(3)]), InferenceSettings(SupportSampler(k=2), 2, volume_memory=memory)
    )
    for _ in inferer.chunks(QUERY, network, volume=True, step=steps.append):
        pass
    assert sum(steps) == len(QUERY) * inferer.looks(len(QUERY), True) == (15 if volume else 5) and max(steps) == 2


@pytest.mark.parametrize("slices", [1, 5])
def test_mirroring_is_the_mean_of_the_case_and_its_mirror_image(network, slices):
    cases = [case(i, [1, 2], slices=slices) for i in range(3)]
    turned = [entry | {name: entry[name].flip(-1) for name in ("picture", "label_map")} for entry in cases]
    # Without the gate: each of the two single ones would learn its own. Regions are cut to whole pixels.
    settings = InferenceSettings(SupportSampler(k=2), batch_size=2, object_gate=False, region_below=0)
    query, steps = {**prepare(case(9, [1], slices=slices)), "letterbox": Letterbox.of((SIZE, SIZE), SIZE)}, []

    def found(entries: list[dict], image: Tensor, mirror: bool = False, step=None) -> Tensor:
        inferer = SupportSetInferer(bank(entries), replace(settings, mirror=mirror))
        parts = inferer.segment_case({**query, "image": image, "image_full": image}, network, step=step)
        return torch.cat([logits for _, logits, _ in parts])

    image = query["image"]
    single, other = found(cases, image), found(turned, image.flip(-1)).flip(-1)
    both = found(cases, image, mirror=True, step=steps.append)
    torch.testing.assert_close(both, (single + other) / 2, atol=1e-3, rtol=1e-3)
    assert (both - single).abs().max() > 0.1
    inferer = SupportSetInferer(bank(cases), replace(settings, mirror=True))
    assert sum(steps) == slices * inferer.looks_at_case(slices) == slices * 2 * (2 if slices == 1 else 4)


@pytest.mark.parametrize(
    ("low", "k", "slices", "mirrored"),
    [(0.0, 3, 1, False), (1.0, 3, 1, True), (0.0, 4, 1, True), (1.0, 4, 2, False)],
    ids=["sure", "of low confidence", "guided by fewer than k", "volume"],
)
def test_by_default_single_images_in_doubt_are_mirrored(network, monkeypatch, low, k, slices, mirrored):
    monkeypatch.setattr("sam2sgp.evaluation.confidence.LOW_CONFIDENCE", low)
    support = bank([case(i, [1]) for i in range(3)])
    query = {**prepare(case(9, [1], slices=slices)), "letterbox": Letterbox.of((SIZE, SIZE), SIZE)}
    found = {}
    for mirror in ("auto", True, False):
        inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=k), mirror=mirror))
        steps: list[int] = []
        found[mirror] = torch.cat([part[1] for part in inferer.segment_case(query, network, step=steps.append)])
        assert sum(steps) == slices * inferer.looks_at_case(slices)
    assert not torch.equal(found[True], found[False])
    assert torch.equal(found["auto"], found[mirrored])


@pytest.mark.parametrize(("found", "likely", "doubtful"), [(1, 1, False), (2, 1, True), (0, 1, True), (0, 0, False)])
def test_a_rare_class_makes_an_image_doubtful_only_where_it_is_found_or_nothing_is(network, found, likely, doubtful):
    """Of class 2 there is one item of three, and it is one of the two that guide the image where it is likely."""
    support = bank([case(0, [1, 2]), case(1, [1]), case(2, [1])])
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2)))
    inferer.encode(network)
    features = network.encode(QUERY[:1].expand(-1, 3, -1, -1))
    retrieved = support.retrieve(network, features, inferer.settings.sampler)
    retrieved[1].likely[:] = bool(likely)
    logits = torch.full((1, 2, 4, 4), -9.0)
    if found:
        logits[:, found - 1] = 9.0
    chunk = SimpleNamespace(retrieved=retrieved)
    assert inferer._is_doubtful(logits, chunk) is doubtful


def test_whoever_waits_for_a_mirrored_image_can_stop_it(network):
    support = bank([case(i, [1]) for i in range(3)])
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=4)))
    query = {**prepare(case(9, [1])), "letterbox": Letterbox.of((SIZE, SIZE), SIZE)}
    list(inferer.segment_case(query, network))
    steps: list[int] = []

    def step(slices: int) -> None:
        steps.append(slices)
        if sum(steps) == inferer.looks_at_case(1) and not slices:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        list(inferer.segment_case(query, network, step=step))


def test_nothing_is_doubtful_where_there_is_no_class(network):
    inferer = SupportSetInferer(bank([], rules=ItemRules(allow_empty=True)))
    query = {**prepare(case(9, [1])), "letterbox": Letterbox.of((SIZE, SIZE), SIZE)}
    ((_, logits, _),) = inferer.segment_case(query, network)
    assert logits.shape[1] == 0


def test_a_class_that_is_absent_stays_so_and_one_that_is_not_looked_for_in_the_mirrored_slice_is_as_found(network):
    cases = [case(i, [1, 2]) for i in range(3)]
    query = {**prepare(case(9, [1])), "letterbox": Letterbox.of((SIZE, SIZE), SIZE)}
    settings = InferenceSettings(SupportSampler(k=2), object_gate=False, region_below=0, mirror=False)

    def found(inferer: SupportSetInferer) -> Tensor:
        return torch.cat([logits for _, logits, _ in inferer.segment_case(query, network)])

    single = found(SupportSetInferer(bank(cases), settings))
    # Class 1 is absent by the gate, and class 2 unlikely in the mirrored image.
    gated = SupportSetInferer(bank(cases), replace(settings, mirror=True, object_gate=True))
    thresholds = Thresholds(torch.tensor([torch.inf, -torch.inf]), torch.full((2,), -torch.inf))
    gated.thresholds = lambda *given: thresholds
    mirror = gated.bank.mirrored

    def unlikely() -> SupportBank:
        mirrored = mirror()
        retrieved = mirrored.retrieve
        mirrored.retrieve = lambda *given: [replace(e, likely=e.likely & (e.value != 2)) for e in retrieved(*given)]
        return mirrored

    gated.bank.mirrored = unlikely
    both = found(gated)
    assert single[:, 0].max() > ABSENT_LOGIT + 1 and both[:, 0].max() <= ABSENT_LOGIT
    torch.testing.assert_close(both[:, 1], single[:, 1])


def test_a_new_support_item_is_mirrored_too(network):
    cases = [case(i, [1]) for i in range(4)]
    query = {**prepare(case(9, [1])), "letterbox": Letterbox.of((SIZE, SIZE), SIZE)}
    settings = InferenceSettings(SupportSampler(k=4), mirror=True)

    def found(inferer: SupportSetInferer) -> Tensor:
        return torch.cat([logits for _, logits, _ in inferer.segment_case(query, network)])

    growing = SupportSetInferer(bank(cases[:2]), settings)
    before = found(growing)
    growing.bank.reconcile(cases)
    torch.testing.assert_close(found(growing), found(SupportSetInferer(bank(cases), settings)))
    assert (found(growing) - before).abs().max() > 0.01


def test_result_equals_the_network_given_the_retrieved_pairs(network):
    support = bank([case(i, [1]) for i in range(5)])
    chunk = next(SupportSetInferer(support, InferenceSettings(SupportSampler(k=2))).chunks(QUERY[:1], network))
    chosen = chunk.retrieved[0].index[0].tolist()
    images = torch.stack([support.items[i].image.float() for i in chosen]).expand(-1, 3, -1, -1)
    masks = support.masks([support.items[i] for i in chosen])
    with torch.no_grad():
        direct = network(QUERY[:1].expand(-1, 3, -1, -1), images, masks)
    torch.testing.assert_close(chunk.output.logits, direct, atol=1e-3, rtol=1e-3)


def test_an_image_in_the_support_set_retrieves_itself_first(network):
    cases = [case(i, [1]) for i in range(6)]
    chunk = next(
        SupportSetInferer(bank(cases), InferenceSettings(SupportSampler(k=3))).chunks(cases[4]["picture"], network)
    )
    assert chunk.retrieved[0].index[0, 0] == 4
    assert chunk.retrieved[0].similarity[0, 0] == pytest.approx(1.0, abs=1e-3)


def test_items_of_the_querys_own_patient_are_not_used(network):
    cases = [case(i, [1], patient="same" if i < 2 else None) for i in range(4)]
    chunk = next(
        SupportSetInferer(bank(cases), InferenceSettings(SupportSampler(k=4))).chunks(QUERY, network, patient="same")
    )
    assert set(chunk.retrieved[0].index.flatten().tolist()) == {2, 3}


def test_items_of_the_querys_group_are_used_where_there_are_any(network):
    cases = [case(i, [1], group="ct" if i < 2 else "mr") for i in range(4)]
    inferer = SupportSetInferer(bank(cases), InferenceSettings(SupportSampler(k=4)))
    of = {g: next(inferer.chunks(QUERY, network, group=g)).retrieved[0].index.unique().tolist() for g in ("ct", "us")}
    assert of == {"ct": [0, 1], "us": [0, 1, 2, 3]}


def test_each_class_is_guided_by_items_that_hold_it_and_unknown_ones_stay_empty(network):
    cases = [case(0, [1]), case(1, [1, 2]), case(2, [2])]
    support = bank(cases, class_names={1: "liver", 2: "spleen", 7: "declared only"})
    chunk = next(SupportSetInferer(support, InferenceSettings(SupportSampler(k=3))).chunks(QUERY, network))
    used = {entry.value: sorted(entry.index[0].tolist()) for entry in chunk.retrieved}
    assert used == {1: [0, 1], 2: [1, 2]}
    assert (chunk.output.logits[:, 2] == ABSENT_LOGIT).all()
    assert (chunk.output.logits[:, :2] != ABSENT_LOGIT).any()


def test_reset_encodes_the_support_set_with_the_network_as_it_is_now(network):
    inferer = SupportSetInferer(bank([case(i, [1]) for i in range(3)]), InferenceSettings(SupportSampler(k=2)))
    before = inferer(QUERY, network)
    other = SAM2SGP("nano", SIZE).eval()
    stale = inferer.bank.memory.tokens
    inferer.reset()
    after = inferer(QUERY, other)
    assert not torch.equal(inferer.bank.memory.tokens, stale)
    assert not torch.allclose(before, after)


def test_volumes_give_a_few_slices_for_each_class():
    volume = case(0, [1], slices=30)
    volume["label_map"][:5] = 0
    volume["label_map"][25:] = 0
    volume["label_map"][12, 40:60, 40:60] = 1
    support = bank([volume], rules=ItemRules(slices_per_class=4))
    slices = [item.slice for item in support.items if item.info.holds]
    assert {5, 12, 24} <= set(slices) and len(slices) <= 5
    assert [item.slice for item in support.items if not item.info.holds] == [0, 4, 25, 29], "what is empty looks so"
    assert [item.id for item in support.items][0] == "case0#0"


def test_a_limit_keeps_items_of_many_cases():
    support = bank([case(i, [1]) for i in range(20)], rules=ItemRules(max_items=6))
    assert len(support) == 6 and len({item.patient for item in support.items}) == 6


def test_a_limit_keeps_volumes_whole_but_for_the_last_and_reads_no_more():
    read = []
    cases = [case(i, [1], slices=12) for i in range(6)]
    for entry in cases:
        entry["label_map"][:3] = 0
    items_of = defaultdict(list)
    for item in bank(cases).items:
        items_of[item.case["name"]].append(item.id)

    def reading(entry: dict) -> dict:
        read.append(entry["name"])
        return prepare(entry)

    support = SupportBank(cases, reading, rules=ItemRules(max_items=12, seed=1), progress=False)
    first, second = read
    assert len(items_of[first]) < 12 < len(items_of[first] + items_of[second])
    assert [item.id for item in support.items] == (items_of[first] + items_of[second])[:12]


def test_a_support_set_without_objects_or_with_undeclared_values_is_refused():
    with pytest.raises(DataError, match="at least one object"):
        bank([case(0, []), case(1, [])])
    with pytest.raises(DataError, match="case0.png"):
        bank([case(0, [3])], class_names={1: "liver"})


def test_precision_is_checked(network):
    with pytest.raises(ConfigError, match="precision"):
        SupportSetInferer(bank([case(0, [1])]), InferenceSettings(SupportSampler(), precision="int4"))(QUERY, network)
