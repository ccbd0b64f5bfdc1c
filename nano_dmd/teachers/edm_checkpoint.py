"""EDM's published .pkl files, read without running them.  Infrastructure, not on the reading path.

A pickle is a program for a stack machine, and one of the machine's instructions is "call this function"; EDM's files even
carry the Python source they want executed. Machine is that machine without the call: what a file wants called becomes a
note (Call), compared afterwards with what EDM's writer is known to ask for. No code of the file is looked at, nothing is
imported or called by name, and torch sees only numbers that were counted first.

    file     {"ema": network, ...}
    network  RECORD({"class_name", "state", "module_src", ...}); enc and dec inside it are MODULE_DICT with a state
    tensor   PARAMETER(TENSOR(STORAGE(bytes), offset, size, stride, ...), ...)
    bytes    torch's old format: five pickles (magic number, version, machine, storage, keys), a count, the numbers
"""

import hashlib
import io
import json
import math
import mmap
import os
import pickletools
import urllib.request
from contextlib import suppress
from http.client import HTTPException

import torch
from tqdm import tqdm

from nano_dmd.denoiser import EDM
from nano_dmd.engine.files import (UserError, cache_dir, first_line, read_json, unwritable,
                                   write_json)
from nano_dmd.teachers.edm_networks import edm_network

CDN = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"

PUBLISHED = {                       # NVIDIA's weights, CC BY-NC-SA 4.0; "vp" is the architecture, DDPM++
    "edm:cifar10-uncond": CDN + "edm-cifar10-32x32-uncond-vp.pkl",
    "edm:cifar10-cond": CDN + "edm-cifar10-32x32-cond-vp.pkl",
    "edm:ffhq64": CDN + "edm-ffhq-64x64-uncond-vp.pkl",
    "edm:afhqv2-64": CDN + "edm-afhqv2-64x64-uncond-vp.pkl",
    "edm:imagenet64": CDN + "edm-imagenet-64x64-cond-adm.pkl",
}

RECORD = "torch_utils.persistence _reconstruct_persistent_obj"

MODULE_DICT = "torch.nn.modules.container ModuleDict"

PARAMETER = "torch._utils _rebuild_parameter"

TENSOR = "torch._utils _rebuild_tensor_v2"

STORAGE = "torch.storage _load_from_bytes"

DICTS = {"collections OrderedDict", "dnnlib.util EasyDict"}

NUMPY = {"numpy dtype", "numpy.core.multiarray scalar", "numpy._core.multiarray scalar"}      # in values we do not need

NAMES = {RECORD, MODULE_DICT, PARAMETER, TENSOR, STORAGE} | DICTS | NUMPY

POINTER = "persistent_load"         # how torch's old format points at its numbers

DTYPES = {"torch FloatStorage": torch.float32, "torch DoubleStorage": torch.float64,
          "torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16}

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001

VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
          "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}

MAKE = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
        "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}

FILL = {"APPEND": list, "APPENDS": list, "SETITEM": dict, "SETITEMS": dict, "ADDITEMS": set}


class Call:
    """A note: the pickle wants name called with args, and the result given a state."""

    __slots__ = ("name", "args", "state")

    def __init__(self, name, args):
        self.name, self.args, self.state = name, args, None


class Machine:
    """Runs one pickle that may mention `names` and no others.  raises ValueError for what EDM's files do not contain."""

    def __init__(self, names):
        self.names, self.stack, self.marks, self.memo = names, [], [], {}

    def run(self, file):
        for op, arg, _ in pickletools.genops(file):
            self.step(op.name, arg)
        return self.take(1)[0]

    def take(self, n):
        if not 0 <= n <= len(self.stack):
            raise ValueError("it is not a pickle that Python wrote")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def above_mark(self):
        return self.take(len(self.stack) - (self.marks.pop() if self.marks else -1))

    def known(self, name):
        if name not in self.names:
            raise ValueError(f"it mentions {name.replace(' ', '.')!r:.80}, which EDM's checkpoints do not")
        return name

    def call(self, name, args):
        """An empty dict for any kind of dict, else a note."""
        if type(name) is not str or type(args) is not tuple:
            raise ValueError(f"it calls a {type(name).__name__} with a {type(args).__name__}")
        return {} if self.known(name) in DICTS and not args else Call(name, args)

    def fill(self, kind, items):
        """Put items into the list, dict or set on top of the stack; hashing a hostile key could exhaust the C stack."""
        target, = self.take(1)
        keys = [] if kind is list else items[::2] if kind is dict else items
        if type(target) is not kind or any(type(k) not in (str, int) for k in keys):
            raise ValueError(f"it fills a {type(target).__name__} as if that were a {kind.__name__} with names as keys")
        if kind is list:
            target.extend(items)
        else:
            target.update(zip(keys, items[1::2], strict=True) if kind is dict else keys)
        self.stack.append(target)

    def step(self, op, arg):
        push, take = self.stack.append, self.take
        if op in VALUES:
            push(arg)
        elif op in MAKE:
            push(MAKE[op]())
        elif op in FILL:
            self.fill(FILL[op], self.above_mark() if op[-1] == "S" else take(1 if op == "APPEND" else 2))
        elif op == "MARK":
            self.marks.append(len(self.stack))
        elif op in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(self.above_mark() if op == "TUPLE" else take(int(op[5]))))
        elif op in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            push(*take(1))
            self.memo[len(self.memo) if op == "MEMOIZE" else arg] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET") and arg in self.memo:
            push(self.memo[arg])
        elif op in ("POP", "POP_MARK"):
            self.above_mark() if op == "POP_MARK" else take(1)
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            push(self.known(arg if op == "GLOBAL" else " ".join(take(2))))
        elif op in ("REDUCE", "NEWOBJ"):
            push(self.call(*take(2)))
        elif op == "BINPERSID":
            push(self.call(POINTER, tuple(take(1))))
        elif op == "BUILD":
            target, state = take(2)
            if type(target) is not Call:
                raise ValueError(f"it gives a {type(target).__name__} a state")
            target.state = state
            push(target)
        elif op not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the pickle instruction {op}, which EDM's checkpoints do not")


def numbers(blob, name):
    """The 1-D tensor in the bytes of one storage, all of which must be accounted for."""
    try:
        file = io.BytesIO(blob)
        magic, version, machine, storage, keys = (Machine({POINTER, *DTYPES}).run(file) for _ in range(5))
        kind, dtype, key, _, count, view = storage.args[0]
        if {type(dtype), type(key)} != {str}:                     # hashing or comparing something else could take forever
            raise ValueError("its storage has no type")
        dtype, count, data = DTYPES[dtype], count.to_bytes(8, "little"), bytearray(file.read())
        right = (magic, version, machine["little_endian"], kind, view) == (MAGIC, VERSION, True, "storage", None)
    except Exception as e:
        raise ValueError(f"the numbers of {name} are not in torch's old format: {first_line(e)}") from e
    size = len(data) - 8
    if not right or keys != [key] or size < 1 or data[:8] != count or size != int.from_bytes(count, "little") * dtype.itemsize:
        raise ValueError(f"the numbers of {name} are not in torch's old format: {size} bytes do not fit their description")
    return torch.frombuffer(data, dtype=dtype, offset=8)


def tensor(note, name, seen):
    """The tensor that a note describes; it must lie within its numbers, which no other tensor shares."""
    while type(note) is Call and note.name == PARAMETER and note.args:
        note = note.args[0]
    storage, offset, size, stride = note.args[:4] if type(note) is Call and note.name == TENSOR and note.args[3:] else [None] * 4
    if type(storage) is not Call or storage.name != STORAGE or len(storage.args) != 1:
        raise ValueError(f"{name} is not a tensor")
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > 8:
        raise ValueError(f"{name} has no shape")
    once(storage.args[0], f"the block of numbers of {name}", seen)
    flat = numbers(storage.args[0], name)
    whole = all(type(n) is int and 0 <= n <= len(flat) for n in (offset, *size, *stride)) and 0 not in size
    if not whole or offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(flat) or math.prod(size) > len(flat):
        raise ValueError(f"{name} does not lie within its {len(flat)} numbers")
    return flat.as_strided(size, stride, offset).contiguous()


def once(thing, name, seen):
    """Modules in a cycle, or one set of numbers under a thousand names, would fill the memory."""
    if id(thing) in seen:
        raise ValueError(f"{name} occurs more than once")
    seen.add(id(thing))


def shown(value):
    """For messages: repr of a text or number, the kind of anything else, whose repr could be endless."""
    return f"{value!r:.40}" if type(value) in (str, int) else f"a {type(value).__name__}"


def record(note):
    """What EDM's writer notes of an object of its own classes; empty for anything else."""
    meta = note.args[0] if type(note) is Call and note.name == RECORD and len(note.args) == 1 else None
    return meta if type(meta) is dict else {}


def attributes(note, name):
    """The __dict__ of a module: of one of EDM's own classes, or of a ModuleDict."""
    meta, state = record(note), note.state if type(note) is Call and note.name == MODULE_DICT else None
    if meta:
        if (meta.get("type"), meta.get("version")) != ("class", 6):
            raise ValueError(f"{name} is {shown(meta.get('type'))} of version {shown(meta.get('version'))}; "
                             "only a 'class' of version 6 is known")
        state = meta.get("state")
    if type(state) is not dict or any(type(state.get(k)) is not dict for k in ("_parameters", "_buffers", "_modules")):
        raise ValueError(f"{name} is not a network")
    return state


def tensors(note, prefix, seen, depth=0):
    """All (name, tensor) of a module in the order of torch's state_dict: parameters, buffers, then the modules inside."""
    name = prefix.rstrip(".") or "ema"
    state = attributes(note, name)
    once(state, name, seen)
    if depth > 16:
        raise ValueError(f"{name:.40}... is nested too deeply")
    hidden = state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers", "_modules"):
        for key, value in state[kind].items():
            if type(key) is not str or not key.isprintable():
                raise ValueError(f"{name} has a part called {shown(key)}")
            if value is not None and kind == "_modules":
                yield from tensors(value, f"{prefix}{key}.", seen, depth + 1)
            elif value is not None and key not in hidden:
                yield f"{prefix}{key}", tensor(value, f"{prefix}{key}", seen)


def keyword_arguments(note):
    """What the network was built with: plain values and lists of them, as json can hold."""
    state, kind = attributes(note, "ema"), record(note).get("class_name")
    if kind != "EDMPrecond":
        raise ValueError(f"its network is {shown(kind)}; only EDM's own preconditioning, 'EDMPrecond', can be used")
    args, kwargs = state.get("_init_args"), state.get("_init_kwargs")
    if args or type(kwargs) is not dict:
        raise ValueError("it does not say what its network was built with")
    for name, value in kwargs.items():
        values = value if type(value) in (list, tuple) else [value]
        if type(name) is not str or any(type(v) not in (bool, int, float, str, type(None)) for v in values):
            raise ValueError(f"its network was built with {shown(name)} = {shown(value)} that is no plain value or list of them")
    return json.loads(json.dumps(kwargs))


def read_edm_pickle(path):
    """(init_kwargs, state_dict) of the averaged network in one of EDM's .pkl files; nothing in it is ever executed.

    init_kwargs  EDMPrecond's keyword arguments, as json can hold them
    state_dict   {"model.enc.32x32_conv.weight": tensor, ...}: EDM's names, order, dtypes and bits
    raises UserError naming path and what was found, if it is anything that EDM's (or SiD's) code does not write
    """
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as file:
            root = Machine(NAMES).run(file)                       # a mapped file: no length in it can claim more than there is
        if type(root) is not dict or "ema" not in root:
            raise ValueError("it has no network 'ema'")
        return keyword_arguments(root["ema"]), dict(tensors(root["ema"], "", set()))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:                                        # whatever a hostile file can provoke is one sentence
        raise UserError(f"{path} is not a checkpoint of EDM's, or a damaged one: {first_line(e, 200)}; nothing in it was "
                        "executed") from e


def build_edm(init_kwargs, state_dict):
    """EDM denoiser, float32 and frozen, from what read_edm_pickle returns ("model." in front of the names is optional).

    raises UserError naming the first argument or tensor that does not fit
    """
    try:
        with torch.device("meta"):                                # shapes first, memory once they fit
            net = edm_network(**init_kwargs)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"no EDM network can be built from these arguments: {first_line(e)}") from e
    want, have = net.state_dict(), {name.removeprefix("model."): t for name, t in state_dict.items()}
    for name in [*want, *have]:
        found, needed = (tuple(d[name].shape) if name in d else "absent" for d in (have, want))
        if found != needed:
            raise UserError(f"model.{name} is {found} in the checkpoint and {needed} in a network built with its arguments")
        if not have[name].is_floating_point():
            raise UserError(f"model.{name} holds {have[name].dtype} numbers in the checkpoint")
        if not have[name].isfinite().all():
            raise UserError(f"model.{name} holds a number that is not finite in the checkpoint")
    net.load_state_dict({name: t.detach().to(torch.float32, copy=True) for name, t in have.items()}, assign=True)
    net.to(memory_format=torch.channels_last)
    return EDM(net, init_kwargs.get("sigma_data", 0.5)).requires_grad_(False).eval()


def converted(path, data):
    """(Denoiser, recipe) of one of EDM's .pkl files, for zoo.save_teacher.

    data  name of the data set the network was trained on, "" if that is not known
    """
    init_kwargs, state_dict = read_edm_pickle(path)
    denoiser = build_edm(init_kwargs, state_dict)
    return denoiser, dict(network="edm", args=init_kwargs, sigma_data=denoiser.sigma_data, bf16=False,
                                        data=data, shape=list(denoiser.net.shape), classes=denoiser.net.classes,
                                        seconds=0, cpu_seconds=0)


def fetch_edm(name):
    """Path of a published .pkl in cache_dir(), downloaded when it is not there; its sha256 is kept beside it.

    raises UserError if it cannot be had, or if it is no longer the file it was when first seen
    """
    if name not in PUBLISHED:
        raise UserError(f"no published checkpoint {name!r}: use one of {', '.join(PUBLISHED)}")
    path = cache_dir() / PUBLISHED[name].rsplit("/", 1)[1]
    remembered = path.with_name(path.name + ".json")
    if not path.is_file():
        download(PUBLISHED[name], path)
    found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if not remembered.is_file():
        write_json(remembered, found)
    elif read_json(remembered) != found:
        raise UserError(f"{path} is not the file that {remembered.name} beside it remembers (its sha256 is {found['sha256']}); "
                        "delete it to download it again, or delete both if you trust the new one")
    return path


def sha256(path):
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    return digest.hexdigest()


def download(url, path):
    """Copy url to path by way of a temporary file beside it: path is whole or absent."""
    def failed(why):
        return UserError(f"cannot download {url} ({why}); on a machine without network put the file at {path}, "
                         "or pass it as --teacher FILE.pkl")

    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            for chunk in chunks(url, path.name, failed):
                if not file.tell() and chunk[:1] != b"\x80":
                    raise failed("what came is not a pickle")
                file.write(chunk)
        os.replace(tmp, path)
    except OSError as e:
        raise unwritable(path, e) from e
    finally:
        with suppress(OSError):
            tmp.unlink()


def chunks(url, name, failed):
    """The bytes behind url, with a progress bar; raises failed(why) unless all of them come."""
    got = size = 0
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers["Content-Length"] or 0)
            with tqdm(total=size or None, desc=name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    yield chunk
                    got += len(chunk)
                    bar.update(len(chunk))
    except (OSError, HTTPException, ValueError) as e:
        raise failed(first_line(e)) from e
    if not got or got < size:
        raise failed(f"it ended after {got} of {size} bytes")
