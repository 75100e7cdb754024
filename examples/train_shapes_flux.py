"""Train shapes-flux, the embedded model in FLUX's layout: T5 encoder and FLUX transformer jointly, by flow matching.

    pip install "diffusion-attn[train]"
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/train_shapes_flux.py --output runs/shapes-flux
    python examples/train_shapes_flux.py --output runs/shapes-flux --stage evaluate     # the scores alone

The autoencoder and the CLIP encoder, whose pooled state FLUX takes beside T5's tokens, are those of shapes-sd and stay
as they are. The first steps run on latents of half the size with positions stretched to the full grid; scenes are
drawn by code. Every run resumes where it stopped. The result, `OUTPUT/model`, is a folder that
`FluxPipeline.from_pretrained` loads. `ACCELERATE_DYNAMO_BACKEND=INDUCTOR` compiles the training step, which takes two
minutes and then, with one process on a CPU with AMX, about a third off each step.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.local_sgd import LocalSGD
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
)
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from train_shapes import HELD_OUT_SEED, Checkpoint, build_optimizer, pixels, psnr, record, set_lr
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from diffusion_attn import shapes
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.scenes import sample_scene, sample_scenes
from diffusion_attn.shapes.tokenizer import WORDS

SIZE = 128  # pixels: 16 x 16 tokens
EDGES = ("text_encoder.shared", "relative_attention_bias", "transformer.x_embedder", "transformer.proj_out")
"""Embeddings and outermost layers, which Muon does not serve."""

POSITIONS = 20  # text tokens; the longest caption takes 15, and every position goes through every layer


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the grammar's words; other text falls to its letters."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = [(token, 0.0) for token in special]
    vocabulary += [("▁" + word, -1.0) for word in WORDS]
    vocabulary += [(character, -10.0) for character in "▁" + string.printable.strip()]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=POSITIONS)


def build_text_encoder(vocab_size: int) -> T5EncoderModel:
    """Two layers of T5: attention looks both ways, and the transformer's text stream goes on from there."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def build_transformer() -> FluxTransformer2DModel:
    """FLUX.1's layout without the guidance embedding, a sixteenth of its width and a sixth of its depth."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 12, 12),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler: its shift is given for 256 tokens, the native size, and grows with the image."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
    )


def positions(side: int) -> torch.Tensor:
    """FLUX's image ids ``(side**2, 3)`` of a picture that fills the native grid of 16 tokens, whatever its own side."""
    step = SIZE // 8 / side
    line = torch.arange(side) * step + (step - 1) / 2
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents ``(batch, channels, height, width)`` as FLUX's tokens ``(batch, height * width / 4, channels * 4)``."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


class Denoiser(torch.nn.Module):
    """T5 encoder and transformer as one module, so that they are trained, averaged and distributed as one."""

    def __init__(self, text_encoder: T5EncoderModel, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    def forward(self, tokens: torch.Tensor, sigmas: torch.Tensor, ids: torch.Tensor, pooled: torch.Tensor):
        """The velocity ``noise - clean`` for tokens ``(batch, side**2, 16)``; ``ids`` for T5, ``pooled`` from CLIP."""
        return self.transformer(
            tokens,
            encoder_hidden_states=self.text_encoder(ids)[0],
            pooled_projections=pooled,
            timestep=sigmas,
            img_ids=positions(round(tokens.shape[1] ** 0.5)),
            txt_ids=torch.zeros(ids.shape[1], 3),
            return_dict=False,
        )[0]


class Conditions:
    """What is frozen: the autoencoder and the pooled CLIP encoder of shapes-sd, with both tokenizers."""

    def __init__(self) -> None:
        base: StableDiffusionPipeline = shapes.load_pipeline("shapes-sd")
        self.autoencoder: AutoencoderKL = base.vae
        self.autoencoder.register_to_config(shift_factor=0.0, sample_size=SIZE)
        self.clip: CLIPTextModel = base.text_encoder
        self.clip_tokenizer, self.tokenizer = base.tokenizer, build_tokenizer()

    @torch.no_grad()
    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's token ids ``(captions, POSITIONS)`` and CLIP's pooled states ``(captions, 128)``."""
        how = {"padding": "max_length", "return_tensors": "pt"}
        pooled = self.clip(self.clip_tokenizer(captions, **how).input_ids).pooler_output
        return self.tokenizer(captions, **how).input_ids, pooled

    @torch.no_grad()
    def latents(self, scenes) -> torch.Tensor:
        """Scaled latents ``(scenes, 4, 32, 32)``."""
        mode = self.autoencoder.encode(pixels(scenes, SIZE)).latent_dist.mode()
        return mode * self.autoencoder.config.scaling_factor


def encode_scenes(args: argparse.Namespace, conditions: Conditions) -> dict[str, torch.Tensor]:
    """Latents, T5 ids and pooled CLIP states of the training split, made once."""
    path = args.output / "latents.safetensors"
    if not path.exists():
        rng, parts = random.Random(args.seed), []
        for _ in tqdm(range(0, args.scenes, 100), desc="latents"):
            scenes = [sample_scene(rng, held_out=False) for _ in range(100)]
            ids, pooled = conditions.texts([caption(scene) for scene in scenes])
            parts.append((conditions.latents(scenes).half(), ids.to(torch.int16), pooled.half()))
        latents, ids, pooled = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
        temporary = path.with_suffix(".tmp")
        save_file({"latents": latents, "ids": ids, "pooled": pooled}, temporary)
        temporary.rename(path)
    return load_file(path)


def draw_sigmas(count: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Noise levels: logit-normal, shifted as a schedule would be (SD3, section 3.1 and 5.3.2)."""
    sigmas = torch.randn(count, generator=generator).sigmoid()
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """T5 encoder and transformer jointly on cached latents; writes ``OUTPUT/model`` from the averaged weights."""
    torch.manual_seed(args.seed)
    conditions = Conditions()
    text_encoder, transformer = build_text_encoder(len(conditions.tokenizer)), build_transformer()
    if args.init is not None:
        text_encoder = T5EncoderModel.from_pretrained(args.init / "text_encoder_2", dtype=torch.float32)
        transformer = FluxTransformer2DModel.from_pretrained(args.init / "transformer", torch_dtype=torch.float32)
    with accelerator.main_process_first():
        cache = encode_scenes(args, conditions)
    empty_ids, empty_pooled = conditions.texts([""])

    denoiser = Denoiser(text_encoder, transformer)
    parameters = list(denoiser.parameters())
    optimizer = build_optimizer(denoiser, args, EDGES)
    ema = EMAModel(parameters, decay=args.ema_decay)
    checkpoint = Checkpoint(args.output / "checkpoint", dict(denoiser.named_children()), optimizer, ema)
    first = checkpoint.load()
    ema.optimization_step = first
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    share = slice(accelerator.process_index, None, accelerator.num_processes)

    began = time.monotonic()
    hidden = not accelerator.is_main_process
    # Without a fast network between processes, exchanging gradients at every step costs more than the step.
    local = LocalSGD(accelerator, model, args.average_every)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="denoiser", disable=hidden)
    with bar, local:
        for step in bar:
            # Everything random depends on the step alone: a resumed run sees what the first would have seen, and any
            # number of processes share the same batch.
            draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            coarse = step < args.coarse_steps
            batch = args.coarse_batch if coarse else args.batch
            picked = torch.randint(len(cache["latents"]), (batch,), generator=draw)
            clean = cache["latents"][picked].float()
            clean = F.avg_pool2d(clean, 2) if coarse else clean
            noise = torch.randn(clean.shape, generator=draw)
            # A pixel of half the size averages four, so the same noise hides less of it.
            sigmas = draw_sigmas(batch, args.shift / 2 if coarse else args.shift, draw)
            dropped = (torch.rand(batch, generator=draw) < args.caption_dropout)[:, None]
            ids = torch.where(dropped, empty_ids, cache["ids"][picked].long())
            pooled = torch.where(dropped, empty_pooled, cache["pooled"][picked].float())
            clean, noise, sigmas, ids, pooled = (x[share] for x in (clean, noise, sigmas, ids, pooled))
            noisy = torch.lerp(clean, noise, sigmas[:, None, None, None])
            set_lr(optimizer, step, args.steps)
            loss = F.mse_loss(model(pack(noisy), sigmas, ids, pooled), pack(noise - clean))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            local.step()
            ema.step(parameters)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if hidden:
                continue
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                checkpoint.save(step + 1)
            if (step + 1) % args.picture_every == 0:
                ema.store(parameters)
                ema.copy_to(parameters)
                save_pictures(args, assemble(conditions, text_encoder, transformer), step + 1)
                ema.restore(parameters)
    if hidden:
        return
    ema.copy_to(parameters)
    pipe = assemble(conditions, text_encoder, transformer)
    pipe.to("cpu", torch.float16).save_pretrained(args.output / "model")
    if step_count := args.steps - first:
        seconds = (time.monotonic() - began) / step_count
        record(args, "denoiser", steps=args.steps, seconds_per_step=seconds, processes=accelerator.num_processes)


def assemble(conditions: Conditions, text_encoder, transformer) -> FluxPipeline:
    """The parts as a stock pipeline."""
    pipe = FluxPipeline(
        scheduler=build_scheduler(),
        vae=conditions.autoencoder,
        text_encoder=conditions.clip,
        tokenizer=conditions.clip_tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=conditions.tokenizer,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: FluxPipeline, prompts: list[str], steps: int, guidance: float, batch: int = 25) -> list:
    """One picture for each prompt, seeds 0, 1, 2, ..."""
    images = []
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", disable=len(prompts) <= batch):
        part = prompts[start : start + batch]
        images += pipe(
            part,
            negative_prompt=[""] * len(part),
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            true_cfg_scale=guidance,
            max_sequence_length=POSITIONS,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        ).images
    return images


def save_pictures(args: argparse.Namespace, pipe: FluxPipeline, step: int) -> None:
    """A grid of 24 held-out captions, and how many of them came out exact, as a quick look at the progress."""
    prompts = [caption(scene) for scene in sample_scenes(24, HELD_OUT_SEED, held_out=True)]
    images = draw(pipe, prompts, 20, args.guidance)
    make_image_grid(images, 3, 8).save(args.output / f"pictures-{step:06d}.png")
    tqdm.write(f"denoiser step {step}: {shapes.score(images, prompts).exact:.0%} of 24 exact")


def evaluate(args: argparse.Namespace) -> None:
    """The acceptance numbers of the finished model: exact matches on held-out captions, PSNR of the autoencoder."""
    pipe = FluxPipeline.from_pretrained(args.output / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scenes = list(sample_scenes(args.captions, HELD_OUT_SEED + 1, held_out=True))
    prompts = [caption(scene) for scene in scenes]
    images = draw(pipe, prompts, 30, args.guidance)
    make_image_grid(images[:40], 5, 8).save(args.output / "evaluation.png")
    record(args, "evaluation", psnr=psnr(pipe.vae, scenes, SIZE), **shapes.score(images, prompts).as_dict())
    write_card(args)


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# shapes-flux

A small text-to-image model in the layout of FLUX.1, made by `examples/train_shapes_flux.py`: the embedded model of
diffusion-attn for methods that serve diffusion transformers. It draws what the grammar of
`diffusion_attn.shapes.captions` can say, and nothing else; what it shows is evidence about mechanisms, not about
photographs.

- **Call**: `pipe(prompt, negative_prompt="", true_cfg_scale={guidance}, height={size}, width={size},
  max_sequence_length={positions})`; the pipeline's own defaults are those of a model a thousand times as large.
- **Data**: scenes drawn by code, one or two of six shapes in eight colours on a plain background, {size} px; a tenth
  of the descriptions is held out by hash. No images from elsewhere.
- **Parts**: AutoencoderKL ({vae} parameters) and CLIPTextModel ({clip}) of shapes-sd, T5EncoderModel ({t5}) with a
  T5Tokenizer of the grammar's words, FluxTransformer2DModel ({transformer}); flow matching; float16 safetensors.
- **Scores** on {captions} held-out captions, 30 Euler steps, guidance {guidance}: {exact:.1%} exact matches,
  backgrounds right {background:.1%}, {read} objects read for {asked} asked; autoencoder {psnr:.2f} dB.
- **Licence**: Apache-2.0.

All settings, times and the machine:

```json
{book}
```
"""


def write_card(args: argparse.Namespace) -> None:
    """The model card, from what the stages recorded."""
    book = json.loads((args.output / "training.json").read_text())
    pipe = FluxPipeline.from_pretrained(args.output / "model")
    parts = {"vae": pipe.vae, "clip": pipe.text_encoder, "t5": pipe.text_encoder_2, "transformer": pipe.transformer}
    facts = {**book["evaluation"], **vars(args), "size": SIZE, "positions": POSITIONS}
    facts |= {name: f"{sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items()}
    (args.output / "model" / "README.md").write_text(CARD.format(book=json.dumps(book, indent=2), **facts))


def parse_args() -> argparse.Namespace:
    """The settings; all of them are recorded beside the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for checkpoints, pictures and the finished model")
    add("--stage", choices=("all", "denoiser", "evaluate"), default="all")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--mixed-precision", choices=("no", "bf16"), default="bf16", help="bf16 is slower on a CPU without AMX")
    add("--init", type=Path, help="model folder whose weights to start from, instead of random ones")
    add("--scenes", type=int, default=40_000, help="training scenes, encoded once")
    add("--coarse-steps", type=int, default=2800, help="first of the steps: on latents of half the size")
    add("--coarse-batch", type=int, default=96, help="of all processes together, in the coarse steps")
    add("--steps", type=int, default=3600, help="steps in all")
    add("--batch", type=int, default=64, help="of all processes together")
    add("--average-every", type=int, default=10, help="steps between averagings of the processes' weights")
    add("--muon-lr", type=float, default=5e-3)
    add("--lr", type=float, default=1e-3, help="of the parameters that Muon does not serve")
    add("--weight-decay", type=float, default=0.01)
    add("--ema-decay", type=float, default=0.998)
    add("--shift", type=float, default=2.0, help="of the noise levels drawn at the full size")
    add("--caption-dropout", type=float, default=0.1, help="share of empty captions, for guidance")
    add("--picture-every", type=int, default=400, help="steps between picture grids")
    add("--captions", type=int, default=200, help="held-out captions to evaluate on")
    add("--guidance", type=float, default=3.0)
    return parser.parse_args()


def main() -> None:
    """Run the stages that were asked for."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=args.mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if args.stage in ("all", "denoiser"):
        train(args, accelerator)
    if args.stage in ("all", "evaluate") and accelerator.is_main_process:
        evaluate(args)


if __name__ == "__main__":
    main()
