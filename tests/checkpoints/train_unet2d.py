"""Train a small UNet2DModel of diffusers, in PyTorch, on the graded digits, and save its pipeline.

    python tests/checkpoints/train_unet2d.py FOLDER

The usual training of noise prediction, at times drawn more often where little noise is added,
because that is where an image of 64 pixels can be told from its neighbours. Four to six minutes.
"""

import math
import sys

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from memjax.data.testbeds import graded

STEPS = 1800
BATCH = 64
LEARNING_RATE = 3e-3


def train(folder, seed=0):
    """Train with Adam and a falling rate, and write the folder of a ``DDPMPipeline``."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images = np.ascontiguousarray(graded(seed).training_images.transpose(0, 3, 1, 2))
    images = torch.from_numpy(images)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 64),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
        add_attention=False,
    )
    scheduler = DDPMScheduler()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    for step in range(STEPS):
        warm = min(1, (step + 1) / 100)
        rate = LEARNING_RATE * warm * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.param_groups[0]["lr"] = rate
        clean = images[torch.randint(0, len(images), (BATCH,))]
        noise = torch.randn_like(clean)
        times = (1000 * torch.rand(BATCH) ** 2).long()
        noised = scheduler.add_noise(clean, noise, times)
        loss = torch.mean((network(noised, times).sample - noise) ** 2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    DDPMPipeline(unet=network.eval(), scheduler=scheduler).save_pretrained(folder)


if __name__ == "__main__":
    train(sys.argv[1])
