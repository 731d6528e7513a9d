"""The images of the review page, in the order in which it pays to look at them."""

from lib.http.work_list import Order, Shown, listed, origins
from tests.helpers.pages import record


def test_what_is_marked_or_in_doubt_comes_first_and_filters_hold():
    records = {
        "sure": {"original": record({"liver": 0.9})},
        "doubtful": {"original": record({"liver": 0.4, "cyst": None})},
        "unlike": {"original": record({"liver": 0.95}, unlike_support=True)},
        "absent": {"original": record({"liver": 0.8}, maybe_absent=["cyst"])},
        "draft": {"original": record({"liver": 0.6}), "draft": {"label_info": [{"idx": 1, "name": "liver"}]}},
        "later": {},
        "sooner": {},
        "approved": {"final": {"label_info": [{"idx": 1, "name": "liver"}]}, "draft": {}},
        "removed": {"removed": {}},
    }
    ranked = lambda images: sorted(images, reverse=True)  # noqa: E731
    # One record that another program made takes no list away.
    foreign = {"foreign": {"original": record({"liver": "sure", "cyst": 0.7}, maybe_absent=3)}}
    assert [(entry.confidence, entry.absent) for entry in listed(foreign, ranked)[0]] == [(0.7, ())]
    entries, counts = listed(records, ranked)
    assert [entry.image for entry in entries] == ["absent", "unlike", "doubtful", "draft", "sure", "sooner", "later"]
    assert counts == {"predicted": 4, "draft": 1, "unlabelled": 2, "removed": 1, "approved": 1}
    names = lambda **how: [entry.image for entry in listed(records, ranked, **how)[0]]  # noqa: E731
    assert names(shown=Shown.approved) == ["approved"] and names(shown=Shown.removed) == ["removed"]
    finals = {
        "as it was": {"final": {"model": "sam2sgp"}},
        "painted": {"final": {"model": "sam2sgp", "corrected": {"voxels": 3, "from": "original"}}},
        "by a viewer": {"final": {}},
        "drawn from nothing": {"final": {"corrected": {"voxels": 3, "from": ""}}},
    }
    assert origins({**records, **finals}) == {"unchanged": 1, "corrected": 1, "others": 3}
    assert names(of_class="cyst") == ["absent"] and names(name="SURE") == ["sure"]
    assert names(shown=Shown.all, order=Order.name) == sorted(records)
