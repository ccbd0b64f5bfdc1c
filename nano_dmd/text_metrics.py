"""Zero-shot metrics of text-to-image students: FID to a folder of real images, and the CLIP score.

    python -m nano_dmd.evaluate RUN --metric fid,clip --prompts captions.txt --reference FOLDER --n 30000

The papers' protocol (DMD2 coco_evaluator.py:123-200): 30,000 captions of COCO 2014's validation set, an image of 512 pixels for
each, resized to 256 by Lanczos; FID to the 40,504 validation images, cropped and resized likewise; CLIP score = mean cosine of
image and "A photo depicts" + caption under OpenCLIP's ViT-g-14.
Differs: Inception and Frechet distance by torch-fidelity (there clean-fid), so compare among runs measured here.
"""

from pathlib import Path

import numpy as np
import torch

from nano_dmd import fid
from nano_dmd.checkpoint import UserError, first_line

CLIP = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
PREFIX = "A photo depicts "


def resized(images, side=256):
    """uint8 (B, 3, side, side) of images (B, 3, H, W) in [-1, 1], by Pillow's Lanczos."""
    from torchvision.transforms.functional import to_pil_image

    pictures = [to_pil_image(x) for x in (images.cpu() + 1) / 2]
    return torch.stack([to_bytes(p, side) for p in pictures])


def to_bytes(image, side):
    """uint8 (3, side, side) of a PIL image, its middle square, by Lanczos."""
    from PIL import Image, ImageOps

    return torch.from_numpy(np.array(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS))).permute(2, 0, 1)


def image_files(folder):
    """All images of a folder, in the order of their names.  raises UserError if there is none."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"no images in {folder}: give --reference a folder of real images, or an .npz of their moments")
    return files


def real_images(files, side=256, batch=50):
    """uint8 batches of images in files."""
    from PIL import Image

    for i in range(0, len(files), batch):
        yield torch.stack([to_bytes(Image.open(f), side) for f in files[i : i + batch]])


class ClipScore:
    """Running mean cosine of images and captions; add(images in [-1, 1], captions), then .mean()."""

    def __init__(self, name, device):
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

            self.model = CLIPModel.from_pretrained(name).to(device).eval()
            self.tokenizer, self.processor = CLIPTokenizer.from_pretrained(name), CLIPImageProcessor.from_pretrained(name)
        except Exception as e:  # not installed, hub, network, weights: no common base class
            raise UserError(
                f'cannot load the CLIP model {name} ({first_line(e)}): pip install "nano_dmd[sd]", and give --clip-model a '
                "hub name (needs a network the first time) or a local folder"
            ) from e
        self.device, self.cosines = device, []

    @torch.no_grad()
    def add(self, images, captions):
        from torchvision.transforms.functional import to_pil_image

        pixels = self.processor([to_pil_image(x) for x in (images.cpu() + 1) / 2], return_tensors="pt").pixel_values
        words = self.tokenizer([PREFIX + c for c in captions], padding=True, truncation=True, return_tensors="pt")
        found = self.model(pixel_values=pixels.to(self.device), **words.to(self.device))
        self.cosines.append((found.image_embeds * found.text_embeds).sum(1).cpu())  # both of unit length

    def mean(self):
        return torch.cat(self.cosines).mean().item()


def measure(images, captions, wanted, reference, device, inception_weights=None, clip_model=CLIP):
    """{metric: number} of images, an iterable of (B, 3, H, W) in [-1, 1] made for captions, in order."""
    score, seen, small = ClipScore(clip_model, device) if "clip" in wanted else None, 0, []
    if "fid" in wanted and not reference:
        raise UserError("FID compares with real images: give --reference, a folder of them or an .npz of EDM's format")
    moments = str(reference).endswith(".npz")
    files = image_files(reference) if "fid" in wanted and not moments else None        # complain before hours of sampling
    for x in images:
        if score:
            score.add(x, captions[seen : seen + len(x)])
        if "fid" in wanted:
            small.append(resized(x))
        seen += len(x)
    result = {}
    if "fid" in wanted:
        result |= fid.inception_metrics(small, reference if moments else real_images(files), ["fid"], device, inception_weights)
    return result | ({"clip": score.mean()} if score else {})
