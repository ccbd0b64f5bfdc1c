"""EDM's published .pkl files, read without running them.

A pickle is a program that may call any function. EDM's files even carry the Python source they want
executed. Reader is Python's own unpickler with three changes. It knows only the names that EDM's
writer mentions. Each becomes a Note, an inert record of the call, or an empty dict. It knows only
that writer's instructions. It hashes only texts and numbers. So nothing is imported or called.

    file     {"ema": network, ...}
    network  RECORD({"class_name", "state", ...}); enc and dec inside are MODULE_DICT with a state
    tensor   PARAMETER(TENSOR(STORAGE(bytes), offset, size, stride, ...), ...)
    bytes    a file in torch's old format, which torch reads with weights_only
"""

import hashlib
import io
import json
import math
import mmap
import pickle
import pickletools
import secrets
from urllib.request import urlretrieve

import torch
from tqdm import tqdm

from nano_dmd.denoiser import EDM
from nano_dmd.engine.files import (UserError, blame, cache_dir, delete, first_line, read_json,
                                   replace, unwritable, write_json)
from nano_dmd.engine.schema import shown, wrong_tensors
from nano_dmd.teachers.edm_networks import edm_network

CDN = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
PUBLISHED = {                       # NVIDIA's weights, CC BY-NC-SA 4.0; "vp" is DDPM++
    "edm:cifar10-uncond": CDN + "edm-cifar10-32x32-uncond-vp.pkl",
    "edm:cifar10-cond": CDN + "edm-cifar10-32x32-cond-vp.pkl",
    "edm:ffhq64": CDN + "edm-ffhq-64x64-uncond-vp.pkl",
    "edm:afhqv2-64": CDN + "edm-afhqv2-64x64-uncond-vp.pkl",
    "edm:imagenet64": CDN + "edm-imagenet-64x64-cond-adm.pkl",
}

RECORD = "torch_utils.persistence._reconstruct_persistent_obj"
MODULE_DICT = "torch.nn.modules.container.ModuleDict"
PARAMETER, TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
NAMES = (RECORD, MODULE_DICT, PARAMETER, TENSOR, STORAGE, *DICTS, *NUMPY)
INSTRUCTIONS = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2
    LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT EMPTY_SET MEMOIZE
    BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ""".split()


class Note:
    """A call a file asks for: its name is the class's; .args, and .state if the file sets it."""

    def __new__(cls, *args):
        note = super().__new__(cls)
        note.args, note.state = args, None
        return note


class Table(dict):
    """An empty dict of any kind, to be filled by the file."""

    def __init__(self):
        super().__init__()


NOTES = {name: type(name, (Note,), {}) for name in NAMES} | dict.fromkeys(DICTS, Table)


class Instructions(dict):
    def __missing__(self, code):
        known = pickletools.code2op.get(chr(code))
        name = known.name if known else f"{code:#x}"
        raise ValueError(f"it has the pickle instruction {name}, which EDM's checkpoints do not")


class Reader(pickle._Unpickler):
    """Reads a pickle that EDM's writer could have written.  raises ValueError, or what it meets."""

    codes = [getattr(pickle, name)[0] for name in INSTRUCTIONS]
    dispatch = Instructions({code: pickle._Unpickler.dispatch[code] for code in codes})

    def find_class(self, module, name):
        full = f"{module}.{name}"
        if full not in NOTES:
            raise ValueError(f"it mentions {full!r:.80}, which EDM's checkpoints do not")
        return NOTES[full]

    def fill(self, kind, items, keys):
        """Put items into a dict or a set; hashing a hostile key could exhaust the C stack."""
        target = self.stack[-1]
        if not isinstance(target, kind) or any(type(key) not in (str, int) for key in keys):
            raise ValueError(f"it fills a {type(target).__name__} with others than names as keys")
        target.update(items)

    def load_setitems(self):
        items = self.pop_mark()
        self.fill(dict, zip(items[::2], items[1::2], strict=True), items[::2])

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(dict, [(key, value)], [key])

    def load_additems(self):
        items = self.pop_mark()
        self.fill(set, items, items)

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Note):
            raise ValueError(f"it gives a {type(self.stack[-1]).__name__} a state")
        self.stack[-1].state = state

    dispatch |= {pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem,
                 pickle.ADDITEMS[0]: load_additems, pickle.BUILD[0]: load_build}


def is_note(value, name, count):
    return isinstance(value, NOTES[name]) and len(value.args) >= count


def tensor(note, name, seen):
    """The tensor of a note, in a block of numbers that no other tensor uses.  raises ValueError"""
    while is_note(note, PARAMETER, 1):
        note = note.args[0]
    if not is_note(note, TENSOR, 4) or not is_note(note.args[0], STORAGE, 1):
        raise ValueError(f"{name} is not a tensor")
    (blob, *_), (offset, size, stride) = note.args[0].args, note.args[1:4]
    once(blob, f"the block of numbers of {name}", seen)
    try:
        if blob[:1] != b"\x80":                    # a zip could grow while it is unpacked
            raise ValueError("they are not in torch's old format")
        storage = torch.load(io.BytesIO(blob), weights_only=True)
        raw, flat = storage._untyped_storage, torch.empty(0, dtype=storage.dtype)
        flat.set_(raw, 0, (raw.nbytes() // flat.itemsize,), (1,))
        if not flat.is_floating_point() or len(size) > 8 or math.prod(size) > len(flat):
            raise ValueError(f"they are {len(flat)} {flat.dtype}, to have the shape {size!r:.80}")
        return flat.as_strided(size, stride, offset).contiguous()
    except Exception as e:
        raise ValueError(f"cannot use the numbers of {name}: {first_line(e)}") from e


def once(thing, name, seen):
    """raises ValueError for a thing seen before: cycles and shared blocks could fill the memory."""
    if id(thing) in seen:
        raise ValueError(f"{name} occurs more than once")
    seen.add(id(thing))


def record(note):
    """What EDM's writer notes of an object of its own classes; empty for anything else."""
    meta = note.args[0] if is_note(note, RECORD, 1) else None
    return meta if isinstance(meta, dict) else {}


def attributes(note, name):
    """The __dict__ of a module: of one of EDM's own classes, or of a ModuleDict."""
    meta = record(note)
    if meta and (meta.get("type"), meta.get("version")) != ("class", 6):
        raise ValueError(f"{name} is {shown(meta.get('type'))} of version "
                         f"{shown(meta.get('version'))}; only a 'class' of version 6 is known")
    state = meta.get("state") if meta else note.state if is_note(note, MODULE_DICT, 0) else None
    parts = ("_parameters", "_buffers", "_modules")
    if not isinstance(state, dict) or any(not isinstance(state.get(k), dict) for k in parts):
        raise ValueError(f"{name} is not a network")
    return state


def tensors(note, prefix, seen, depth=0):
    """All (name, tensor) of a module in the order of torch's state_dict."""
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
        raise ValueError(f"its network is {shown(kind)}; only EDM's own, 'EDMPrecond', can be used")
    kwargs = state.get("_init_kwargs")
    if state.get("_init_args") or not isinstance(kwargs, dict):
        raise ValueError("it does not say what its network was built with")
    for name, value in kwargs.items():
        values = value if type(value) in (list, tuple) else [value]
        plain = all(type(v) in (bool, int, float, str, type(None)) for v in values)
        if type(name) is not str or not plain:
            raise ValueError(f"its network was built with {shown(name)} = {shown(value)}, no plain "
                             "value")
    return json.loads(json.dumps(kwargs))


def read_edm_pickle(path):
    """(init_kwargs, state_dict) of the averaged network in one of EDM's .pkl files; runs nothing.

    init_kwargs  EDMPrecond's keyword arguments, as json can hold them
    state_dict   {"model.enc.32x32_conv.weight": tensor, ...}: EDM's names, order, dtypes and bits
    raises UserError naming path and what was found, if EDM's (or SiD's) code does not write it
    """
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as file:
            root = Reader(file).load()      # mapped: no length can claim more than there is
        if not isinstance(root, dict) or "ema" not in root:
            raise ValueError("it has no network 'ema'")
        return keyword_arguments(root["ema"]), dict(tensors(root["ema"], "", set()))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:                         # whatever a hostile file can provoke
        raise UserError(f"{path} is not a checkpoint of EDM's, or a damaged one: "
                        f"{first_line(e, 200)}; nothing in it was executed") from e


def build_edm(init_kwargs, state_dict):
    """EDM denoiser, float32 and frozen, of what read_edm_pickle returns; "model." may be left out.

    raises UserError naming the first argument or tensor that does not fit
    """
    with blame("no EDM network can be built from these arguments"), torch.device("meta"):
        net = edm_network(**init_kwargs)           # shapes first, memory once they fit
    wanted = {name: (t.dtype, t.shape) for name, t in net.state_dict().items()}
    have = {name.removeprefix("model."): t for name, t in state_dict.items()}
    if problem := wrong_tensors(have, wanted):
        raise UserError(f"the weights do not fit the network of these arguments: {problem}")
    copies = {name: t.detach().to(torch.float32, copy=True) for name, t in have.items()}
    net.load_state_dict(copies, assign=True)
    net.to(memory_format=torch.channels_last)
    return EDM(net, init_kwargs.get("sigma_data", 0.5)).requires_grad_(False).eval()


def edm_teacher(path, data):
    """(Denoiser, recipe) of one of EDM's .pkl files, for zoo.save_teacher.

    data  name of the data set the network was trained on, "" if that is not known
    """
    init_kwargs, state_dict = read_edm_pickle(path)
    denoiser = build_edm(init_kwargs, state_dict)
    return denoiser, dict(network="edm", args=init_kwargs, sigma_data=denoiser.sigma_data,
                          bf16=False, data=data, shape=list(denoiser.net.shape),
                          classes=denoiser.net.classes, seconds=0, cpu_seconds=0)


def fetch_edm(name):
    """Path of a published .pkl in the cache, downloaded once; its sha256 is kept beside it.

    raises UserError if it cannot be had, or is no longer the file it was when first seen
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
        raise UserError(f"{path} is not the file that {remembered.name} remembers, its sha256 is "
                        f"{found['sha256']}: delete it, or both if you trust the new one")
    return path


def sha256(path):
    with blame(f"cannot read {path}"), open(path, "rb") as f:
        found = hashlib.sha256()
        while chunk := f.read(1 << 20):
            found.update(chunk)
        return found.hexdigest()


def download(url, path):
    """Copy url to path by way of a temporary file beside it: path is whole or absent."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    by_hand = f"without a network put the file at {path}, or give --teacher FILE.pkl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with blame(f"cannot download {url}", by_hand), tqdm(desc=path.name, unit="MB") as bar:
            urlretrieve(url, new, lambda count, size, total: bar.update(size / 1e6))
            with open(new, "rb") as f:
                if f.read(1) != b"\x80":
                    raise ValueError("what came is not a pickle")
        replace(new, path)
    except OSError as e:
        raise unwritable(path, e) from e
    finally:
        delete(new)
