"""The same numbers on a GPU as on the CPU: every network, every loss, every step.  Skipped without a GPU.

    NANO_DMD_GPU=cpu pytest tests/test_cuda.py      tries the tests themselves without one

float32 is compared without TensorFloat-32. Batches and noise are drawn on the CPU and carried over, so both devices see
the same. Optimisers are plain gradient descent: Adam's first step is the sign of a gradient, and would hide its size.
"""

import gc
import os
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from pipelines import pipeline
from test_hub import pipeline as pixels
from test_parallel import launch, sharded
from test_stable_diffusion import pipeline as stable_diffusion
from torch.testing import assert_close

from nano_dmd import methods, sample, train
from nano_dmd.engine import machine, parallel, prepare
from nano_dmd.engine.config import resolve
from nano_dmd.engine.draw import Batch
from nano_dmd.engine.files import load_tensors
from nano_dmd.engine.find import find_prompts
from nano_dmd.engine.runs import load_run
from nano_dmd.export import export
from nano_dmd.teachers import zoo

DEVICE = torch.device(os.environ.get("NANO_DMD_GPU", "cuda"))
GPU, CPU = DEVICE.type == "cuda", torch.device("cpu")
pytestmark = pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="needs a GPU")
on_a_gpu = pytest.mark.skipif(not GPU, reason="what only a GPU has")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SMALL = dict(steps=9, batch=8, teacher_steps=20, pairs=16, pair_steps=3, bf16=False, tf32=False, clip=0, critic_steps=2)
GAN = dict(w_gan=0.1, w_disc=0.1)
NARROW = dict(model_type="SongUNet", img_resolution=8, img_channels=1, label_dim=10, model_channels=16, channel_mult=[1, 2],
              num_blocks=1, attn_resolutions=[4])
EDM = {"ddpmpp": NARROW,
       "ncsnpp": NARROW | dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
                               resample_filter=[1, 3, 3, 1]),
       "adm": dict(NARROW, model_type="DhariwalUNet", model_channels=64, attn_resolutions=[8, 4])}
CASES = {
    **{f"{preset} {method}": dict(preset=preset, method=method) for preset in ("toy", "digits") for method in methods.METHODS},
    **{f"{net} {method}": dict(preset="digits", method=method, edm=net) for net in EDM for method in ("dmd2", "sid")},
    "digits dmd2, GAN, two steps": dict(preset="digits", method="dmd2", sigmas="80,0.4", noisings=2, **GAN),
    "digits dmd2, on noised data": dict(preset="digits", method="dmd2", sigmas="80,0.4", backward_simulation=False),
    "digits dmd2, parts and averages": dict(preset="digits", method="dmd2", accumulate=2, ema_critic=5.0, flip=True, w_r1=10.0,
                                            **GAN),
    "digits dmd2, IDA": dict(preset="digits", method="dmd2", ida=0.05),
    "toy f_distill, exact ratio": dict(preset="toy", method="f_distill", ratio="exact"),
    "epsilon dmd2": dict(preset="digits", method="dmd2", teacher="epsilon", data="digits", **GAN),
    "v_prediction dmd2": dict(preset="digits", method="dmd2", teacher="v_prediction", data="digits", **GAN),
    "text sid": dict(preset="sd15", method="sid", teacher="random:tiny", guidance=1.5, fake_guidance=1.5),
    "text dmd2, LoRA": dict(preset="sd15", method="dmd2", teacher="random:tiny", lora_generator=4, lora_critic=4),
    **{f"{kind} dmd2, LoRA": dict(preset=preset, method="dmd2", teacher=kind, lora_generator=4, lora_critic=4, sigmas=sigmas,
                                     w_gan=0, w_disc=0)
       for kind, preset, sigmas in (("sdxl", "sdxl", "14.6"), ("sd3", "sana", "f0.9"), ("prx", "sana", "f0.9"))},
    "flow sid": dict(preset="sana", method="sid", teacher="random:tiny-flow", sigmas="f0.9,f0.5"),
    "flow dmd2, LoRA": dict(preset="sana", method="dmd2", teacher="random:tiny-flow", lora_generator=4, lora_critic=4,
                            sigmas="f0.9"),
}


@pytest.fixture(autouse=True)
def exact():
    """float32 as it is written, here and in what follows."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def config_of(tmp_path, monkeypatch):
    """function(case, changes): its Config."""
    def function(case, **changes):
        settings = SMALL | CASES[case] | changes
        if edm := settings.pop("edm", None):
            monkeypatch.setitem(zoo.RECIPES, "digits", zoo.RECIPES["digits"] | dict(network="edm", args=EDM[edm]))
        kind = settings.get("teacher")
        if kind in ("epsilon", "v_prediction"):
            pixels(tmp_path, kind)
            settings["teacher"] = str(tmp_path)
        if kind in ("sdxl", "sd3", "prx"):
            settings["teacher"] = pipeline(kind, tmp_path)
        if settings["preset"] in ("sd15", "sana", "sdxl"):
            (tmp_path / "prompts.txt").write_text("a red cube\ntwo dogs\n")
            settings |= dict(prompts=str(tmp_path / "prompts.txt"), half_frozen=False, checkpointing=False, critic_steps=1)
            settings |= dict(pairs=2) | changes
        return resolve(settings)

    return function


class Carried(Batch):
    """A batch that was drawn on the CPU and is used elsewhere.  Its noise is drawn on the CPU, too."""

    def noising(self, spec, x):
        sigma, noise = super().noising(spec, x.detach().to(CPU))
        self.sigma = self.sigma.to(x.device)
        return sigma.to(x.device), noise.to(x)


def carried(batch, device):
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Carried(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def disturbed(nets):
    """Move generator and fake score off the teacher, by the same numbers everywhere: their gap would be rounding errors."""
    rng = torch.Generator().manual_seed(0)
    for net in (nets.generator, nets.fake):
        for p in net.parameters():
            if p.requires_grad:
                p.data += 0.1 * p.detach().std(unbiased=False) * torch.randn(p.shape, generator=rng).to(p.device)


def trained(nets):
    return {f"{name}.{k}": p for name in ("generator", "fake", "discriminator")
            for k, p in getattr(nets, name).named_parameters() if p.requires_grad}


def step_on(device, cfg):
    """(how a step of gradient descent moves every weight, its logs), on the CPU."""
    draw = prepare.prepare(cfg, CPU)[3]
    _, nets, opts, _ = prepare.prepare(cfg, device)
    methods.critic_requires_grad(nets, True)
    disturbed(nets)
    before = {name: p.detach().clone() for name, p in trained(nets).items()}
    opts = {k: torch.optim.SGD(opt.param_groups[0]["params"], lr=1e-3) for k, opt in opts.items()}
    parallel.share(nets, opts, cfg)
    torch.manual_seed(1)
    with machine.compiled(True, asked=cfg.compile):
        logs = methods.train_step(nets, opts, lambda: carried(draw(), device), cfg, 0)
    methods.critic_requires_grad(nets, True)
    after = parallel.gather(trained(nets))
    return {k: after[k].detach().cpu() - v.cpu() for k, v in before.items()}, {k: v.cpu() for k, v in logs.items()}


def each(moves):
    """{network: its move}: a step of the fake score is often a hundred times as long as one of the generator."""
    names = {name.split(".")[0] for name in moves}
    joined = {name: torch.cat([v.flatten().double() for k, v in moves.items() if k.startswith(name)]) for name in names}
    return {name: move for name, move in joined.items() if move.any()}


def assert_alike(moves, wanted, limit, generator=None):
    """|a - b| <= limit |b| for the weights of each network; a limit of their own for generator and discriminator."""
    moves, wanted = each(moves), each(wanted)
    assert moves.keys() == wanted.keys() and "generator" in wanted
    for name, move in wanted.items():
        allowed = limit if name == "fake" else generator or limit
        assert (moves[name] - move).norm() <= allowed * move.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_cpus(case, config_of):
    """How each network moves agrees to 1e-3 of its length (generator 1e-2), every loss to 1e-3.

    SANA's attention has corners (ReLU) and a division: roundings of 3e-7 in its layers move its generator by 7e-4.
    """
    cfg = config_of(case)
    there, logs = step_on(DEVICE, cfg)
    here, wanted = step_on(CPU, cfg)
    assert_alike(there, here, 1e-3, generator=1e-2)
    assert_close(logs, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["toy dmd2", "digits sid", "ddpmpp sid", "adm dmd2", "text dmd2, LoRA", "flow dmd2, LoRA"])
def test_networks_are_the_cpus(case, config_of):
    """Teacher's answer and features agree to 1e-4 of their size, input gradients too (SANA's to 3e-2, see above)."""
    cfg, found = config_of(case), []
    for device in (DEVICE, CPU):
        _, nets, _, draw = prepare.prepare(cfg, device)
        z = torch.randn(4, *draw.teacher.shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        sigma = torch.tensor([0.05, 0.5, 2.5, 12.0], device=device)
        cond = None if not draw.teacher.classes else torch.tensor([0, 3, -1, 9], device=device)
        answer, features = nets.real(z, sigma, cond), nets.fake.features(z, sigma, cond)
        gradient, = torch.autograd.grad(answer.square().sum(), z)
        found.append([v.detach().cpu() for v in (answer, features, gradient)])
    limits = 1e-4, 1e-4, 3e-2 if "flow" in case else 1e-4
    for there, here, limit in zip(*found, limits):
        assert ((there - here).norm() / here.norm()).item() < limit


@pytest.mark.parametrize("case", ["toy sid", "digits sid", "digits dmd2", "ddpmpp sid", "adm dmd2", "text sid"])
def test_bfloat16_moves_the_same_way(case, config_of):
    """Cosine of each network's moves in bfloat16 and float32 over .97, lengths within 10 percent."""
    low, high = (each(step_on(DEVICE, config_of(case, bf16=bf16))[0]) for bf16 in (True, False))
    for name, move in high.items():
        assert torch.cosine_similarity(low[name], move, 0) > 0.97 and abs(low[name].norm() / move.norm() - 1) < 0.1


@pytest.mark.parametrize("case, change, limit, generator", [
    ("ddpmpp sid", dict(checkpointing=True), 1e-5, 1e-3), ("text dmd2, LoRA", dict(checkpointing=True), 1e-5, 1e-3),
    ("digits dmd2", dict(offload_teacher=True), 0, 0)])
def test_options_change_nothing(case, change, limit, generator, config_of):
    """Recomputed activations to rounding, a visiting teacher to the bit."""
    assert_alike(step_on(DEVICE, config_of(case, **change))[0], step_on(DEVICE, config_of(case))[0], limit, generator)


@on_a_gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("change", [{}, dict(bf16=True, checkpointing=True)], ids=["float32", "bfloat16, recomputed"])
def test_a_step_never_waits(case, change, config_of):
    """torch raises where the CPU waits for the GPU."""
    if change and not case.startswith(("text", "flow", "ddpmpp")):
        change = dict(bf16=True)
    cfg = config_of(case, clip=10.0, **change)
    _, nets, opts, draw = prepare.prepare(cfg, DEVICE)
    methods.train_step(nets, opts, draw, cfg, 0)                  # tables go to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        methods.train_step(nets, opts, draw, cfg, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("case", ["digits dmd2, GAN, two steps", "ddpmpp sid"])
def test_memory_does_not_grow(case, config_of):
    """Bytes allocated after 10 and after 200 steps are equal."""
    cfg, seen = config_of(case, steps=300), []
    _, nets, opts, draw = prepare.prepare(cfg, DEVICE)
    gc.collect()                                                  # what other tests left
    for step in range(201):
        methods.train_step(nets, opts, draw, cfg, step)
        if step in (10, 200):
            seen.append(torch.cuda.memory_allocated())
    assert seen[0] == seen[1]


def weights_of(argv, out):
    train.main([*argv, "--out", str(out)])
    return load_tensors(out / "generator.safetensors")


RUN = ["--method", "sid", "--device", str(DEVICE), "--teacher_steps", "20", "--batch", "16", "--steps", "12", "--save_every", "4"]


@pytest.mark.parametrize("preset, more", [("toy", []), ("digits", []), ("digits", ["--method", "dmd2"])],
                         ids=["toy sid", "digits sid", "digits dmd2"])
def test_a_run_is_repeated_and_resumed_to_the_bit(preset, more, tmp_path, quick):
    """The same seed twice; and once more, killed after its first checkpoint."""
    argv = ["--preset", preset, *RUN, *more]
    whole, again = (weights_of(argv, tmp_path / name) for name in ("whole", "again"))
    said = tmp_path / "cut.txt"
    assert launch(1, *argv, "--out", str(tmp_path / "cut"), dies=True, output=said) == [-9], said.read_text()
    train.main(["--resume", "--out", str(tmp_path / "cut")])
    for other in (again, load_tensors(tmp_path / "cut" / "generator.safetensors")):
        assert all(torch.equal(v, other[k]) for k, v in whole.items())


def test_samples_are_the_cpus(tmp_path, quick):
    """Of one run's weights, to 1e-4 of their size."""
    weights_of(["--preset", "digits", *RUN, "--no-bf16", "--no-tf32"], tmp_path / "run")
    there, here = (sample.sample(tmp_path / "run", 20, device=device) for device in (DEVICE, CPU))
    assert ((there - here).norm() / here.norm()).item() < 1e-4


def test_eight_bit_moments_move_alike(config_of):
    """Eight steps with bitsandbytes' AdamW and with torch's: cosine of the way over .9.  Below 4,096 weights it keeps 32 bits."""
    ways = []
    for small in (True, False):
        cfg = config_of("digits dmd2", adam8bit=small)
        _, nets, opts, draw = prepare.prepare(cfg, DEVICE)
        before = {k: p.detach().clone() for k, p in trained(nets).items()}
        torch.manual_seed(1)
        for step in range(8):
            methods.train_step(nets, opts, lambda: carried(draw(), DEVICE), cfg, step)
        kinds = {v.dtype for state in opts["generator"].state.values() for v in state.values() if torch.is_tensor(v)}
        assert (torch.uint8 in kinds) == small
        methods.critic_requires_grad(nets, True)
        ways.append(each({k: p.detach() - before[k] for k, p in trained(nets).items() if k in before}))
    assert ways[1].keys() == {"generator", "fake", "discriminator"}
    for name, way in ways[1].items():
        assert torch.cosine_similarity(ways[0][name], way, 0) > 0.9


def test_an_exported_student_samples_as_ours(tmp_path, quick):
    """On this device and on the CPU, to 1e-3 of the latents' size."""
    from diffusers import DiffusionPipeline

    folder = stable_diffusion(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    train.main(["--preset", "sd15", "--method", "dmd2", "--teacher", folder, "--prompts", str(tmp_path / "prompts.txt"),
                "--device", str(DEVICE), "--steps", "1", "--batch", "1", "--critic_steps", "1", "--no-bf16", "--no-half_frozen",
                "--no-tf32", "--out", str(tmp_path / "run")])
    export(str(tmp_path / "run"), str(tmp_path / "new"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "new").to(DEVICE)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    how = dict(num_inference_steps=1, guidance_scale=0, output_type="latent")
    theirs = pipe("a red cube", latents=z, **how).images
    assert_close(pipe.to(CPU)("a red cube", latents=z.to(CPU), **how).images, theirs.to(CPU), rtol=1e-3, atol=1e-3)

    cfg, teacher, generator = load_run(tmp_path / "run", DEVICE)
    ours = generator(z[None], find_prompts(cfg, teacher, DEVICE)[torch.tensor([0])].to(DEVICE))
    assert ((theirs - ours).norm() / ours.norm()).item() < 1e-3


@pytest.mark.parametrize("case", ["toy dmd2", "digits dmd2, GAN, two steps", "ddpmpp sid", "flow dmd2, LoRA"])
@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=sharded)], ids=["DDP", "FSDP2"])
def test_one_process_shares_with_itself(shard, case, config_of):
    """A step of a group of one, over NCCL: the plain step to 1e-4 of its length (FSDP2 keeps weights in another order)."""
    alone = step_on(DEVICE, config_of(case))[0]
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        moved = step_on(DEVICE, config_of(case, shard=shard))[0]
    finally:
        parallel.close()
    assert_alike(moved, alone, 1e-4, generator=1e-3)


@two_gpus
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["DDP", "FSDP2"])
def test_two_gpus_are_one_with_the_joint_batch(shard, tmp_path):
    """After six updates at small rates the weights differ by less than 10 percent of the way they went.

    Kernels for half a batch add up in another order, and Adam makes steps of gradients that are rounding errors.
    """
    argv = ["--preset", "digits", *RUN, "--no-bf16", "--no-tf32", "--lr_generator", "5e-4", "--lr_critic", "5e-4", "--steps", "6"]
    for count, more in ((1, []), (2, shard)):
        assert launch(count, *argv, *more, "--out", str(tmp_path / str(count))) == [0] * count
    one, two = (load_tensors(tmp_path / str(count) / "generator.safetensors") for count in (1, 2))
    start = load_tensors(tmp_path / "1" / "teacher.safetensors")
    way = {k: v - start[k.removeprefix("net.")] for k, v in one.items()}
    apart = {k: two[k] - v for k, v in one.items()}
    assert sum(v.square().sum() for v in apart.values()) < 0.1**2 * sum(v.square().sum() for v in way.values())


@on_a_gpu
@pytest.mark.parametrize("case", ["digits sid", "ddpmpp dmd2", "digits dmd2", "epsilon dmd2"])
def test_compiled_is_eager(case, config_of):
    """To 1e-3 of the length of each network's move (generator 1e-2).  Last: compiling takes minutes."""
    assert_alike(*(step_on(DEVICE, config_of(case, compile=on))[0] for on in (True, False)), 1e-3, generator=1e-2)
