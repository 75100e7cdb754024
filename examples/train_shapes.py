"""Train shapes-sd, the embedded text-to-image model, from nothing: an autoencoder, then text encoder and UNet jointly.

    pip install "diffusion-attn[train]"
    python examples/train_shapes.py --output runs/shapes-sd                      # everything, resumes where it stopped
    python examples/train_shapes.py --output runs/shapes-sd --stage evaluate     # the scores alone
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/train_shapes.py --output runs/shapes-sd   # a process a core

The embedded model was made on two cores by two runs, of 70 and of 55 minutes; the second one went on from the first:

    torchrun --nproc-per-node 2 examples/train_shapes.py --output runs/first
    torchrun --nproc-per-node 2 examples/train_shapes.py --output runs/second --init runs/first/model --seed 1 \\
        --steps 2400 --coarse-steps 0 --muon-lr 2.5e-3 --lr 5e-4

Scenes are drawn by code, so there is no dataset. Each stage writes a checkpoint every `--save-every` steps and
continues from it; a finished stage is not run again. The result, `OUTPUT/model`, is a folder that
`StableDiffusionPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.local_sgd import LocalSGD
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from pytorch_optimizer import Muon
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_attn import shapes
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.renderer import rasterize
from diffusion_attn.shapes.scenes import sample_scene, sample_scenes
from diffusion_attn.shapes.tokenizer import POSITIONS, build_tokenizer

SIZE = 64  # pixels
HELD_OUT_SEED = 20_000


def build_autoencoder() -> AutoencoderKL:
    """A 4x autoencoder without attention, so that cost stays linear in pixels at any size."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_text_encoder(vocab_size: int, eos_token_id: int) -> CLIPTextModel:
    """Four layers of CLIP's text transformer.

    Its attention is causal, so the first shape's words cannot know how it stands to the second: what follows the
    caption has to gather that, which takes depth.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            bos_token_id=eos_token_id - 1,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's layout, four levels with cross-attention in the first three, at a tenth of its width."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(48, 96, 96, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule, with v-prediction: colours and places are learned at high noise, where
    predicting the noise teaches little.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pixels(scenes, size: int = SIZE) -> torch.Tensor:
    """Scenes as a batch ``(batch, 3, size, size)``, float32 in -1..1."""
    return torch.from_numpy(np.stack([rasterize(scene, size) for scene in scenes])).permute(0, 3, 1, 2) * 2 - 1


def psnr(autoencoder: AutoencoderKL, scenes, size: int = SIZE) -> float:
    """Mean over scenes of the peak signal-to-noise ratio of the reconstruction, in dB."""
    images = pixels(scenes, size)
    with torch.no_grad():
        decoded = [autoencoder.decode(autoencoder.encode(b).latent_dist.mode()).sample for b in images.split(50)]
    error = ((torch.cat(decoded).clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


class Checkpoint:
    """Modules, optimiser and step of a stage in one folder, replaced as a whole."""

    def __init__(self, folder: Path, modules: dict[str, torch.nn.Module], optimizer, ema=None) -> None:
        self.folder, self.modules, self.optimizer, self.ema = folder, modules, optimizer, ema

    def save(self, step: int) -> None:
        """Write everything beside the last checkpoint, then take its place."""
        temporary = self.folder.with_suffix(".tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}/{k}": v for name, m in self.modules.items() for k, v in m.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{k}": v for k, v in state.items()}
        if self.ema is not None:
            tensors |= {f"ema/{i}": v for i, v in enumerate(self.ema.shadow_params)}
        # Copies: tied weights (T5's embedding) share memory, which the format refuses.
        copies = {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        save_file(copies, temporary / "state.safetensors")
        (temporary / "step.json").write_text(json.dumps({"step": step}))
        old = self.folder.with_suffix(".old")
        if self.folder.exists():
            self.folder.rename(old)
        temporary.rename(self.folder)
        for path in old.glob("*"):
            path.unlink()
        if old.exists():
            old.rmdir()

    def load(self) -> int:
        """Bring everything back; the number of steps that were done, 0 without a checkpoint."""
        if not self.folder.exists():
            return 0
        tensors = load_file(self.folder / "state.safetensors")
        part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        for name, module in self.modules.items():
            module.load_state_dict(part(f"{name}/"))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in part("optimizer/").items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
        step = int(json.loads((self.folder / "step.json").read_text())["step"])
        # Muon counts its steps in the groups, AdamW in the state.
        groups = [{**group, "step": step} for group in self.optimizer.state_dict()["param_groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.ema is not None:
            shadow = part("ema/")
            self.ema.shadow_params = [shadow[str(i)] for i in range(len(shadow))]
        return step


def train_autoencoder(args: argparse.Namespace) -> None:
    """Stage 1: L1 + MSE on pixels, a light KL term on the latents; writes ``OUTPUT/vae``."""
    final = args.output / "vae"
    if final.exists():
        return
    if args.init is not None:
        AutoencoderKL.from_pretrained(args.init / "vae", torch_dtype=torch.float32).save_pretrained(final)
        return
    torch.manual_seed(args.seed)
    autoencoder = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), args.ae_lr, weight_decay=0.0)
    checkpoint = Checkpoint(args.output / "checkpoint-vae", {"vae": autoencoder}, optimizer)
    first = checkpoint.load()

    def loss_of(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean, posterior.logvar
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + args.kl_weight * kl

    began = time.monotonic()
    with tqdm(range(first, args.ae_steps), initial=first, total=args.ae_steps, desc="autoencoder") as bar:
        for step in bar:
            # Both splits: the autoencoder sees no captions, so there is nothing to hold out from it.
            rng = random.Random(args.seed * 1_000_003 + step)
            images = pixels([sample_scene(rng) for _ in range(args.ae_batch)]).contiguous(
                memory_format=torch.channels_last
            )
            noise = torch.randn(args.ae_batch, 4, SIZE // 4, SIZE // 4)
            set_lr(optimizer, step, args.ae_steps)
            loss = loss_of(images, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if (step + 1) % args.save_every == 0:
                checkpoint.save(step + 1)
                quality = psnr(autoencoder, sample_scenes(100, HELD_OUT_SEED, held_out=True))
                tqdm.write(f"autoencoder step {step + 1}: {quality:.2f} dB")
    latents = torch.cat(
        [autoencoder.encode(pixels(list(sample_scenes(50, s)))).latent_dist.mode().detach() for s in range(10)]
    )
    autoencoder.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    quality = psnr(autoencoder, sample_scenes(200, HELD_OUT_SEED, held_out=True))
    record(args, "autoencoder", steps=args.ae_steps, seconds=time.monotonic() - began, first_step=first, psnr=quality)
    autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(final)


def encode_scenes(args: argparse.Namespace, autoencoder: AutoencoderKL, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents ``(scenes, 4, 16, 16)`` and token ids ``(scenes, positions)`` of the training split, made once."""
    path = args.output / "latents.safetensors"
    if not path.exists():
        latents, captions = [], []
        rng = random.Random(args.seed)
        with torch.no_grad(), tqdm(total=args.scenes, desc="latents") as bar:
            while len(captions) < args.scenes:
                scenes = [sample_scene(rng, held_out=False) for _ in range(100)]
                latents.append(autoencoder.encode(pixels(scenes)).latent_dist.mode().half())
                captions += [caption(scene) for scene in scenes]
                bar.update(len(scenes))
        ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        temporary = path.with_suffix(".tmp")
        save_file({"latents": torch.cat(latents).contiguous(), "ids": ids.to(torch.int16)}, temporary)
        temporary.rename(path)
    cache = load_file(path)
    return cache["latents"] * autoencoder.config.scaling_factor, cache["ids"]


class Denoiser(torch.nn.Module):
    """Text encoder and UNet as one module, so that they are trained, averaged and distributed as one."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The prediction for latents ``(batch, 4, height, width)`` under the token ids ``(batch, positions)``."""
        return self.unet(noisy, timesteps, self.text_encoder(ids)[0], return_dict=False)[0]


def build_optimizer(
    denoiser: torch.nn.Module, args: argparse.Namespace, edges: Sequence[str] = ("embedding", "conv_in", "conv_out")
) -> torch.optim.Optimizer:
    """Muon for the weights of hidden layers, Adam for vectors and for what has one of ``edges`` in its name.

    At the same time on the clock Muon got about a third further than AdamW in trials, its own cost included.
    """
    named = dict(denoiser.named_parameters())
    hidden = [name for name, p in named.items() if p.ndim >= 2 and not any(edge in name for edge in edges)]
    others = [p for name, p in named.items() if name not in hidden]
    shared = {"weight_decay": args.weight_decay}
    return Muon(
        [
            {"params": [named[name] for name in hidden], "use_muon": True, "lr": args.muon_lr, **shared},
            {"params": others, "use_muon": False, "lr": args.lr, "betas": (0.9, 0.99), **shared},
        ],
        use_adjusted_lr=True,
    )


def train_denoiser(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Stage 2: text encoder and UNet jointly on cached latents; writes ``OUTPUT/model`` from the averaged weights.

    The first steps run on averaged latents: what words mean and where things go is learned there at a third of the
    cost, as large models are trained at a small size first.
    """
    torch.manual_seed(args.seed)
    autoencoder = AutoencoderKL.from_pretrained(args.output / "vae")
    tokenizer = build_tokenizer()
    text_encoder, unet = build_text_encoder(len(tokenizer), tokenizer.eos_token_id), build_unet()
    scheduler = build_scheduler()
    with accelerator.main_process_first():
        latents, ids = encode_scenes(args, autoencoder, tokenizer)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    if args.init is not None:
        text_encoder = CLIPTextModel.from_pretrained(args.init / "text_encoder", dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(args.init / "unet", torch_dtype=torch.float32)
    denoiser = Denoiser(text_encoder, unet).to(accelerator.device)
    parameters = list(denoiser.parameters())
    optimizer = build_optimizer(denoiser, args)
    ema = EMAModel(parameters, decay=args.ema_decay)
    checkpoint = Checkpoint(args.output / "checkpoint", dict(denoiser.named_children()), optimizer, ema)
    first = checkpoint.load()
    ema.optimization_step = first
    ema.to(accelerator.device)
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
            picked = torch.randint(len(latents), (args.batch,), generator=draw)
            clean = latents[picked].float()
            if step < args.coarse_steps:
                clean = F.avg_pool2d(clean, 2)
            noise = torch.randn(clean.shape, generator=draw)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (args.batch,), generator=draw)
            dropped = torch.rand(args.batch, generator=draw) < args.caption_dropout
            tokens = torch.where(dropped[:, None], empty, ids[picked].long())
            noisy, target = (mix(clean, noise, timesteps) for mix in (scheduler.add_noise, scheduler.get_velocity))
            noisy, timesteps, tokens, target = (
                x[share].to(accelerator.device) for x in (noisy, timesteps, tokens, target)
            )
            set_lr(optimizer, step, args.steps)
            loss = F.mse_loss(model(noisy, timesteps, tokens), target)
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
                save_pictures(args, assemble(autoencoder, text_encoder, tokenizer, unet, scheduler), step + 1)
                ema.restore(parameters)
    if hidden:
        return
    ema.copy_to(parameters)
    pipe = assemble(autoencoder, text_encoder, tokenizer, unet, scheduler)
    pipe.to("cpu", torch.float16).save_pretrained(args.output / "model")
    if step_count := args.steps - first:
        seconds = (time.monotonic() - began) / step_count
        facts = {"steps": args.steps, "seconds_per_step": seconds, "processes": accelerator.num_processes}
        if args.init is not None and (earlier := args.init.parent / "training.json").exists():
            facts["continued"] = json.loads(earlier.read_text())["denoiser"]
        record(args, "denoiser", **facts)


def assemble(autoencoder, text_encoder, tokenizer, unet, scheduler) -> StableDiffusionPipeline:
    """The parts as a stock pipeline."""
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, batch: int = 25) -> list:
    """One picture for each prompt, seeds 0, 1, 2, ..."""
    images = []
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", disable=len(prompts) <= batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return images


def save_pictures(args: argparse.Namespace, pipe: StableDiffusionPipeline, step: int) -> None:
    """A grid of 24 held-out captions, and how many of them came out exact, as a quick look at the progress."""
    prompts = [caption(scene) for scene in sample_scenes(24, HELD_OUT_SEED, held_out=True)]
    images = draw(pipe, prompts, 20, args.guidance)
    make_image_grid(images, 3, 8).save(args.output / f"pictures-{step:06d}.png")
    tqdm.write(f"denoiser step {step}: {shapes.score(images, prompts).exact:.0%} of 24 exact")


def evaluate(args: argparse.Namespace) -> None:
    """The acceptance numbers of the finished model: exact matches on held-out captions, PSNR of the autoencoder."""
    pipe = StableDiffusionPipeline.from_pretrained(args.output / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scenes = list(sample_scenes(args.captions, HELD_OUT_SEED + 1, held_out=True))
    prompts = [caption(scene) for scene in scenes]
    images = draw(pipe, prompts, 30, args.guidance)
    make_image_grid(images[:40], 5, 8).save(args.output / "evaluation.png")
    record(args, "evaluation", psnr=psnr(pipe.vae, scenes), **shapes.score(images, prompts).as_dict())
    write_card(args)


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# shapes-sd

A small text-to-image model in the layout of Stable Diffusion 1.5, made by `examples/train_shapes.py`: the embedded
model of diffusion-attn, for trying and measuring attention methods offline. It draws what the grammar of
`diffusion_attn.shapes.captions` can say, and nothing else; what it shows is evidence about mechanisms, not about
photographs.

- **Data**: scenes drawn by code, one or two of six shapes in eight colours on a plain background, {size} px; a tenth
  of the descriptions is held out by hash. No images from elsewhere.
- **Parts**: AutoencoderKL (4x, {vae} parameters), CLIPTextModel ({text} parameters) with a CLIPTokenizer of the
  grammar's words, UNet2DConditionModel ({unet} parameters), v-prediction; float16 safetensors.
- **Scores** on {captions} held-out captions, 30 DDIM steps, guidance {guidance}: {exact:.1%} exact matches, backgrounds
  right {background:.1%}, {read} objects read for {asked} asked; autoencoder {psnr:.2f} dB.
- **Licence**: Apache-2.0.

All settings, times and the machine:

```json
{book}
```
"""


def write_card(args: argparse.Namespace) -> None:
    """The model card, from what the stages recorded."""
    book = json.loads((args.output / "training.json").read_text())
    pipe = StableDiffusionPipeline.from_pretrained(args.output / "model")
    count = {name: f"{sum(p.numel() for p in getattr(pipe, name).parameters()):,}" for name in PARTS}
    facts = {**book["evaluation"], "size": SIZE, "captions": args.captions, "guidance": args.guidance}
    facts |= {"vae": count["vae"], "text": count["text_encoder"], "unet": count["unet"]}
    (args.output / "model" / "README.md").write_text(CARD.format(book=json.dumps(book, indent=2), **facts))


PARTS = ("vae", "text_encoder", "unet")


def set_lr(optimizer, step: int, steps: int, warmup: int = 200) -> None:
    """A short linear warm-up to the rate that each group was made with, then a linear decay to zero."""
    factor = min(1.0, (step + 1) / warmup) * (1 - step / steps)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak", group["lr"]) * factor


def record(args: argparse.Namespace, stage: str, **facts) -> None:
    """Add a stage's facts and settings to ``OUTPUT/training.json``."""
    path = args.output / "training.json"
    book = json.loads(path.read_text()) if path.exists() else {}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    book[stage] = {**facts, "machine": machine, "settings": settings}
    path.write_text(json.dumps(book, indent=2))
    tqdm.write(f"{stage}: {json.dumps(facts)}")


def parse_args() -> argparse.Namespace:
    """The settings; all of them are recorded beside the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for checkpoints, pictures and the finished model")
    add("--stage", choices=("all", "autoencoder", "denoiser", "evaluate"), default="all")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--ae-steps", type=int, default=5000)
    add("--ae-batch", type=int, default=16)
    add("--ae-lr", type=float, default=2e-3)
    add("--kl-weight", type=float, default=1e-3)
    add("--init", type=Path, help="model folder whose weights to start from, instead of random ones")
    add("--scenes", type=int, default=60_000, help="training scenes, encoded once")
    add(
        "--coarse-steps",
        type=int,
        default=2500,
        help="first of the steps: on latents of half the size, three times as fast",
    )
    add("--steps", type=int, default=5500, help="steps in all")
    add("--batch", type=int, default=64, help="of all processes together")
    add("--average-every", type=int, default=10, help="steps between averagings of the processes' weights")
    add("--muon-lr", type=float, default=6e-3)
    add("--lr", type=float, default=1.2e-3, help="of the parameters that Muon does not serve")
    add("--weight-decay", type=float, default=0.01)
    add("--ema-decay", type=float, default=0.999)
    add("--caption-dropout", type=float, default=0.1, help="share of empty captions, for guidance")
    add("--picture-every", type=int, default=1000, help="steps between picture grids")
    add("--captions", type=int, default=200, help="held-out captions to evaluate on")
    add("--guidance", type=float, default=2.0)
    return parser.parse_args()


def main() -> None:
    """Run the stages that were asked for."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    # The other processes wait while the first one trains the autoencoder.
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))]
    )
    if args.stage in ("all", "autoencoder"):
        with accelerator.main_process_first():
            train_autoencoder(args)
    if args.stage in ("all", "denoiser"):
        train_denoiser(args, accelerator)
    if args.stage in ("all", "evaluate") and accelerator.is_main_process:
        evaluate(args)


if __name__ == "__main__":
    main()
