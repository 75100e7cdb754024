"""Train shapes-clip, which tells what pictures of shapes show, and an IP-Adapter by which shapes-sd is told of them.

    pip install "diffusion-attn[train]"
    python examples/train_shapes_clip.py --output runs/shapes-clip                     # everything, resumes
    python examples/train_shapes_clip.py --output runs/shapes-clip --stage evaluate    # the scores alone

First CLIP by contrast, from the text encoder of shapes-sd on, then the adapter's projections beside a frozen UNet. The
embedded adapter was made by two runs of the second stage; the other one went on where the first had ended:

    python examples/train_shapes_clip.py --output runs/shapes-clip --adapter-steps 1000 --caption-dropout 0.5
    rm runs/shapes-clip/model/ip-adapter_shapes-sd.safetensors
    python examples/train_shapes_clip.py --output runs/shapes-clip

Scenes are drawn by code, so there is no dataset. The result, `OUTPUT/model`, is a folder whose CLIP
`CLIPModel.from_pretrained` and whose adapter `pipe.load_ip_adapter` load.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import ImageProjection
from diffusers.utils import make_image_grid
from safetensors.torch import save_file
from tqdm import tqdm
from train_shapes import HELD_OUT_SEED, SIZE, Checkpoint, pixels, record, set_lr
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from diffusion_attn import shapes
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.renderer import render
from diffusion_attn.shapes.scenes import Scene, sample_scene, sample_scenes

WIDTH = 128  # of the space of pictures and captions
TOKENS = 4  # that the adapter makes of a picture
ADAPTER = "ip-adapter_shapes-sd.safetensors"
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def build_clip(pipe) -> CLIPModel:
    """CLIP whose text transformer is that of shapes-sd, which knows what words mean."""
    layers = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
    # Halves are loaded alone too, and have to know how wide the space is.
    text = {**pipe.text_encoder.config.to_dict(), "projection_dim": WIDTH}
    vision = {**layers, "image_size": SIZE, "patch_size": 8, "projection_dim": WIDTH}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    clip.text_model.load_state_dict(pipe.text_encoder.state_dict())
    return clip


def build_adapter(unet) -> ImageProjection:
    """Load an untrained IP-Adapter into ``unet``: keys and values for pictures begin as those for text."""
    projection = ImageProjection(WIDTH, unet.config.cross_attention_dim, TOKENS)
    names = {"image_embeds": "proj", "norm": "norm"}  # in IP-Adapter's files
    image = {}
    for key, value in projection.state_dict().items():
        layer, kind = key.split(".")
        image[f"{names[layer]}.{kind}"] = value
    adapter = {}
    for index, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            adapter |= {f"{index}.to_{kind}_ip.weight": getattr(layer, f"to_{kind}").weight.detach() for kind in "kv"}
    unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": adapter}])
    return unet.encoder_hid_proj.image_projection_layers[0]


def adapter_file(unet) -> dict[str, torch.Tensor]:
    """The weights as IP-Adapter's files have them."""
    [projection] = unet.encoder_hid_proj.image_projection_layers
    tensors = {f"image_proj.proj.{name}": p for name, p in projection.image_embeds.named_parameters()}
    tensors |= {f"image_proj.norm.{name}": p for name, p in projection.norm.named_parameters()}
    for index, processor in enumerate(unet.attn_processors.values()):
        if hasattr(processor, "to_k_ip"):
            for kind in "kv":
                tensors[f"ip_adapter.{index}.to_{kind}_ip.weight"] = getattr(processor, f"to_{kind}_ip")[0].weight
    return {name: p.detach().half().contiguous() for name, p in tensors.items()}


def clip_pixels(scenes: list[Scene]) -> torch.Tensor:
    """What CLIP's processor makes of the scenes at their native size, ``(batch, 3, SIZE, SIZE)``."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (PROCESSOR.image_mean, PROCESSOR.image_std))
    return ((pixels(scenes) + 1) / 2 - mean) / std


def tokens_of(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids ``(batch, positions)``."""
    return tokenizer(captions, padding="max_length", return_tensors="pt").input_ids


def train_clip(args: argparse.Namespace) -> None:
    """Stage 1: pictures and captions by contrast; writes the CLIP of ``OUTPUT/model``."""
    final = args.output / "model"
    if (final / "model.safetensors").exists():
        return
    torch.manual_seed(args.seed)
    pipe = shapes.load_pipeline("shapes-sd")
    clip = build_clip(pipe).train()
    optimizer = torch.optim.AdamW(clip.parameters(), args.clip_lr, weight_decay=0.05)
    checkpoint = Checkpoint(args.output / "checkpoint-clip", {"clip": clip}, optimizer)
    first = checkpoint.load()
    began = time.monotonic()
    with tqdm(range(first, args.clip_steps), initial=first, total=args.clip_steps, desc="clip") as bar:
        for step in bar:
            rng = random.Random(args.seed * 1_000_003 + step)
            scenes = [sample_scene(rng, held_out=False) for _ in range(args.clip_batch)]
            set_lr(optimizer, step, args.clip_steps)
            # What follows a caption's end does not count.
            ids = pipe.tokenizer([caption(scene) for scene in scenes], padding=True, return_tensors="pt").input_ids
            loss = clip(input_ids=ids, pixel_values=clip_pixels(scenes), return_loss=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clip.logit_scale.data.clamp_(max=4.6052)  # a hundredfold, as CLIP's
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % args.save_every == 0:
                checkpoint.save(step + 1)
                found = retrieval(clip, pipe.tokenizer)
                tqdm.write(f"clip step {step + 1}: {found:.0%} of 200 captions found")
                clip.train()
    record(args, "clip", steps=args.clip_steps, seconds=time.monotonic() - began, first_step=first)
    CLIPProcessor(PROCESSOR, pipe.tokenizer).save_pretrained(final)
    clip.eval().half().save_pretrained(final)  # last, since it says that the stage is done


@torch.no_grad()
def retrieval(clip: CLIPModel, tokenizer, count: int = 200) -> float:
    """The share of held-out pictures whose own caption, among those of all, is the nearest."""
    scenes = list(sample_scenes(count, HELD_OUT_SEED + 2, held_out=True))
    captions = [caption(scene) for scene in scenes]
    logits = clip.eval()(
        input_ids=tokens_of(tokenizer, captions), pixel_values=clip_pixels(scenes).to(clip.dtype)
    ).logits_per_image
    return sum(captions[int(found)] == own for found, own in zip(logits.argmax(1), captions, strict=True)) / count


def train_adapter(args: argparse.Namespace) -> None:
    """Stage 2: the adapter's projections alone, on pictures that the UNet is told of by CLIP, by text or by both."""
    final = args.output / "model" / ADAPTER
    if final.exists():
        return
    torch.manual_seed(args.seed)
    pipe = shapes.load_pipeline("shapes-sd")
    clip = CLIPModel.from_pretrained(args.output / "model", dtype=torch.float32).eval()
    unet = pipe.unet.requires_grad_(False)
    projection = build_adapter(unet)
    processors = {str(i): p for i, p in enumerate(unet.attn_processors.values()) if hasattr(p, "to_k_ip")}
    trained = torch.nn.ModuleDict({"projection": projection, **processors}).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), args.adapter_lr, weight_decay=0.01)
    checkpoint = Checkpoint(args.output / "checkpoint-adapter", {"adapter": trained}, optimizer)
    first = checkpoint.load()
    scheduler = pipe.scheduler
    empty = tokens_of(pipe.tokenizer, [""])
    began = time.monotonic()
    with tqdm(range(first, args.adapter_steps), initial=first, total=args.adapter_steps, desc="adapter") as bar:
        for step in bar:
            rng = random.Random(args.seed * 1_000_003 + step)
            draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            scenes = [sample_scene(rng, held_out=False) for _ in range(args.adapter_batch)]
            ids = tokens_of(pipe.tokenizer, [caption(scene) for scene in scenes])
            without_text, without_image = torch.rand(2, len(scenes), 1, generator=draw)
            with torch.no_grad():
                clean = pipe.vae.encode(pixels(scenes)).latent_dist.mode() * pipe.vae.config.scaling_factor
                text = pipe.text_encoder(torch.where(without_text < args.caption_dropout, empty, ids))[0]
                seen = clip.get_image_features(pixel_values=clip_pixels(scenes)).pooler_output
            seen = torch.where(without_image < args.image_dropout, 0.0, seen)
            noise = torch.randn(clean.shape, generator=draw)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(scenes),), generator=draw)
            noisy, target = (mix(clean, noise, timesteps) for mix in (scheduler.add_noise, scheduler.get_velocity))
            set_lr(optimizer, step, args.adapter_steps)
            told = {"image_embeds": [seen[:, None]]}
            loss = F.mse_loss(unet(noisy, timesteps, text, added_cond_kwargs=told, return_dict=False)[0], target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.4f}")
            if (step + 1) % args.save_every == 0:
                checkpoint.save(step + 1)
    record(args, "adapter", steps=args.adapter_steps, seconds=time.monotonic() - began, first_step=first)
    temporary = final.with_suffix(".tmp")
    save_file(adapter_file(unet), temporary)
    temporary.rename(final)


def evaluate(args: argparse.Namespace) -> None:
    """How many captions CLIP finds, and how often a picture drawn from a picture alone shows the same things."""
    folder = args.output / "model"
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    pipe = shapes.load_pipeline("shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    found = retrieval(clip, pipe.tokenizer)
    pipe.load_ip_adapter(folder, subfolder="", weight_name=ADAPTER, image_encoder_folder="./")
    scenes = list(sample_scenes(args.pictures, HELD_OUT_SEED + 3, held_out=True))
    captions = [caption(scene) for scene in scenes]
    given = [render(scene, SIZE) for scene in scenes]
    exact = {}
    for scale in (0.0, 0.4, 1.0):
        pipe.set_ip_adapter_scale(scale)
        drawn = [
            pipe(
                "",
                ip_adapter_image=image,
                num_inference_steps=20,
                guidance_scale=args.guidance,
                generator=torch.Generator().manual_seed(index),
            ).images[0]
            for index, image in enumerate(tqdm(given, desc=f"scale {scale}"))
        ]
        exact[str(scale)] = shapes.score(drawn, captions).as_dict()
        shown = min(10, len(drawn))
        make_image_grid([*given[:shown], *drawn[:shown]], 2, shown).save(args.output / f"pictures-{scale}.png")
    record(args, "evaluation", retrieval=found, from_pictures=exact)
    write_card(args, folder, clip)


CARD = """---
license: apache-2.0
library_name: transformers
---

# shapes-clip

A small CLIP for pictures of `diffusion_attn.shapes`, and an IP-Adapter by which shapes-sd is told of a picture; made by
`examples/train_shapes_clip.py`, for trying image-guided editing offline.

- **Data**: scenes drawn by code, {size} px; a tenth of the descriptions is held out by hash. No images from elsewhere.
- **Parts**: CLIPModel ({clip:,} parameters, a space of {width}), whose halves load alone too; `{adapter}`
  ({weights:,} numbers, {tokens} tokens a picture); float16 safetensors.
- **Scores**: of 200 held-out pictures {retrieval:.1%} are nearest to their own caption. Drawn from {pictures} held-out
  pictures and the empty prompt at scale 1, guidance {guidance}: backgrounds right {background:.0%}, {read} objects read
  for {asked}, {missing} missing, {wrong_color} of a wrong colour, {wrong_shape} of a wrong shape; exact {exact:.0%}.
  So it tells of colours, number and background, and hardly of shapes.
- **Licence**: Apache-2.0.

All settings, times and the machine:

```json
{book}
```
"""


def write_card(args: argparse.Namespace, folder: Path, clip: CLIPModel) -> None:
    """The model card, from what the stages recorded."""
    book = json.loads((args.output / "training.json").read_text())
    pipe = shapes.load_pipeline("shapes-sd")
    build_adapter(pipe.unet)
    facts = {
        "size": SIZE,
        "clip": clip.num_parameters(),
        "width": WIDTH,
        "adapter": ADAPTER,
        "weights": sum(x.numel() for x in adapter_file(pipe.unet).values()),
        "tokens": TOKENS,
        "retrieval": book["evaluation"]["retrieval"],
        "guidance": args.guidance,
        "pictures": args.pictures,
        **book["evaluation"]["from_pictures"]["1.0"],
        "book": json.dumps(book, indent=2),
    }
    (folder / "README.md").write_text(CARD.format(**facts))


def parse_args() -> argparse.Namespace:
    """The settings; all of them are recorded beside the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for checkpoints, pictures and the finished model")
    add("--stage", choices=("all", "clip", "adapter", "evaluate"), default="all")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add("--clip-steps", type=int, default=1200)
    add("--clip-batch", type=int, default=96)
    add("--clip-lr", type=float, default=1e-3)
    add("--adapter-steps", type=int, default=3000)
    add("--adapter-batch", type=int, default=32)
    add("--adapter-lr", type=float, default=1e-3)
    add("--caption-dropout", type=float, default=0.7, help="share of empty captions, so that pictures are looked at")
    add("--image-dropout", type=float, default=0.1, help="share of empty pictures, for guidance")
    add("--pictures", type=int, default=100, help="held-out pictures to evaluate on")
    add("--guidance", type=float, default=3.0)
    return parser.parse_args()


def main() -> None:
    """Run the stages that were asked for."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "clip"):
        train_clip(args)
    if args.stage in ("all", "adapter"):
        train_adapter(args)
    if args.stage in ("all", "evaluate"):
        evaluate(args)


if __name__ == "__main__":
    main()
