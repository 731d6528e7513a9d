"""Rows of features, memory and results are taken and put together without being mixed up."""

import torch

from sam2sgp.networks import ImageFeatures, SGPOutput, SupportMemory


def features(count: int, prior: bool = True) -> ImageFeatures:
    numbers = torch.arange(count, dtype=torch.float32)
    map_ = numbers[:, None, None, None].expand(-1, 2, 4, 4)
    rows = numbers[:, None, None].expand(-1, 16, 2)
    return ImageFeatures(map_, map_ + 0.5, (map_ * 10, map_ * 100), rows if prior else None, rows if prior else None)


def pool(items: int, classes: int) -> SupportMemory:
    """Of which each value is 10 times the item's number, and of classes their number more."""
    item = 10.0 * torch.arange(items)
    of_class = item[:, None] + torch.arange(classes)
    return SupportMemory(
        of_class[..., None, None],
        item[:, None, None],
        of_class[..., None],
        item[:, None, None],
        of_class[..., None, None],
    )


def test_features_of_some_images_are_theirs_and_parts_join_in_order():
    whole = features(5)
    some = whole[[3, 1]]
    assert len(some) == 2 and some.embedding[:, 0, 0, 0].tolist() == [3.0, 1.0]
    assert some.high_res[1][:, 0, 0, 0].tolist() == [300.0, 100.0] and some.prior_key[:, 0, 0].tolist() == [3.0, 1.0]
    joined = ImageFeatures.concatenate([whole[3:], whole[:3]])
    assert joined.embedding[:, 0, 0, 0].tolist() == [3.0, 4.0, 0.0, 1.0, 2.0]
    assert joined.high_res[0][:, 0, 0, 0].tolist() == [30.0, 40.0, 0.0, 10.0, 20.0]
    assert features(2, prior=False)[:1].pixels is None
    assert ImageFeatures.concatenate([features(1, prior=False)] * 2).prior_key is None


def test_items_are_selected_for_each_query_and_class():
    index = torch.tensor([[[2, 0], [1, 1]], [[0, 3], [3, 2]]])
    memory = pool(4, 2).select(index)
    classes = torch.arange(2)[None, :, None]
    assert torch.equal(memory.tokens[..., 0, 0], 10.0 * index + classes)
    assert torch.equal(memory.gram_foreground[..., 0, 0], 10.0 * index + classes)
    assert torch.equal(memory.prior_key[..., 0, 0], 10.0 * index)
    only_second = pool(4, 2).select(index[:, :1], torch.tensor([1]))
    assert torch.equal(only_second.tokens[..., 0, 0], 10.0 * index[:, :1] + 1)


def test_slices_of_the_own_volume_stand_beside_items_of_the_support_set():
    support = pool(4, 1).select(torch.tensor([[[0, 1]]]))
    own = pool(4, 1).select(torch.tensor([[[3]]]))
    own.distance = torch.tensor([[[2]]])
    both = support.beside(own)
    assert both.tokens[0, 0, :, 0, 0].tolist() == [0.0, 10.0, 30.0] and both.distance.tolist() == [[[0, 0, 2]]]
    assert support.distance is None


def test_results_of_some_images_are_theirs():
    numbers = torch.arange(4.0)
    map_ = numbers[:, None, None, None].expand(-1, 1, 2, 2)
    whole = SGPOutput(map_, map_ + 0.5, numbers[:, None, None].expand(-1, 1, 4), numbers[:, None], -numbers[:, None])
    joined = SGPOutput.concatenate([whole.rows(slice(2, 4)), whole.rows(torch.tensor([0]))])
    assert joined.iou[:, 0].tolist() == [2.0, 3.0, 0.0] and joined.object_score[:, 0].tolist() == [-2.0, -3.0, 0.0]
    assert joined.pseudo_logits[:, 0, 0, 0].tolist() == [2.5, 3.5, 0.5] and joined.box[:, 0, 0].tolist() == [
        2.0,
        3.0,
        0.0,
    ]
