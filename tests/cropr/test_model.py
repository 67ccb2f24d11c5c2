"""The pruned model around every host: identity, traces, fusion, deployment."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from cases import (
    HOSTS,
    SMALL,
    assert_deployed,
    assert_independent_of_the_batch,
    assert_one_graph,
    host_of,
    pictures,
)
from torch import nn

import cropr
from cropr.pruning.methods import REDUCERS
from cropr.pruning.schedule import Schedule

METHODS = [name for name in REDUCERS if name != "none"]
FUSION = {name: "llf" if method.family == "pruner" else "none" for name, method in REDUCERS.items()}
PAIRS = [
    (host, reducer) for host in ("vit", "eva") for reducer in METHODS
    if host == "vit" or REDUCERS[reducer].family != "slots"
]  # fmt: skip


def pruned(host, rate=3, reducer="cropr", fusion="llf"):
    return cropr.prune(host, Schedule.constant(rate), reducer, fusion).eval()


@pytest.mark.parametrize("name", HOSTS)
def test_rate_zero_is_the_host_a_higher_rate_is_not_and_deployment_changes_nothing(name):
    host = host_of(name)
    expected = host(pictures())
    for fusion in ("none", "llf"):
        torch.testing.assert_close(pruned(host, 0, fusion=fusion)(pictures()).logits, expected, rtol=0, atol=1e-6)
    output = pruned(host, fusion="none")(pictures())
    assert [index.shape[1] for index in output.kept.values()] == [12, 9, 6]
    assert output.tokens.num_patches == 6
    assert (output.logits - expected).abs().max() > 1e-3
    for fusion in ("none", "llf"):
        assert_deployed(pruned(host, fusion=fusion), pictures())


@pytest.mark.parametrize("name", HOSTS)
def test_fusion_of_tokens_pruned_just_before_the_last_block_changes_nothing(name):
    """Tokens pruned after block 2 of 4 miss block 3 alone. With that block skipped, LLF is exact."""
    host = host_of(name)
    model = cropr.prune(host, Schedule.stages({2: 7}), fusion="llf").eval()
    host.blocks[2].forward = lambda x, **_: x
    fused = model(pictures())
    torch.testing.assert_close(fused.logits, host(pictures()), rtol=1e-5, atol=1e-5)
    plain = pruned(host, 0, fusion="none")(pictures())
    torch.testing.assert_close(fused.tokens.raster().x, plain.tokens.x, rtol=1e-4, atol=1e-5)


def test_deployment_leaves_the_trained_model_alone_and_adds_one_vector_a_module():
    host = host_of("vit")
    model = cropr.prune(host, Schedule.constant(3), reducer_options={"num_queries": 50}).train()
    fast = model.deploy()
    assert model.training
    assert not fast.training
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fast.parameters()}
    assert all(p.requires_grad for p in model.parameters())
    deployed, own = (sum(tensor.numel() for tensor in one.state_dict().values()) for one in (fast, host))
    assert deployed - own == 3 * 32


@pytest.mark.parametrize(("name", "reducer"), PAIRS)
def test_a_result_does_not_depend_on_the_batch_and_every_block_stays_on_fused_attention(name, reducer, attention_calls):
    model = pruned(host_of(name), 2, reducer, FUSION[reducer])
    model(pictures())
    assert len(attention_calls) == SMALL["depth"]
    if reducer != "random":
        assert_independent_of_the_batch(model, pictures(3))


def test_pruned_after_is_the_block_that_pruned_each_patch():
    assert not pruned(host_of("vit"), 0)(pictures()).pruned_after(16).any()
    output = pruned(host_of("vit"), fusion="none")(pictures())
    after = output.pruned_after(16)
    assert [int((after[0] == block).sum()) for block in (0, 1, 2, 3)] == [6, 4, 3, 3]
    assert torch.equal((after[0] == 0).nonzero()[:, 0], output.kept[3][0].sort().values)


def test_another_image_size_resolves_the_schedule_anew():
    model = cropr.prune(host_of("dynamic-size"), Schedule.fraction({2: 0.5})).eval()
    assert [model(pictures(2, size)).tokens.num_patches for size in (32, 48)] == [8, 18]


def test_activation_checkpointing_of_the_host_is_honoured():
    gradients = []
    for enable in (False, True):
        host = host_of("eva")
        host.set_grad_checkpointing(enable)
        pruned(host, 3, "variance").train()(pictures()).logits.sum().backward()
        gradients.append(host.blocks[0].mlp.fc2.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_pickles():
    model = pruned(host_of("vit"))
    assert torch.equal(pickle.loads(pickle.dumps(model))(pictures()).logits, model(pictures()).logits)


@pytest.mark.model
@pytest.mark.parametrize(("name", "reducer"), [*(("vit", reducer) for reducer in METHODS), ("eva", "attn_topk")])
def test_deployed_is_one_graph(name, reducer):
    assert_one_graph(pruned(host_of(name, depth=3), 3, reducer, FUSION[reducer]).deploy())


def foreign_block():
    host = host_of("vit")
    host.blocks[1] = nn.TransformerEncoderLayer(32, 4)
    return host


@pytest.mark.parametrize(
    ("host", "arguments", "says"),
    [
        (lambda: timm.create_model("resnet18", num_classes=5), {}, r"no adapter for ResNet; .*Eva.*VisionTransformer"),
        (lambda: host_of("vit", patch_drop_rate=0.5), {}, "patch dropout"),
        (foreign_block, {}, "no adapter for block type TransformerEncoderLayer; supported:"),
        (lambda: host_of("gap-without-cls"), {"reducer": "attn_topk"}, "no class token"),
        (lambda: host_of("parallel"), {"reducer": "attn_topk"}, "ParallelScalingBlock"),
        (None, {"schedule": Schedule.constant(6)}, "prunes 19 of 16 patch tokens.*lower the rate to 4"),
        (None, {"fusion": "LLF"}, "unknown fusion 'LLF'"),
        (None, {"reducer": "none"}, "reducer 'none' with a schedule that prunes"),
        (None, {"reducer": "topk"}, "unknown reducer 'topk'"),
        (None, {"reducer_options": {"queries": 2}}, "no option queries; it has num_q"),
        (lambda: host_of("vit", num_classes=0), {}, "num_outputs"),
    ],
)
def test_unsupported_hosts_and_settings_are_refused_by_name(host, arguments, says):
    with pytest.raises((TypeError, ValueError), match=says):
        cropr.prune(host() if host else host_of("vit"), **{"schedule": Schedule.constant(2), **arguments})


def test_auxiliary_heads_of_a_host_without_classes_have_the_outputs_that_are_named():
    model = cropr.prune(host_of("vit", num_classes=0), Schedule.constant(2), num_outputs=7)
    assert model.train()(pictures()).aux[0].shape == (2, 1, 7)
