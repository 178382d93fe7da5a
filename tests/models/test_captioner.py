import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_tell.data.features import Features
from prune_tell.data.packing import pack_captions
from prune_tell.data.tokenizer import BOS, EOS, PAD
from prune_tell.models.captioner import Captioner
from prune_tell.models.decoder import Memory
from prune_tell.pruning.topk import TopK
from prune_tell.training.losses import word_loss

IMAGE = (24, 40)
CAPTIONS = [[BOS, 4, 5, 6, EOS], [BOS, EOS], [BOS, 7, 7, EOS], [BOS, 9, 4, 8, 10, 5, EOS], [BOS, 6, EOS]]
SCORES = ["norm", "cls_attention", "learned"]


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, *IMAGE)


@pytest.mark.parametrize("score", SCORES)
def test_five_captions_in_one_pass_equal_five_passes(make_captioner, score):
    captioner, pictures = make_captioner(prune_ratio=0.3, score=score), images(2)
    rows = [CAPTIONS, CAPTIONS[::-1][:3]]
    packed = pack_captions(rows)
    output = captioner(pictures, packed)
    loss = word_loss(output.logits_BQV, packed.targets_BQ)
    loss.loss.backward()
    together = {name: p.grad.clone() for name, p in captioner.named_parameters() if p.grad is not None}
    captioner.zero_grad()

    total = words = 0
    for image, captions in enumerate(rows):
        for number, caption in enumerate(captions):
            alone = pack_captions([[caption]])
            logits = captioner(pictures[image : image + 1], alone).logits_BQV
            mine = output.logits_BQV[image, packed.caption_BQ[image] == number]
            torch.testing.assert_close(mine, logits[0], atol=1e-5, rtol=1e-5)
            part = word_loss(logits, alone.targets_BQ)
            part.loss.backward()
            total, words = total + part.loss.item(), words + int(part.words)
    assert int(loss.words) == words
    assert loss.loss.item() == pytest.approx(total, rel=1e-5)
    separate = {name: p.grad for name, p in captioner.named_parameters() if p.grad is not None}
    assert separate.keys() == together.keys()
    for name, gradient in separate.items():
        torch.testing.assert_close(together[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 15), (0.3, 11), (0.9, 2)])
def test_prefix_tokens_are_never_dropped(make_captioner, score, ratio, kept):
    captioner = make_captioner(prune_ratio=ratio, score=score)
    sight = captioner.look(images(2))
    assert (sight.prefix, sight.grid) == (3, (3, 5))  # CLS and two registers
    assert sight.reduction.tokens_BKD.shape[1] == kept
    assert sight.memory.keys_values[0][0].shape == (2, 2, 3 + kept, 8)
    full = make_captioner(prune_ratio=0.0, score=score)
    full.load_state_dict(captioner.state_dict())
    features = captioner.encode(images(2))
    with torch.no_grad():
        for ours, whole in zip(
            captioner.look(features).memory.keys_values, full.look(features).memory.keys_values, strict=True
        ):
            torch.testing.assert_close(ours[0][:, :, :3], whole[0][:, :, :3])
            torch.testing.assert_close(ours[1][:, :, :3], whole[1][:, :, :3])


@given(
    seed=st.integers(0, 1000),
    ratio=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    score=st.sampled_from(["norm", "cls_attention"]),
    places=st.sampled_from(["none", "sinusoidal", "learned"]),
)
@settings(max_examples=12)
def test_gathering_equals_masking(make_captioner, seed, ratio, score, places):
    options = {"seed": seed % 3, "score": score, "grid_positions": places}
    pruned, whole = (make_captioner(prune_ratio=r, **options) for r in (ratio, 0.0))
    whole.load_state_dict(pruned.state_dict())
    packed = pack_captions([CAPTIONS, CAPTIONS[:2]])
    with torch.inference_mode():
        features = pruned.encode(images(2))
        sight = pruned.look(features)
        gathered, _ = pruned.decoder(packed.words_BQ, packed.positions_BQ, packed.mask(), sight.memory)
        dropped = torch.cat([torch.zeros(2, 3, dtype=torch.bool), sight.reduction.assignment_BN < 0], dim=1)
        assert dropped.any()
        bias = torch.zeros(2, 1, 1, 18).masked_fill(dropped[:, None, None], -torch.inf)
        memory = Memory(whole.look(features).memory.keys_values, bias)
        masked, _ = whole.decoder(packed.words_BQ, packed.positions_BQ, packed.mask(), memory)
    torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_dropped_tokens_get_no_gradient_and_the_learned_score_does(make_captioner, score):
    captioner = make_captioner(prune_ratio=0.5, score=score).train()
    features = Features(
        torch.randn(2, 15, 16, requires_grad=True), torch.randn(2, 3, 16, requires_grad=True), (3, 5), torch.rand(2, 15)
    )
    packed = pack_captions([CAPTIONS, CAPTIONS[:2]])
    output = captioner(features, packed)
    word_loss(output.logits_BQV, packed.targets_BQ).loss.backward()
    dropped = output.sight.reduction.assignment_BN < 0
    assert dropped.sum(1).tolist() == [7, 7]
    assert (features.tokens_BND.grad[dropped] == 0).all()
    assert (features.tokens_BND.grad[~dropped] != 0).any(-1).all()
    assert (features.prefix_BPD.grad != 0).any(-1).all()
    for name, parameter in captioner.reducer.named_parameters():
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("score", SCORES)
def test_nothing_pruned_is_the_very_same_tensor(make_captioner, score):
    captioner = make_captioner(prune_ratio=0.0, score=score)
    features = captioner.encode(images(1))
    assert captioner.look(features).reduction.tokens_BKD is features.tokens_BND


def test_a_kept_token_keeps_its_place(make_captioner):
    """The same token content on another grid position must read differently; with `none` it must not."""
    tokens = torch.randn(1, 15, 16) * 0.1
    packed = pack_captions([CAPTIONS])
    for kind, same in (("none", True), ("sinusoidal", False), ("learned", False)):
        captioner = make_captioner(prune_ratio=0.9, grid_positions=kind)
        logits = []
        for place in (2, 11):
            moved = tokens.clone()
            moved[0, [place, 7]] = 10 * torch.ones(16).cumsum(0)
            logits.append(captioner(Features(moved, torch.zeros(1, 0, 16), (3, 5)), packed).logits_BQV)
        assert torch.allclose(*logits, atol=1e-6) == same, kind


def test_images_and_their_features_give_the_same(make_captioner):
    captioner, pictures = make_captioner(prune_ratio=0.3, score="cls_attention"), images(2)
    packed = pack_captions([CAPTIONS, []])
    torch.testing.assert_close(
        captioner(pictures, packed).logits_BQV, captioner(captioner.encode(pictures), packed).logits_BQV
    )


def test_a_backbone_without_prefix_tokens(make_captioner):
    vit = {"model_args": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False}}
    vit["model_args"]["global_pool"] = "avg"
    captioner = make_captioner(prune_ratio=0.5, backbone=vit)
    sight = captioner.look(images(2))
    assert sight.prefix == 0
    assert sight.memory.keys_values[0][0].shape[2] == 8


@pytest.mark.parametrize("trainable", ["frozen", "full"])
def test_a_frozen_backbone_has_no_graph(make_captioner, trainable):
    captioner = make_captioner(backbone={"trainable": trainable}).train()
    features = captioner.encode(images(1))
    assert features.tokens_BND.requires_grad == (trainable == "full")
    packed = pack_captions([CAPTIONS])
    word_loss(captioner(images(1), packed).logits_BQV, packed.targets_BQ).loss.backward()
    assert any(p.grad is not None for p in captioner.backbone.parameters()) == (trainable == "full")
    assert all(p.grad is not None for p in captioner.projection.parameters())
    with torch.no_grad():
        assert not captioner.encode(images(1)).tokens_BND.requires_grad


@pytest.mark.parametrize("score", SCORES)
def test_bf16_autocast_is_finite_and_close(make_captioner, score):
    captioner = make_captioner(prune_ratio=0.0, score=score).train()
    packed = pack_captions([CAPTIONS, []])
    pictures = images(2)
    expected = captioner(pictures, packed).logits_BQV
    captioner.reducer.prune_ratio = 0.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = word_loss(captioner(pictures, packed).logits_BQV, packed.targets_BQ).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in captioner.parameters() if p.grad is not None)
    captioner.reducer.prune_ratio = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = captioner(pictures, packed).logits_BQV
    real = packed.words_BQ != PAD
    assert (half.float()[real] - expected[real]).abs().max() < 0.1 * expected[real].abs().max()


def test_fp16_features_from_a_cache_train_in_single_precision(make_captioner):
    captioner = make_captioner(prune_ratio=0.3).train()
    half = Features(torch.randn(2, 15, 16).half(), torch.randn(2, 3, 16).half(), (3, 5)).to(torch.device("cpu"))
    assert captioner(half, pack_captions([CAPTIONS, []])).logits_BQV.dtype == torch.float32


def live_bytes() -> int:
    gc.collect()
    seen: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":  # no compiler leftovers
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_no_step_leaves_tensors_behind(make_captioner, score, checkpointing):
    captioner = make_captioner(prune_ratio=0.3, score=score, backbone={"gradient_checkpointing": checkpointing}).train()
    optimizer = torch.optim.SGD(captioner.parameters(), lr=1e-3)
    packed, pictures = pack_captions([CAPTIONS, CAPTIONS]), images(2)

    def step() -> None:
        word_loss(captioner(pictures, packed).logits_BQV, packed.targets_BQ).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    before = live_bytes()
    for _ in range(12):
        step()
    assert live_bytes() == before
    kept = captioner.backbone._qkv
    assert kept is None or kept.grad_fn is None  # what checkpointing measures again holds no graph


@pytest.mark.parametrize("score", SCORES)
def test_a_copy_is_independent(make_captioner, score):
    captioner, pictures, packed = make_captioner(prune_ratio=0.3, score=score), images(1), pack_captions([CAPTIONS])
    expected = captioner(pictures, packed).logits_BQV
    twin = copy.deepcopy(captioner)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(pictures, packed).logits_BQV, expected)


def test_weights_and_attention_come_with_the_output(make_captioner):
    captioner = make_captioner(prune_ratio=0.3)
    packed = pack_captions([CAPTIONS])
    output = captioner(images(1), packed, weights=True)
    assert [m.shape for m in output.attention] == [(1, 2, packed.words_BQ.shape[1], 3 + 11)] * 2
    assert captioner(images(1), packed).attention == [None, None]


@pytest.mark.parametrize("score", SCORES)
def test_the_whole_compiles_without_a_graph_break(make_captioner, score):
    captioner = make_captioner(prune_ratio=0.3, score=score).train()
    pictures, packed = images(2), pack_captions([CAPTIONS, []])
    torch._dynamo.reset()
    compiled = torch.compile(captioner, fullgraph=True, backend="eager")
    torch.manual_seed(1)  # the learned score draws its tokens in training
    ours = compiled(pictures, packed).logits_BQV
    torch.manual_seed(1)
    torch.testing.assert_close(ours, captioner(pictures, packed).logits_BQV)


def test_reducers_can_be_exchanged(make_captioner):
    captioner: Captioner = make_captioner()
    captioner.reducer = TopK(width=16, kept_tokens=4)
    assert captioner.look(images(1)).memory.keys_values[0][0].shape[2] == 7
