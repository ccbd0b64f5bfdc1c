"""Zero-shot metrics of text-to-image students: FID to a folder of real images, and the CLIP score.

    python -m nano_dmd.evaluate RUN --metric fid,clip --prompts captions.txt --reference FOLDER

The papers' protocol (DMD2 coco_evaluator.py:123-200): 30,000 captions of COCO 2014's validation
set, an image of 512 pixels for each, resized to 256 by Lanczos. FID to the 40,504 validation
images, cropped and resized likewise. CLIP score = mean cosine of image and "A photo depicts" +
caption under OpenCLIP's ViT-g-14.
Differs: FID is by metrics/inception.py (there by clean-fid), so compare only runs measured here.
"""

import torch

from nano_dmd.engine.files import UserError, blame
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
    found = [torch.from_numpy(middle_square(v, side)) for v in images]
    return torch.stack(found).permute(0, 3, 1, 2)


class ClipScore:
    """Running mean cosine of images and captions; add(images in [-1, 1], captions), then mean()."""

    def __init__(self, name, device):
        with blame(f"cannot load the CLIP model {name}", 'pip install "nano_dmd[sd]", and give '
                   "--clip-model a hub name (needs a network the first time) or a local folder"):
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

            self.model = CLIPModel.from_pretrained(name).to(device).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(name)
            self.processor = CLIPImageProcessor.from_pretrained(name)
        self.device, self.cosines = device, []

    @torch.no_grad()
    def add(self, images, captions):
        pixels = self.processor(pil_images(images), return_tensors="pt").pixel_values
        words = self.tokenizer([PREFIX + c for c in captions], padding=True, truncation=True,
                               return_tensors="pt")
        found = self.model(pixel_values=pixels.to(self.device), **words.to(self.device))
        cosines = (found.image_embeds * found.text_embeds).sum(1)              # both of unit length
        self.cosines.append(cosines.cpu())

    def mean(self):
        return torch.cat(self.cosines).mean().item()


def text_metrics(images, captions, wanted, reference, device, weights=None, clip_model=CLIP):
    """{metric: number} of images, an iterable of (1, 3, H, W) in [-1, 1], one for each caption."""
    clip = ClipScore(clip_model, device) if "clip" in wanted else None
    if "fid" in wanted:
        if not reference:
            raise UserError("FID compares with real images: give --reference, a folder of them or "
                            "an .npz of EDM's format")
        real = reference
        if not str(reference).endswith(".npz"):
            files = image_files(reference)         # complains before hours of sampling
            real = (squares(files[i : i + 50]) for i in range(0, len(files), 50))

    def scored():
        """The images one by one; each is added to the CLIP score on its way."""
        for x, caption in zip(images, captions):
            if clip:
                clip.add(x, [caption])
            yield x

    result = {}
    if "fid" in wanted:                            # it loads its network before the first image
        small = (squares(pil_images(x)) for x in scored())
        result = inception_metrics(small, real, ["fid"], device, weights)
    else:
        for _ in scored():
            pass
    return result | ({"clip": clip.mean()} if clip else {})
