"""Labelled cases of some patients, for tests."""


def some(count, patients):
    return [{"name": f"n{i}", "patient": f"p{i % patients}", "image": "i", "label": "l"} for i in range(count)]
