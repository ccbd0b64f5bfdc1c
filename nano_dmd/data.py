"""Data sets: something with .shape, .classes and .sample(n, generator) -> (x, cond)."""

from pathlib import Path

import torch

from nano_dmd.checkpoint import UserError

DIGITS = Path(__file__).parent / "assets" / "digits8x8.npz"


class TensorData:
    """Images held in memory, x (N, C, H, W) float32 in [-1, 1], labels (N,) int64 or None."""

    def __init__(self, x, labels=None):
        self.x, self.labels = x, labels
        self.shape, self.classes = tuple(x.shape[1:]), 0 if labels is None else int(labels.max()) + 1

    def sample(self, n, generator=None):
        """n images drawn with replacement; the CPU generator makes the order independent of the device."""
        index = torch.randint(len(self.x), (n,), generator=generator).to(self.x.device)
        return self.x[index], None if self.labels is None else self.labels[index]


def load_digits(device="cpu"):
    """1,797 real handwritten digits, 8x8, ten classes (UCI, CC BY 4.0; see assets/ATTRIBUTION.md)."""
    import numpy as np

    with np.load(DIGITS, allow_pickle=False) as f:
        x, labels = torch.from_numpy(f["images"]), torch.from_numpy(f["labels"])
    return TensorData((x.float() / 8 - 1)[:, None].to(device), labels.long().to(device))


def load_data(name, device="cpu"):
    """'digits' or 'toy:NAME' -> a data set on device.  raises UserError for anything else."""
    if name == "digits":
        return load_digits(device)
    if name.startswith("toy:"):
        from toy.mixtures import MIXTURES

        if name[4:] not in MIXTURES:
            raise UserError(f"no mixture {name!r}: use one of {', '.join('toy:' + m for m in MIXTURES)}")
        return MIXTURES[name[4:]]().to(device)
    raise UserError(f"no data set {name!r}: use digits or toy:NAME")
