"""The pruned model around every host: identity, traces, fusion, deployment, blocks by halves, what a reducer reads."""

import pickle
from dataclasses import replace

import pytest
import timm
import torch
from cases import HOSTS, PRUNERS, SMALL, assert_batchwise, assert_deployed, assert_one_graph, host_of, pictures
from torch import nn

import cropr
from cropr.pruning.backbones import adapt
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
    model = pruned(host, fusion="none")
    output = model(pictures())
    assert [index.shape[1] for index in output.kept.values()] == [12, 9, 6]
    assert output.tokens.num_patches == 6 == model.token_trace[-1] - model.backbone.prefix
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
        assert_batchwise(model, pictures(3))


def test_pruned_after_is_the_block_that_pruned_each_patch():
    assert not pruned(host_of("vit"), 0)(pictures()).pruned_after(16).any()
    model = pruned(host_of("vit"), fusion="none")
    output = model(pictures())
    after = output.pruned_after(16)
    assert [int((after[0] == block).sum()) for block in (0, 1, 2, 3)] == [6, 4, 3, 3]
    assert torch.equal((after[0] == 0).nonzero()[:, 0], output.kept[3][0].sort().values)
    assert torch.equal(pickle.loads(pickle.dumps(model))(pictures()).logits, output.logits)
    # Another image size resolves the schedule anew.
    model = cropr.prune(host_of("dynamic-size"), Schedule.fraction({2: 0.5})).eval()
    assert [model(pictures(2, size)).tokens.num_patches for size in (32, 48)] == [8, 18]


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
        (lambda: "google/vit-base-patch16-224", {}, "give the model itself"),
        (None, {"schedule": 8}, "schedule = 8: give a Schedule"),
        (lambda: host_of("vit", patch_drop_rate=0.5), {}, "patch dropout"),
        (lambda: host_of("vit", dynamic_img_pad=True), {}, "dynamic_img_pad"),
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


def test_a_host_without_classes_takes_a_method_without_a_head():
    assert pruned(host_of("vit", num_classes=0), reducer="tome", fusion="none")(pictures()).logits.shape == (2, 32)


READ = ["vit", "layerscale", "norms", "registers-avg", "eva", "eva-fused-qkv", "eva-norms"]
"""Hosts whose attention can be read and gated."""
each_host = pytest.mark.parametrize("name", [*READ, "eva-mixed-rope"])


def _tokens(host: nn.Module, order: list[int]):
    """Adapter, these patches of two images before block 1, and what is known of positions."""
    backbone = adapt(host)
    tokens, position = backbone.embed(torch.randn(2, 3, 32, 32))
    return backbone, tokens.keep(torch.tensor([order, order[::-1]])), position


@pytest.mark.parametrize("training", [False, True])
@each_host
def test_both_halves_are_the_block_to_the_bit(name, training):
    backbone, tokens, position = _tokens(host_of(name, drop_path_rate=0.5).train(training), [3, 1, 8, 15, 0])
    sized = replace(tokens, size=torch.rand(2, 5) + 0.5)
    for block in (2, 4):
        for each in (tokens, sized):
            torch.manual_seed(7)
            whole = backbone.run(block, each, position).x
            torch.manual_seed(7)
            assert torch.equal(backbone.mlp(block, backbone.attend(block, each, position)).x, whole)


@each_host
@torch.no_grad()
def test_a_size_is_so_many_copies_and_padding_is_nothing(name):
    """In attention, in the CLS row and in pooling."""
    backbone, tokens, position = _tokens(host_of(name), [3, 1, 8])
    copies = torch.tensor([[0, 1, 1, 1, 2], [0, 1, 1, 1, 2]])
    sized = replace(tokens, size=torch.tensor([[1.0, 3.0, 1.0]] * 2))
    garbage = tokens.keep(copies)
    padded = replace(garbage, valid=torch.tensor([[True, True, False, False, True]] * 2))
    removed = tokens.keep(torch.tensor([[0, 1, 2]] * 2))
    few = [*range(backbone.prefix), *(backbone.prefix + j for j in (0, 1, 4))]
    for ours, theirs in ((sized, garbage), (padded, removed)):
        rows = slice(None) if ours is padded else few
        ours, theirs = backbone.run(1, ours, position), backbone.run(1, theirs, position)
        x = ours.x[:, few] if ours.valid is not None else ours.x
        torch.testing.assert_close(x, theirs.x[:, rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(backbone.head(ours), backbone.head(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", READ)
@torch.no_grad()
def test_open_gates_are_plain_attention_and_closed_ones_pruning(name):
    backbone, tokens, position = _tokens(host_of(name), [3, 1, 8, 15, 0])
    plain = backbone.run(1, tokens, position).x
    opened = backbone.run(1, replace(tokens, gate=torch.ones(2, 5)), position).x
    torch.testing.assert_close(opened, plain, rtol=1e-5, atol=1e-5)
    gate = torch.tensor([[1.0, 0, 1, 1, 0]] * 2)
    gated, removed = replace(tokens, gate=gate), tokens.keep(torch.tensor([[0, 2, 3]] * 2))
    none = backbone.head(replace(tokens, gate=0 * gate))
    assert none.isfinite().all(), "an image may lose all patches in training"
    for block in (1, 2):
        gated, removed = backbone.run(block, gated, position), backbone.run(block, removed, position)
    stays = [*range(backbone.prefix), *(backbone.prefix + j for j in (0, 2, 3))]
    torch.testing.assert_close(gated.x[:, stays], removed.x, rtol=1e-3, atol=1e-3)  # its epsilon is 1e-6
    torch.testing.assert_close(backbone.head(gated), backbone.head(removed), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", READ)
@torch.no_grad()
def test_what_is_read_is_what_the_block_computes(name):
    """Keys, values and attention of the host's own explicit path."""
    host = host_of(name)
    backbone, tokens, position = _tokens(host, [3, 1, 8, 15])
    tokens = replace(tokens, size=torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2))
    attention = host.blocks[1].attn
    attention.fused_attn = False
    seen: dict[str, torch.Tensor] = {}
    attention.attn_drop.register_forward_hook(lambda *found: seen.update(attention=found[2]))
    attention.k_norm.register_forward_hook(lambda *found: seen.update(key=found[2]))
    backbone.run(2, tokens, position)
    _, _, value = backbone._project(2, backbone._normed(2, tokens), tokens, position)
    prefix, close = backbone.prefix, {"rtol": 1e-4, "atol": 1e-5}
    weights, key = seen["attention"], seen["key"]
    torch.testing.assert_close(backbone.column_sums(2, tokens, position), weights.sum((1, 2))[:, prefix:], **close)
    torch.testing.assert_close(backbone.cls_attention(2, tokens, position), weights[:, :, 0, prefix:], **close)
    torch.testing.assert_close(backbone.mean_key(2, tokens, position), key.mean(dim=1), **close)
    torch.testing.assert_close(backbone.value_norms(2, tokens, position), value[:, :, prefix:].norm(dim=3), **close)
    heads = attention.norm((weights @ value).transpose(1, 2).flatten(2))
    half = backbone._scale(host.blocks[1], 1, attention.proj(heads))
    torch.testing.assert_close(tokens.x + half, backbone.attend(2, tokens, position).x, **close)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "none"])
@torch.no_grad()
def test_every_block_computes_on_the_counts_of_the_schedule(name, prefix):
    """Tokens that enter each attention and each MLP, with 0 to 5 prefix tokens."""
    pool = "token" if prefix else "avg"
    host = host_of("vit", class_token=prefix > 0, reg_tokens=max(prefix - 1, 0), global_pool=pool)
    kind = REDUCERS[name].load()
    if not prefix and "cls_attention" in kind.reads:
        with pytest.raises(TypeError, match="no class token"):
            cropr.prune(host, Schedule.constant(3), name)
        return
    model = cropr.prune(host, Schedule.constant(3), name).eval()
    entered: list[list[int]] = [[], []]
    for block in host.blocks:
        for part, found in zip((block.attn, block.mlp), entered, strict=True):
            part.register_forward_pre_hook(lambda _module, x, found=found: found.append(x[0].shape[1] - prefix))
    output = model(torch.randn(2, 3, 32, 32))
    assert entered[0] == [16, 12, 9, 6]
    assert entered[1] == ([12, 9, 6, 6] if kind.places[0] == "after_attention" else entered[0])
    assert output.tokens.num_patches == 6
    assert (output.tokens.valid is None) == (name != "ats")
    assert set(output.kept) == (set() if REDUCERS[name].family == "slots" else {1, 2, 3})


@pytest.mark.parametrize("name", [name for name in REDUCERS if name not in ("none", *PRUNERS)])
def test_what_a_method_cannot_do_is_refused_by_name(name):
    kind = REDUCERS[name].load()
    refused = [("vit", "llf", f"{kind.__name__} leaves no pruned tokens")]
    if kind.places[0] == "after_attention":
        refused.append(("post-norm", "none", f"ResPostBlock, for {kind.__name__}"))
    if kind.reads or "gate" in kind.sets:
        refused.append(("eva-mixed-rope", "none", f"type AttentionRope, for {kind.__name__}"))
    if kind.slots:
        refused.append(("eva", "none", f"rotary positions, for {kind.__name__}"))
        output = cropr.prune(host_of("vit"), Schedule.constant(3), name).eval()(torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match="no pruning map"):
            output.pruned_after(16)
    for host, fusion, says in refused:
        with pytest.raises((TypeError, ValueError), match=says):
            cropr.prune(host_of(host), Schedule.constant(3), name, fusion)
