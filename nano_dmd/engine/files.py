"""Files that survive: atomic writes, safe reads, one-sentence errors.  Infrastructure, not on the reading path."""

import errno
import functools
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors, save as dump_safetensors

from nano_dmd.engine.schema import mismatch, wrong_tensors


class UserError(Exception):
    """One clear sentence for the person at the keyboard; the command lines print it and exit with code 2."""


def command(main):
    """Run a command line's main(): a UserError or a full memory becomes one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):                       # a console that cannot show a letter of a name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as e:
        sys.exit(_complain(str(e)))
    except OSError as e:                                          # the outside world, wherever it came in
        sys.exit(_complain(f"{e.filename or 'the system'}: {e.strerror or e}"))
    except Exception as e:
        if out_of_memory(e):
            sys.exit(_complain(f"out of memory ({first_line(e)}); try a smaller --batch or, with the same result, a "
                               "larger --accumulate; --checkpointing, --lora_critic 64 and --adam8bit help large networks"))
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(_complain(f"torch.compile does not work here ({first_line(e)}); add --no-compile"))
        raise
    except KeyboardInterrupt:
        print("\nstopped; a training run goes on from its last checkpoint with --resume; one without a checkpoint yet starts "
              "again, with teacher and pairs from the cache", file=sys.stderr)
        sys.exit(130)


def _complain(sentence):
    print("error:", sentence.replace("\n", " "), file=sys.stderr)
    return 2


def out_of_memory(error):
    """A GPU's full memory has a type of its own, a CPU's is a RuntimeError that says so."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def blame(what, advice=""):
    """Whatever goes wrong inside becomes one UserError: what, the reason, advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what}: {first_line(e)}" + f"; {advice}" * bool(advice)) from e


def first_line(error, length=120):
    """What an exception has to say in one short line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]


@functools.lru_cache(maxsize=None)
def note(sentence):
    """Print a note on stderr, each one once: it works, but the user may not have meant it."""
    print(f"note: {sentence}", file=sys.stderr, flush=True)


def cache_dir():
    """Where trained teachers and noise-image pairs are kept: $NANO_DMD_CACHE, else ~/.cache/nano_dmd."""
    try:
        return Path(os.environ.get("NANO_DMD_CACHE") or Path.home() / ".cache" / "nano_dmd")
    except RuntimeError as e:                                     # a user without one, in some containers
        raise UserError(f"{e}: say by $NANO_DMD_CACHE where to keep what is made once") from e


def write_atomic(path, data: bytes):
    """Replace path by data, or leave it untouched: temporary file, fsync, rename, fsync of the folder."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():                  # /dev/null would become a file
            raise OSError(errno.EINVAL, "it exists and is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                sync(f.fileno())
            with suppress(OSError):                               # file systems without Unix permissions refuse
                os.chmod(tmp, 0o666 & ~_umask())
            replace(tmp, path)
        except BaseException:
            Path(tmp).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise unwritable(path, e) from e
    sync_folder(path.parent)


def sync(handle):
    """fsync.  Some FUSE and network drives do not know it; the file is there all the same."""
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def sync_folder(folder):
    """Have the names in a folder on the disk too.  Windows cannot open a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            sync(handle)
        finally:
            os.close(handle)


def replace(old, new):
    """os.replace, again a little later where Windows refuses because a virus scanner or a cloud drive holds the file."""
    for pause in (0.1, 0.5, None):
        try:
            return os.replace(old, new)
        except PermissionError:
            if pause is None or os.path.isdir(new):
                raise
            time.sleep(pause)


def unwritable(path, error):
    return UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder "
                     "(--out, or $NANO_DMD_CACHE for the cache)")


def plain(obj):
    """obj for json, which has no words for NaN and infinity: they become None."""
    if isinstance(obj, dict):
        return {k: plain(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(v) for v in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def append_line(path, obj):
    """One more line of a .jsonl file."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as f:
            f.write(json.dumps(plain(obj), allow_nan=False) + "\n")
    except OSError as e:
        raise unwritable(path, e) from e


def check_writable(folder):
    """Raise UserError now if folder could not be made or written to later; touches nothing."""
    existing = next(p for p in (Path(folder), *Path(folder).absolute().parents) if os.path.exists(p))
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"cannot write to {folder}: {existing} is not a folder one may write to; choose another --out")


def remove_leftovers(folder):
    """Delete the temporary files of writes that a kill cut short."""
    for path in Path(folder).rglob(".*.tmp"):
        delete(path)


def delete(path):
    """Delete a file or a folder, if it is there."""
    if path.exists() or path.is_symlink():
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, obj):
    write_atomic(path, (json.dumps(plain(obj), indent=2, allow_nan=False) + "\n").encode())


def read_bytes(path):
    """The content of a file.  raises UserError; also for a device or a pipe, which might never end."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a file")
        return path.read_bytes()
    except (OSError, ValueError) as e:                            # ValueError: a name that holds a zero byte
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e


def parse_json(data, what):
    """The value in some JSON, bytes or text.  raises UserError naming what it is, for any damage."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:                     # not JSON, not UTF-8, numbers or nesting without end
        raise UserError(f"cannot read {what}: {first_line(e)}") from e


def read_json(path, kind=None):
    """The value in a JSON file, of a kind if one is given (schema.py).  raises UserError."""
    if not Path(path).exists():
        raise UserError(f"cannot read {path}: it is not there; is this a run folder?")
    value = parse_json(read_bytes(path), path)
    if problem := mismatch(value, kind) if kind is not None else "":
        raise UserError(f"cannot use {path}, it is damaged or of another version: {problem}")
    return value


def read_lines(path):
    """[(number, line without white space around it)] of a UTF-8 text file, blank lines left out.

    A line ends where an editor ends it: U+2028, which may stand in a caption, is no line break.
    """
    data = read_bytes(path)
    try:
        text = data.decode("utf-8").replace("\ufeff", "")         # the mark that Windows' Notepad puts first
    except UnicodeDecodeError as e:
        number = data.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}, line {number}, is not UTF-8 text: save the file as UTF-8") from e
    if "\0" in text:
        raise UserError(f"{path} holds zeros and is no UTF-8 text: save the file as UTF-8")
    lines = re.split("\r\n|\n|\r", text)
    return [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]


def save_tensors(path, tensors, **metadata):
    """Write a dict of tensors as safetensors.  All metadata in one entry: the order of several is random."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, dump_safetensors(tensors, {"nano_dmd": json.dumps(metadata)} if metadata else None))


def load_tensors(path, wanted=None):
    """Read a safetensors file; never executes anything in it.

    wanted  {name: (dtype, shape)}, see schema.wrong_tensors.  raises UserError where the file is not like that
    """
    if not Path(path).exists():
        raise UserError(f"no {path}; is this the folder of a finished run?")
    try:
        tensors = load_safetensors(read_bytes(path))
    except (SafetensorError, KeyError, OverflowError) as e:       # KeyError: a number format torch does not have
        raise UserError(f"cannot read {path}: {first_line(e)}; delete it to have it made again") from e
    if problem := wrong_tensors(tensors, wanted) if wanted else "":
        raise UserError(f"{path} is damaged: {problem}; delete it to have it made again")
    return tensors


def own_state(module):
    """What of a module's state is its own: for LoRA (lora.py) the low-rank weights alone, else everything."""
    state = module.state_dict()
    return {name: t for name, t in state.items() if "lora_" in name} or state


def load_weights(module, tensors, path):
    """Strict load_state_dict, of own_state, whose complaint names the file and the first difference."""
    own = own_state(module)
    if problem := wrong_tensors(tensors, {name: (t.dtype, tuple(t.shape)) for name, t in own.items()}):
        raise UserError(f"{path} does not fit this network: {problem}")
    module.load_state_dict(tensors, strict=False)                 # the check above was strict


def save_checkpoint(path, state):
    """torch.save of plain containers and tensors, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())

NETS = {str: {str: torch.Tensor}}

CHECKPOINT = dict(config=dict, step=int, seconds=[float, float], processes=int, nets=NETS,
                  opts={str: {"state": dict, "param_groups": [dict]}}, rng=[torch.Tensor, [torch.Tensor], torch.Tensor])


def load_checkpoint(path, device="cpu"):
    """torch.load(weights_only=True): a hostile file cannot run code; a broken one, if by one bit, gets one sentence."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; start without --resume, or check --out")
    try:
        with zipfile.ZipFile(path) as f:
            if sum(part.file_size for part in f.infolist()) > os.path.getsize(path):  # torch never compresses
                raise ValueError("it would grow while it is unpacked")
            if bad := f.testzip():                                # torch.load does not compare checksums
                raise ValueError(f"wrong checksum of {bad}")
        saved = torch.load(path, map_location=device, weights_only=True)
        if problem := mismatch(saved, CHECKPOINT):
            raise ValueError(problem)
        return saved
    except Exception as e:                                        # zip, pickle and EOF errors share no base class
        raise UserError(f"checkpoint {path} is corrupt or not ours ({first_line(e)}); delete it or restore a copy") from e


def trim_log(path, step):
    """Keep the lines up to a checkpoint's step: what a killed run logged after it will be logged again."""
    def step_of(line):
        with suppress(ValueError, RecursionError):                # a line that a kill or a full disk cut short
            record = json.loads(line)
            if not mismatch(record, {"step": int}):
                return record["step"]
        return math.inf

    lines = read_bytes(path).splitlines() if path.exists() else []
    write_atomic(path, b"".join(line + b"\n" for line in lines if step_of(line) <= step))
