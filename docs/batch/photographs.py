"""A net for the example: it tells scikit-learn's two photographs apart by pieces of 48 x 48 pixels.

Trained when it is made, in some ten seconds, from a fixed seed. It averages over positions, so it takes pictures of any
size: what speaks for "flower" in the whole photograph is what speaks for it in a piece.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional

PIECE, STEPS, BATCH = 48, 150, 32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
        )
        self.classes = nn.Linear(32, 2)  # 0: china.jpg, 1: flower.jpg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classes(self.features(x).mean((2, 3)))


def net() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Net()
    pictures = torch.stack([torch.tensor(i) for i in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    pictures = functional.interpolate(pictures, (214, 320), mode="bilinear", antialias=True)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(STEPS):
        which = torch.randint(2, (BATCH,), generator=generator)
        y = torch.randint(214 - PIECE, (BATCH,), generator=generator).tolist()
        x = torch.randint(320 - PIECE, (BATCH,), generator=generator).tolist()
        pieces = [pictures[w, :, a : a + PIECE, b : b + PIECE] for w, a, b in zip(which.tolist(), y, x, strict=True)]
        batch = torch.stack(pieces)
        batch = batch * (0.7 + 0.6 * torch.rand(BATCH, 1, 1, 1, generator=generator))  # brightness is no evidence
        functional.cross_entropy(model(batch), which).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
