"""A seeded fuzzer: about 1,800 bad, odd and good inputs to the command lines and their files.

    python tests/fuzz.py [--seed 0] [--seconds 60] [--only KIND] [--list] [--case NAME]

Each input has to end in one "sentence" (a UserError, exit code 2), to work ("works"), or "either".
Faults: a traceback, a hang (10 s), a crash (a signal, a gigabyte of memory, foreign code that ran),
a bad input accepted, a good one refused.  Inputs run in forked processes, each in a folder of its
own; --case runs one alone and shows what it prints.  Exit code 1 if there was a fault.  Linux only.
"""

import argparse
import contextlib
import gc
import gzip
import io
import json
import math
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter, deque, namedtuple
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import toy.__main__ as race
from nano_dmd import compare, evaluate, plot, sample, train
from nano_dmd.engine import files, pictures, progress, runs
from nano_dmd.engine.config import Config, read_config, resolve
from nano_dmd.metrics import images as image_metrics
from nano_dmd.teacher import load_teacher
from nano_dmd.teachers import captions as captioning
from nano_dmd.teachers import data, hub
from nano_dmd.teachers import latents as encoding
from nano_dmd.teachers import prompts as prompting
from tutorials import grade

SENTENCE, EITHER, WORKS = "sentence", "either", "works"
FAULTS = ("traceback", "hang", "crash", "accepted", "refused")
LIMIT, GRACE, MEMORY = 10, 15, 2**30               # s, s, bytes on top of what torch takes
BATCH, RECORD = 20, 2048                           # cases to a process; bytes it sends about each
FLAGS = ("--preset=toy --method=sid --device=cpu --teacher_steps=2 --steps=1 --batch=8 "
         "--out=o").split()
REGRESSION = ["--method=regression", "--pairs=8", "--pair_steps=2", "--no-control"]
LONG, DEEP, DIGITS = "A" * 5000, "[" * 100_000 + "]" * 100_000, "7" * 5000
HOUSE = ("nano_dmd", "engine", "teachers", "metrics", "toy", "tutorials", "assignments")
BASE, REACHED, ABSENT = [], [], set()              # base folder; runs begun; not in this code
Case = namedtuple("Case", "kind name run expect")


class Hang(BaseException):
    """Not an Exception, so that nothing under test can swallow it."""


# Ways to spoil files.  Cases are (name, function, expectation).

SPECIAL = {"folder": os.mkdir, "fifo": os.mkfifo, "/dev/zero": partial(os.symlink, "/dev/zero"),
           "dangling": partial(os.symlink, "nowhere"),
           "loop": lambda path: os.symlink(Path(path).name, path)}
SPECIALS = dict(zip(SPECIAL, SPECIAL))
TENSORS = {  # functions of a tensor
    "@int64": lambda t: t.long(), "@bool": lambda t: t > 0, "@complex": lambda t: t.float() + 0j,
    "@nan": lambda t: t * math.nan, "@inf": lambda t: t.float() + math.inf,
    "@1e38": lambda t: torch.full_like(t.float(), 1e38), "@flat": lambda t: t.reshape(1, -1),
    "@no rows": lambda t: t[:0] if t.ndim else t, "@float8": lambda t: t.to(torch.float8_e4m3fn)}
LOSSLESS = {"@float64": lambda t: t.double(), "@half": lambda t: t.half(),
            "@float": lambda t: t.float(),
            "@repeated": lambda t: t.reshape(-1)[:1].expand(t.numel()).reshape(t.shape)}
CONVERT = TENSORS | LOSSLESS | {
    "@99": lambda t: 0 * t + 99, "@one row": lambda t: t[:1], "@number": lambda t: t.sum(),
    "@below": lambda t: 0 * t.long() - 1, "@huge": lambda t: 0 * t.long() + 2**62,
    "@few": lambda t: t[: len(t) // 2], "@axes": lambda t: t[None]}
DROP, TOKENS = "@drop", {"@deep": DEEP, "@digits": DIGITS, "@1e400": "1e400"}
WRONG = {
    int: [2.5, "3", [], None, {}, "@1e400", "@digits", -1, math.nan, 2**70, DROP],
    float: ["x", "1", [], None, {}, "@digits", "@deep", [1.0], DROP],
    bool: ["yes", 7, [], None, 2.5], str: [5, [], {}, None, True, 2.5, ["a"], DROP],
    list: ["x", None, 5, {}, [], [1, 2, 3], ["a", "b"], DROP],
    dict: ["x", None, 5, [], {}, [1], DROP], torch.Tensor: ["x", None, [1.0], DROP, *TENSORS]}


def put(path, content):
    """Replace a file by bytes, text, one of SPECIAL, or what a function makes of the old bytes."""
    path = Path(path)
    content = content(path.read_bytes()) if callable(content) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if content in SPECIAL:
        SPECIAL[content](path)
    else:
        text = isinstance(content, str)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if text else content)


def change(obj, path, value):
    """obj with something else, or nothing, at a dotted path; last is the last key."""
    def key_of(obj, key):
        return list(obj)[-1] if key == "last" else int(key) if key.isdigit() else key

    *way, last = path.split(".")
    at = obj
    for key in way:
        at = at[key_of(at, key)]
    last = key_of(at, last)
    if value == DROP:
        del at[last]
    else:
        convert = CONVERT.get(value) if isinstance(value, str) else None
        at[last] = convert(at[last]) if convert else value
    return obj


def as_json(path, value, old):
    """A JSON file with one change, which may be a token that Python does not write."""
    text = json.dumps(change(json.loads(old), path, value))
    for name, token in TOKENS.items():
        text = text.replace(json.dumps(name), token)
    return text


def saved(obj, **how):
    torch.save(obj, buffer := io.BytesIO(), **how)
    return buffer.getvalue()


def as_state(path, value, old):
    return saved(change(torch.load(io.BytesIO(old), weights_only=True), path, value))


def as_tensors(name, old):
    """A .safetensors or .npy file with all numbers converted, or with other names."""
    if old[:6] == b"\x93NUMPY":
        table = torch.from_numpy(np.load(io.BytesIO(old)))
        np.save(buffer := io.BytesIO(), CONVERT[name](table).numpy())
        return buffer.getvalue()
    tensors = safetensors.torch.load(old)
    if name in CONVERT:
        tensors = {k: CONVERT[name](v).contiguous() for k, v in tensors.items()}
    else:
        tensors["nope"] = torch.zeros(1) if name == "extra" else tensors.pop(min(tensors))
    return safetensors.torch.save({} if name == "none" else tensors)


def zipped(files, how=zipfile.ZIP_STORED, zeros=0):
    """A zip of {name: content}, with or without an entry of many MB of zeros."""
    with zipfile.ZipFile(out := io.BytesIO(), "w", how, compresslevel=1) as f:
        for name, content in files.items():
            f.writestr(name, content)
        if zeros:
            with f.open(f"{name.split('/')[0]}/data/99999", "w") as entry:
                for _ in range(zeros):
                    entry.write(bytes(2**20))
    return out.getvalue()


def deflated(zeros, old):
    with zipfile.ZipFile(io.BytesIO(old)) as f:
        return zipped({name: f.read(name) for name in f.namelist()}, zipfile.ZIP_DEFLATED, zeros)


def directory(offset, value, old):
    """Another number in the first entry of a zip's directory."""
    i = old.index(b"PK\1\2") + offset
    return old[:i] + value + old[i + len(value):]


def flip(seed, old):
    """One bit is another one; every second time among the first 300 bytes."""
    rng = random.Random(seed)
    i = rng.randrange(rng.choice((len(old), min(300, len(old)))))
    return old[:i] + bytes([old[i] ^ 1 << rng.randrange(8)]) + old[i + 1:]


def cut(seed, old):
    return old[: random.Random(seed).randrange(len(old))]


def mutated(word, rng):
    """A character more, fewer or another."""
    i = rng.randrange(len(word) + 1)
    other = rng.choice(["", "(", ",", "-", "9", "t", "\0", "e"])
    return word[:i] + other + word[i + rng.choice((0, 1)):]


def whole(rng, good=b'{"a": 1}'):
    """(name, content, expectation) of a JSON file that as a whole is not what it should be."""
    broken = {"empty": b"", "cut": good[:-1], "list": b"[]", "number": b"5", "null": b"null",
              "text": b'"x"', "nan": b"NaN", "deep list": DEEP, "deep dict": '{"a":' * 100_000,
              "digits": DIGITS, "digits inside": '{"a": %s}' % DIGITS, "latin-1": good + b"\xe9",
              "utf-16": b"\xff\xfe" + good, "noise": rng.randbytes(200), **SPECIALS}
    rows = [(*item, SENTENCE) for item in broken.items()]
    return [*rows, ("BOM", b"\xef\xbb\xbf" + good, EITHER)]


def changes(rng, wrong, odd, n):
    """(path, value, expectation) of {path: values, or a type: n values of other types}.

    What odd has is not wrong.
    """
    for path, values in wrong.items():
        values = values if isinstance(values, list) else rng.sample(WRONG[values], n)
        yield from [(path, value, SENTENCE) for value in values if value not in odd.get(path, [])]
    yield from [(path, value, EITHER) for path, values in odd.items() for value in values]


def show(value):
    text = ascii(value)
    return text if len(text) < 40 else f"{text[:24]}...{len(text)}"


def train_with(*flags):
    train.main([*FLAGS, *flags])


USES = {  # what a run folder is good for
    "resume": lambda run: train.main(["--resume", f"--out={run}"]), "read": read_config,
    "load": runs.load_run, "teacher": lambda run: load_teacher(str(run), show=False),
    "init": lambda run: train_with(f"--init={run}"),
    "distil": lambda run: train_with(f"--teacher={run}"),
    "sample": lambda run: sample.main([str(run), "--n=2", "--device=cpu", "--out=x.npy"])}


def fresh(name):
    """A copy of a base folder here, as hard links: put() leaves the original."""
    return shutil.copytree(BASE[0] / name, name, copy_function=os.link)


def spoilt(run, file, name, content, expect, use):
    """A case: a file of a run folder is changed, then the folder is used."""
    return f"{run}/{file} {name} {use}", lambda: (
        put(f"{fresh(run)}/{file}", content), USES[use](Path(run))), expect


# 1. The flags of training.

NO_INT = ["", DIGITS, str(2**63), str(2**64), str(-2**62), "\0", "1\0", "\udcff", "\u00bd",
          *" |nan|1.5|1e3|0x10|-1|True|--1|1,0".split("|")]
NO_FLOAT = ["", "\0", "1\0", "\udcff",
            *" |nan|inf|-inf|1e309|0x1p3|1.5.2|1e|1e300|1e19|-1e300|--1|None|1j|1,0".split("|")]
ODD_INT = ["1_0", "\u0661\u0660", " 5", "+5", "5\n", "007"]
ODD_FLOAT = ["0", "0.5", "1", "1e18", "1e-320", "1_0.5", "\u0661.\u0665", " 5", "-0"]
POSITIVE = ("steps batch accumulate critic_steps noisings log_every sample_every save_every pairs "
            "pair_steps eval_images").split()
SLOW = ["compile", "adam8bit"]
LOOPS, LORA = ["steps", "critic_steps", "teacher_steps"], ["lora_generator", "lora_critic"]
TOO_MUCH = [*LORA, "batch", "accumulate", "pairs", "pair_steps", "noisings", "threads"]
CONTEXT = dict.fromkeys(["pairs", "pair_steps", "pair_sigma", "w_reg"], REGRESSION) | {
    "w_gan": ["--method=dmd2", "--w_disc=1"], "w_disc": ["--method=dmd2", "--w_gan=1"]}
NASTY = [LONG, "A/" * 3000, "a\0b", "/dev/zero", "/dev/null", "plain", "fifo", "loop", "loop/x",
         "\U0001f600" * 70, "\udcff\udcfe", "a\nb", "dangling", ".", "~", "*", "b" * 255]
SPECS = [LONG, "", *("lognormal(0,0) lognormal(0,-1) lognormal(nan,1) lognormal(inf,1) "
                     "karras(0,1) karras(2,1) karras(1,inf) karras(1) karras(1,2,3) sd(0,1000) "
                     "sd(-1,5) sd(1.5,2) sd(5,4) normal(0,1) lognormal(0,1 sd(0,1)x").split()]
ODD_SPECS = ["lognormal(0,1e300)", "lognormal(1e300,1)", "karras(1,1e300)", " karras( 1 , 2 ) "]
SIGMAS = ["", DIGITS, "\0", "t" + DIGITS, *(", 1, 1,1 1,2 0 -1 nan inf 1e309 1;2 t t1000 t-1 "
                                           "t9.5 2,1,0 1e300 t999,t999 2,,1").split()]
ODD_SIGMAS = ["1e-320", "t999", " 2 , 1 ", "1e10", ",".join(map(str, range(2000, 0, -1)))]
STRINGS = {  # beside NASTY: (sentence, either, works)
    "preset": (["", "toy-nope"], ["toy-sid"], ["toy"]), "method": (["", "SID"], ["dmd2"], ["sid"]),
    "reg_loss": (["", "L2"], [], ["l2"]), "log_to": (["x"], [], [""]),
    "init": (["empty"], [], [""]), "sigmas": (SIGMAS, ODD_SIGMAS, ["2,1"]),
    "device": (["", "gpu", "cuda:99", "cuda:-1", "mps:7", "cpu:x"], ["meta"], ["cpu"]),
    "teacher": (["", "toy:", "toy:" + LONG, "edm:", "plain.pkl", "fifo.pkl", "a/b"], [],
                ["toy:ring8"]),
    "data": (["toy:", "toy:" + LONG, "digits", "plain.zip", "empty"], ["toy:grid25"],
             ["toy:ring8"]),
    "dm_sigma": (SPECS[:9], ODD_SPECS, ["sd(0,999)"]), "gan_sigma": (SPECS[:5], [], ["sd(0,0)"]),
    "critic_sigma": (SPECS[9:], ODD_SPECS, ["karras(1,2)"])}
ARGV = {SENTENCE: [["--nope"], ["x"], ["--step=1"], ["--steps"], ["--steps", "--batch"], [""],
                   ["--resume"], ["--resume", "--out=plain"], ["@plain"], ["\udcff"], ["\0"]],
        EITHER: [["--"]], WORKS: [["--help"], ["--dry-run"], ["--steps=2", "--steps=1"]]}


def integers(name, rng):
    """(value, expectation) of a flag."""
    yield from [(v, SENTENCE) for v in [*rng.sample(NO_INT, 3), str(-1 - rng.getrandbits(300))]]
    yield rng.choice(ODD_INT), EITHER
    if name != "teacher_steps":                                   # 0 = the recipe's
        yield "0", SENTENCE if name in POSITIVE else WORKS
    yield "1", SENTENCE if name in [*LORA, "pair_steps", "eval_images"] else EITHER
    yield "2", SENTENCE if name in LORA else WORKS
    for huge in [2**17] * (name == "threads") + [rng.choice((2**40, 2**62))] * (name not in LOOPS):
        yield str(huge), SENTENCE if name in TOO_MUCH else EITHER


def floats(name, rng):
    yield from [(v, SENTENCE) for v in rng.sample(NO_FLOAT, 3)]
    yield from [(v, EITHER) for v in [rng.choice([*ODD_FLOAT, repr(rng.lognormvariate(0, 5))])]]
    yield "-1", EITHER if name in ("guidance", "fake_guidance", "alpha") else SENTENCE
    yield "5", SENTENCE if name in ("beta1", "beta2", "critic_dropout") else EITHER
    yield str(getattr(Config, name)), EITHER if name in ("w_gan", "w_disc") else WORKS


def strings(name, rng):
    if name == "out":
        yield from [(v, SENTENCE) for v in NASTY[:10] + ["plain/x", "/proc/x", "/dev/null/x"]]
        yield from [(v, EITHER) for v in NASTY[10:]] + [("", WORKS), ("deep/er", WORKS)]
        return
    bad, odd, good = STRINGS.get(name, ([], rng.sample(NASTY, 1), []))        # else: not looked at
    some = NASTY if name in ("data", "init", "teacher") else rng.sample(NASTY, 2) if bad else []
    for expect, values in (SENTENCE, bad + some), (EITHER, odd), (WORKS, good):
        yield from [(v, expect) for v in values]
    yield from [(mutated(word, rng), EITHER) for word in good * 2]


def flags(rng):
    argvs = [(argv, expect) for expect, some in ARGV.items() for argv in some]
    for f in fields(Config):
        kind, name, more = type(f.default), f.name, CONTEXT.get(f.name, [])
        if kind is bool:
            argvs += [([f"--{name}=yes"], SENTENCE), ([f"--no-{name}=0"], SENTENCE)]
            argvs += [([f"--{name}"], EITHER)] * (name not in SLOW) + [([f"--no-{name}"], WORKS)]
            continue
        values = {int: integers, float: floats, str: strings}[kind](name, rng)
        argvs += [([*more, f"--{name}={value}"], expect) for value, expect in values]
    for argv, expect in argvs:
        yield " ".join(map(show, argv)), partial(train_with, *argv), expect


# 2. config.json.

ODD = {int: [True, 3.0], bool: [0, 1], float: [True, 10**17], str: [LONG, "\0", "\ud800", ""]}


def config(rng):
    uses = [("toy", "read"), ("toy", "load"), ("toy", "sample"), ("half", "resume")]
    rows = whole(rng)
    for f in fields(Config):
        kind = type(f.default)
        odd = {f.name: rng.sample(ODD[kind], 1)} if f.name not in LOOPS else {}
        table = changes(rng, {f.name: rng.sample([v for v in WRONG[kind] if v != DROP], 2)}, odd, 0)
        rows += [(f"{p}={show(v)}", partial(as_json, p, v), expect) for p, v, expect in table]
    rows += [(f"no {f.name}", partial(as_json, f.name, DROP), EITHER)
             for f in rng.sample(fields(Config), 9) if f.name not in LOOPS]
    rows += [("extra", partial(as_json, "extra", 1), SENTENCE), ("same", lambda old: old, WORKS)]
    for name, content, expect in rows:
        run, use = rng.choice(uses[:3] if name.startswith(tuple(SLOW)) else uses)
        yield spoilt(run, "config.json", name, content, expect, use)


# 3. checkpoint.pt.

GROUP, MOMENT = "opts.generator.param_groups.0.", "opts.generator.state.0.exp_avg"
STATE = dict.fromkeys(["nets", "nets.generator", "nets.fake", "nets.ema", "opts", "opts.generator"],
                      dict) | dict.fromkeys(["seconds", "opts.generator.param_groups", "rng",
                                             GROUP + "betas", GROUP + "params"], list)
STATE |= {GROUP + "eps": float, GROUP + "weight_decay": float, "step": int} | dict.fromkeys(
    ["nets.generator.last", "nets.fake.last", "rng.0", "rng.2", MOMENT], torch.Tensor)
STATE["processes"] = int
BAD_STATE = {"step": [-5, 10**9], "seconds": [[math.nan] * 2], "processes": [0],
             MOMENT: [torch.zeros(3)], GROUP + "amsgrad": [True], GROUP + "maximize": [True],
             "config.seed": [7], "config": [None, {}, "x"]}
BAD_STATE |= {path: [DROP] for path in [*STATE][:-1] if path not in BAD_STATE}
ODD_STATE = {"nets.fake.last": [*LOSSLESS], "step": [True, 4], "extra": [1], "nets.real": [{}],
             "rng.0": ["@flat"], "rng.1": ["x"], "rng.2": ["@flat"],
             "processes": [10**9], "opts.generator.state": [{}],
             GROUP + "lr": ["x"]}
ZIPS = {"method 99": partial(directory, 10, b"\x63\0"), "encrypted": partial(directory, 8, b"\1"),
        "text": b"hello", "empty": b"", "nothing in it": b"PK\5\6" + bytes(18),
        "wrong sum": partial(directory, 16, b"abcd")}


class Payload:
    """Unpickled, it would leave a file."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def checkpoints(rng):
    table = [*changes(rng, STATE, ODD_STATE, 2), *changes(rng, BAD_STATE, {}, 0)]
    rows = [(f"{path} {show(value)}", partial(as_state, path, value), expect, use)
            for path, value, expect in table
            for use in ["resume"] + ["init"] * path.startswith(("nets.fake", "nets.generator"))]
    files = {f"is {show(v)}": saved(v) for v in ([], None, 5, torch.zeros(3), {}, "x")} | ZIPS
    files |= {"pickle": saved(Payload()), "plain pickle": pickle.dumps(Payload()), **SPECIALS,
              "old pickle": saved(Payload(), _use_new_zipfile_serialization=False),
              "bomb": partial(deflated, 200)}
    odd = {"deflated": partial(deflated, 0), "size": partial(directory, 24, b"\xff\xff\xff\x7f")}
    for i in range(10):
        files[f"cut {i}"], odd[f"bit {i}"] = partial(cut, rng.random()), partial(flip, rng.random())
    for expect, contents in (SENTENCE, files), (EITHER, odd), (WORKS, {"same": lambda old: old}):
        rows += [(*item, expect, rng.choice(["resume", "init"])) for item in contents.items()]
    return [spoilt("half", "checkpoint.pt", *row) for row in rows]


# 4. teacher.json, and the weights of teacher and generator.

RECIPE = {"args": dict, "shape": list, "classes": int, "sigma_data": float, "network": str,
          "seconds": float, "cpu_seconds": float}
BAD_RECIPE = {
    "args": [{"nope": 1}, {"dim": -1}, {"octaves": -5}, {"width": -1}, {"width": 2**62},
             {"depth": 10**5}],
    "shape": [[3], [2, 2], [-2], "22", ["@1e400"], [0], [2.5]], "classes": [-3, 1.9, 10**9],
    "sigma_data": [math.nan, 0, -1, "@1e400"], "network": ["x"]}
ODD_RECIPE = {"sigma_data": [1e-300], "data": [5], "classes": [10], "bf16": ["x"], "source": [{}]}
DIGITS_RECIPE = {"classes": [11, 5, 0], "args.classes": [-1, 2**40], "network": ["diffusers"],
                 "shape": [[1, 7, 7], [8, 8], [3, 8, 8], [1, 8], [1, 16, 4], [1, 10**9, 8]]}
HEADERS = {f"header of {n}": struct.pack("<Q", n) + b"{}" for n in (0, 1, 3, 2**40, 2**63)} | {
    "deep": struct.pack("<Q", 60_000) + b"[" * 60_000, "list": struct.pack("<Q", 2) + b"[]",
    "empty": b"", "no data": struct.pack("<Q", 80) + (
        b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(80))}


def weights(rng):
    tables = [("toy", changes(rng, RECIPE, ODD_RECIPE, 2)),
              ("toy", changes(rng, BAD_RECIPE, {}, 0)),
              ("numbers", changes(rng, DIGITS_RECIPE, {}, 0))]
    rows = [(run, "teacher.json", f"{path} {show(value)}", partial(as_json, path, value), expect)
            for run, table in tables for path, value, expect in table]
    rows += [("toy", "teacher.json", *row) for row in whole(rng)]
    for file in ("teacher.safetensors", "generator.safetensors"):
        files = [("same", lambda old: old, WORKS)]
        files += [(how, partial(as_tensors, how), EITHER if how in LOSSLESS else SENTENCE)
                  for how in [*TENSORS, *LOSSLESS, "extra", "renamed", "none"]]
        files += [(*item, SENTENCE) for item in (HEADERS | SPECIALS).items()]
        files += [(f"bit {i}", partial(flip, rng.random()), EITHER) for i in range(12)]
        files += [(f"cut {i}", partial(cut, rng.random()), SENTENCE) for i in range(4)]
        rows += [(rng.choice(["toy", "numbers"]), file, *row) for row in files]
    for run, file, *row in rows:
        uses = ["sample", "load"] + ["teacher", "distil"] * (not file.startswith("generator"))
        yield spoilt(run, file, *row, rng.choice(uses))


# 5. The cache.

def classify():
    digits = data.load_data("digits")
    image_metrics.digit_classifier(digits).features(digits.x[:4])


def prompted(path):
    prompting.read_prompts("random:tiny", str(path))[torch.tensor([0])]


def latents():
    found = encoding.Latents("random:tiny", str(BASE[0] / "pics"), (4, 8, 8), "cpu")
    found.sample(3, torch.Generator())


MAKERS = {"pairs": partial(train_with, *REGRESSION), "teacher": train_with,
          "pairs of digits": partial(train_with, "--preset=digits", *REGRESSION),
          "latents": latents, "classifier": classify,
          "text": lambda: prompted(BASE[0] / "prompts.txt"),
          "data": lambda: data.load_data(str(BASE[0] / "pics")).sample(9),
          "data of a zip": lambda: data.load_data(str(BASE[0] / "pics.zip")).sample(9)}


def spoil(name, suffix, pick, content):
    """Change one of the cache's files of a prefix and suffix (pick None: all), then use it."""
    folder = Path(os.environ["NANO_DMD_CACHE"])
    found = sorted(p for p in folder.rglob(f"*{suffix}")
                   if str(p.relative_to(folder)).startswith(name.split()[0]))
    for path in found if pick is None or not found else [found[pick % len(found)]]:
        put(path, content)
    if name not in ABSENT:
        MAKERS[name]()


def cache(rng):
    broken = {"empty": b"", "noise": rng.randbytes(500), "few": lambda old: old[: len(old) // 2],
              "a byte less": lambda old: old[:-1], "text": b"hello", **SPECIALS}
    for name in MAKERS:
        table = name.split()[0] in ("text", "data", "latents")
        suffix, names = (".npy", []) if table else (".safetensors", ["renamed", "extra", "none"])
        names += [how for how in CONVERT if how != "@float8"]
        yield f"{name} as it was", partial(spoil, name, suffix, 0, lambda old: old), WORKS
        some = [(how, partial(as_tensors, how)) for how in rng.sample(names, 11)]
        for how, content in rng.sample([*broken.items()], 3) + some:
            pick = rng.randrange(9) if table else None
            yield f"{name} {how} {pick}", partial(spoil, name, suffix, pick, content), EITHER
    for name, content, _ in rng.sample(whole(rng), 6):
        yield f"teacher.json {name}", partial(spoil, "teacher", ".json", None, content), EITHER


# 6. Logs and reports.

LINE = {"step": float, "x_mean": float, "spread": float, "mesm": list, "fake_loss": list,
        "grad": dict}
BAD_LINE = {"grad": [{"x": "y"}], "mesm": [["x"] * 5]}
ODD_LINE = {"by_sigma": [{}, {"x": [1.0]}, {"x": 3}, 3, None, [], "x", DROP],
            "by_sigma.last": [[None] * 6, DROP], "grad": [{}], "teacher": [3, [], DROP],
            "sid_loss": ["x", DROP], "step": [-1, "@1e400", 10**30],
            "x_mean": ["@1e400", None], "spread": [None],
            "mesm": [[1e30] * 5, [math.nan] * 5, [0] * 5, [-1] * 5], "x_std": [1e30, None]}
REPORT = {"rows": dict, "rows.sid": dict, "cpu_seconds": float, "seconds": float,
          "rows.sid.sw2": ["x", [], {}, "@deep", "@digits"]}
ODD_REPORT = {"rows.sid": [{}], "rows.teacher": [DROP, None, {}],
              "rows.teacher.sw2": ["x", None], "extra": [1],
              "rows.sid.sw2": [DROP, None, math.nan, 10**30]}         # None: it could not be told
FOUND = json.dumps(dict(rows={"teacher": {"sw2": 1.0, "NFE": 35}, "sid": {"sw2": 2.0, "NFE": 1}},
                        cpu_seconds=1.0, seconds=2.0))
LINES = {"blank": lambda old: old + b"\n", "crlf": lambda old: old.replace(b"\n", b"\r\n"),
         "cut": lambda old: old[:-30], "BOM": lambda old: b"\xef\xbb\xbf" + old}


def last_line(path, value, old):
    *before, line = old.decode().splitlines()
    return "\n".join([*before, as_json(path, value, line), ""])


def logged(run, content, draw=False):
    """A changed log is plotted (drawn, or everything but that), or its run is resumed."""
    if not draw:
        Figure.savefig = lambda *args, **more: None
    put(f"{fresh(run)}/log.jsonl", content)
    plot.main(["toy"]) if run == "toy" else USES["resume"](run)


def no_runs(main, argv):
    """A main() that compares, but starts no process."""
    def run(*args, **more):
        REACHED.append(args)
        return subprocess.CompletedProcess(args, 2, "", "error: x")

    subprocess.run = run
    main(argv)


def reported(content):
    """compare finds a run that is done; its report is another one."""
    wanted = dict(preset="toy", method="sid", control=False)
    put("cmp/sid/0/config.json", json.dumps(asdict(resolve(wanted))))
    put("cmp/sid/0/report.json", content)
    no_runs(compare.main, ["--preset=toy", "--seeds=1", "--out=cmp", "sid"])


def logs(rng):
    for path, value, expect in [*changes(rng, LINE, ODD_LINE, 4), *changes(rng, BAD_LINE, {}, 0)]:
        content, draw = partial(last_line, path, value), expect == EITHER and rng.random() < 0.3
        yield f"plot {path} {show(value)}", partial(logged, "toy", content, draw), expect
        if rng.random() < 0.3:
            yield f"resume {path} {show(value)}", partial(logged, "half", content), EITHER
    for name, content, expect in [*whole(rng), *((*item, EITHER) for item in LINES.items())]:
        yield f"plot {name}", partial(logged, "toy", content), expect
        yield f"resume {name}", partial(logged, "half", content), EITHER
        if not callable(content):
            expect = EITHER if content in SPECIAL else expect
            yield f"report {name}", partial(reported, content), expect
    for path, value, expect in [*changes(rng, REPORT, ODD_REPORT, 4), ("seconds", 1.0, WORKS)]:
        yield f"report {path} {show(value)}", partial(reported, as_json(path, value, FOUND)), expect


# 7. Images.

COLOURS = {"P": 3, "1": 1, "L": 9, "I;16": 999, "I": 70_000, "F": 0.5, "LA": (9, 9)}


def picture(mode="RGB", kind="PNG", side=8, width=None):
    colour = COLOURS.get(mode, (9, 80, 200, 128)[: len(mode)])
    Image.new(mode, (width or side, side), colour).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def declared(width, height):
    """A small PNG that says that it is a large one."""
    head = b"IHDR" + struct.pack(">II", width, height) + picture()[24:29]
    return picture()[:12] + head + struct.pack(">I", zlib.crc32(head)) + picture()[33:]


GOOD = {"a.png": picture(), "b.png": picture()}
PICTURES = {
    WORKS: {"good": picture(), "jpeg": picture(kind="JPEG"), "grey": picture("L"),
            "1 bit": picture("1"), "rgba": picture("RGBA"), "palette": picture("P"),
            "cmyk": picture("CMYK", "JPEG")},
    EITHER: {"16 bit": picture("I;16"), "gif": picture("P", "GIF"), "tiff": picture("F", "TIFF"),
             "int": picture("I", "TIFF"), "longer": picture() + b"x" * 99,
             "grey alpha": picture("LA")},
    SENTENCE: {"empty": b"", "text": b"hello", "cut": picture()[:40], "svg": b"<svg/>",
               "60000x60000": declared(60_000, 60_000), "12000x12000": declared(12_000, 12_000),
               "0x0": declared(0, 0), "2^31": declared(2**31 - 1, 1)}}
SHAPES = {"wide": picture(width=9), "large": picture(side=9), "low": picture(side=1, width=900)}
TREES = {SENTENCE: [[], ["a.txt"]], WORKS: [["a/a.png", "b/b.png"], ["A.PNG", "B.JPeG"]],
         EITHER: [["a.png"], ["a\udcff.png"], ["a/b/c.png"], [".a.png", "b.png"], ["a\nb.png"],
                  ["__MACOSX/a.png", "a.png"], ["a/a.png", "b.png"], [".x/a.png", "a.png"]]}
LABELS = {SENTENCE: [[["a.png", v], ["b.png", 0]] for v in (
    2**70, 2**62, -1, 1.5, "x", None, [0], "@digits", "@deep", math.nan)] + [
        [["a.png", 0]], [["x.png", 0], ["y.png", 1]], 5, "ab", [1, 2], [["a.png"]]],
    EITHER: [[["a.png", 10**6], ["b.png", 0]], {"a.png": 0, "b.png": 1}, [], None],
    WORKS: [[["a.png", 1], ["b.png", 0]]]}


def folder_of(files):
    """A folder of files {name: content} as a data set."""
    os.mkdir("set")
    for file, content in files.items():
        put(os.path.join("set", file), content)
    data.load_data("set").sample(3)


def zip_of(files, content=lambda old: old):
    put("set.zip", zipped(files))
    put("set.zip", content)
    data.load_data("set.zip").sample(3)


def square(content):
    put("x.png", content)
    data.middle_square("x.png", 8)


def images(rng):
    for expect, made in PICTURES.items():
        for name, content in made.items():
            yield f"{name} in folder", partial(folder_of, GOOD | {"b.png": content}), expect
            yield f"{name} in zip", partial(zip_of, {"a.png": content}), expect
            yield f"{name} square", partial(square, content), expect
    for name, content in SHAPES.items():
        yield f"{name} in folder", partial(folder_of, GOOD | {"b.png": content}), SENTENCE
        yield f"{name} square", partial(square, content), WORKS
    for kind in SPECIAL:
        yield f"{kind} among images", partial(folder_of, GOOD | {"b.png": kind}), EITHER
        yield f"{kind} among classes", partial(folder_of, {"a/a.png": picture(), "b": kind}), EITHER
        yield f"{kind} square", partial(square, kind), SENTENCE
        yield f"{kind} as zip", partial(zip_of, GOOD, kind), SENTENCE
    for expect, trees in TREES.items():
        for files in trees:
            contents = dict.fromkeys(files, picture())
            yield f"folder {show(files)}", partial(folder_of, contents), expect
    for expect, labels in LABELS.items():
        for value in labels:
            table = as_json("labels", value, "{}")
            yield f"labels {show(value)}", partial(zip_of, GOOD | {"dataset.json": table}), expect
    for name, content, expect in whole(rng):
        if content not in SPECIAL:
            yield f"dataset.json {name}", partial(zip_of, GOOD | {"dataset.json": content}), expect
    for name, content in ZIPS.items():
        yield f"zip {name}", partial(zip_of, GOOD, content), SENTENCE
    for i in range(8):
        yield f"zip bit {i}", partial(zip_of, GOOD, partial(flip, rng.random())), EITHER
        yield f"zip cut {i}", partial(zip_of, GOOD, partial(cut, rng.random())), SENTENCE


# 8. Prompts and captions.

TEXTS = {SENTENCE: [b"", b"\n \n\t\n", b"caf\xe9\n", b"\xff\xfea\0", *SPECIAL],
         EITHER: [bytes(50), b"a\0b\n", b"x" * 100_000, b'["a"]\n', b"a\xe2\x80\xa8b\x0cc",
                  b"\xef\xbb\xbf"],
         WORKS: [b"a\nb\n", b"\xef\xbb\xbfa\n", b"a\r\nb\r\n", b"a"]}
ROW = '{"file_name": "a.png", "text": "x"}'
ROWS = {SENTENCE: ["x", "[]", "5", "null", '"x"', "[1, 2]", "{}", "{", "\0", DEEP, DIGITS,
                   '{"file_name": "a.png"}', '{"text": "x"}', ROW.replace('"a.png"', "[]"),
                   ROW.replace("a.png", "z.png"), ROW.replace('"x"', "null"),
                   ROW.encode() + b"\xe9", ROW + ",", *SPECIAL],
        EITHER: [ROW.replace('"x"', "5"), ROW.replace('"x"', '["x"]'), ROW.replace("x", "\\ud800"),
                 ROW.replace("text", "prompt"), "\ufeff" + ROW, ROW + "\n\n"],
        WORKS: [ROW, ROW + "\r\n"]}


def captions(name, content):
    """The captions in a folder of one image; they have to be texts."""
    put("set/a.png", picture())
    put(f"set/{name}", content)
    found = captioning.captioned("set")[1]
    assert all(isinstance(c, str) for c in found), f"captions {found}"


def texts(rng):
    for all_expect, contents in TEXTS.items():
        for content in contents:
            expect = all_expect
            yield (f"prompts {show(content)}",
                   lambda content=content: (put("p.txt", content), prompted("p.txt")), expect)
            expect = EITHER if isinstance(content, bytes) and not content.strip() else expect
            yield f"caption {show(content)}", partial(captions, "a.txt", content), expect
    for name in ["", "\0", "nowhere", LONG, "A/" * 3000, "\udcff", "."]:
        yield f"prompts at {show(name)}", partial(prompted, name), SENTENCE
        yield f"captions at {show(name)}", partial(captioning.captioned, name), SENTENCE
    for expect, rows in [*ROWS.items(), (EITHER, [mutated(ROW, rng) for _ in range(15)])]:
        for row in rows:
            yield f"jsonl {show(row)}", partial(captions, "metadata.jsonl", row), expect


def shard(*members):
    """A .tar of (name, content)."""
    with tarfile.open(fileobj=(found := io.BytesIO()), mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return found.getvalue()


def shards(rng):
    def read(content):
        put("set/a.tar", content)
        images, found = captioning.captioned("set")
        assert len(images) == len(found) and all(isinstance(c, str) for c in found)
        [image.read() for image in images]

    good = shard(("a.png", picture()), ("a.txt", b"fog"), ("b/c.png", picture()), ("b/c.json", b'{"text": "x"}'))
    yield "shard", partial(read, good), WORKS
    yield "shard, compressed", partial(read, gzip.compress(good)), SENTENCE
    for member in (("a.txt", b"\xff"), ("a.json", b"{"), ("a.json", b"[]"), ("a.json", b'{"text": 3}'), ("../a.txt", b"x"),
                   ("a.png.txt", b"x"), ("a", b"x"), ("/etc/passwd", b"x")):
        yield f"shard {show(member)}", partial(read, shard(("a.png", picture()), member)), SENTENCE
    for content in (b"", b"x", bytes(10240), good[:100], good[:700], DEEP.encode()):
        yield f"shard {show(content)}", partial(read, content), SENTENCE
    for _ in range(20):
        i = rng.randrange(len(good))
        yield f"shard, byte {i}", partial(read, good[:i] + rng.randbytes(rng.choice((0, 1, 8))) + good[i + 1 :]), EITHER


# 9. The other command lines.

COUNTS = ["", "x", "nan", "1.5", "-1", "0", "0x10", DIGITS, "\udcff", "\0"]
FOLDERS = ["nowhere", "", "plain", "loop", "fifo", "/dev/zero", LONG, "A/" * 3000, "\0", "\udcff",
           "empty"]
BAD_MORE = ("--help|-h|--method dmd|--method=dmd|--seed 4|--preset digits|--out x|--resume|"
            "--dry-run|'|\"|--nope|--steps|--steps x|--steps 0|dmd|--|\0|\\|--seeds 3").split("|")
BAD_FLAGS = ("\"|--batch '|--method sid|--teacher digits|--seed 4|--preset digits|--out x|"
             "--help|--nope|--steps x|x|--batch 0|\0|--resume|\\").split("|")
BAD_OUT = ["plain/x", LONG, "a\0b", "loop/x", "/proc/x", "/dev/null/x"]


def each(names, values, end=""):
    return [f"--{name}={v}{end}" for name in names.split() for v in values]


ARGVS = {  # program, expectation: [(arguments before, versions of the last one)]
    ("sample", SENTENCE): [
        ([], FOLDERS), (["toy", "--out=x.npy"], each("n", [*COUNTS, 2**40, 2**63, 2**64])),
        (["toy"], each("class", [0, -1, "x", 2**70]) + each("seed", ["x", 2**64, -2**64, 2**70])),
        (["toy"], each("device", ["", "cuda:99"]) + each("prompt", ["", "x"]) + ["toy"]),
        (["toy", "--n=2"], each("out", BAD_OUT, ".npy") + each("out", ["", "x", "x.jpg", ".png"]))],
    ("sample", EITHER): [(["toy", "--n=2"], ["--out=\udcff.npy", "--out=x\n.npy"]),
                         (["toy", "--out=x.npy"], each("seed", [-2**63, -1, 2**63]) + ["--n=1_0"])],
    ("sample", WORKS): [([], ["--help"]),
                        (["toy", "--n=1"], ["--out=d/e.npy", "--out=x.png", "--seed=7"])],
    ("evaluate", SENTENCE): [
        ([], FOLDERS), (["toy"], each("n draws repeats batch", COUNTS)),
        (["toy"], each("metric", ["nope", ",", "nfe", "fid", "fid,", "\0", "\udcff", LONG])),
        (["toy"], ["--n=1"])],
    ("evaluate", EITHER): [(["toy"], ["--metric=", "--reference=x", f"--reference={LONG}"])],
    ("evaluate", WORKS): [([], ["--help"]), (["toy"], ["--metric=NFE", "--n=2", "--draws=2"])],
    ("plot", SENTENCE): [([], FOLDERS), (["toy"], FOLDERS[:4]), (["toy"] * 5, ["toy"]),
                         (["toy"], each("out", BAD_OUT, ".png") + ["--out=x.xyz", "--out=empty"])],
    ("plot", WORKS): [([], ["--help"]), (["toy"], ["--out=x.pdf", "--out=d/x.png"])],
    ("compare", SENTENCE): [
        ([], [f"sid {more}" for more in BAD_MORE] + ["", " ", "nope", "--help x"]),
        (["sid"], each("seeds jobs", COUNTS) + each("first_seed preset", ["-1", "x", ""]))],
    ("compare", EITHER): [
        (["sid"], each("out", BAD_OUT) + ["sid", f"--seeds={2**40}", f"--first_seed={2**63}"]),
        ([], ["sid\n--steps 3", "sid --teacher \udcff", "sid " + "--steps 3 " * 500])],
    ("compare", WORKS): [([], ["--help", "sid"]), (["sid --steps 3"], ["sid --steps 4"])],
    ("toy", SENTENCE): [
        (["--methods=dmd2"], each("flags", BAD_FLAGS)), ([], each("seeds jobs", COUNTS)),
        ([], each("methods", ["", ",", "nope", "sid,", "sid dmd", "sid --seed 4", "\0"]) + ["x"]),
        ([], each("target", ["", "nope", "ring8 --seed 4", "\0", LONG])),
        ([], each("steps", ["-1", "x", 2**63])),
        ([], each("sigma", ["", "x", "0", "nan", "1,", "1e309"]))],
    ("toy", EITHER): [([], ["--methods=sid,sid"])],
    ("toy", WORKS): [([], ["--help", "--methods=sid", "--flags=--batch 64"])],
    ("grade", SENTENCE): [
        ([], FOLDERS), (["sub"], each("assignments", ["nope", "a1,nope", "\0", "a1 a2"])),
        (["sub"], each("seed", ["x", "1.5", "", 2**70])),
        (["sub", "--assignments=a2"], ["--out=plain/x", "--out=empty"])],
    ("grade", EITHER): [(["sub", "--assignments=a2,a2"], ["--out=", "--out=r.json"])],
    ("grade", WORKS): [([], ["--help"]), (["sub"], ["--seed=3"])]}


def program(name, argv):
    """Run one, with a finished run in toy and a submission in sub."""
    fresh("toy")
    put("sub/a1.py", "def nothing():\n    pass\n")
    if name == "compare":
        no_runs(compare.main, ["--preset=toy", "--out=cmp", *argv])
    elif name == "toy":
        no_runs(race.main, ["--out=race", "--seeds=1", *argv])
    else:
        {"sample": sample, "evaluate": evaluate, "plot": plot, "grade": grade}[name].main(argv)


def commands(rng):
    for (name, expect), rows in ARGVS.items():
        argvs = [[*first, last] for first, lasts in rows for last in lasts]
        for argv in rng.sample(argvs, min(len(argvs), 22)):
            yield f"{name} {' '.join(map(show, argv))}", partial(program, name, argv), expect
    if not os.access("/dev", os.W_OK):                            # root would replace the device
        yield "plot /dev/full", partial(program, "plot", ["toy", "--out=/dev/full"]), SENTENCE


KINDS = {"flags": flags, "config": config, "checkpoint": checkpoints, "weights": weights,
         "cache": cache, "logs": logs, "images": images, "text": texts, "shards": shards, "commands": commands}


def all_cases(seed, only=None):
    """Every case, in random order; both follow from the seed."""
    cases, seen = [], Counter()
    for kind in [only] if only else KINDS:
        for name, run, expect in KINDS[kind](random.Random(f"{seed} {kind}")):
            seen[name := f"{kind}: {name}"] += 1
            name += f" ({seen[name]})" * (seen[name] > 1)
            cases.append(Case(kind, name, run, expect))
    random.Random(seed).shuffle(cases)
    return cases


# Running them.

def quick():
    """Runs without pictures and the final evaluation."""
    def rows(net, teacher, data, cfg, **more):
        return {"teacher": {"NFE": 35, "seconds": 1.0}, cfg.method: {"NFE": len(net.sigmas)}}

    def moments(images, *args):
        return (np.zeros((8, 8, 8), np.float16) for _ in images)

    for where, name, value in [
            (train, "have_matplotlib", lambda: False),
            (pictures, "save_picture", lambda *args: None),
            (evaluate, "report_rows", rows),
            (evaluate, "measure", lambda *args, **more: {"sw2": 1.0}),
            (progress, "heun", lambda denoiser, z, cond=None, **more: 0.5 * z),
            (progress.Progress, "save_samples", lambda *args, **more: None),
            (hub, "version", lambda *args: "1"),
            (hub, "component_config", lambda *args: {"block_out_channels": [8] * 4}),
            (encoding, "load_vae", lambda model: torch.nn.Identity()),
            (encoding, "vae_moments", moments), (os, "fsync", lambda file: None)]:
        assert hasattr(where, name), f"{where} has no {name} to skip"
        setattr(where, name, value)


def prepare(base):
    """Two finished runs, one that stopped half way, pictures, prompts, and a full cache."""
    BASE.append(base)
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0                                     # no thread: we fork
    os.environ.update(NANO_DMD_CACHE=str(base / "cache"), HF_HUB_OFFLINE="1")
    os.chdir(base)
    quick()
    train_with("--steps=2", "--log_every=1", "--out=toy")
    train_with("--preset=digits", "--out=numbers")
    shutil.copytree("toy", "half", ignore=lambda *_: ["generator.safetensors", "report.json"])
    settings = json.loads(Path("half/config.json").read_text()) | {"steps": 4, "out": "half"}
    put("half/config.json", json.dumps(settings))
    put("half/checkpoint.pt", partial(as_state, "config", settings))
    for name in GOOD:
        put(f"pics/{name}", GOOD[name])
        put(f"pics/{name[0]}.txt", name)
    labels = json.dumps({"labels": [["a.png", 0], ["b.png", 1]]})
    put("pics.zip", zipped(GOOD | {"dataset.json": labels}))
    put("prompts.txt", "one\ntwo\nthree\n")
    image_metrics.range = lambda *args: [0, 1]                         # shortens a training
    for name, make in MAKERS.items():
        shutil.rmtree("o", ignore_errors=True)
        try:
            make()
        except Exception as e:
            ABSENT.add(name)
            print(f"cache without {name}: {type(e).__name__}: {e}", file=sys.__stderr__)
    del image_metrics.range
    gc.freeze()


def enter(folder):
    """The working directory of one case, with a few odd files and a cache."""
    os.mkdir(folder)
    os.chdir(folder)
    for name in ("plain", "plain.zip", "plain.pkl"):
        put(name, b"x")
    for name, kind in {"empty": "folder", "fifo.pkl": "fifo", "fifo": "fifo", "loop": "loop",
                       "dangling": "dangling"}.items():
        put(name, kind)
    fresh("cache")
    os.environ["NANO_DMD_CACHE"] = os.path.abspath("cache")


def limit():
    """Memory of this process, on top of what it has, and what happens when its time is over."""
    def ring(*_):
        raise Hang

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + 2 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, ring)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def place(error):
    """The innermost line of the code under test."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__
              and Path(f.filename).parent.name in HOUSE]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def attempt(case, loud):
    """(what happened, in a few words why) in this process."""
    said, before = [], peak()

    def body():
        try:
            case.run()
        except files.UserError as e:
            said.append(str(e))
            raise

    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        files.command(body)
        what, why = "done", ""
    except SystemExit as e:
        what = {None: "done", 0: "done", 2: "sentence"}.get(e.code, "traceback")
        why = said[0] if said else f"exit code {e.code}"
    except Hang as e:
        what, why = "hang", place(e)
    except BaseException as e:
        what, why = "traceback", f"{type(e).__name__}: {files.first_line(e)} ({place(e)})"
        if loud:
            traceback.print_exc()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if Path("pwned").exists():
        return "crash", "code in a file was executed"
    if peak() - before > MEMORY:
        return "crash", f"took {(peak() - before) >> 20} MiB; {what} {why}"
    return ("done", "") if REACHED and what == "sentence" else (what, why)


def child(cases, folder, pipe, loud):
    """The forked process: one case after another, until one goes wrong; never returns."""
    real = Figure.savefig, subprocess.run
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in () if loud else (0, 1, 2):
            os.dup2(null, fd)
        limit()
        for case in cases:
            REACHED.clear()
            enter(folder)
            what, why = attempt(case, loud)
            sys.stdout.flush()
            shutil.rmtree(folder, ignore_errors=True)
            os.write(pipe, json.dumps([what, why[:150]]).encode().ljust(RECORD))
            if what in FAULTS:
                break
            Figure.savefig, subprocess.run = real
            torch.set_num_threads(1)
    finally:
        os._exit(0)


def judge(cases, loud=False):
    """Yields (case, one of FAULTS or "", why); up to BATCH cases share a process, until a fault."""
    todo, folder = deque(cases), BASE[0] / "work"
    wrong = {("done", SENTENCE): "accepted", ("sentence", WORKS): "refused"}
    while todo:
        (read, write), batch = os.pipe(), [todo.popleft() for _ in range(min(BATCH, len(todo)))]
        pid = os.fork()
        if not pid:
            child(batch, folder, write, loud)
        os.close(write)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)                                  # whoever of the two is first
        try:
            while batch:
                ready = select.select([read], [], [], GRACE)[0]
                record = os.read(read, RECORD) if ready else b""
                lost = ("crash", "") if ready else ("hang", "killed")
                what, why = json.loads(record) if record else lost
                if what in FAULTS:
                    break
                case = batch.pop(0)
                yield case, wrong.get((what, case.expect), ""), why
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)                    # and what it has started
            status = os.waitpid(pid, 0)[1]
            os.close(read)
            shutil.rmtree(folder, ignore_errors=True)
        if batch:
            yield batch.pop(0), what, why or f"the process ended with status {status}"
            todo.extendleft(reversed(batch))


def run_all(cases, seconds):
    """Run cases until the time is over; prints the faults and a table, returns their number."""
    start, tried, found, took, faults = time.monotonic(), Counter(), Counter(), Counter(), []
    before = start
    for case, fault, why in judge(cases):
        now = time.monotonic()
        tried[case.kind] += 1
        took[case.kind] += now - before
        before = now
        if fault:
            found[case.kind, fault] += 1
            faults.append(f"{fault:9} {case.name}  {ascii(why)[1:140]}")
        if now - start > seconds:
            break
    print(*sorted(faults), "", sep="\n")
    print(f"{'kind':12}", *(f"{name:>9}" for name in ("tried", *FAULTS, "seconds")))
    for kind in tried:
        counts = [tried[kind], *(found[kind, fault] for fault in FAULTS), round(took[kind])]
        print(f"{kind:12}", *(f"{n:>9}" for n in counts))
    early = "" if sum(tried.values()) == len(cases) else ", stopped early"
    print(f"{sum(tried.values())} of {len(cases)} inputs in {before - start:.0f} s{early}; "
          f"{len(faults)} faults")
    return len(faults)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="the inputs and their order follow from it")
    p.add_argument("--seconds", type=float, default=60, help="stop after these")
    p.add_argument("--only", choices=KINDS, help="one kind of input")
    p.add_argument("--list", action="store_true", help="the inputs and what is expected of them")
    p.add_argument("--case", help="run the one of this name, and show what it prints")
    args = p.parse_args()
    cases = [c for c in all_cases(args.seed, args.only) if args.case in (None, c.name)]
    if not cases:
        p.error(f"no case {args.case!r} of seed {args.seed}; --list shows all")
    if args.list:
        print(*(f"{c.expect:9} {c.name}" for c in cases), f"{len(cases)} inputs", sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as base:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare(Path(base).resolve())
        if args.case is None:
            return bool(run_all(cases, args.seconds))
        [(case, fault, why)] = judge(cases, loud=True)
        print(f"\n{why}\nexpected {case.expect}: {fault or 'fine'}")
        return bool(fault)


if __name__ == "__main__":
    sys.exit(main())
