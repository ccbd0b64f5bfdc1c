"""EDM's networks and checkpoints: the numbers of the reference implementation, and files that are read but never run.

Without these a published teacher would be loaded slightly wrong and distilled faithfully, or somebody's .pkl would run.
Files in EDM's format are written here, by classes that only reduce the way EDM's do. Their module_src, and every hostile
file, would leave a marker file behind if anything in them were executed.
"""

import contextlib
import copy
import copyreg
import hashlib
import http.server
import io
import json
import math
import pickle
import random
import re
import struct
import sys
import threading
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from nano_dmd import train
from nano_dmd.teachers import edm_checkpoint
from nano_dmd.engine.files import UserError
from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.teachers.edm_networks import EDMBlock as Block, Resample, attend
from nano_dmd.teachers.edm_checkpoint import build_edm, edm_teacher, fetch_edm, read_edm_pickle
from nano_dmd.teachers.edm_networks import SongUNet, edm_network
from nano_dmd.engine.runs import load_run
from nano_dmd.noise import add_noise
from nano_dmd.sid_loss import sid_integrand
from nano_dmd.denoiser import EDM, edm_loss, heun
from nano_dmd.teacher import load_teacher
from nano_dmd.teachers.zoo import read_teacher, save_teacher

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORKS = ("ddpmpp_cond", "adm_cond", "ncsnpp_uncond")
LAYOUTS = json.loads((GOLDEN / "edm_checkpoint_layouts.json").read_text())
CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32; the largest differences met are 2e-6 (denoisers, samplers), 5e-6 (gradients)
TINY = dict(img_resolution=8, img_channels=1, label_dim=3, augment_dim=9, model_type="SongUNet", model_channels=8,
            channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.1)
NCSNPP = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
TINY_ADM = dict(TINY, model_type="DhariwalUNet", model_channels=64, augment_dim=0)


def sentence(function, *args, **kwargs):
    """The UserError that function(...) raises, as one line of printable text."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert str(error.value).isprintable()
    return str(error.value)


def randomised(net, seed=0):
    """The same network with every parameter drawn anew, so that no branch is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p[0].numel(), 8) ** 0.5)
    return net.eval()


def inputs(net, n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *net.shape, generator=generator, dtype=dtype), torch.linspace(-1.0, 1.0, n, dtype=dtype)


# ---- the numbers of the reference implementation ----------------------------------------------------------


@pytest.fixture(scope="module", params=NETWORKS)
def golden(request):
    """tensors, init_kwargs and the pair of denoisers of one reference network."""
    path = GOLDEN / f"edm_{request.param}.safetensors"
    with safe_open(path, "pt") as f:
        kwargs = json.loads(f.metadata()["config"])
    tensors = {name: t.float() for name, t in load_file(path).items()}
    real = build_edm(kwargs, {k.removeprefix("real."): v for k, v in tensors.items() if k.startswith("real.")})
    fake = copy.deepcopy(real)
    for p in fake.parameters():
        p.mul_(0.875)
    cond = tensors["labels_onehot"].argmax(1) if "labels_onehot" in tensors else None
    return types.SimpleNamespace(t=tensors, kwargs=kwargs, real=real, fake=fake, cond=cond)


def answers(g, x):
    """(d_real, d_fake) at the reference's noising of x."""
    xt = add_noise(x, g.t["sigma"], g.t["noise"])
    return g.real(xt, g.t["sigma"], g.cond), g.fake(xt, g.t["sigma"], g.cond)


def test_denoisers_and_dmd_gradient(golden):
    d_real, d_fake = answers(golden, golden.t["x"])
    assert_close(d_real, golden.t["denoised_real"], **CLOSE)
    assert_close(d_fake, golden.t["denoised_fake"], **CLOSE)
    assert_close(dmd_gradient(golden.t["x"], d_real, d_fake), golden.t["dmd_grad"], rtol=0, atol=3e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_through_both_networks(golden, alpha):
    """Value (a sum of 3072 terms, about 60: met 3e-5) and gradient with respect to x (met 4e-6)."""
    x = golden.t["x"].clone().requires_grad_()
    loss = sid_integrand(x, *answers(golden, x), alpha).sum()
    loss.backward()
    assert_close(loss.detach(), golden.t[f"sid_loss_sum_alpha{alpha}"][0], rtol=0, atol=1e-4)
    assert_close(x.grad, golden.t[f"sid_grad_alpha{alpha}"], rtol=0, atol=3e-5)


def test_fake_loss(golden):
    """EDM's weight and DMD2's are one and the same."""
    t = golden.t
    loss = edm_loss(golden.fake, t["x"], t["sigma"], t["noise"], golden.cond).mean()
    assert_close(loss, t["fake_loss_edm_weight_mean"][0], **CLOSE)
    assert_close(loss, t["fake_loss_karras_snr_weight_mean"][0], **CLOSE)


def test_heun(golden):
    cond = None if golden.cond is None else golden.cond[:2]
    assert_close(heun(golden.real, golden.t["latents"], cond), golden.t["heun18_real"], **CLOSE)
    x = heun(golden.real, golden.t["latents"], cond, steps=10, sigma_min=0.01, sigma_max=20.0)
    assert_close(x, golden.t["heun18_nfe35_check_steps10"], **CLOSE)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("recorded", [True, False])
def test_published_layouts(name, recorded):
    """Every name, order and shape of the published checkpoints, also when two arguments are left to their defaults."""
    layout = LAYOUTS[name]
    kwargs = {k: v for k, v in layout["init_kwargs"].items() if recorded or k not in ("num_blocks", "attn_resolutions")}
    with torch.device("meta"):
        net = edm_network(**kwargs)
    assert [("model." + k, list(v.shape)) for k, v in net.state_dict().items()] == list(layout["state_dict"].items())
    assert sum(p.numel() for p in net.parameters()) == layout["n_parameters"]
    assert (net.shape, net.classes) == ((3, kwargs["img_resolution"], kwargs["img_resolution"]), kwargs["label_dim"])


# ---- the networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [TINY, TINY | NCSNPP, TINY_ADM], ids=["ddpmpp", "ncsnpp", "adm"])
def test_features_are_what_the_decoder_starts_from(kwargs):
    net, seen = randomised(edm_network(**kwargs)), []
    next(iter(net.dec.values())).register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    x, c = inputs(net)
    features = net.features(x, c, torch.tensor([0, 1, 2]))
    assert not seen                                               # the encoder alone was run
    net(x, c, torch.tensor([0, 1, 2]))
    assert_close(features, seen[0], rtol=0, atol=0)
    assert features.shape == (3, 2 * kwargs["model_channels"], 4, 4)


@pytest.mark.parametrize("kwargs", [TINY, TINY_ADM], ids=["ddpmpp", "adm"])
def test_classes(kwargs):
    """None and -1 are the same, sample by sample; every class gives another answer; a class outside is an error."""
    net = randomised(edm_network(**kwargs))
    x, c = inputs(net, 1)
    answer = {k: net(x, c, None if k is None else torch.tensor([k])) for k in (None, -1, 0, 1, 2)}
    assert_close(answer[None], answer[-1], rtol=0, atol=0)
    assert min((answer[i] - answer[j]).abs().max() for i in (-1, 0, 1, 2) for j in (-1, 0, 1, 2) if i != j) > 1e-3
    mixed = net(x.expand(3, -1, -1, -1), c.expand(3), torch.tensor([2, -1, 0]))
    assert_close(mixed, torch.cat([answer[2], answer[-1], answer[0]]), **CLOSE)
    with pytest.raises(RuntimeError):
        net(x, c, torch.tensor([3]))


def test_attention_reads_interleaved_channels():
    """softmax(q k^T / sqrt(d)) v with q, k, v = channels 3c, 3c + 1, 3c + 2 of each head, by explicit loops."""
    qkv = torch.randn(2, 24, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.empty(2, 8, 6, dtype=torch.float64)
    for sample in range(2):
        for head in range(2):
            q, k, v = (qkv[sample, 12 * head + j : 12 * head + 12 : 3].flatten(1) for j in range(3))      # (4, 6) each
            expected[sample, 4 * head : 4 * head + 4] = v @ torch.softmax(q.T @ k / 2, 1).T
    assert_close(attend(qkv, 2).flatten(2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling(taps):
    """Both directions against the definition: filter by the outer product of the taps, keep or insert every second."""
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel, reach = torch.tensor(taps, dtype=torch.float64), len(taps) // 2 - 1
    kernel = (kernel.outer(kernel) / kernel.sum() ** 2).expand(3, 1, -1, -1)
    down = F.conv2d(F.pad(x, [reach] * 4), kernel, groups=3)[:, :, ::2, ::2]
    assert_close(Resample("down", taps).double()(x), down, rtol=0, atol=1e-12)
    spread = x.new_zeros(2, 3, 12, 16)
    spread[:, :, ::2, ::2] = x
    side = len(taps) - 1 - reach
    up = 4 * F.conv2d(F.pad(spread, [side, side - 1 + len(taps) % 2, side, side - 1 + len(taps) % 2]), kernel, groups=3)
    assert_close(Resample("up", taps).double()(x), up, rtol=0, atol=1e-12)


def test_ncsnpp_with_three_resolutions():
    """The residual path widens with the network (the reference has two resolutions only); every weight gets a gradient."""
    net = randomised(edm_network(**TINY | NCSNPP | {"channel_mult": [1, 2, 3]}))
    assert net.enc["4x4_aux_residual"].weight.shape == (8, 1, 3, 3) and net.enc["2x2_aux_residual"].weight.shape == (16, 8, 3, 3)
    x, c = inputs(net)
    net(x, c, torch.tensor([0, 1, -1])).square().sum().backward()
    still = {name for name, p in net.named_parameters() if not p.grad.abs().max() > 0}
    assert still == {"map_augment.weight"}                        # "not augmented": exactly 0, and not None, which DDP rejects


@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("kwargs", [TINY, TINY_ADM], ids=["ddpmpp", "adm"])
def test_checkpointing_changes_no_gradient(kwargs, training):
    net = randomised(edm_network(**kwargs)).double().train(training)
    x, c = inputs(net, dtype=torch.float64)
    blocks = [m for m in net.modules() if isinstance(m, Block)]
    grads, runs, counts = [], [], []
    for block in blocks:
        block.register_forward_pre_hook(lambda *args: runs.append(1))
    for net.checkpointing in (False, True):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        loss = net(leaf, c, torch.tensor([0, 1, -1])).square().mean()
        grads.append(torch.autograd.grad(loss, [leaf, *net.parameters()]))
        counts.append(len(runs))
    assert counts == [len(blocks), 3 * len(blocks)]               # the second time every block ran again
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kwargs", [TINY, TINY_ADM], ids=["ddpmpp", "adm"])
def test_dropout_in_training_only(kwargs):
    net = randomised(edm_network(**kwargs))
    x, c = inputs(net)
    assert torch.equal(net(x, c), net(x, c))
    net.train()
    assert (net(x, c) - net(x, c)).abs().max() > 1e-2


def test_bfloat16(golden):
    """F alone in bfloat16 (8 bits of mantissa): the answers, of std 0.37, move by 0.0018 in the mean, by 0.016 at most."""
    low = EDM(golden.real.net, bf16=True)
    xt = add_noise(golden.t["x"], golden.t["sigma"], golden.t["noise"])
    d = low(xt, golden.t["sigma"], golden.cond)
    error = (d - golden.t["denoised_real"]).abs()
    assert d.dtype == torch.float32 and 0 < error.max() < 0.03 and error.mean() < 0.004
    assert low.features(xt, golden.t["sigma"], golden.cond).dtype == torch.float32


def test_a_new_network_predicts_nothing():
    """Residual branches and output start at (almost) 0, so training starts from D = c_skip x; other weights are spread
    as they should be: Xavier's uniform bound for DDPM++, std 1 for ADM's classes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, adm = edm_network(**dict(TINY, model_channels=32)), edm_network(**TINY_ADM)
    x, c = inputs(net)
    assert 0 < net(x, c).abs().max() < 1e-3 and adm(x, c).abs().max() == 0
    block = net.enc["4x4_block0"]
    for weight, gain in ((block.conv0.weight, 1), (block.conv1.weight, 1e-5), (block.qkv.weight, 0.2**0.5)):
        bound = gain * math.sqrt(6 / (weight[0].numel() + weight[:, 0].numel()))
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert adm.map_label.weight.std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "UNet"}, "no network 'UNet'"),
    ({"label_dropout": 0.1}, "no argument 'label_dropout'"),
    ({"embedding_type": "random"}, "embedding_type = 'random'"),
    ({"decoder_type": "skip"}, "decoder_type = 'skip'"),
    ({"resample_filter": [1, 2, 1]}, "resample_filter = [1, 2, 1]"),
    ({"img_channels": "3"}, "img_channels = '3'"),
    ({"num_blocks": 10**9}, "num_blocks = 1000000000"),
    ({"channel_mult": 2}, "channel_mult = 2"),
    ({"attn_resolutions": [4, 8.0]}, "attn_resolutions = [4, 8.0]"),
    ({"channel_mult": [1] * 5}, "cannot halve img_resolution = 8"),
    ({"dropout": 1.0}, "dropout = 1.0"),
    ({"sigma_data": 0}, "sigma_data > 0"),
])
def test_arguments_that_do_not_fit(change, message):
    assert message in sentence(edm_network, **TINY | change)


def test_missing_arguments():
    assert "needs img_resolution" in sentence(edm_network, model_type="SongUNet", img_channels=3)
    assert "model_type must be SongUNet or DhariwalUNet" in sentence(edm_network, img_resolution=8, img_channels=3)
    with pytest.raises(ValueError, match="heads of 64"):
        edm_network(**dict(TINY_ADM, model_channels=24))


# ---- building from a state dict ---------------------------------------------------------------------------


def tiny_state(kwargs=TINY):
    net = randomised(edm_network(**kwargs))
    return net, {"model." + k: v for k, v in net.state_dict().items()}


def test_build_edm():
    """Frozen, float32, in eval mode, with weights of its own; the prefix may be missing; sigma_data is passed on."""
    net, state = tiny_state()
    state = {k: v.half() for k, v in state.items()}
    denoiser = build_edm(dict(TINY, sigma_data=0.7, use_fp16=True, sigma_min=0, sigma_max=float("inf")), state)
    assert isinstance(denoiser, EDM) and isinstance(denoiser.net, SongUNet) and denoiser.sigma_data == 0.7
    assert not denoiser.training and not any(p.requires_grad for p in denoiser.parameters())
    assert {p.dtype for p in denoiser.state_dict().values()} == {torch.float32}
    state = {k.removeprefix("model."): v.float() for k, v in state.items()}
    again = build_edm(TINY, state)
    x, c = inputs(net)
    assert torch.equal(denoiser.net(x, c), again.net(x, c))
    again.net.map_label.weight.zero_()
    assert state["map_label.weight"].abs().max() > 0


@pytest.mark.parametrize("name, tensor, message", [
    ("model.map_layer0.bias", None, "map_layer0.bias is missing"),
    ("model.extra", torch.zeros(2), "extra is not expected"),
    ("model.map_layer0.bias", torch.zeros(33), "map_layer0.bias is (33,) in the file and (32,) here"),
    ("model.map_layer0.bias", torch.zeros(32, dtype=torch.int64), "map_layer0.bias holds torch.int64 numbers"),
])
def test_build_edm_is_strict(name, tensor, message):
    state = dict(tiny_state()[1], **{name: tensor})
    assert message in sentence(build_edm, TINY, {k: v for k, v in state.items() if v is not None})


def test_build_edm_complains_about_arguments():
    assert "no argument 'depth'" in sentence(build_edm, dict(TINY, depth=3), {})
    assert "cannot be built with model_channels = 5" in sentence(build_edm, dict(TINY, model_channels=5), {})
    assert "heads of 64" in sentence(build_edm, dict(TINY_ADM, model_channels=24), {})
    assert "no EDM network can be built" in sentence(build_edm, {3: 4}, {})


# ---- files in EDM's format --------------------------------------------------------------------------------


class EasyDict(dict):
    pass


@contextlib.contextmanager
def edm_importable():
    """Modules of the names that EDM's pickles mention, for the time of writing one."""
    def _reconstruct_persistent_obj(meta):
        raise AssertionError("executed")

    fakes = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    persistence, util = fakes["torch_utils.persistence"], fakes["dnnlib.util"]
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = persistence.__name__, util.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, EasyDict
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fakes.items():
            patch.setitem(sys.modules, name, module)
        yield _reconstruct_persistent_obj


class Persistent:
    """Reduces as EDM's own classes do."""

    def __init__(self, class_name, state, **changes):
        self.meta = dict(type="class", version=6, module_src=Persistent.source, class_name=class_name, state=state) | changes

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class Exec:
    """Reduces to a call that leaves the marker."""

    def __reduce__(self):
        return exec, (Persistent.source,)


@pytest.fixture(autouse=True)
def marker(tmp_path):
    """A file that exists after the test if any of the test's code was executed; then the test fails."""
    path = tmp_path / "executed"
    Persistent.source = f"open({str(path)!r}, 'w').close()\n"
    yield path
    assert not path.exists()
    assert not {"torch_utils", "torch_utils.persistence", "dnnlib"} & set(sys.modules)


def module_state(modules=None, parameters=None, buffers=None, **extra):
    """The __dict__ of a torch module of 2022."""
    return dict(training=False, _parameters=OrderedDict(parameters or {}), _buffers=OrderedDict(buffers or {}),
                _non_persistent_buffers_set=set(), _backward_hooks=OrderedDict(), _forward_hooks=OrderedDict(),
                _modules=OrderedDict(modules or {}), **extra)


def persistent(module, class_name=None, **extra):
    """A module of ours as EDM would have pickled its own: records, but for ModuleDicts."""
    children = {k: m and persistent(m) for k, m in module._modules.items()}
    if isinstance(module, nn.ModuleDict):
        shell = nn.ModuleDict()
        shell.__dict__["_modules"] = OrderedDict(children)
        return shell
    extra.setdefault("_init_args", ())
    extra.setdefault("_init_kwargs", {"skip_scale": np.sqrt(0.5), "eps": 1e-6})
    return Persistent(class_name or type(module).__name__,
                      module_state(children, module._parameters, module._buffers, **extra))


def precond(net, kwargs, class_name="EDMPrecond"):
    state = module_state({"model": persistent(net)}, _init_args=(), _init_kwargs=kwargs, sigma_data=0.5, img_resolution=8)
    return Persistent(class_name, state)


def dump(obj, path, protocol=4):
    with edm_importable():
        path.write_bytes(pickle.dumps(obj, protocol))
    return path


def snapshot(ema):
    """What EDM's training loop writes: the averaged network and things we have no use for."""
    return dict(ema=ema, loss_fn=Persistent("EDMLoss", {"P_mean": np.float64(-1.2), "sigma_data": 0.5}),
                augment_pipe=Persistent("AugmentPipe", {"p": 0.12, "hz": torch.ones(3)}),
                dataset_kwargs=EasyDict(path="data.zip", use_labels=True, max_size=50000))


def test_round_trip(golden, tmp_path):
    """Written by EDM's mechanism, read without it: same arguments, names, order and bits, and the network's own answer."""
    net, kwargs = golden.real.net, dict(golden.kwargs, use_fp16=False, attn_resolutions=(8,))
    path = dump(snapshot(precond(net, kwargs)), tmp_path / "edm.pkl")
    with path.open("rb") as f:
        calls = f.read().count(b"module_src")
    assert calls == 1                                             # the writer memoises, as Python's does
    init_kwargs, state = read_edm_pickle(path)
    assert init_kwargs == dict(kwargs, attn_resolutions=[8])
    own = {"model." + k: v for k, v in net.state_dict().items()}
    assert list(state) == list(own)
    for name, t in state.items():
        assert t.dtype == torch.float32 and torch.equal(t, own[name]), name
    xt = add_noise(golden.t["x"], golden.t["sigma"], golden.t["noise"])
    again = build_edm(init_kwargs, state)(xt, golden.t["sigma"], golden.cond)
    assert torch.equal(again, golden.real(xt, golden.t["sigma"], golden.cond))


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_number_formats(tmp_path, protocol, dtype):
    net = randomised(edm_network(**TINY)).to(dtype)
    state = read_edm_pickle(dump(snapshot(precond(net, TINY)), tmp_path / "edm.pkl", protocol))[1]
    assert all(torch.equal(state["model." + k], v) and state["model." + k].dtype == dtype for k, v in net.state_dict().items())


def test_numpy_of_both_ages(tmp_path):
    """numpy 2 renamed the module of its scalars; EDM's files are older."""
    path = dump(snapshot(ema()), tmp_path / "edm.pkl")
    content, new, old = path.read_bytes(), b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    assert (new in content) != (old in content)
    for name in (new, old):
        path.write_bytes(content.replace(new, name).replace(old, name))
        assert list(read_edm_pickle(path)[1]) == ["w"]


@pytest.mark.parametrize("protocol", [2, 3])
def test_older_protocols_call_more_than_we_know(tmp_path, protocol):
    """EDM wrote protocol 4; before it an empty set is a call by name, and before 3 so are bytes."""
    message = {2: "mentions '_codecs.encode'", 3: "mentions 'builtins.set'"}[protocol]
    assert message in sentence(read_edm_pickle, dump(snapshot(ema()), tmp_path / "edm.pkl", protocol))


def test_buffers_that_are_not_saved_and_empty_slots(tmp_path):
    state = module_state({"none": None}, {"w": nn.Parameter(torch.arange(6.0).view(2, 3).T), "bias": None},
                         {"kept": torch.ones(1), "hidden": torch.ones(2), "scalar": torch.tensor(3.0)}, _init_kwargs={})
    state["_non_persistent_buffers_set"] = {"hidden"}
    _, tensors = read_edm_pickle(dump(dict(ema=Persistent("EDMPrecond", state)), tmp_path / "edm.pkl"))
    assert list(tensors) == ["w", "kept", "scalar"] and tensors["scalar"].shape == ()
    assert torch.equal(tensors["w"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))            # transposed in the file


def test_convert(tmp_path):
    """The folder is one that load_teacher's reader takes; nothing of the .pkl is needed again."""
    net, _ = tiny_state()
    path = dump(snapshot(precond(net, dict(TINY, use_fp16=False))), tmp_path / "edm.pkl")
    save_teacher(tmp_path / "teacher", *edm_teacher(path, "digits"))
    path.unlink()
    denoiser, recipe = read_teacher(tmp_path / "teacher", "cpu")
    assert recipe == dict(network="edm", args=dict(TINY, use_fp16=False), sigma_data=0.5, bf16=False, data="digits",
                          shape=[1, 8, 8], classes=3, seconds=0, cpu_seconds=0)
    x, c = inputs(net)
    assert torch.equal(denoiser.net(x, c, torch.tensor([0, 1, -1])), net(x, c, torch.tensor([0, 1, -1])))


def test_a_pkl_is_a_teacher(tmp_path, quick):
    """--teacher FILE.pkl: edm_teacher once into the cache, distilled, and the run stands alone afterwards."""
    net, _ = tiny_state()
    path = dump(snapshot(precond(net, dict(TINY, use_fp16=False))), tmp_path / "edm.pkl")
    train.main(["--preset", "cifar10", "--method", "sid", "--teacher", str(path), "--batch", "2", "--steps", "1", "--no-bf16",
                "--device", "cpu", "--out", str(tmp_path / "run")])
    x, c = inputs(net)
    assert torch.equal(load_teacher(str(path)).net.net(x, c, None), net(x, c, None))
    path.unlink()
    _, teacher, generator = load_run(tmp_path / "run")
    assert (teacher.shape, teacher.classes) == ((1, 8, 8), 3) and generator.sigmas == (2.5,)
    assert "no file" in sentence(load_teacher, str(path))


# ---- hostile and broken files -----------------------------------------------------------------------------


def ema(tensor=None, **changes):
    """The smallest network that is read: one tensor."""
    state = module_state(parameters={"w": nn.Parameter(torch.ones(4)) if tensor is None else tensor}, _init_args=(),
                         _init_kwargs={"img_resolution": 8})
    return Persistent("EDMPrecond", state | changes.pop("state", {}), **changes)


class Rebuilt:
    """A tensor whose notes are written by hand."""

    def __init__(self, offset=0, size=(4,), stride=(1,), blob=None):
        self.blob, self.rest = blob if blob is not None else legacy(torch.ones(4)), (offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Bytes(self.blob), *self.rest)


class Bytes:
    def __init__(self, blob):
        self.blob = blob

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.blob,)


def legacy(tensor):
    """The bytes of a storage as torch.storage writes them."""
    buffer = io.BytesIO()
    torch.save(torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True), buffer,
               _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def cyclic():
    state = module_state(_init_kwargs={})
    state["_modules"]["again"] = me = Persistent("EDMPrecond", state)
    return me


def deep(levels=30):
    note = ema()
    for _ in range(levels):
        note = Persistent("EDMPrecond", module_state({"a": note}, _init_kwargs={}))
    return note


def laughs():
    """2^60 references in 60 lists: whoever prints, copies or compares it never ends."""
    x = []
    for _ in range(60):
        x = [x, x]
    return x


class Pid(pickle.Pickler):
    def persistent_id(self, obj):
        return "numbers" if isinstance(obj, nn.Parameter) else None


def persistent_ids():
    buffer = io.BytesIO()
    with edm_importable():
        Pid(buffer, 4).dump(dict(ema=ema()))
    return buffer.getvalue()


SHARED = legacy(torch.ones(4))
EXECUTE = b"cbuiltins\nexec\n"                                    # the callable, on the stack


def source():
    return pickle.dumps(Persistent.source, 2)[2:-1]


HOSTILE = {  # name: (bytes or object to pickle, part of the message)
    "empty": (lambda: b"", "empty file"),
    "html": (lambda: b"<!DOCTYPE html><title>404</title>", "instruction 0x3c"),
    "text": (lambda: b"hello\n", "Memo value not found"),
    "zip": (lambda: b"PK\x03\x04" + bytes(100), "instruction PERSID"),
    "not a dict": (lambda: [1, 2], "no network 'ema'"),
    "no ema": (lambda: dict(G=1), "no network 'ema'"),
    "ema is no module": (lambda: dict(ema={"w": 1}), "ema is not a network"),
    "ema is a state dict": (lambda: dict(ema=OrderedDict(w=torch.ones(2))), "ema is not a network"),
    "VP preconditioning": (lambda: dict(ema=precond(tiny_state()[0], TINY, "VPPrecond")), "'VPPrecond'; only EDM's own"),
    "version 7": (lambda: dict(ema=ema(version=7)), "of version 7"),
    "endless version": (lambda: dict(ema=ema(version=laughs())), "of version a list"),
    "a function": (lambda: dict(ema=ema(type="func")), "'func' of version 6"),
    "no state": (lambda: dict(ema=Persistent("EDMPrecond", None)), "ema is not a network"),
    "no record": (lambda: dict(ema=ema(state=dict(_init_kwargs=None))), "does not say what its network was built with"),
    "positional record": (lambda: dict(ema=ema(state=dict(_init_args=(64,)))), "does not say what"),
    "endless arguments": (lambda: dict(ema=ema(state=dict(_init_kwargs={"a": laughs()}))), "'a' = a list"),
    "call in arguments": (lambda: dict(ema=ema(state=dict(_init_kwargs={"a": np.float64(1)}))), "'a' = a numpy"),
    "exec at the top": (lambda: Exec(), "mentions 'builtins.exec'"),
    "exec as ema": (lambda: dict(ema=Exec()), "mentions 'builtins.exec'"),
    "exec beside ema": (lambda: dict(ema=ema(), loss_fn=Exec()), "mentions 'builtins.exec'"),
    "exec as a weight": (lambda: dict(ema=ema(Exec())), "mentions 'builtins.exec'"),
    "exec among the numbers": (lambda: dict(ema=ema(Rebuilt(blob=pickle.dumps(Exec(), 2)))),
                               "numbers of w: .*exec"),
    "zip among the numbers": (lambda: dict(ema=ema(Rebuilt(blob=b"PK\x03\x04"))), "they are not in torch's old format"),
    "numbers cut": (lambda: dict(ema=ema(Rebuilt(blob=legacy(torch.ones(4))[:-1]))), "numbers of w: unexpected EOF"),
    "numbers that lie": (lambda: dict(ema=ema(Rebuilt(blob=SHARED[:-24] + struct.pack("<q", 2**40) + SHARED[-16:]))),
                         "numbers of w: .*wrong"),
    "whole numbers": (lambda: dict(ema=ema(torch.arange(3))), "numbers of w: they are 3 torch.int64"),
    "beyond its numbers": (lambda: dict(ema=ema(Rebuilt(offset=1))), "numbers of w: .*out of bounds"),
    "strides beyond": (lambda: dict(ema=ema(Rebuilt(size=(2, 2), stride=(2, 2)))), "numbers of w: setStorage"),
    "negative": (lambda: dict(ema=ema(Rebuilt(offset=-1))), "numbers of w: .*offset -1"),
    "expanded": (lambda: dict(ema=ema(Rebuilt(size=(4, 4, 4), stride=(0, 0, 0)))), r"shape \(4, 4, 4\)"),
    "a shape of text": (lambda: dict(ema=ema(Rebuilt(size="abcd"))), "numbers of w: "),
    "a shape of texts": (lambda: dict(ema=ema(Rebuilt(size=("a",)))), "numbers of w: "),
    "a weight that is none": (lambda: dict(ema=ema("text")), "w is not a tensor"),
    "shared numbers": (lambda: dict(ema=Persistent("EDMPrecond", module_state(
        parameters={"a": Rebuilt(blob=SHARED), "b": Rebuilt(blob=SHARED)}, _init_kwargs={}))),
        "numbers of b occurs more than once"),
    "cycle": (lambda: dict(ema=cyclic()), "again occurs more than once"),
    "deep": (lambda: dict(ema=deep()), "nested too deeply"),
    "escape codes": (lambda: dict(ema=ema(state=dict(_parameters={"\x1b[2J": torch.ones(1)}))), r"called '\\x1b\[2J'"),
    "persistent id": (persistent_ids, "instruction BINPERSID"),
    "instance": (lambda: b"(" + source() + b"ibuiltins\nexec\n.", "instruction INST"),
    "object": (lambda: b"(" + EXECUTE + source() + b"o.", "mentions 'builtins.exec'"),
    "dotted name": (lambda: b"\x80\x04\x8c\x05torch\x8c\x11os.system.strange\x93.", "mentions 'torch.os.system"),
    "extension": (lambda: b"\x80\x02\x82\xf0" + source() + b"\x85R.", "instruction EXT1"),
    "call of a text": (lambda: b"\x80\x02]" + source() + b"\x85R.", "'list' object is not callable"),
    "state for a dict": (lambda: b"\x80\x02}}b.", "gives a dict a state"),
    "items for a note": (lambda: b"\x80\x02cnumpy\ndtype\n)RK\x01K\x02s.", "fills a numpy.dtype"),
    "append to a text": (lambda: b"\x80\x02" + source() + b"K\x01a.", "no attribute 'append'"),
    "odd items": (lambda: b"\x80\x02}(K\x01u.", "zip"),
    "stack underflow": (lambda: b"\x80\x02\x86.", "index out of range"),
    "no mark": (lambda: b"\x80\x02t.", "pop from empty list"),
    "memo of 16 GB": (lambda: b"\x80\x02]r\xff\xff\xff\x7f.", "no network 'ema'"),
    "unknown memo": (lambda: b"\x80\x02h\x05.", "Memo value not found"),
    "text of 8 EB": (lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc", "EOFError"),
    "bytes of 1 TB": (lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc", "EOFError"),
    "frame of 8 EB": (lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"]", "EOFError"),
    "100,000 tuples as a key": (lambda: b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s.", "names as keys"),
    "100,000 lists": (lambda: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", "no network 'ema'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case, tmp_path):
    """One sentence that names the file and what is wrong with it; the marker fixture sees to the rest."""
    make, message = HOSTILE[case]
    content, path = make(), tmp_path / "hostile.pkl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        dump(content, path)
    found = sentence(read_edm_pickle, path)
    assert found.startswith(str(path))
    assert re.search(message, found), found


@pytest.mark.parametrize("case", ["exec at the top", "exec as a weight", "object", "extension"])
def test_the_hostile_files_are_hostile(case, tmp_path, marker, monkeypatch):
    """Python's own reader does execute them: the test above is not passed by harmless files."""
    monkeypatch.setitem(copyreg._extension_cache, 240, exec)
    path, content = tmp_path / "hostile.pkl", HOSTILE[case][0]()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        dump(content, path)
    with contextlib.suppress(Exception), edm_importable():
        pickle.loads(path.read_bytes())
    assert marker.exists()
    marker.unlink()
    assert "builtins.exec" in (found := sentence(read_edm_pickle, path)) or "EXT1" in found


def test_unreadable_paths(tmp_path):
    assert "No such file" in sentence(read_edm_pickle, tmp_path / "nowhere.pkl")
    assert "Is a directory" in sentence(read_edm_pickle, tmp_path)


def test_damaged_files(tmp_path):
    """Cut anywhere, or with random bytes changed: read, or refused in one sentence.  Seeded; 300 damages."""
    whole, path = dump(snapshot(ema()), tmp_path / "whole.pkl").read_bytes(), tmp_path / "damaged.pkl"
    rng, refused = random.Random(0), 0
    for i in range(300):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if i % 3 == 0 else whole)
        for _ in range(i % 3 * 2):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            read_edm_pickle(path)
            refused -= 1
        refused += 1
    assert refused > 150                                          # a changed weight or a spare text is nobody's business


# ---- the download -----------------------------------------------------------------------------------------


class Site(http.server.BaseHTTPRequestHandler):
    """Serves self.server.content, or part of it, and counts."""

    def do_GET(self):
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on loopback that has the small network of this file, and a cache of the test's own."""
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.content = dump(snapshot(precond(tiny_state()[0], TINY)), tmp_path / "edm.pkl").read_bytes()
    server.status, server.requests, server.sent = 200, 0, None
    monkeypatch.setitem(edm_checkpoint.PUBLISHED, "edm:tiny", f"http://127.0.0.1:{server.server_port}/edm-tiny.pkl")
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_once(site, tmp_path):
    path = fetch_edm("edm:tiny")
    assert path == tmp_path / "cache" / "edm-tiny.pkl" and path.read_bytes() == site.content
    assert read_edm_pickle(path)[0] == TINY
    assert fetch_edm("edm:tiny") == path and site.requests == 1
    remembered = json.loads((tmp_path / "cache" / "edm-tiny.pkl.json").read_text())
    assert remembered == {"bytes": len(site.content), "sha256": hashlib.sha256(site.content).hexdigest()}
    assert sorted(p.name for p in path.parent.iterdir()) == ["edm-tiny.pkl", "edm-tiny.pkl.json"]


def test_fetch_refuses_another_file(site, tmp_path):
    """Changed on disk, or other content behind the same address later."""
    path = fetch_edm("edm:tiny")
    path.write_bytes(site.content + b"x")
    assert "is not the file that edm-tiny.pkl.json remembers" in sentence(fetch_edm, "edm:tiny")
    path.unlink()
    site.content += b"y"
    assert "delete it, or both if you trust the new one" in sentence(fetch_edm, "edm:tiny")
    path.unlink()
    path.with_name("edm-tiny.pkl.json").unlink()
    assert fetch_edm("edm:tiny").read_bytes() == site.content


def test_fetch_takes_a_file_put_there_by_hand(site, tmp_path):
    path = tmp_path / "cache" / "edm-tiny.pkl"
    path.parent.mkdir()
    path.write_bytes(site.content)
    assert fetch_edm("edm:tiny") == path and site.requests == 0


@pytest.mark.parametrize("status, sent, content, message", [
    (404, None, None, "HTTP Error 404"),
    (200, 1000, None, "got only 1000 out of"),
    (200, None, b"<html>please log in</html>", "what came is not a pickle"),
    (200, None, b"", "what came is not a pickle"),
])
def test_fetch_failures(site, tmp_path, status, sent, content, message):
    """One sentence with the address and the way round it; nothing is left behind."""
    site.status, site.sent, site.content = status, sent, site.content if content is None else content
    found = sentence(fetch_edm, "edm:tiny")
    assert re.search(message, found) and edm_checkpoint.PUBLISHED["edm:tiny"] in found
    assert f"put the file at {tmp_path / 'cache' / 'edm-tiny.pkl'}" in found and "--teacher FILE.pkl" in found
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_without_network_or_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path))
    monkeypatch.setitem(edm_checkpoint.PUBLISHED, "edm:tiny", "http://127.0.0.1:1/edm-tiny.pkl")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "Connection refused" in sentence(fetch_edm, "edm:tiny")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "file"))
    assert "cannot write" in sentence(fetch_edm, "edm:tiny")
    assert "use one of edm:cifar10-uncond" in sentence(fetch_edm, "edm:cifar100")


def test_published_addresses():
    """As in EDM's own documentation; every one has its layout here."""
    for name in ("edm:cifar10-uncond", "edm:cifar10-cond", "edm:ffhq64", "edm:afhqv2-64", "edm:imagenet64"):
        base, file = edm_checkpoint.PUBLISHED[name].rsplit("/", 1)
        assert base == "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained" and file.removesuffix(".pkl") in LAYOUTS
