"""Stable Diffusion 1.5 (and its kin up to 2.1) as a teacher: latents and prompts.

    latents  x = VAE encoder of an image, scaled to about unit variance: (4, 64, 64) for 512 pixels
    noise    xt = x + sigma noise; FromEps divides by sqrt(1 + sigma^2) for the network
    cond     (B, 77, 768) embeddings of the prompts, 1024 wide in 2.x; None = the empty prompt

The text encoder and the VAE encoder run once, before training. The cache keeps their outputs.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nano_dmd.engine.cache import cached, digest, fingerprint
from nano_dmd.engine.files import UserError, blame, note, parse_json, read_lines
from nano_dmd.engine.machine import forked
from nano_dmd.engine.schema import mismatch
from nano_dmd.noise import sd_sigmas
from nano_dmd.teachers import data
from nano_dmd.teachers import diffusers_unet as hub
from nano_dmd.teachers.text_networks import RANDOM, TextUNet

# Settings of a U-Net that Stable Diffusion 1 and 2 do not have.
OTHERS = ("addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type",
          "num_class_embeds", "time_cond_proj_dim", "center_input_sample")


def load(name, device):
    """The fields of a Teacher in a diffusers folder, on the hub or of RANDOM.  raises UserError."""
    from diffusers import UNet2DConditionModel

    if name in RANDOM:
        kind, decode = "epsilon", None
        sigmas = sd_sigmas()
        with forked(device):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(**RANDOM[name])
    else:
        unet, kind, sigmas, decode = read_parts(name, device)
    empty = Prompts(name, [""])[torch.zeros(1, dtype=torch.long)]
    if empty.shape[2] != unet.config.cross_attention_dim:
        raise UserError(f"the text_encoder of {name} gives {empty.shape[2]} numbers a token, its "
                        f"unet takes {unet.config.cross_attention_dim}: they are not of one model")
    abar = 1 / (1 + sigmas.double() ** 2)
    denoiser = hub.PREDICTS[kind](TextUNet(unet, empty), abar).to(device)
    denoiser.requires_grad_(False).eval()
    shape = (4, *2 * [hub.square(unet.config.sample_size)])
    recipe = dict(network="stable_diffusion", source=name, shape=list(shape), classes=0, data="",
                  seconds=0, cpu_seconds=0, version=name)
    if name not in RANDOM:
        place = os.path.abspath(name) if os.path.isdir(name) else name
        recipe.update(source=place, version=hub.version(name))
    # the published losses are plain errors in eps or v: weight 1/sigma^2, or 1/sigma^2 + 1, in x0
    sigma_data = {"epsilon": float("inf"), "v_prediction": 1.0}[kind]
    return dict(kind="text", denoiser=denoiser, net=denoiser, shape=shape, classes=0, data="",
                sigma_data=sigma_data, recipe=recipe, decode=decode,
                sigmas=(sigmas[0].item(), sigmas[-1].item()))


def sd_part(kind, name, subfolder):
    """kind.from_pretrained of one subfolder; raises UserError naming it."""
    return hub.part(kind, name, subfolder, "Stable Diffusion 1.5 pipeline")


def read_parts(name, device):
    """(U-Net, what it predicts, its (1000,) noise levels, decode) of a pipeline."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = hub.index_of(name).get("_class_name", "")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        raise UserError(f"{name} is {f'a {kind}' if kind else 'no Stable Diffusion pipeline'}: "
                        "versions 1 and 2 are supported; SDXL, inpainting and newer models are not")
    scheduler = hub.noise_table(name)
    with blame(f"cannot load the unet of {name}", "is it a Stable Diffusion 1.5 pipeline?"):
        config = UNet2DConditionModel.load_config(**hub.source(name), subfolder="unet")
    odd = [k for k in OTHERS if config.get(k)]     # before gigabytes are loaded
    if odd or config.get("in_channels", 4) != 4 or not hub.square(config.get("sample_size")):
        odd += [f"{k} {config.get(k)}" for k in ("in_channels", "sample_size")]
        raise UserError(f"{name} is not Stable Diffusion 1 or 2 but has {', '.join(odd)}")
    abar = scheduler.alphas_cumprod.double()
    sigmas = ((1 - abar) / abar).sqrt()
    if sigmas.shape != (1000,) or not torch.allclose(sigmas, sd_sigmas().double(), rtol=1e-3):
        raise UserError(f"{name} has another noise schedule than Stable Diffusion 1 and 2: "
                        "sd(first,last) would not fit it")
    unet, vae = sd_part(UNet2DConditionModel, name, "unet"), sd_part(AutoencoderKL, name, "vae")
    return unet, scheduler.config.prediction_type, sigmas, decoder(vae, device)


def decoder(vae, device):
    """latents (B, 4, h, w) -> images (B, 3, 8h, 8w) in [-1, 1] on the CPU, computed on device."""
    config, factor = vae.config, 2 ** (len(vae.config.block_out_channels) - 1)
    odd = [k for k in ("shift_factor", "latents_mean", "latents_std") if config.get(k)]
    if config.latent_channels != 4 or odd or factor != 8 or not config.scaling_factor > 0:
        odd.append(f"scaling_factor {config.scaling_factor}")
        raise UserError(f"the vae is not Stable Diffusion's: {config.latent_channels} channels, "
                        f"{factor} pixels a latent, {' '.join(odd)}")
    vae.requires_grad_(False).eval()

    @torch.no_grad()
    def decode(latents):
        vae.to(device)
        some = (latents.to(device) / config.scaling_factor).split(4)
        x = [vae.decode(v).sample.clamp(-1, 1).cpu() for v in some]
        vae.cpu()
        return torch.cat(x)

    return decode


def differentiable_decoder(name, pipeline, device):
    """latents (B, 4, h, w) -> images (B, 3, 8h, 8w) in about [-1, 1], for LPIPS.

    name is a TAESD (5 MB, what DMD used: appendix B.3), or "vae": the pipeline's own.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    vae = sd_part(AutoencoderKL, pipeline, "vae") if name == "vae" else None
    vae = vae or hub.part(AutoencoderTiny, name, "vae", "TAESD")
    vae = vae.to(device).requires_grad_(False).eval()
    return lambda latents: vae.decode(latents / vae.config.scaling_factor).sample


class Prompts:
    """Texts and their embeddings: prompts[index (B,)] -> (B, T, C) float32 on the CPU.

    Memory-mapped, 118 KB a prompt (float16): ten thousand are 1.2 GB.
    """

    def __init__(self, model, texts):
        self.model, self.texts = model, texts
        encoder = model if model in RANDOM else hub.version(model, "tokenizer", "text_encoder")
        made_of = dict(model=str(model), encoder=encoder, texts=digest(texts), count=len(texts),
                       first=texts[0][:80])

        def make(path):
            data.write_rows(path, len(texts), embeddings(model, texts))

        self.table = data.read_table(cached("text", made_of, make, ".npy"), np.float16,
                                [len(texts), None, None])

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return finite(self.table[index.cpu().numpy()])


def finite(rows):
    """Rows of a table of the cache as float32.  raises UserError if a number is not finite."""
    rows = torch.from_numpy(rows.astype(np.float32))
    if not rows.isfinite().all():
        raise UserError("the cache holds numbers that are not finite: clear it by "
                        "python -m nano_dmd.engine.cache --clear text latents")
    return rows


def embeddings(model, texts, batch=32):
    """Yield a float16 (T, C) array per text.  Says so where a text is cut.  raises UserError."""
    if model in RANDOM:
        for text in texts:                         # made up, but the same for the same words
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
            shape = (77, RANDOM[model]["cross_attention_dim"])
            yield np.random.default_rng(seed).standard_normal(shape).astype(np.float16)
        return
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as e:
        raise UserError(f'Stable Diffusion needs more packages ({e}): pip install '
                        '"nano_dmd[sd]"') from e
    tokenizer = sd_part(CLIPTokenizer, model, "tokenizer")
    encoder = sd_part(CLIPTextModel, model, "text_encoder").eval()
    words, most = len(tokenizer), encoder.config.vocab_size
    if not most / 2 < words <= most:  # transformers makes an empty tokenizer of nothing
        raise UserError(f"the tokenizer of {model} knows {words} words, its text_encoder {most}: "
                        "files of it are missing, or it belongs to another model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, cut = encoder.to(device), 0
    limits = tokenizer.model_max_length, encoder.config.max_position_embeddings
    length = min(n for n in limits if n > 0)
    for i in tqdm(range(0, len(texts), batch), "encoding prompts", disable=len(texts) < batch):
        some = texts[i : i + batch]
        cut += sum(len(ids) > length for ids in tokenizer(some).input_ids)
        ids = tokenizer(some, padding="max_length", truncation=True, max_length=length,
                        return_tensors="pt").input_ids
        with torch.no_grad():
            yield from encoder(ids.to(device))[0].float().cpu().numpy().astype(np.float16)
    if cut:
        print(f"WARNING: {cut} of {len(texts)} prompts are longer than {length} tokens: cut")


def read_prompts(model, path):
    """The Prompts in a text file, one to a line; empty lines are left out."""
    texts = [line for _, line in read_lines(path)]
    if not texts:
        raise UserError(f"no prompt in {path}: give a text file with one prompt to a line")
    return Prompts(model, texts)


class Latents:
    """Real images for the GAN: the VAE's mean and log-variance (float16), and the caption."""

    kind = "text"

    def __init__(self, model, folder, shape, device):
        files, captions = captioned(folder)
        self.shape, self.classes = shape, 0
        self.device, side = device, 8 * shape[1]
        made_of = dict(model=model, vae=hub.version(model, "vae"), side=side, folder=str(folder),
                       files=fingerprint(*files))

        def make(path):
            data.write_rows(path, len(files), vae_moments(model, files, side, device))

        self.table = data.read_table(cached("latents", made_of, make, ".npy"), np.float16,
                                [len(files), 8, *shape[1:]])
        self.prompts = Prompts(model, captions)

    def __len__(self):
        return len(self.table)

    def sample(self, n, generator=None, rows=slice(None)):
        """(x, cond): the slice rows of n draws from the encoder's distribution, as published."""
        index = torch.randint(len(self), (n,), generator=generator)
        noise = torch.randn(n, *self.shape, generator=generator)[rows]
        mean, log_variance = finite(self.table[index[rows].numpy()]).chunk(2, dim=1)
        x = mean + (log_variance / 2).exp() * noise
        cond = self.prompts[index[rows]]
        return x.to(self.device, non_blocking=True), cond.to(self.device, non_blocking=True)


def captioned(folder):
    """(image files, captions) of a folder: NAME.txt beside each image, or metadata.jsonl."""
    folder, files = Path(folder), data.image_files(folder)
    listed = folder / "metadata.jsonl"
    if listed.is_file():
        rows = {}
        for i, line in read_lines(listed):
            name, caption = caption_of(line, f"{listed}, line {i}")
            if name in rows:
                raise UserError(f"{listed}, line {i}: {name} has a caption already; give it one")
            rows[name] = caption
        captions = [rows.pop(f.relative_to(folder).as_posix(), None) for f in files]
        if rows:
            note(f"{listed} has captions for {len(rows)} images that are not there, "
                 f"{next(iter(rows))} for example")
    else:
        captions = []
        for text in (f.with_suffix(".txt") for f in files):
            words = [line for _, line in read_lines(text)] if text.is_file() else None
            captions.append(None if words is None else " ".join(words))
    if "" in captions:
        note(f"{captions.count('')} captions in {folder} are empty, that of "
             f"{files[captions.index('')].name} for example")
    if None in captions:
        raise UserError(f"{captions.count(None)} of {len(files)} images have no caption, "
                        f"{files[captions.index(None)]} for example: put NAME.txt beside each "
                        "image, or a metadata.jsonl with file_name and text in the folder")
    return files, captions


def caption_of(line, where):
    """(file name, caption) of a line of metadata.jsonl; text may be called prompt or caption."""
    row = parse_json(line, where)
    named = row if isinstance(row, dict) else {}
    column = next((c for c in ("text", "prompt", "caption") if c in named), "text")
    if problem := mismatch(row, {"file_name": str, column: str}):
        raise UserError(f"cannot use {where}: {problem}; it needs file_name and text")
    return row["file_name"].replace("\\", "/").removeprefix("./"), row[column].strip()


@torch.no_grad()
def vae_moments(model, files, side, device):
    """Yield the VAE's (8, h, w) mean and log-variance of the middle square of each image."""
    from diffusers import AutoencoderKL

    vae = sd_part(AutoencoderKL, model, "vae").to(device).eval()
    scale = vae.config.scaling_factor
    for file in tqdm(files, "encoding images"):
        pixels = torch.from_numpy(data.middle_square(file, side)).permute(2, 0, 1)[None]
        found = vae.encode(pixels.to(device) / 127.5 - 1).latent_dist
        scaled = torch.cat([found.mean * scale, found.logvar + 2 * np.log(scale)], 1)
        yield scaled[0].cpu().numpy().astype(np.float16)
