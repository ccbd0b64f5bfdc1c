"""Zero-shot metrics of text-to-image students: FID to a folder of real images, and the CLIP score.

    python -m nano_dmd.evaluate RUN --metric fid,clip --prompts captions.txt --reference FOLDER --n 30000

The papers' protocol (DMD2 coco_evaluator.py:123-200): 30,000 captions of COCO 2014's validation set, an image of 512 pixels for
each, resized to 256 by Lanczos; FID to the 40,504 validation images, cropped and resized likewise; CLIP score = mean cosine of
image and "A photo depicts" + caption under OpenCLIP's ViT-g-14.
Differs: Inception and Frechet distance by torch-fidelity (there clean-fid), so compare among runs measured here.
"""

import torch

from nano_dmd.engine.files import UserError, first_line
from nano_dmd.engine.pictures import to_pil
from nano_dmd.metrics.inception import inception_metrics
from nano_dmd.teachers.data import image_files, middle_square

CLIP = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"

PREFIX = "A photo depicts "


def pil_images(images):
    """PIL images of (B, 3, H, W) in [-1, 1]."""
    return [to_pil(x) for x in (images.float().cpu() + 1) / 2]


def squares(images, side=256):
    """uint8 (B, 3, side, side) of files or PIL images: their middle squares, by Lanczos."""
    return torch.stack([torch.from_numpy(middle_square(v, side)).permute(2, 0, 1) for v in images])


class ClipScore:
    """Running mean cosine of images and captions; add(images in [-1, 1], captions), then .mean()."""

    def __init__(self, name, device):
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

            self.model = CLIPModel.from_pretrained(name).to(device).eval()
            self.tokenizer, self.processor = CLIPTokenizer.from_pretrained(name), CLIPImageProcessor.from_pretrained(name)
        except Exception as e:                                    # not installed, hub, network, weights: no common base class
            raise UserError(f'cannot load the CLIP model {name} ({first_line(e)}): pip install "nano_dmd[sd]", and give '
                            "--clip-model a hub name (needs a network the first time) or a local folder") from e
        self.device, self.cosines = device, []

    @torch.no_grad()
    def add(self, images, captions):
        pixels = self.processor(pil_images(images), return_tensors="pt").pixel_values
        words = self.tokenizer([PREFIX + c for c in captions], padding=True, truncation=True, return_tensors="pt")
        found = self.model(pixel_values=pixels.to(self.device), **words.to(self.device))
        self.cosines.append((found.image_embeds * found.text_embeds).sum(1).cpu())     # both of unit length

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
            small.append(squares(pil_images(x)))
        seen += len(x)
    result = {}
    if "fid" in wanted:
        real = reference if moments else (squares(files[i : i + 50]) for i in range(0, len(files), 50))
        result |= inception_metrics(small, real, ["fid"], device, inception_weights)
    return result | ({"clip": score.mean()} if score else {})
