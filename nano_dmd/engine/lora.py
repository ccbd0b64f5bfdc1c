"""Low-rank updates (LoRA) on a denoiser's frozen weights.

The teacher, a LoRA fake score and a LoRA student of Stable Diffusion hold 860 M weights once, not
three times. The sharing copy is a network of its own whose tensors are the teacher's. No adapter
is switched on or off in it. So gradient checkpointing, which runs parts of a forward again, finds
the same network.
"""

import copy

from nano_dmd.denoiser import trainable_copy
from nano_dmd.engine.files import UserError

ALPHA = 8  # the update is ALPHA / rank * B A, as in DMD2 (rank 64)


def sharing_copy(module):
    """A deep copy whose frozen weights and buffers are the same tensors."""
    shared = [*(p for p in module.parameters() if not p.requires_grad), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in shared})


def lora_copy(denoiser, rank=0):
    """A copy to train: in full (rank 0), or low-rank updates of that rank, zero at first.

    raises UserError for LoRA on a network that is not told by text, or without peft
    """
    if not rank:
        return trainable_copy(denoiser)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as e:
        raise UserError(f'LoRA needs peft ({e}): pip install "nano_dmd[sd]", or set rank 0') from e
    denoiser.requires_grad_(False)
    twin = sharing_copy(denoiser)
    if not hasattr(twin.net, "kind"):
        raise UserError("LoRA is for networks that are told by text (teachers/text_networks.py), "
                        f"not {type(twin.net).__name__}: set rank 0")
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=twin.net.kind.lora)
    inject_adapter_in_model(config, twin.net.network)
    for p in twin.parameters():
        if p.requires_grad:
            p.data = p.data.float()                # whatever precision the frozen weights have
    return twin.eval()
