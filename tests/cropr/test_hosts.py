"""Hosts of other libraries: Hugging Face, open_clip, torchvision, and timm's attention pooling, DINOv3 and NaFlex."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cases import assert_deployed, assert_exports, assert_one_graph, randomised
from cases import pictures as images
from PIL import Image
from torch import Tensor, nn

import cropr
from cropr import Schedule
from cropr.pruning import flops
from cropr.pruning.backbones import adapt

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32}
SMALL |= {"patch_size": 8}
TIMM = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
MLP, RATIO = {"intermediate_size": 64}, {"mlp_ratio": 2}
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", MLP),
    "vit-bare": ("ViTConfig", "ViTModel", MLP),
    "deit": ("DeiTConfig", "DeiTForImageClassification", MLP),
    "deit-teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", MLP),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", RATIO),
    "dinov2-bare": ("Dinov2Config", "Dinov2Model", RATIO),
    "dinov2-registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", RATIO),
    "dinov3-bare": ("DINOv3ViTConfig", "DINOv3ViTModel", {**MLP, "num_register_tokens": 2}),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", MLP),
    "clip-projection": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {**MLP, "projection_dim": 8}),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", MLP),
    "clip-classes": ("CLIPConfig", "CLIPForImageClassification", {"vision_config": {**SMALL, **MLP}}),
    "siglip-classes": ("SiglipConfig", "SiglipForImageClassification", {"vision_config": {**SMALL, **MLP}}),
}
OTHERS = ("torchvision", "open_clip", "open_clip-avg", "siglip-timm", "dinov3-timm", "naflex", "naflex-rope")
HOSTS = [*(f"{name}/{kind}" for name in HUGGING_FACE for kind in ("sdpa", "eager")), *OTHERS]


def _build(name: str) -> nn.Module:
    if name.startswith("open_clip"):
        towers = pytest.importorskip("open_clip.transformer")
        small = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "heads": 4, "mlp_ratio": 2.0}
        return towers.VisionTransformer(**small, output_dim=8, pool_type="avg" if "avg" in name else "tok")
    if name == "torchvision":
        return pytest.importorskip("torchvision").models.VisionTransformer(32, 8, 4, 4, 32, 64, num_classes=5)
    if name.startswith("naflex"):
        rope = "axial" if "rope" in name else "none"
        return timm.create_model("naflexvit_base_patch16_gap", pos_embed_grid_size=(4, 4), rope_type=rope, **TIMM)
    if name in OTHERS:
        model = "vit_base_patch16_siglip_224" if "siglip" in name else "vit_small_patch16_dinov3"
        return timm.create_model(model, img_size=32, **TIMM)
    transformers = pytest.importorskip("transformers")
    family, _, attention = name.partition("/")
    config_name, model_name, extra = HUGGING_FACE[family]
    config = getattr(transformers, config_name)(**({} if "vision_config" in extra else SMALL), **extra, num_labels=5)
    config._attn_implementation = attention
    return getattr(transformers, model_name)(config)


def host_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(_build(name))


def prune(host: nn.Module, rate: int, fusion: str = "none", reducer: str = "cropr") -> cropr.PrunedViT:
    torch.manual_seed(2)
    return cropr.prune(host, Schedule.constant(rate), reducer, fusion, num_outputs=5).eval()


def answer(host: nn.Module) -> Tensor:
    """What the host's own forward gives: logits, embedding or pooled output."""
    found: Any = host(images())
    if isinstance(found, Tensor):
        return found
    return next(found[key] for key in ("logits", "image_embeds", "pooler_output") if found.get(key) is not None)


@pytest.mark.parametrize("name", HOSTS)
def test_rate_zero_is_the_host_a_higher_rate_is_not_and_deployed_is_the_same(name: str, attention_calls: list) -> None:
    host = host_of(name)
    expected = answer(host)
    unpruned = len(attention_calls)
    for fusion in ("none", "llf"):
        torch.testing.assert_close(prune(host, 0, fusion)(images()).logits, expected, rtol=1e-6, atol=1e-6)
        model = prune(host, 3, fusion)
        attention_calls.clear()
        output = model(images())
        assert "eager" in name or len(attention_calls) == unpruned >= 4, "every block stays on fused attention"
        assert output.kept[1].shape[1] < 16 == output.tokens.num_patches + 10 * (fusion == "none")
        assert (output.logits - expected).abs().max() > 1e-3
    assert flops.macs(assert_deployed(model, images())).total < flops.macs(host).total


def by_hand(host: Any, name: str) -> tuple[Tensor, list[Any], Any]:
    """Embedded tokens, layers, and tables of rotary positions or None, from the host's own parts."""
    if name == "torchvision":
        x = torch.cat((host.class_token.expand(2, -1, -1), host._process_input(images())), 1)
        return x + host.encoder.pos_embedding, list(host.encoder.layers), None
    if name.startswith("open_clip"):
        return host._embeds(images()), list(host.transformer.resblocks), None
    body = next(part for part in host.modules() if hasattr(part, "embeddings"))
    x, tables = body.embeddings(images()), body.rope_embeddings(images()) if "dinov3" in name else None
    layers = next(part for part in body.modules() if isinstance(part, nn.ModuleList))
    return (body.pre_layrnorm(x) if "clip" in name else x), list(layers), tables


LOOPED = ["vit/sdpa", "deit/sdpa", "dinov2/sdpa", "dinov2-registers/eager", "dinov3-bare/sdpa", "clip/sdpa"]
LOOPED += ["siglip/eager", "torchvision", "open_clip"]


@pytest.mark.parametrize("name", LOOPED)
def test_kept_sets_are_those_of_a_loop_by_hand(name: str) -> None:
    """The host's own layers, an image at a time; the scores of a folded query, sorted."""
    host = host_of(name)
    fast = prune(host, 3).deploy()
    kept = fast.detailed(images()).kept
    batch, layers, tables = by_hand(host, name)
    prefix = batch.shape[1] - 16
    for b, tokens in enumerate(batch):
        x, places = tokens[None], torch.arange(16)
        for block, layer in enumerate(layers[:3], start=1):
            given: dict[str, Any] = {} if tables is None else {"position_embeddings": [rows[places] for rows in tables]}
            if "causal_attention_mask" in inspect.signature(layer.forward).parameters:  # CLIP of version 4
                given = {"attention_mask": None, "causal_attention_mask": None}
            x = layer(x, **given) if given or "lip/" not in name else layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
            reducer: Any = fast.model.reducers[str(block)]
            scores = reducer.score(cropr.Tokens(x, places[None], prefix), None)[0]
            best = scores.argsort(descending=True)[: len(places) - 3 - (block == 1)].sort().values
            x, places = torch.cat((x[:, :prefix], x[:, prefix:][:, best]), dim=1), places[best]
            assert torch.equal(kept[block][b], places)


@pytest.mark.parametrize("name", [name for name in HOSTS if "sdpa" in name])
@pytest.mark.parametrize("reducer", ["attn_topk", "evit", "tome", "ats"])
def test_other_methods_run_or_are_refused_by_name(name: str, reducer: str) -> None:
    try:
        output = prune(host_of(name), 3, reducer=reducer)(images())
    except TypeError as error:
        refused = str(error)
        assert re.search("with (no class token|attention pooling|blocks of type .* for .*)", refused), refused
    else:
        assert output.logits.isfinite().all()


@pytest.mark.parametrize("name", ["vit/sdpa", "vit/eager", "dinov2-bare/sdpa", "dinov3-bare/sdpa", "clip/sdpa"])
def test_the_cls_row_is_that_of_the_layers_own_attention(name: str) -> None:
    backbone = adapt(host_of(name))
    tokens, position = backbone.embed(images())
    query, key, _ = backbone._project(2, backbone._normed(2, tokens), tokens, position)
    row = (query[:, :, :1] @ key.transpose(2, 3)).softmax(dim=3)
    torch.testing.assert_close(backbone.cls_attention(2, tokens, position), row[:, :, 0, backbone.prefix :])
    if backbone._can_halve(backbone.blocks[1]):
        halves = backbone.mlp(2, backbone.attend(2, tokens, position))
        torch.testing.assert_close(halves.x, backbone.run(2, tokens, position).x, rtol=0, atol=0)


@pytest.mark.model
@pytest.mark.parametrize(
    "name",
    [*(f"{name}/sdpa" for name in HUGGING_FACE if name not in ("vit-bare", "deit", "dinov2", "dinov2-bare", "clip"))]
    + [name for name in OTHERS if name not in ("open_clip-avg", "naflex")],
)
def test_deployed_is_one_graph_and_exports(name: str) -> None:
    fast = prune(host_of(name), 3, "llf").deploy()
    assert_one_graph(fast)
    assert_exports(fast)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_as_host_gives_what_the_hosts_class_gives(name: str) -> None:
    host = host_of(f"{name}/sdpa")
    expected = host(pixel_values=images())
    for fusion in ("none", "llf"):
        same, fewer = (cropr.as_host(prune(host, rate, fusion).deploy()) for rate in (0, 3))
        actual = same(pixel_values=images())
        assert type(same) is type(host) and type(actual) is type(expected)  # noqa: PT018
        for key in actual:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-5)
        states = fewer(images(), output_hidden_states=True).hidden_states[-1]
        assert states.shape[1] == adapt(host).prefix + (16 if fusion == "llf" else 6)
    if "siglip" not in name and adapt(host).masks:  # pools by attention; with classes, version 4 records layers itself
        merged = prune(host, 3, reducer="tome").deploy()
        states = cropr.as_host(merged)(images(), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(states, merged.model(images()).tokens.raster().x)


def test_as_host_goes_into_a_pipeline_and_refuses_what_it_would_ignore_and_other_models() -> None:
    transformers = pytest.importorskip("transformers")
    host = host_of("vit/sdpa")
    same, fewer = (cropr.as_host(prune(host, rate).deploy()) for rate in (0, 3))
    how = {"image_processor": transformers.ViTImageProcessor(size={"height": 32, "width": 32}), "top_k": 5}
    picture = Image.fromarray(torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy())
    found = [transformers.pipeline("image-classification", model=one, **how)(picture) for one in (host, same, fewer)]
    scores = [{line["label"]: line["score"] for line in lines} for lines in found]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) != scores[2]
    assert scores[2].keys() == scores[0].keys()
    fewer.vit(images(), num_items_in_batch=torch.tensor(2))
    for refused in ({"interpolate_pos_encoding": True}, {"bool_masked_pos": torch.ones(2, 16)}):
        with pytest.raises(TypeError, match=rf"not \['{next(iter(refused))}'\]"):
            fewer.vit(images(), **refused)
    for other in (host, prune(host_of("torchvision"), 3)):
        with pytest.raises(TypeError, match="as_host takes pruned models of Hugging Face, not V"):
            cropr.as_host(other)


def test_what_has_no_adapter_is_refused_with_what_has() -> None:
    transformers = pytest.importorskip("transformers")
    text = transformers.CLIPTextConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    with pytest.raises(TypeError, match=r"CLIPTextModel with this head, forward or text tower \(supported:"):
        adapt(transformers.CLIPTextModel(text))
    swin = transformers.SwinConfig(embed_dim=12, depths=[1], num_heads=[1], image_size=32)
    with pytest.raises(TypeError, match=r"no adapter for SwinModel; supported: .*transformers dinov2"):
        adapt(transformers.SwinModel(swin))


@pytest.mark.model
def test_the_example_of_the_docs_measures_a_speed_up(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    readme, docs = ((Path(__file__).parents[2] / name).read_text("utf-8") for name in ("README.md", "docs/hosts.md"))
    code = docs.split("```python\n", 1)[1].split("```", 1)[0]
    assert code in readme
    small = code.replace("randn(8,", "randn(1,").replace(
        "ViTConfig()", "ViTConfig(num_hidden_layers=3, hidden_size=96, num_attention_heads=3)"
    )
    exec(compile(small, "docs/hosts.md", "exec"), {})
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.model
@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (
            "vlm_tower",
            ["--width=64", "--depth=6", "--text-width=64", "--text-depth=1", "--image-size=224", "--rounds=1"],
            "time to first token",
        ),
        ("host_speed", ["--batch-size=1", "--rounds=1"], "| DINOv2-B/14, 224 px | 256 | 167 |"),
    ],
)
def test_the_examples_run(script: str, flags: list[str], said: str) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(Path(__file__).parents[2] / f"examples/{script}.py"), *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said in run.stdout, run.stderr
