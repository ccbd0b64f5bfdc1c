"""Write a text-to-image student as a pipeline folder that diffusers loads and samples as we do.

    python -m nano_dmd.export RUN --to DIR

    DiffusionPipeline.from_pretrained(DIR)("a red cube", num_inference_steps=1, guidance_scale=0)

U-Net students that start from unit noise (DMD, DMD2) get an LCMScheduler, whose steps are ours:
predict x0, noise it again. SiD's student starts from sigma z at timestep 625. It gets an Euler
scheduler that knows only the first 626 timesteps and makes one step. Flow students get a
FlowMatchLCMScheduler without shift. It cannot store its times, so they stand in the call, which the
model card shows. Students with --ode_steps get DDIM, or Euler for flow: the same step. LoRA updates
are merged into the weights; pytorch_lora_weights.safetensors holds them alone.
"""

import shutil
import tempfile
from pathlib import Path

import torch

from nano_dmd.engine import files
from nano_dmd.engine.config import parser
from nano_dmd.engine.files import UserError, command
from nano_dmd.engine.runs import load_run
from nano_dmd.noise import sd_sigmas
from nano_dmd.teachers import hub
from nano_dmd.teachers.diffusers_unet import noise_table
from nano_dmd.teachers.latents import load_vae, pixels
from nano_dmd.teachers.prompts import text_parts
from nano_dmd.teachers.text_networks import RANDOM

CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
license: other
---
# {steps}-step student of {base}

Distilled by nano_dmd with method `{method}` (preset `{preset}`): {updates} generator updates
of {batch} prompts, {critics} critic updates each, teacher guidance {guidance}{lora}. No quality was
measured by this export.

```python
from diffusers import DiffusionPipeline

image = DiffusionPipeline.from_pretrained("{folder}")("a red cube", {call}).images[0]
```

The licence and the terms of use of the base model apply to these weights too.
"""


def timesteps(cfg):
    """Timesteps of the student's noise levels, descending.  raises UserError for others."""
    table, found = sd_sigmas(), []
    for sigma in cfg.sigma_list():
        index = (table / sigma).log().abs().argmin().item()
        if abs(table[index].item() / sigma - 1) > 1e-4:
            raise UserError(f"sigma {sigma:g} is no timestep of Stable Diffusion, the nearest is "
                            f"t{index} ({table[index]:g}): train with --sigmas t999 and the like")
        found.append(index)
    return found


def scheduler(cfg, kind, config, side):
    """(a diffusers scheduler that samples as the student does, arguments of a call).

    kind    the student's row of text_networks.KINDS
    config  of the teacher's DDPMScheduler; a flow model needs none
    side    pixels of an image
    """
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    if kind.call:
        from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

        if not cfg.unit_noise:
            raise UserError("flow students are exported if they start from unit noise: train with "
                            "--unit_noise")
        times = [round(s / (1 + s), 6) for s in cfg.sigma_list()]
        call = kind.call.format(times=times, timesteps=[1000 * t for t in times], side=side)
        flow = FlowMatchEulerDiscreteScheduler if cfg.ode_steps else FlowMatchLCMScheduler
        return flow(shift=1.0), call
    steps = timesteps(cfg)
    call = f"num_inference_steps={len(steps)}, guidance_scale=0"
    if not cfg.unit_noise:
        if len(steps) > 1:
            raise UserError("several steps without --unit_noise have no counterpart in diffusers: "
                            "train them with --unit_noise")
        low, high = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
        count = steps[0] + 1
        betas = torch.linspace(low, high, 1000, dtype=torch.float64)[:count] ** 2
        return EulerDiscreteScheduler.from_config(
            config, num_train_timesteps=count, trained_betas=betas.tolist(),
            timestep_spacing="trailing"), call
    if cfg.ode_steps and len(steps) > 1:
        return ddim(config, steps), call
    lcm = LCMScheduler.from_config(config, original_inference_steps=len(steps),
                                   timestep_spacing="leading", clip_sample=False)
    lcm.set_timesteps(len(steps))
    if lcm.timesteps.tolist() == steps:
        return lcm, call
    call = f"timesteps={steps}, guidance_scale=0"
    return LCMScheduler.from_config(config, clip_sample=False), call


def ddim(config, steps):
    """The scheduler of a Stable Diffusion student with --ode_steps.  raises UserError."""
    from diffusers import DDIMScheduler

    found = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False,
                                      set_alpha_to_one=True)
    found.set_timesteps(len(steps))
    if (own := found.timesteps.tolist()) != steps:
        raise UserError(f"with --ode_steps the timesteps must be DDIM's, {own}, not {steps}: train "
                        "with --sigmas t999,t749,t499,t249 and the like")
    return found


def lora_weights(network, part):
    """Low-rank weights by diffusers' names, scaled so that a loader needs to know no alpha."""
    from peft.utils import get_peft_model_state_dict

    config = network.peft_config["default"]
    weights, scale = get_peft_model_state_dict(network), config.lora_alpha / config.r
    return {f"{part}.{k}": v * scale if "lora_B" in k else v for k, v in weights.items()}


def merge_lora(network):
    """Add the low-rank updates to the weights, and forget them."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(network)


def export(run, to):
    """Write the pipeline folder `to`, complete or not at all; returns arguments of its call."""
    from diffusers import DDPMScheduler, DiffusionPipeline

    cfg, teacher, generator = load_run(run)
    if teacher.kind != "text" or teacher.recipe["source"] in RANDOM:
        raise UserError(f"{run} is a student of {cfg.teacher}: only those of a text-to-image "
                        "pipeline can be exported")
    if Path(to).exists():
        raise UserError(f"{to} exists already: give --to a folder that does not")
    source, net = teacher.recipe["source"], generator.net.net
    lora = lora_weights(net.network, net.kind.part) if cfg.lora_generator else {}
    if lora:
        merge_lora(net.network)
    vae, text = load_vae(source), text_parts(source)
    config = None
    if not net.kind.call:
        config = dict(DDPMScheduler.from_config(noise_table(source).config).config)
    steps, call = scheduler(cfg, net.kind, config, teacher.shape[1] * pixels(vae.config))
    with files.blame(f"cannot read {source}", "is it a complete pipeline, in .safetensors?"):
        pipeline = DiffusionPipeline.from_pretrained(
            **hub.source(source), **{net.kind.part: net.network}, scheduler=steps, vae=vae,
            use_safetensors=True, **text)
    parent = Path(to).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".export-", suffix=".tmp") as tmp:
            new = Path(tmp) / "new"
            if lora:
                files.save_tensors(new / "pytorch_lora_weights.safetensors", lora)
            pipeline.save_pretrained(new)
            restore_text_parts(new, source, text)
            (new / "README.md").write_text(card(cfg, source, Path(to).name, call), encoding="utf-8")
            shutil.move(new, to)
    except OSError as e:
        raise files.unwritable(to, e) from e
    return call


def restore_text_parts(new, source, text):
    """Describe text encoders of diffusers' own (PRX) as the source does.

    diffusers saves the config of T5Gemma so that it cannot load it again (its issue 13142)
    """
    index = files.read_json(new / "model_index.json")
    for name in (n for n, v in text.items() if type(v).__module__.startswith("diffusers")):
        index[name] = hub.index_of(source)[name]
        files.write_json(new / name / "config.json", hub.component_config(source, name))
    files.write_json(new / "model_index.json", index)


def card(cfg, source, folder, call):
    """The model card of a student."""
    lora = f", LoRA of rank {cfg.lora_generator}" if cfg.lora_generator else ""
    return CARD.format(
        base=source.partition("@")[0], steps=len(cfg.sigma_list()), method=cfg.method,
        preset=cfg.preset, updates=cfg.steps, batch=cfg.batch, critics=cfg.critic_steps,
        guidance=cfg.guidance, lora=lora, folder=folder, call=call)


def main(argv=None):
    p = parser("python -m nano_dmd.export", __doc__)
    p.add_argument("run", help="the folder of a finished run with prompts")
    p.add_argument("--to", required=True, metavar="DIR", help="a new folder for the pipeline")
    args = p.parse_args(argv)
    try:
        call = export(args.run, args.to)
    except ImportError as e:
        raise UserError(f'export needs more packages ({files.first_line(e)}): pip install '
                        '"nano_dmd[sd]"') from e
    print(f"{args.to} is written; sample it with")
    print(f'    DiffusionPipeline.from_pretrained({args.to!r})("a red cube", {call}).images[0]')


if __name__ == "__main__":
    command(main)
