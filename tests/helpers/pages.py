"""What the review page gets and sends, for tests."""

from sam2sgp.transforms import ScaleIntensityByModalityd


def record(confidence: dict, **params) -> dict:
    return {"label_info": [], "params": {"confidence": confidence, **params}}


SCALE = ScaleIntensityByModalityd()


def case(client, image: str, **query) -> dict:
    answer = client.get("/sam2sgp/review/case", params={"image": image, **query})
    assert answer.status_code == 200, answer.text
    return answer.json()


def correction(shown: dict, changes: list, save_as: str = "draft", **other) -> dict:
    return {
        "image": shown["image"],
        "image_seen": shown["image_seen"],
        "shape": shown["shape"],
        "label_tag": shown["label_tag"],
        "seen": shown["seen"],
        "save_as": save_as,
        "replaces": shown["labels"].get(save_as, ""),
        "classes": [{"idx": entry["value"], "name": entry["name"]} for entry in shown["classes"]],
        "changes": changes,
        **other,
    }
