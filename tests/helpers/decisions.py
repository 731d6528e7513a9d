"""Decisions about one image's labels at once, over HTTP, and what may be stored after they were answered.

A decision is one of `approve` (the prediction `original` becomes `final`), `reject` (it is deleted), `remove` (`final`
becomes `removed`) and `submit` (another label is saved as `final`). Whatever the order in which decisions are carried
out, the answers have to fit one, and the labels afterwards that same one.
"""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path

import requests

DECISIONS = ("approve", "reject", "remove", "submit")
# Labels by their tags.
Labels = dict[str, bytes]


def carried_out(labels: Labels, decision: str, submitted: bytes) -> tuple[bool, Labels]:
    """Whether a decision can be carried out, and the labels after it."""
    moves = {"approve": ("original", "final"), "remove": ("final", "removed")}
    if decision == "submit":
        return True, {**labels, "final": submitted}
    old, new = moves.get(decision, ("original", None))
    if old not in labels:
        return False, labels
    kept = {tag: label for tag, label in labels.items() if tag != old}
    return True, {**kept, new: labels[old]} if new else kept


def final_states(before: Labels, answers: list[tuple[str, bool]], submitted: bytes) -> list[Labels]:
    """All labels that there may be after decisions at once.

    Args:
        before: the labels when they began.
        answers: each decision, and whether the answer said that it was carried out.
        submitted: the label that `submit` saves as final.

    Returns:
        The labels after each order of the decisions that gives exactly these answers.
    """
    found: list[Labels] = []
    for order in set(permutations(answers)):
        labels = before
        for decision, said in order:
            done, labels = carried_out(labels, decision, submitted)
            if done != said:
                break
        else:
            found.append(labels)
    return found


def stored(studies: Path, image: str) -> Labels:
    """The labels of a picture in a studies folder."""
    return {path.parent.name: path.read_bytes() for path in (studies / "labels").glob(f"*/{image}.png")}


def decide(url: str, image: str, decision: str, submitted: Path) -> int:
    """Ask for one decision. Returns the status of the answer."""
    if decision == "submit":
        with open(submitted, "rb") as file:
            query = {"image": image, "tag": "final"}
            return requests.put(f"{url}/datastore/label", params=query, files={"label": file}).status_code
    tag = "final" if decision == "remove" else "original"
    return requests.post(f"{url}/sam2sgp/{decision}", json={"image": image, "label_tag": tag}).status_code


def rounds(url: str, studies: Path, image: str, labels: tuple[Path, Path], count: int, clients: int = 4) -> Counter:
    """Rounds of decisions at once about one picture.

    Args:
        url: of the server.
        studies: its folder.
        image: id of the picture, which is a PNG file.
        labels: the prediction to decide about, and the label that is submitted.
        count: of rounds.
        clients: decisions at once in each round.

    Returns:
        How often each decision was answered with each status, by (decision, status).

    Raises:
        AssertionError: in some round, answers and stored labels fit no order of the decisions.
    """
    choices, counts = random.Random(0), Counter()
    prediction, submitted = labels
    with ThreadPoolExecutor(clients) as pool:
        for turn in range(count):
            for tag in stored(studies, image):
                requests.delete(f"{url}/datastore/label", params={"id": image, "tag": tag}).raise_for_status()
            with open(prediction, "rb") as file:
                query = {"image": image, "tag": "original"}
                requests.put(f"{url}/datastore/label", params=query, files={"label": file}).raise_for_status()
            before = stored(studies, image)
            assert set(before) == {"original"}, f"round {turn}: {sorted(before)}"
            # Each round has the pair that is worst: a prediction is approved and rejected.
            asked = ["approve", "reject", *choices.choices(DECISIONS, k=clients - 2)]
            statuses = list(pool.map(lambda decision: decide(url, image, decision, submitted), asked))
            counts.update(zip(asked, statuses, strict=True))
            answers = [(decision, status == 200) for decision, status in zip(asked, statuses, strict=True)]
            allowed = final_states(before, answers, submitted.read_bytes())
            found = stored(studies, image)
            assert found in allowed, f"round {turn}: {list(zip(asked, statuses, strict=True))}, stored: {sorted(found)}"
            listed = requests.get(f"{url}/datastore/", params={"output": "all"}).json()
            told = listed["objects"][image]["labels"]
            assert set(told) == set(found), f"round {turn}: listed: {sorted(told)}, stored: {sorted(found)}"
    return counts
