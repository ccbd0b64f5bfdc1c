"""Prompts and their embeddings, made by the pipeline's own encode_prompt.

Every model has its own templates, masks, number of text encoders and empty prompt (zeros for SDXL).
All that comes from diffusers. What leaves this file is one tensor (B, T, C), see text_networks.py.

    cache    every prompt is encoded once, before the training (118 KB each for Stable Diffusion
             1.5, 320 KB for SDXL, 1.4 MB for SANA)
    online   the prompts of each batch are encoded when they are drawn: for millions of prompts
    visit    the same, but the text encoders are on the device only while they work
"""

import functools
import hashlib
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from nano_dmd.engine.cache import cached, digest
from nano_dmd.engine.files import Lines, UserError, blame
from nano_dmd.teachers import data, hub
from nano_dmd.teachers.text_networks import RANDOM

PARTS = [part + n for n in ("", "_2", "_3") for part in ("tokenizer", "text_encoder")]


class Prompts:
    """Texts and their embeddings: prompts[index (B,)] -> (B, T, C) float32.

    texts   a list, or the Lines of a file
    encode  "cache" | "online" | "visit", see above.  All give the same, but for rounding
    """

    def __init__(self, model, texts, encode="cache", device="cpu"):
        self.model, self.texts = model, texts
        if encode == "cache":
            self.table = embedded(model, texts)
        else:
            self.table, self.encoder = None, text_encoder(model, str(device), encode == "visit")

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        if self.table is None:
            return self.encoder([self.texts[i] for i in index.tolist()]).float()
        return finite(self.table[index.cpu().numpy()])


def read_prompts(model, path, encode="cache", device="cpu"):
    """The Prompts in a text file, one to a line; empty lines are left out."""
    texts = Lines(path)
    if not len(texts):
        raise UserError(f"no prompt in {path}: give a text file with one prompt to a line")
    return Prompts(model, texts, encode, device)


def empty_prompt(model):
    """(1, T, C) float32: what stands for no prompt."""
    return finite(embedded(model, [""], empty=True)[:])


def embedded(model, texts, empty=False):
    """The table (N, T, C) float16 of the embeddings of texts, cached and memory-mapped."""
    version = model if model in RANDOM else hub.version(model, *PARTS)
    made_of = dict(model=str(model), encoder=version, texts=digest([*texts]), count=len(texts),
                   first=texts[0][:80]) | (dict(empty=True) if empty else {})
    if model not in RANDOM:                        # its class and flags decide, too
        made_of["pipeline"] = {k: v for k, v in hub.index_of(model).items() if type(v) is not list}

    def make(path):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        data.write_rows(path, len(texts), rows(TextEncoder(model, device), texts, empty))

    return data.read_table(cached("text", made_of, make, ".npy"), np.float16,
                           [len(texts), None, None])


def rows(encoder, texts, empty, batch=32):
    """Yield a float16 array (T, C) per text.  Says where a text is cut."""
    cut = 0
    for i in tqdm(range(0, len(texts), batch), "encoding prompts", disable=len(texts) < batch):
        some = [texts[k] for k in range(i, min(i + batch, len(texts)))]
        cut += encoder.cut(some)
        yield from encoder(some, empty).cpu().numpy()
    if cut:
        print(f"WARNING: {cut} of {len(texts)} prompts are longer than {encoder.longest} tokens: "
              "cut")


def finite(table):
    """Rows of a table of the cache as float32.  raises UserError if a number is not finite."""
    found = torch.from_numpy(table.astype(np.float32))
    if not found.isfinite().all():
        raise UserError("the cache holds numbers that are not finite: clear it by "
                        "python -m nano_dmd.engine.cache --clear text latents")
    return found


@functools.lru_cache(maxsize=2)
def text_encoder(model, device, visit):
    """The TextEncoder of a run, which training prompts and captions share."""
    return TextEncoder(model, device, visit)


class TextEncoder:
    """encoder(texts, empty=False) -> (B, T, C) float16; empty: what stands for "no prompt" instead.

    raises UserError for a model whose parts are missing or do not belong together
    """

    def __init__(self, model, device, visit=False):
        self.model, self.device = model, device
        self.longest = 0
        if model in RANDOM:
            return
        import diffusers

        index, given = hub.index_of(model), text_parts(model)
        kind = getattr(diffusers, index["_class_name"])
        for name in given:
            if name.startswith("tokenizer"):
                fit(model, given[name], given.get(name.replace("tokenizer", "text_encoder")))
        nets = [net.eval() for name, net in given.items() if name.startswith("text_encoder")]
        self.visitors = nets if visit else []      # the others stay on the device
        for net in [] if visit else nets:
            net.to(device)
        for name, parameter in inspect.signature(kind).parameters.items():
            value = index.get(name)                # flags as saved; the parts nobody needs: None
            if isinstance(value, (list, tuple)) or parameter.default is parameter.empty:
                given.setdefault(name, None)
            elif value is not None:
                given[name] = value
        if "safety_checker" in given:
            given["requires_safety_checker"] = False
        self.pipeline, self.tokenizer = kind(**given), given["tokenizer"]
        usual = inspect.signature(kind.__call__).parameters
        self.options = {name: usual[name].default for name in (
            "prompt_2", "prompt_3", "max_sequence_length", "complex_human_instruction")
            if name in usual and name in inspect.signature(kind.encode_prompt).parameters}
        self.longest = self.options.get("max_sequence_length") or self.tokenizer.model_max_length

    def cut(self, texts):
        """How many of texts have more tokens than the model reads."""
        if not self.longest:
            return 0
        return sum(len(ids) > self.longest for ids in self.tokenizer(texts).input_ids)

    @torch.no_grad()
    def __call__(self, texts, empty=False):
        if self.model in RANDOM:
            shape = RANDOM[self.model][2]
            return torch.stack([made_up("" if empty else text, shape) for text in texts])
        for net in self.visitors:
            net.to(self.device)
        with blame(f"{self.model} cannot encode prompts",
                   'is the pipeline complete, and so is pip install "nano_dmd[sd]"?'):
            found = self.pipeline.encode_prompt(
                texts, device=torch.device(self.device), num_images_per_prompt=1,
                do_classifier_free_guidance=empty, **self.options)
        for net in self.visitors:
            net.cpu()
        return packed(found, empty).half()


def packed(found, empty):
    """What encode_prompt returns -> the embeddings of the prompts or of the empty one, (B, T, C).

    2 tensors  text, empty
    4 tensors  text, mask, empty, mask; or text, empty, one vector per prompt, that of the empty one
    """
    if len(found) == 2:
        return found[empty]
    text, second, third, fourth = found
    if second is not None and second.ndim == 2:    # padding becomes zeros: the mask can be read off
        tokens, mask = (third, fourth) if empty else (text, second)
        return tokens * mask[..., None]
    tokens, whole = (second, fourth) if empty else (text, third)
    return torch.cat([tokens, F.pad(whole, (0, tokens.shape[2] - whole.shape[1]))[:, None]], 1)


def text_parts(model):
    """{name: tokenizer or text encoder} of a pipeline, all that its model_index.json names."""
    return {name: hub.component(model, name) for name in PARTS if hub.declared(model, name)}


def made_up(text, shape):
    """An embedding for RANDOM: the same for the same words."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).half()


def fit(model, tokenizer, encoder):
    """Raise UserError unless a tokenizer and an encoder know the same words.

    A tokenizer saved without a length gets that of the encoder.
    """
    words = len(tokenizer)
    most = encoder.get_input_embeddings().num_embeddings if encoder else 0
    if not most / 2 < words <= most:  # transformers makes an empty tokenizer of nothing
        raise UserError(f"the tokenizer of {model} knows {words} words, its text_encoder {most}: "
                        "files of it are missing, or it belongs to another model")
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
