"""Linear attention on the embedded model: convert, save, load, draw, and be the base model again.

    python examples/linfusion.py

The conversion is not distilled, so its pictures show that the path works, not what LinFusion can do.
"""

import tempfile

import torch

import diffusion_attn as da

PROMPT = "a large red star above a blue ring on a white background"

pipe = da.shapes.load_pipeline()


def draw():
    """The same seed each time."""
    return pipe(PROMPT, num_inference_steps=20, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[
        0
    ]


plain = draw()

with tempfile.TemporaryDirectory() as folder:
    da.LinFusion.for_model(pipe.unet).save_pretrained(folder)
    linfusion = da.LinFusion.from_pretrained(folder)

print(da.enable(pipe, linfusion))
linear = draw()
da.disable(pipe)

assert draw().tobytes() == plain.tobytes()
for name, image in (("plain", plain), ("linear", linear)):
    print(f"{name}: {da.shapes.read(image)}")
