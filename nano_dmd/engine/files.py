"""Files that survive: atomic writes, safe reads, and errors of one sentence."""

import errno
import functools
import io
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import time
import zipfile
from array import array
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors

from nano_dmd.engine.schema import mismatch, wrong_tensors

MAKE_ROOM = "free some space or choose another folder (--out, or $NANO_DMD_CACHE for the cache)"
MADE_AGAIN = "delete it to have it made again"


class UserError(Exception):
    """One clear sentence for the person at the keyboard; commands print it and exit with code 2."""


def command(main):
    """Run a command line's main(): a user's mistake becomes one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):        # a console may lack a letter of some name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except UserError as e:
        sentence = str(e)
    except OSError as e:
        sentence = f"{e.filename or 'the system'}: {e.strerror or e}"
    except KeyboardInterrupt:
        print("\nstopped; a training goes on by --resume once it has a checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        full = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if full or "can't allocate memory" in str(e):             # a CPU's is a RuntimeError
            sentence = (f"out of memory ({first_line(e)}); try a smaller --batch or, with the same "
                        "result, a larger --accumulate; --checkpointing, LoRA and --adam8bit help")
        elif type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sentence = f"torch.compile does not work here ({first_line(e)}); add --no-compile"
        else:
            raise
    print("error:", sentence.replace("\n", " "), file=sys.stderr)
    sys.exit(2)


@contextmanager
def blame(what, advice=""):
    """Whatever goes wrong inside becomes one UserError: what, the reason, advice."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        raise UserError(f"{what}: {first_line(e)}" + f"; {advice}" * bool(advice)) from e


def first_line(error, length=120):
    """What an exception says, in one short line without colours; its type where it says nothing."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return re.sub("\x1b\\[[0-9;]*m", "", said.splitlines()[0])[:length]


def last_words(done):
    """Why a process failed: its own sentence, the signal that killed it, or its exit code."""
    if done.returncode < 0:
        name = {s.value: s.name for s in signal.Signals}.get(-done.returncode, "unknown")
        full = ": the memory may have been full" if name == "SIGKILL" else ""
        return f"was killed by signal {-done.returncode} ({name}){full}"
    lines = done.stderr.strip().splitlines() or ["it said nothing"]
    said = [line for line in lines if line.startswith("error: ")]
    return (f"failed: {said[-1]}" if said else
            f"ended with exit code {done.returncode}: {lines[-1]:.200}")


@functools.lru_cache(maxsize=None)
def note(sentence):
    """Print a note on stderr, only once: the command goes on, but the user should know this."""
    print(f"note: {sentence}", file=sys.stderr, flush=True)


def cache_dir():
    """The cache's folder: $NANO_DMD_CACHE, else ~/.cache/nano_dmd.  raises UserError."""
    with blame("no cache", "say by $NANO_DMD_CACHE where to keep what is made once"):   # no home
        return Path(os.environ.get("NANO_DMD_CACHE") or Path.home() / ".cache" / "nano_dmd")


def write_atomic(path, data: bytes):
    """Replace path by data, or leave it untouched: temporary file, fsync, rename."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and not path.is_file():   # /dev/null would become a file
            raise OSError(errno.EINVAL, "it exists and is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as f:
            f.write(data)
            f.flush()
            sync(f.fileno())
        replace(new, path)
    except OSError as e:
        raise unwritable(path, e) from e
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)
    with suppress(OSError):                        # Windows cannot open a folder
        handle = os.open(path.parent, os.O_RDONLY)
        sync(handle)
        os.close(handle)


def sync(handle):
    """fsync.  Some network drives do not know it; the file is there all the same."""
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def replace(old, new):
    """os.replace, again a little later where Windows refuses (a virus scanner holds the file)."""
    for pause in (0.1, 0.5, None):
        try:
            return os.replace(old, new)
        except PermissionError:
            if pause is None or os.path.isdir(new):
                raise
            time.sleep(pause)


def unwritable(path, error):
    return UserError(f"cannot write {path}: {error.strerror or error}; {MAKE_ROOM}")


def delete(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Delete the temporary files of writes that a kill cut short."""
    for path in Path(folder).rglob(".*.tmp"):
        delete(path)


def check_writable(folder):
    """Raise UserError now if folder could not be written to later; touches nothing."""
    nearest = next(p for p in (Path(folder), *Path(folder).absolute().parents) if os.path.exists(p))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"cannot write to {folder}: {nearest} is no folder to write to; choose "
                        "another --out")


def plain(obj):
    """obj for json: tensors become numbers of five digits; what is not finite becomes None."""
    if isinstance(obj, dict):
        return {k: plain(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(v) for v in obj]
    if isinstance(obj, torch.Tensor):
        obj = float(f"{obj.item():.5g}")
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def write_json(path, obj):
    write_atomic(path, (json.dumps(plain(obj), indent=2, allow_nan=False) + "\n").encode())


def append_line(path, obj):
    """One more line of a .jsonl file."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as f:
            f.write(json.dumps(plain(obj), allow_nan=False) + "\n")
    except OSError as e:
        raise unwritable(path, e) from e


def read_bytes(path):
    """The content of a file.  raises UserError, also for a device or a pipe: it might never end."""
    check_file(path)
    with blame(f"cannot read {path}"):
        return Path(path).read_bytes()


def check_file(path):
    """Raise UserError for a device, a pipe or a folder."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot read {path}: it is not a file")


def parse_json(data, what):
    """The value in some JSON, bytes or text.  raises UserError, which names `what`."""
    with blame(f"cannot read {what}"):
        return json.loads(data)


def read_json(path, kind=None):
    """The value in a JSON file, of a kind if one is given (engine/schema.py).  raises UserError."""
    if not os.path.exists(path):
        raise UserError(f"cannot read {path}: it is not there; is this a run folder?")
    value = parse_json(read_bytes(path), path)
    if problem := mismatch(value, kind) if kind is not None else "":
        raise UserError(f"cannot use {path}, it is damaged or of another version: {problem}")
    return value


class Lines:
    """The lines of a UTF-8 text file, stripped, without blank ones: len(), [i], .numbers[i].

    The texts stay on the disk: there may be millions of prompts.  A line ends with LF, CR or both.
    U+2028, which some captions contain, does not end a line.
    """

    def __init__(self, path):
        check_file(path)
        with blame(f"cannot read {path}"):
            self.path, self.file = path, open(path, "rb")
        self.unchanged = self.stamp()
        self.starts, self.ends = array("q"), array("q")
        self.numbers = array("q")
        number, start = 1, 0
        for line in self.file:
            for part in re.finditer(rb"[^\r\n]+|\r\n|\r|\n", line):
                if part[0][:1] in b"\r\n":
                    number += 1
                elif text_of(part[0], f"{path}, line {number},"):
                    self.starts.append(start + part.start())
                    self.ends.append(start + part.end())
                    self.numbers.append(number)
            start += len(line)

    def stamp(self):
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        if self.stamp() != self.unchanged:         # another line would be read without a word
            raise UserError(f"{self.path} was changed while it was in use: go on by --resume")
        self.file.seek(self.starts[i])
        return text_of(self.file.read(self.ends[i] - self.starts[i]), self.path)


def text_of(line, where):
    """The text of some bytes, stripped.  raises UserError."""
    if b"\0" in line:
        raise UserError(f"{where} holds zeros and is no UTF-8 text: save the file as UTF-8")
    try:
        return line.decode("utf-8").replace("\ufeff", "").strip()       # a mark of Windows' Notepad
    except UnicodeDecodeError as e:
        raise UserError(f"{where} is not UTF-8 text: save the file as UTF-8") from e


def read_lines(path):
    """[(number, stripped line)] of a UTF-8 text file, without blank lines."""
    lines = Lines(path)
    return [(lines.numbers[i], lines[i]) for i in range(len(lines))]


def save_tensors(path, tensors):
    """Write tensors as safetensors."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, dump_safetensors(tensors))


def load_tensors(path, wanted=None):
    """The tensors of a safetensors file; nothing in it is executed.

    wanted  {name: (dtype, shape)}, see schema.wrong_tensors.  raises UserError if they differ
    """
    if not Path(path).exists():
        raise UserError(f"no {path}; is this the folder of a finished run?")
    data = read_bytes(path)
    with blame(f"cannot read {path}", MADE_AGAIN):
        tensors = load_safetensors(data)
    if problem := wrong_tensors(tensors, wanted) if wanted else "":
        raise UserError(f"{path} is damaged: {problem}; {MADE_AGAIN}")
    return {name: t.to(wanted[name][0]) for name, t in tensors.items()} if wanted else tensors


def own_state(module):
    """The state that belongs to a module: with LoRA the low-rank weights alone, else everything."""
    state = module.state_dict()
    return {name: t for name, t in state.items() if "lora_" in name} or state


def load_weights(module, tensors, path):
    """Strict load_state_dict, of own_state.  raises UserError about the first difference."""
    wanted = {name: (t.dtype, tuple(t.shape)) for name, t in own_state(module).items()}
    if problem := wrong_tensors(tensors, wanted):
        raise UserError(f"{path} does not fit this network: {problem}")
    module.load_state_dict(tensors, strict=False)  # the check above was strict


NETS = {str: {str: torch.Tensor}}
CHECKPOINT = dict(config=dict, step=int, seconds=[float, float], processes=int, nets=NETS,
                  opts={str: {"state": dict, "param_groups": [dict]}},
                  rng=[torch.Tensor, [torch.Tensor], torch.Tensor])


def save_checkpoint(path, state):
    """torch.save of plain containers and tensors, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path, device="cpu"):
    """torch.load of weights only: a hostile file runs no code; a damaged one gets one sentence."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; start without --resume, or check --out")
    with blame(f"checkpoint {path} is corrupt or not ours", "delete it or restore a copy"):
        with zipfile.ZipFile(path) as f:
            if sum(part.file_size for part in f.infolist()) > os.path.getsize(path):
                raise ValueError("it would grow while it is unpacked")  # torch never compresses
            if bad := f.testzip():                 # torch.load does not compare checksums
                raise ValueError(f"wrong checksum of {bad}")
        saved = torch.load(path, map_location=device, weights_only=True)
        if problem := mismatch(saved, CHECKPOINT):
            raise ValueError(problem)
        return saved


def trim_log(path, step):
    """Keep the lines up to a checkpoint's step.  The resumed run logs the later ones again."""
    def early(line):
        with suppress(ValueError, RecursionError):  # a line that a kill or a full disk cut short
            record = json.loads(line)
            return not mismatch(record, {"step": int}) and record["step"] <= step

    lines = read_bytes(path).splitlines() if path.exists() else []
    write_atomic(path, b"".join(line + b"\n" for line in lines if early(line)))
