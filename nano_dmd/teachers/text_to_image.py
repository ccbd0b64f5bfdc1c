"""Stable Diffusion 1.5 (and its kin up to 2.1) as a teacher: latents for images, text embeddings for labels.

    latents    x = VAE encoder of an image, scaled to about unit variance: (4, 64, 64) for 512 pixels
    noise      xt = x + sigma noise as everywhere here; FromEps divides by sqrt(1 + sigma^2) before the network sees it
    cond       (B, 77, 768) embeddings of the prompts; None = the empty prompt, what guidance subtracts

Text encoder and VAE encoder run once, before training; what they said is kept in the cache and they leave the memory.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nano_dmd.denoiser import FromEps, FromV
from nano_dmd.engine.cache import cached, digest, fingerprint
from nano_dmd.engine.files import UserError, first_line, note, parse_json, read_lines
from nano_dmd.engine.machine import forked
from nano_dmd.engine.schema import mismatch
from nano_dmd.noise import sd_sigmas
from nano_dmd.teachers import diffusers_unet as hub
from nano_dmd.teachers.data import image_files, middle_square, read_table, write_rows
from nano_dmd.teachers.text_networks import RANDOM, TextUNet

NEEDS = 'Stable Diffusion needs more packages ({}): pip install "nano_dmd[sd]"'


def load(name, device):
    """The fields of a Teacher in a diffusers folder, on the hub or of RANDOM.  raises UserError if it is not Stable Diffusion 1 or 2."""
    from diffusers import UNet2DConditionModel

    if name in RANDOM:
        with forked(device):
            torch.manual_seed(0)
            unet, kind, sigmas, decode = UNet2DConditionModel(**RANDOM[name]), "epsilon", sd_sigmas(), None
    else:
        unet, kind, sigmas, decode = read_parts(name, device)
    empty = Prompts(name, [""])[torch.zeros(1, dtype=torch.long)]
    if empty.shape[2] != unet.config.cross_attention_dim:
        raise UserError(f"the text_encoder of {name} gives {empty.shape[2]} numbers a token, its unet takes "
                        f"{unet.config.cross_attention_dim}: they are not of one model")
    net = TextUNet(unet, empty)
    denoiser = {"epsilon": FromEps, "v_prediction": FromV}[kind](net, 1 / (1 + sigmas.double() ** 2)).to(device)
    # the published losses are plain errors in what the network predicts: in x0 that is 1/sigma^2, and 1/sigma^2 + 1 for v
    sigma_data = {"epsilon": float("inf"), "v_prediction": 1.0}[kind]
    shape = (4, *2 * [hub.square(unet.config.sample_size)])
    place = os.path.abspath(name) if os.path.isdir(name) else name
    recipe = dict(network="stable_diffusion", source=place, shape=list(shape), classes=0, data="", seconds=0, cpu_seconds=0,
                  version=name if name in RANDOM else hub.version(name))
    return dict(kind="text", denoiser=denoiser, net=denoiser.requires_grad_(False).eval(), shape=shape, classes=0,
                sigma_data=sigma_data, data="", recipe=recipe, sigmas=(sigmas[0].item(), sigmas[-1].item()), decode=decode)


def part(kind, name, subfolder):
    """kind.from_pretrained of one subfolder; raises UserError naming it."""
    return hub.part(kind, name, subfolder, "Stable Diffusion 1.5 pipeline")


def read_parts(name, device):
    """(U-Net, what it predicts, its (1000,) noise levels, decode) of a pipeline."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = hub.index_of(name).get("_class_name", "")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        raise UserError(f"{name} is {f'a {kind}' if kind else 'no Stable Diffusion pipeline'}: versions 1 and 2 are supported; "
                        "SDXL, inpainting and newer models are not")
    scheduler = hub.noise_table(name)
    try:                                                          # before gigabytes are loaded
        config = UNet2DConditionModel.load_config(**hub.source(name), subfolder="unet")
    except Exception as e:
        raise UserError(f"cannot load the unet of {name}: {first_line(e)}; is it a Stable Diffusion 1.5 pipeline?") from e
    odd = [k for k in ("addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds",
                       "time_cond_proj_dim", "center_input_sample") if config.get(k)]
    if odd or config.get("in_channels", 4) != 4 or not hub.square(config.get("sample_size")):
        also = f", also {', '.join(odd)}" if odd else ""
        raise UserError(f"{name} is not Stable Diffusion 1 or 2 (in_channels {config.get('in_channels')}, sample_size "
                        f"{config.get('sample_size')}{also}): SDXL, inpainting, distilled and newer models are not supported")
    abar = scheduler.alphas_cumprod.double()
    sigmas = ((1 - abar) / abar).sqrt()
    if sigmas.shape != (1000,) or not torch.allclose(sigmas, sd_sigmas().double(), rtol=1e-3):
        raise UserError(f"{name} has another noise schedule than Stable Diffusion 1 and 2: sd(first,last) would not fit it")
    return (part(UNet2DConditionModel, name, "unet"), scheduler.config.prediction_type, sigmas,
            decoder(part(AutoencoderKL, name, "vae"), device))


def decoder(vae, device):
    """decode(latents) -> images in [-1, 1] on the CPU, a few at a time; the VAE visits the device only while it works."""
    config, factor = vae.config, 2 ** (len(vae.config.block_out_channels) - 1)
    odd = [k for k in ("shift_factor", "latents_mean", "latents_std") if config.get(k)]
    if config.latent_channels != 4 or odd or factor != 8 or not config.scaling_factor > 0:
        raise UserError(f"the vae has {config.latent_channels} latent channels, {factor} pixels a latent, scaling_factor "
                        f"{config.scaling_factor}{''.join(f', {k}' for k in odd)}: it is not Stable Diffusion's")
    vae.requires_grad_(False).eval()

    @torch.no_grad()
    def decode(latents):
        vae.to(device)
        x = [vae.decode(some / vae.config.scaling_factor).sample.clamp(-1, 1).cpu() for some in latents.to(device).split(4)]
        vae.cpu()
        return torch.cat(x)

    return decode


def differentiable_decoder(name, source, device):
    """latents (B, 4, h, w) -> images (B, 3, 8h, 8w) in about [-1, 1], for the LPIPS of the regression loss.

    name is a TAESD (an autoencoder of 5 MB for the same latents, which DMD used: appendix B.3), or "vae": source's own.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    vae = part(AutoencoderKL, source, "vae") if name == "vae" else hub.part(AutoencoderTiny, name, "vae", "TAESD")
    vae = vae.to(device).requires_grad_(False).eval()
    return lambda latents: vae.decode(latents / vae.config.scaling_factor).sample


class Prompts:
    """Texts and their embeddings: prompts[index (B,)] -> (B, T, C) float32 on the CPU; encoded once, memory-mapped.

    118 KB a prompt (float16): ten thousand are 1.2 GB, and LAION's 3 million would be 350 GB.
    """

    def __init__(self, model, texts):
        self.model, self.texts = model, texts
        encoder = model if model in RANDOM else hub.version(model, "tokenizer", "text_encoder")
        made_of = dict(model=str(model), encoder=encoder, texts=digest(texts), count=len(texts), first=texts[0][:80])
        path = cached("text", made_of, lambda path: write_rows(path, len(texts), embeddings(model, texts)), ".npy")
        self.table = read_table(path, np.float16, [len(texts), None, None])

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return finite(self.table[index.cpu().numpy()])


def finite(rows):
    """Rows of a table of the cache as float32.  raises UserError where they hold no numbers"""
    rows = torch.from_numpy(rows.astype(np.float32))
    if not rows.isfinite().all():
        raise UserError("the cache holds numbers that are not finite: clear it by python -m nano_dmd.engine.cache --clear text latents")
    return rows


def embeddings(model, texts, batch=32):
    """Yield a float16 (T, C) array per text.  raises UserError without the packages; says so where a text is cut."""
    if model in RANDOM:
        width = RANDOM[model]["cross_attention_dim"]
        for text in texts:                                        # made up, but the same for the same words
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
            yield np.random.default_rng(seed).standard_normal((77, width)).astype(np.float16)
        return
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as e:
        raise UserError(NEEDS.format(e)) from e
    tokenizer, encoder = part(CLIPTokenizer, model, "tokenizer"), part(CLIPTextModel, model, "text_encoder").eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words, most = len(tokenizer), encoder.config.vocab_size
    if not most / 2 < words <= most:                              # transformers makes an empty tokenizer of missing files
        raise UserError(f"the tokenizer of {model} knows {words} words, its text_encoder {most}: files of it are missing, or it "
                        "belongs to another model")
    encoder, cut = encoder.to(device), 0
    length = min(n for n in (tokenizer.model_max_length, encoder.config.max_position_embeddings) if n > 0)
    for i in tqdm(range(0, len(texts), batch), "encoding prompts", disable=len(texts) < batch):
        cut += sum(len(ids) > length for ids in tokenizer(texts[i : i + batch]).input_ids)
        ids = tokenizer(texts[i : i + batch], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            yield from encoder(ids.input_ids.to(device))[0].float().cpu().numpy().astype(np.float16)
    if cut:
        print(f"WARNING: {cut} of {len(texts)} prompts are longer than {length} tokens; the rest of each was cut off")


def read_prompts(model, path):
    """The Prompts in a text file, one to a line; empty lines are left out."""
    texts = [line for _, line in read_lines(path)]
    if not texts:
        raise UserError(f"no prompt in {path}: give a text file with one prompt to a line")
    return Prompts(model, texts)


class Latents:
    """Real images for the GAN: what the VAE says of each (mean and log-variance, float16), and its caption.

    sample(n, rng) -> (x (n, 4, h, w), cond (n, T, C)), a fresh draw from the encoder's distribution as published.
    """

    def __init__(self, model, folder, shape, device):
        files, captions = captioned(folder)
        self.shape, self.classes, self.device, side = shape, 0, device, 8 * shape[1]
        made_of = dict(model=model, vae=hub.version(model, "vae"), side=side, folder=str(folder), files=fingerprint(*files))
        path = cached("latents", made_of, lambda path: write_rows(path, len(files), moments(model, files, side, device)), ".npy")
        self.table, self.prompts = read_table(path, np.float16, [len(files), 8, *shape[1:]]), Prompts(model, captions)

    def __len__(self):
        return len(self.table)

    def sample(self, n, rng):
        index = torch.randint(len(self), (n,), generator=rng)
        mean, log_variance = finite(self.table[index.numpy()]).chunk(2, dim=1)
        x = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=rng)
        return x.to(self.device, non_blocking=True), self.prompts[index].to(self.device, non_blocking=True)


def captioned(folder):
    """(image files, captions) of a folder: NAME.txt beside each image, or metadata.jsonl with file_name and text."""
    folder, files = Path(folder), image_files(folder)
    listed = folder / "metadata.jsonl"
    if listed.is_file():
        rows = {}
        for i, line in read_lines(listed):
            name, caption = caption_of(line, f"{listed}, line {i}")
            if name in rows:
                raise UserError(f"{listed}, line {i}, lists {name} again: give each image one caption")
            rows[name] = caption
        captions = [rows.pop(f.relative_to(folder).as_posix(), None) for f in files]
        if rows:
            note(f"{listed} has captions for {len(rows)} images that are not there, {next(iter(rows))} for example")
    else:
        beside = [f.with_suffix(".txt") for f in files]
        captions = [" ".join(line for _, line in read_lines(t)) if t.is_file() else None for t in beside]
    if "" in captions:
        note(f"{captions.count('')} captions in {folder} are empty, that of {files[captions.index('')].name} for example")
    if None in captions:
        raise UserError(f"{captions.count(None)} of {len(files)} images have no caption, {files[captions.index(None)]} for "
                        "example: put NAME.txt beside each image, or a metadata.jsonl with file_name and text in the folder")
    return files, captions


def caption_of(line, where):
    """(file name, caption) of a line of metadata.jsonl, whose caption may also be called prompt or caption."""
    row = parse_json(line, where)
    if problem := mismatch(row, {"file_name": str}):
        raise UserError(f"cannot use {where}: {problem}")
    column = next((c for c in ("text", "prompt", "caption") if c in row), "text")
    if problem := mismatch(row, {column: str}):
        raise UserError(f"cannot use {where}: {problem}; it needs file_name and text")
    return row["file_name"].replace("\\", "/").removeprefix("./"), row[column].strip()


@torch.no_grad()
def moments(model, files, side, device):
    """Yield the VAE's (8, h, w) mean and log-variance of each image, scaled as latents are; centre-cropped to a square."""
    from diffusers import AutoencoderKL

    vae = part(AutoencoderKL, model, "vae").to(device).eval()
    for file in tqdm(files, "encoding images"):
        pixels = torch.from_numpy(middle_square(file, side)).permute(2, 0, 1)[None].to(device) / 127.5 - 1
        found = vae.encode(pixels).latent_dist
        scale = vae.config.scaling_factor
        yield torch.cat([found.mean * scale, found.logvar + 2 * np.log(scale)], 1)[0].cpu().numpy().astype(np.float16)
