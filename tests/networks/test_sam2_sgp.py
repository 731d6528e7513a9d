"""The network as a whole: shapes, gradients, switches, and that its parts do what the method says."""

import pytest
import torch

from sam2sgp.engines import SGPLoss
from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP
from tests.helpers.small_network import SIZE, network, square_masks


def test_shapes_with_and_without_support(images):
    net = network()
    assert net(images).shape == (5, 1, SIZE, SIZE)
    support = torch.rand(4, 3, SIZE, SIZE)
    assert net(images, support, square_masks(4, 3)).shape == (5, 3, SIZE, SIZE)
    own = torch.rand(5, 2, 3, SIZE, SIZE)
    assert net(images, own, square_masks(10).reshape(5, 2, 1, SIZE, SIZE)).shape == (5, 1, SIZE, SIZE)


def test_no_support_items_is_the_path_without_memory(images):
    net = network()
    features = net.encode(images)
    memory = net.encode_support(features, square_masks(5)).select(torch.zeros(5, 1, 0, dtype=torch.long))
    torch.testing.assert_close(net.segment(features, memory).logits, net.segment(features, None).logits)


def test_image_size_must_fit(images):
    with pytest.raises(ConfigError, match="multiple of 32"):
        SAM2SGP("nano", 100)
    with pytest.raises(ConfigError, match="resize"):
        network()(torch.rand(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="pma.boxes"):
        SAM2SGP("nano", SIZE, pma={"boxes": True})


def test_own_support_equals_selection_from_a_pool(images):
    net = network()
    support, masks = torch.rand(6, 3, SIZE, SIZE), (torch.rand(6, 1, SIZE, SIZE) > 0.5).float()
    index = torch.tensor([[[0, 3]], [[1, 4]], [[2, 5]], [[5, 0]], [[3, 1]]])
    pooled = net(images, support, masks, index)
    own = net(images, support[index[:, 0]], masks[index[:, 0]])
    torch.testing.assert_close(pooled, own, atol=1e-4, rtol=1e-4)


def test_classes_in_a_batch_equal_classes_one_by_one(images):
    net = network()
    support, masks = torch.rand(4, 3, SIZE, SIZE), (torch.rand(4, 3, SIZE, SIZE) > 0.5).float()
    together = net(images, support, masks)
    for c in range(3):
        torch.testing.assert_close(
            together[:, c : c + 1], net(images, support, masks[:, c : c + 1]), atol=1e-4, rtol=1e-4
        )


def test_order_of_support_items_does_not_matter(images):
    net = network()
    support, masks = torch.rand(4, 3, SIZE, SIZE), (torch.rand(4, 1, SIZE, SIZE) > 0.5).float()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        net(images, support, masks), net(images, support[order], masks[order]), atol=1e-4, rtol=1e-4
    )


def test_every_trainable_parameter_gets_a_gradient_from_the_loss(images):
    for settings in (
        {},
        {"pma": {"dense": True}},
        {"pma": {"box": False, "attention": False}},
        {"pmg": {"prior": False}},
        {"pmg": {"regression": False}, "refinement": False},
    ):
        net = network(**settings).train()
        if net.refinement is not None:  # its last layer starts at zero, and hides the others from the first step
            torch.nn.init.normal_(net.refinement.head.weight)
        label = square_masks(5)
        label[0] = 0
        index = torch.tensor([[[1, 2]], [[2, 3]], [[3, 4]], [[4, 1]], [[1, 3]]])
        frames = torch.tensor([[-1], [-1], [-1], [4], [3]])
        clips = {"frame_index": frames, "frame_distance": frames.new_ones(5, 1)}
        loss = SGPLoss()(net(images, support_label=label, support_index=index, **clips), label)
        loss.backward()
        without = [
            name
            for name, parameter in net.named_parameters()
            if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
        ]
        assert not without, (settings, without)


def test_pseudo_mask_decoder_is_trained_by_the_pseudo_loss_alone(images):
    net = network().train()
    label = square_masks(5)
    index = torch.tensor([[[1]], [[2]], [[3]], [[4]], [[0]]])
    net(images, support_label=label, support_index=index)["pseudo_logits"].pow(2).mean().backward()
    assert net.pmg_decoder.decoder.mask_tokens.weight.grad.abs().sum() > 0
    assert net.pma_decoder.decoder.mask_tokens.weight.grad is None


@pytest.mark.parametrize("switch", ["box", "attention", "dense"])
def test_switching_a_part_of_pma_changes_the_result(images, switch):
    support, masks = torch.rand(4, 3, SIZE, SIZE), square_masks(4)
    everything = {"box": True, "attention": True, "dense": True}
    on = network(pma=everything)
    off = network(pma={**everything, switch: False})
    off.load_state_dict(on.state_dict(), strict=False)
    difference = (on(images, support, masks) - off(images, support, masks)).abs().max()
    assert difference > 1e-3


def test_switching_the_prior_off_changes_the_result(images):
    support, masks = torch.rand(4, 3, SIZE, SIZE), square_masks(4)
    on, off = network(), network(pmg={"prior": False})
    off.load_state_dict(on.state_dict(), strict=False)
    assert (on(images, support, masks) - off(images, support, masks)).abs().max() > 1e-3


@pytest.mark.parametrize("switch", ["regression", "refinement"])
def test_switching_a_part_of_the_fine_path_off_changes_the_result(images, switch):
    support, masks = torch.rand(4, 3, SIZE, SIZE), square_masks(4)
    on = network()
    torch.nn.init.normal_(on.refinement.head.weight)
    off = network(pmg={"regression": False}) if switch == "regression" else network(refinement=False)
    shared = {
        k: v for k, v in on.state_dict().items() if k in off.state_dict() and v.shape == off.state_dict()[k].shape
    }
    off.load_state_dict(shared, strict=False)
    assert (on(images, support, masks) - off(images, support, masks)).abs().max() > 1e-3


def test_blanking_the_pseudo_mask_changes_what_pma_makes_of_it(images):
    net = network()
    features = net.encode(images)
    conditioned = features.embedding
    dense = torch.zeros_like(conditioned)
    pseudo = torch.full((5, 1, SIZE // 2, SIZE // 2), -4.0)
    pseudo[..., 8:20, 8:20] = 4.0
    blank = torch.full_like(pseudo, -4.0)
    corrections = [net.guide(conditioned, dense, features.high_res, p, net.box(p))[0] - p for p in (pseudo, blank)]
    assert (corrections[0] - corrections[1]).abs().max() > 1e-3


def test_box_is_tight_and_absent_for_an_empty_pseudo_mask():
    net = network()
    pseudo = torch.full((2, 1, 32, 32), -1.0)
    pseudo[0, 0, 4:10, 6:20] = 1.0
    assert net.box(pseudo).tolist() == [[12.0, 8.0, 40.0, 20.0], [-1.0] * 4]


def test_support_masks_enter_the_memory_as_ten_times_plus_or_minus_one(images):
    net = network()
    seen = []
    net.memory_encoder.mask_downsampler.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    net.encode_support(net.encode(images), square_masks(5))
    assert set(torch.unique(seen[0]).tolist()) == {-10.0, 10.0}


def test_retrieval_embedding_is_normalised_and_prefers_the_same_image(images):
    net = network()
    embedding = net.retrieval_embedding(net.encode(images))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(5))
    assert torch.equal((embedding @ embedding.T).argmax(1), torch.arange(5))


@torch.no_grad()
def test_instance_normalisation_makes_brightness_and_contrast_irrelevant(images):
    darker = images * 0.5 + 0.2
    change = {}
    for normalization in ("instance", "imagenet"):
        net = network()
        net.normalization = normalization
        change[normalization] = float((net(images) - net(darker)).abs().mean())
    assert change["instance"] < 0.1 * change["imagenet"]


@torch.no_grad()
def test_decoders_of_a_network_from_scratch_start_quiet(images):
    """Loud ones are silenced for good by the first training steps."""
    net = network()
    features = net.encode(images)
    position, sparse = net.prompt_encoder.get_dense_pe(), net._sparse(None, len(images))
    for name, decoder in (("pmg", net.pmg_decoder), ("pma", net.pma_decoder)):
        high_res = net._share(features.high_res, name)
        logits, *_ = decoder(features.embedding, position, sparse, torch.zeros_like(features.embedding), high_res)
        assert 0 < logits.std() < 1


def episode(images: torch.Tensor) -> dict:
    return {
        "support_label": square_masks(5),
        "support_index": torch.tensor([[[3, 4]], [[3, 4]], [[3, 4]], [[0, 1]], [[0, 1]]]),
    }


def test_slices_of_a_clip_guide_each_other_and_others_are_as_without(images):
    net, arguments = network(), episode(images)
    alone = net(images, **arguments)
    frames = torch.tensor([[1, 2], [0, 2], [1, 0], [-1, -1], [-1, -1]])
    together = net(images, **arguments, frame_index=frames, frame_distance=frames.new_ones(5, 2))
    torch.testing.assert_close(together[3:], alone[3:], atol=1e-5, rtol=1e-4)
    assert ((together - alone)[:3].flatten(1).abs().amax(1) > 1e-3).all()
    unguided = net(images, **arguments, frame_index=torch.full_like(frames, -1), frame_distance=frames * 0)
    torch.testing.assert_close(unguided, alone, atol=1e-5, rtol=1e-4)


def test_what_guides_a_slice_is_the_prediction_of_its_neighbours_not_their_label(images):
    net, arguments = network(), episode(images)
    frames = torch.tensor([[1], [0], [-1], [-1], [-1]])
    first = net(images, **arguments, frame_index=frames, frame_distance=frames.new_ones(5, 1))
    arguments["support_label"][1] = 0
    arguments["support_index"][3:] = 0
    changed = net(images, **arguments, frame_index=frames, frame_distance=frames.new_ones(5, 1))
    torch.testing.assert_close(changed[:1], first[:1])


def test_a_clip_trains_the_temporal_encoding_of_its_distance(images):
    net, arguments = network().train(), episode(images)
    frames = torch.tensor([[1], [0], [-1], [-1], [-1]])
    net(images, **arguments, frame_index=frames, frame_distance=2 * frames.new_ones(5, 1))["logits"].sum().backward()
    moved = net.frame_tpos.grad.abs().amax(1) > 0
    assert moved.tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2, "alpha": 4}, "freeze_encoder": True}])
def test_checkpoints_keep_the_gradients_and_little_of_each_image(images, settings, monkeypatch):
    frames = torch.tensor([[1], [0], [-1], [-1], [-1]])
    arguments = {**episode(images), "frame_index": frames, "frame_distance": frames.new_ones(5, 1)}
    plain = network(**settings)
    nets = [network(gradient_checkpointing=True, **settings) for _ in range(2)]
    kept, gradients = [], []
    for net, without in ((plain, False), (nets[0], False), (nets[1], True)):
        if without:  # the same computation, image by image, with all of it kept
            for module in ("sam2_sgp", "backbones"):
                monkeypatch.setattr(f"sam2sgp.networks.{module}.checkpoint", lambda f, *args, use_reentrant: f(*args))
        weights = {parameter.data_ptr() for parameter in net.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor, saved=saved, weights=weights):
            if tensor.data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = SGPLoss()(net.train()(images, **arguments), arguments["support_label"])
        kept.append(sum(saved.values()))
        loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert len(gradients[1]) > 50
    assert gradients[0].keys() == gradients[1].keys() == gradients[2].keys()
    with_checkpoints, without = (torch.cat([g.flatten() for g in part.values()]) for part in gradients[1:])
    # Not to the bit: some processors' matrix products depend on where the operands lie in memory.
    assert (with_checkpoints - without).norm() < 1e-3 * without.norm()
    assert kept[1] < 0.5 * kept[0], kept
    torch.testing.assert_close(nets[0].eval()(images, **arguments), plain.eval()(images, **arguments))
