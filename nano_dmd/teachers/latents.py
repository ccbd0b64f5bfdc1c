"""Between images and latents: decoders of a pipeline's VAE, and real images for the GAN."""

import functools

import numpy as np
import torch
from tqdm import tqdm

from nano_dmd.engine.cache import cached, digest, fingerprint
from nano_dmd.engine.files import UserError, blame
from nano_dmd.teachers import data, hub
from nano_dmd.teachers.captions import captioned
from nano_dmd.teachers.prompts import Prompts, finite

CHUNK = 10_000                                     # images of one entry of the cache


def load_vae(model):
    """The VAE of a pipeline in float32 (in float16 SDXL's overflows).  raises UserError."""
    vae = hub.component(model, "vae", ("AutoencoderKL", "AutoencoderDC"))
    odd = [k for k in ("latents_mean", "latents_std") if vae.config.get(k)]
    if not vae.config.scaling_factor > 0:
        odd.append(f"scaling_factor {vae.config.scaling_factor}")
    if odd:
        raise UserError(f"the vae of {model} is not supported: it has {', '.join(odd)}")
    return vae.requires_grad_(False).eval()


def pixels(config):
    """Pixels of an image per latent, along one side, by a VAE's config: 8, or 32."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(blocks) - 1)


def shift(config):
    return config.get("shift_factor") or 0.0       # Stable Diffusion 3, Flux; others have none


def decoder(vae, device):
    """latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1] on the CPU, one by one on device."""
    config = vae.config

    @torch.no_grad()
    def decode(latents):
        vae.to(device)
        some = (latents.to(device) / config.scaling_factor + shift(config)).split(1)
        x = [vae.decode(v).sample.clamp(-1, 1).cpu() for v in some]
        vae.cpu()
        return torch.cat(x)

    return decode


def differentiable_decoder(name, pipeline, device):
    """latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1], for LPIPS.

    name is a TAESD (5 MB, what DMD used: appendix B.3), or "vae": the pipeline's own.
    """
    from diffusers import AutoencoderTiny

    vae = load_vae(pipeline) if name == "vae" else hub.part(AutoencoderTiny, name, "vae", "TAESD")
    vae = vae.to(device).requires_grad_(False).eval()
    scale = vae.config.scaling_factor
    offset = shift(vae.config) if name == "vae" else 0.0          # a TAESD's is of another kind
    return lambda latents: vae.decode(latents / scale + offset).sample


class Latents:
    """Real images for the GAN: the VAE's mean and log-variance (float16), and the caption.

    The cache holds them in entries of CHUNK images each, so a stopped encoding goes on.
    """

    kind = "text"

    def __init__(self, model, place, shape, device, encode="cache"):
        images, captions = captioned(place)
        self.shape, self.classes = shape, 0
        self.device = device
        side = pixels(hub.component_config(model, "vae")) * shape[1]
        version = hub.version(model, "vae")

        @functools.cache                           # nothing is loaded where all is cached
        def tools():
            bar = tqdm(total=len(images), desc="encoding images", initial=first)
            return load_vae(model).to(device), bar

        def make(path):
            data.write_rows(path, len(chunk), vae_moments(chunk, side, device, *tools()))

        self.tables = []
        for first in range(0, len(images), CHUNK):
            chunk = images[first : first + CHUNK]
            paths = sorted({image.path for image in chunk})
            made_of = dict(model=model, vae=version, side=side, folder=str(place),
                           files=fingerprint(*paths))
            if any(image.start for image in chunk):
                made_of["parts"] = digest([image[1:] for image in chunk])
            file = cached("latents", made_of, make, ".npy")
            self.tables.append(data.read_table(file, np.float16,
                                               [len(chunk), 2 * shape[0], *shape[1:]]))
        self.prompts = Prompts(model, captions, encode, device)

    def __len__(self):
        return sum(map(len, self.tables))

    def sample(self, n, generator=None, rows=slice(None)):
        """(x, cond): the slice rows of n draws from the encoder's distribution, as published."""
        index = torch.randint(len(self), (n,), generator=generator)
        noise = torch.randn(n, *self.shape, generator=generator)[rows]
        index = index[rows]
        found = np.stack([self.tables[i // CHUNK][i % CHUNK] for i in index.tolist()])
        mean, log_variance = finite(found).chunk(2, dim=1)
        x = mean + (log_variance / 2).exp() * noise
        cond = self.prompts[index]
        return x.to(self.device, non_blocking=True), cond.to(self.device, non_blocking=True)


@torch.no_grad()
def vae_moments(images, side, device, vae, bar):
    """Yield the (2 C, h, w) mean and log-variance of the middle square of each image."""
    config, scale = vae.config, vae.config.scaling_factor
    for image in images:
        with blame(f"cannot read the image {image}"):
            square = data.middle_square(data.open_image(image.read()), side)
        x = torch.from_numpy(square).permute(2, 0, 1)[None].to(device) / 127.5 - 1
        found = vae.encode(x)
        if hasattr(found, "latent_dist"):
            mean, log_variance = found.latent_dist.mean, found.latent_dist.logvar
        else:                                      # AutoencoderDC has no spread
            mean, log_variance = found.latent, torch.full_like(found.latent, -30.0)
        scaled = [(mean - shift(config)) * scale, log_variance + 2 * np.log(scale)]
        bar.update()
        yield torch.cat(scaled, 1)[0].cpu().numpy().astype(np.float16)
