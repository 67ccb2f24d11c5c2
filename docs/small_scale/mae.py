"""Masked-patch reconstruction as the first training of the laptop scale's ViT: does it serve within minutes?

    python docs/small_scale/mae.py 48000 mae.safetensors
    python docs/small_scale/search.py classification imagenet_methods/none --weights mae.safetensors

Trains on scenes of seed 0 without labels, as MAE does: a quarter of the patches enter the encoder, two narrow blocks
predict the normalised pixels of the others. Writes the host's weights under timm's names. docs/small_scale.md has the
result.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cropr.data.scenes import compose
from cropr.specs import ScenesSpec
from workflow.paper.grid import load_grid

IMAGES, BATCH, KEPT, PATCH, NARROW = 20_000, 64, 16, 8, 64


class Decoder(nn.Module):
    """Pixels [B, N, 3 x 8 x 8] of all patches, from the encoded visible ones."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, NARROW)
        self.mask = nn.Parameter(torch.zeros(1, 1, NARROW))
        self.position = nn.Parameter(0.02 * torch.randn(1, patches, NARROW))
        self.blocks = nn.Sequential(*(Block(NARROW, 4) for _ in range(2)))
        self.pixels = nn.Sequential(nn.LayerNorm(NARROW), nn.Linear(NARROW, 3 * PATCH**2))

    def forward(self, visible: Tensor, index: Tensor) -> Tensor:
        place = index[..., None].expand(-1, -1, NARROW)
        tokens = self.mask.expand(len(visible), self.position.shape[1], -1).scatter(1, place, self.narrow(visible))
        return self.pixels(self.blocks(tokens + self.position))


def main() -> None:
    seen, out = int(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    spec = load_grid("config").config.tasks["classification"].model
    host = timm.create_model(spec.name, img_size=64, num_classes=10, **spec.args, **spec.pools["avg"])
    decoder = Decoder(host.embed_dim, 64)
    images = torch.stack([torch.from_numpy(compose(ScenesSpec(), "train", i).image) for i in range(IMAGES)])
    parameters = [*host.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1.5e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, seen // BATCH, pct_start=0.1)
    began = time.time()
    for step in range(seen // BATCH):
        x = images[torch.randint(0, IMAGES, (BATCH,))].permute(0, 3, 1, 2) / 127.5 - 1
        target = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        tokens = host._pos_embed(host.patch_embed(x))
        index = torch.rand(BATCH, 64).argsort(1)[:, :KEPT]
        patches = tokens[:, 1:].gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
        visible = host.blocks(torch.cat((tokens[:, :1], patches), 1))[:, 1:]
        masked = torch.ones(BATCH, 64).scatter(1, index, 0)
        error = (decoder(host.fc_norm(visible), index) - target).square().mean(-1)
        loss = (error * masked).sum() / masked.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(step, f"{loss.item():.3f}, {(step + 1) * BATCH / (time.time() - began):.0f} images/s", flush=True)  # noqa: T201
    save_file({name: tensor.contiguous() for name, tensor in host.state_dict().items()}, out)


if __name__ == "__main__":
    main()
