"""Speed-up of pruned Hugging Face models over their hosts, beside the ratio of multiply-adds.

The models are built from their configuration with random weights: nothing is downloaded, and speed does not depend on
weights. Needs ``pip install cropr[hf]``.
"""

from __future__ import annotations

import argparse

import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

import cropr

MODELS = {
    "ViT-B/16, 224 px": lambda: ViTForImageClassification(ViTConfig()),
    "DINOv2-B/14, 224 px": lambda: Dinov2Model(Dinov2Config(image_size=224)),
}


def main() -> None:
    """Build, prune, time in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rate", type=int, default=8, help="patches pruned after every block but the last")
    args = parser.parse_args()

    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    print("| model | patches | left | speed-up | MAC ratio | speed-up / MAC ratio |\n|---|---|---|---|---|---|")
    for name, build in MODELS.items():
        host = build().eval().to(args.device)
        fast = cropr.prune(host, cropr.Schedule.constant(rate=args.rate), num_outputs=1).deploy()
        found = cropr.speedup(host, fast, images, args.rounds)
        interval = f"{found['speedup']:.2f} [{found['speedup_low']:.2f}, {found['speedup_high']:.2f}]"
        patches, left = fast.model.backbone.num_patches, fast.model.token_trace[-1] - 1
        share = f"{100 * found['speedup_over_mac_ratio']:.0f} %"
        print(f"| {name} | {patches} | {left} | {interval} | {found['mac_ratio']:.2f} | {share} |")


if __name__ == "__main__":
    main()
