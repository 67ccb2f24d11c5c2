"""Time to the first token of a LLaVA-like model whose CLIP vision tower is pruned, beside the unpruned one.

Both are built from their configuration with random weights: nothing is downloaded, and speed does not depend on
weights. Needs ``pip install cropr[hf]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import cropr
from cropr.bench.timing import ratio, time_passes

IMAGE_TOKEN = 7


def build(args: argparse.Namespace) -> Any:
    """A LLaVA whose tower ends with the layer that the language model reads: the last but one of CLIP's."""
    tower = CLIPVisionConfig(
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.depth,
        num_attention_heads=args.width // 64,
        image_size=args.image_size,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=args.text_width,
        intermediate_size=3 * args.text_width,
        num_hidden_layers=args.text_depth,
        num_attention_heads=args.text_width // 64,
        num_key_value_heads=args.text_width // 64,
        vocab_size=1000,
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval().to(args.device)


def first_token(model: Any, tower: Any, images: torch.Tensor, tokens: int, words: int) -> Callable[[], torch.Tensor]:
    """A forward pass to the first token, with so many image tokens and words in the prompt."""
    image = torch.full((len(images), tokens), IMAGE_TOKEN)
    prompt = torch.cat((image, torch.full((len(images), words), IMAGE_TOKEN + 1)), dim=1).to(images.device)

    def run() -> torch.Tensor:
        model.model.vision_tower = tower
        return model(input_ids=prompt, pixel_values=images, logits_to_keep=1).logits.argmax(dim=-1)

    return run


def main() -> None:
    """Build, prune, time in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=336, help="pixels; patches have 14")
    parser.add_argument("--width", type=int, default=1024, help="channels of the tower, a multiple of 64")
    parser.add_argument("--depth", type=int, default=23, help="layers of the tower")
    parser.add_argument("--text-width", type=int, default=1024, help="channels of the language model, a multiple of 64")
    parser.add_argument("--text-depth", type=int, default=12, help="layers of the language model")
    parser.add_argument("--words", type=int, default=32, help="text tokens in the prompt")
    args = parser.parse_args()

    model = build(args)
    tower = model.model.vision_tower
    schedule = cropr.Schedule.for_speedup(2.0, tower)
    fast = cropr.prune(tower, schedule, num_outputs=1).deploy()
    left = fast.model.token_trace[-1] - 1
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    patches = fast.model.backbone.num_patches
    passes = {
        "base": first_token(model, tower, images, patches, args.words),
        "pruned": first_token(model, cropr.as_host(fast), images, left, args.words),
    }
    with torch.inference_mode():
        seconds = time_passes(passes, args.rounds, args.device)
    whole, alone = ratio("speedup", seconds["base"], seconds["pruned"]), cropr.speedup(tower, fast, images, args.rounds)
    milliseconds = {name: 1e3 * sorted(found)[len(found) // 2] for name, found in seconds.items()}
    print(f"{schedule}: {patches} -> {left} image tokens")
    print(
        f"tower: {alone['speedup']:.2f} ({alone['speedup_low']:.2f} to {alone['speedup_high']:.2f}) times as fast, "
        f"{alone['mac_ratio']:.2f} times fewer multiply-adds ({alone['speedup_over_mac_ratio']:.2f} of that ratio)"
    )
    print(
        f"time to first token: {milliseconds['base']:.1f} ms -> {milliseconds['pruned']:.1f} ms, "
        f"{whole['speedup']:.2f} ({whole['speedup_low']:.2f} to {whole['speedup_high']:.2f}) times as fast"
    )


if __name__ == "__main__":
    main()
