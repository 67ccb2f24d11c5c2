"""The pruned model around every host: identity, traces, fusion, deployment."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from torch import nn

import cropr
from cropr.pruning.methods import REDUCERS
from cropr.pruning.schedule import Schedule

DETERMINISTIC = [name for name in REDUCERS if name not in ("none", "random")]
FUSION = {name: "llf" if method.family == "pruner" else "none" for name, method in REDUCERS.items()}
PAIRS = [
    (host, reducer)
    for host in ("vit", "eva-rope")
    for reducer in DETERMINISTIC
    if host == "vit" or REDUCERS[reducer].family != "slots"
]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
HOSTS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit-avg-with-cls": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "gap-without-cls": ("vit_base_patch16_gap_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "layerscale": ("vit_tiny_patch16_224", {"init_values": 1e-2}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "scale-norms": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "pre-norm": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "post-norm": ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}),
    "parallel": ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ParallelScalingBlock}),
    "attention-pool": ("vit_tiny_patch16_224", {"global_pool": "map"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "eva-rope": ("eva02_tiny_patch14_224", {}),
    "eva-fused-qkv": ("eva02_tiny_patch14_224", {"qkv_fused": True, "global_pool": "token"}),
    "eva-mixed-rope": ("vit_small_patch16_rope_mixed_224", {}),
    "dynamic-size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
}


def _host(name: str) -> nn.Module:
    """A tiny host with every parameter at a value that matters (fresh weights hardly move the tokens)."""
    torch.manual_seed(0)
    model, arguments = HOSTS[name]
    host = timm.create_model(model, **{**SMALL, **arguments})
    for parameter in host.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    return host.eval()


def _images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fusion", ["none", "llf"])
@pytest.mark.parametrize("name", HOSTS)
def test_rate_zero_is_the_host(name, fusion):
    host = _host(name)
    expected = host(_images())
    actual = cropr.prune(host, Schedule.constant(0), fusion=fusion).eval()(_images()).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", HOSTS)
def test_pruning_changes_the_output_and_the_counts(name):
    host = _host(name)
    model = cropr.prune(host, Schedule.constant(3), fusion="none").eval()
    output = model(_images())
    assert [index.shape[1] for index in output.kept.values()] == [12, 9, 6]
    assert output.tokens.num_patches == 6
    assert (output.logits - host(_images())).abs().max() > 1e-3


@pytest.mark.parametrize("name", HOSTS)
def test_fusion_of_tokens_pruned_just_before_the_last_block_changes_nothing(name):
    """Tokens pruned after block 2 of 4 miss block 3 alone. With that block skipped, LLF is exact."""
    host = _host(name)

    class Skipped(nn.Module):
        def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
            return x

    model = cropr.prune(host, Schedule.stages({2: 7}), fusion="llf").eval()
    host.blocks[2].forward = Skipped().forward
    fused = model(_images())
    torch.testing.assert_close(fused.logits, host(_images()), rtol=1e-5, atol=1e-5)
    plain = cropr.prune(host, Schedule.constant(0)).eval()(_images())
    torch.testing.assert_close(fused.tokens.raster().x, plain.tokens.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "gap-without-cls", "registers", "eva-rope", "eva-mixed-rope"])
@pytest.mark.parametrize("fusion", ["none", "llf"])
def test_deployed_is_the_trained_model_in_eval_mode(name, fusion):
    model = cropr.prune(_host(name), Schedule.constant(3), fusion=fusion).eval()
    fast = model.deploy()
    trained, deployed = model(_images()), fast.detailed(_images())
    torch.testing.assert_close(fast(_images()), trained.logits, rtol=0, atol=1e-6)
    assert trained.kept.keys() == deployed.kept.keys()
    assert all(torch.equal(trained.kept[block], deployed.kept[block]) for block in trained.kept)


def test_deploy_leaves_the_trained_model_alone():
    model = cropr.prune(_host("vit"), Schedule.constant(3)).train()
    fast = model.deploy()
    assert model.training
    assert not fast.training
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fast.parameters()}
    assert not shared
    assert all(p.requires_grad for p in model.parameters())


def test_deployed_weights_are_the_hosts_plus_one_vector_a_module():
    host = _host("vit")
    model = cropr.prune(host, Schedule.constant(3), reducer_options={"num_queries": 50})
    extra = sum(tensor.numel() for tensor in model.deploy().state_dict().values())
    assert extra - sum(tensor.numel() for tensor in host.state_dict().values()) == 3 * 32


@pytest.mark.parametrize(("name", "reducer"), PAIRS)
def test_a_result_does_not_depend_on_the_batch(name, reducer):
    model = cropr.prune(_host(name), Schedule.constant(2), reducer, FUSION[reducer]).eval()
    images = _images(4)
    together = model(images)
    for b in range(4):
        alone = model(images[b : b + 1])
        torch.testing.assert_close(alone.logits, together.logits[b : b + 1], rtol=1e-4, atol=1e-5)
        for block, index in together.kept.items():
            assert torch.equal(alone.kept[block], index[b : b + 1])


@pytest.mark.parametrize("name", ["vit", "layerscale", "qk-norm", "post-norm", "eva-rope", "eva-fused-qkv"])
def test_the_cls_row_is_that_of_the_blocks_own_attention(name):
    """The recomputed row against softmax weights read off a host with explicit attention, rotary positions included."""
    host = _host(name)
    seen: list[torch.Tensor] = []
    attention = host.blocks[1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda _module, _input, output: seen.append(output))
    backbone = cropr.pruning.backbones.adapt(host)
    tokens, position = backbone.embed(_images())
    tokens = tokens.keep(torch.tensor([[3, 1, 8, 15], [0, 2, 9, 4]]))
    row = backbone.cls_attention(2, tokens, position)
    backbone.run(2, tokens, position)
    torch.testing.assert_close(row, seen[0][:, :, 0, backbone.prefix :], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "reducer"), [*PAIRS, ("vit", "random")])
def test_every_block_stays_on_fused_attention(name, reducer, monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    cropr.prune(_host(name), Schedule.constant(2), reducer, FUSION[reducer]).eval()(_images())
    assert len(calls) == SMALL["depth"]


def test_pruned_after_is_the_block_that_pruned_each_patch():
    assert not cropr.prune(_host("vit"), Schedule.constant(0)).eval()(_images()).pruned_after(16).any()
    output = cropr.prune(_host("vit"), Schedule.constant(3)).eval()(_images())
    after = output.pruned_after(16)
    assert [int((after[0] == block).sum()) for block in (0, 1, 2, 3)] == [6, 4, 3, 3]
    assert torch.equal((after[0] == 0).nonzero()[:, 0], output.kept[3][0].sort().values)


def test_another_image_size_resolves_the_schedule_anew():
    model = cropr.prune(_host("dynamic-size"), Schedule.fraction({2: 0.5})).eval()
    assert model(_images(size=32)).tokens.num_patches == 8
    assert model(_images(size=48)).tokens.num_patches == 18


def test_activation_checkpointing_of_the_host_is_honoured():
    images = _images()
    gradients = []
    for enable in (False, True):
        host = _host("eva-rope")
        host.set_grad_checkpointing(enable)
        model = cropr.prune(host, Schedule.constant(3), "variance", "llf").train()
        model(images).logits.sum().backward()
        gradients.append(host.blocks[0].mlp.fc2.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_pickles():
    model = cropr.prune(_host("vit"), Schedule.constant(3)).eval()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(_images()).logits, model(_images()).logits)


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "reducer"),
    [*(("vit", reducer) for reducer in DETERMINISTIC), ("registers", "cropr"), ("eva-rope", "cropr"),
     ("eva-rope", "attn_topk")],
)  # fmt: skip
def test_deployed_is_one_graph(name, reducer):
    torch._dynamo.reset()
    fast = cropr.prune(_host(name), Schedule.constant(2), reducer, FUSION[reducer]).deploy()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(_images()), fast(_images()))


def test_unsupported_hosts_and_settings_are_refused_by_name():
    with pytest.raises(TypeError, match=r"no adapter for ResNet; supported:.*Eva.*VisionTransformer"):
        cropr.prune(timm.create_model("resnet18", num_classes=5), Schedule.constant(2))
    with pytest.raises(TypeError, match="give the model itself"):
        cropr.prune("google/vit-base-patch16-224", Schedule.constant(2))
    with pytest.raises(TypeError, match=r"schedule = 8: give a Schedule"):
        cropr.prune(_host("vit"), 8)
    with pytest.raises(TypeError, match="patch dropout"):
        cropr.prune(timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5), Schedule.constant(2))
    host = _host("vit")
    host.blocks[1] = nn.TransformerEncoderLayer(32, 4)
    with pytest.raises(TypeError, match="no adapter for block type TransformerEncoderLayer; supported:"):
        cropr.prune(host, Schedule.constant(2))
    with pytest.raises(TypeError, match="no class token"):
        cropr.prune(_host("gap-without-cls"), Schedule.constant(2), "attn_topk")
    with pytest.raises(TypeError, match="ParallelScalingBlock"):
        cropr.prune(_host("parallel"), Schedule.constant(2), "attn_topk")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"schedule": Schedule.constant(6)}, "prunes 19 of 16 patch tokens.*lower the rate to 4"),
        ({"schedule": Schedule.constant(2), "fusion": "LLF"}, "unknown fusion 'LLF'"),
        ({"schedule": Schedule.constant(2), "reducer": "none"}, "reducer 'none' with a schedule that prunes"),
        ({"schedule": Schedule.constant(2), "reducer": "topk"}, "unknown reducer 'topk'"),
        (
            {"schedule": Schedule.constant(2), "reducer_options": {"queries": 2}},
            "no option queries; it has num_q",
        ),
    ],
)
def test_bad_settings_name_value_and_fix(arguments, says):
    with pytest.raises(ValueError, match=says):
        cropr.prune(_host("vit"), **arguments)


def test_auxiliary_heads_need_outputs():
    host = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0})
    with pytest.raises(ValueError, match="num_outputs"):
        cropr.prune(host, Schedule.constant(2))
    assert cropr.prune(host, Schedule.constant(2), num_outputs=7).train()(_images()).aux[0].shape == (2, 1, 7)
