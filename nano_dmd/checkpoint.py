"""Files that survive: atomic writes, safe reads, one-sentence errors.  Infrastructure, not on the reading path."""

import io
import json
import math
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors


class UserError(Exception):
    """One clear sentence for the person at the keyboard; the command lines print it and exit with code 2."""


def command(main):
    """Run a command line's main(): a UserError or a full memory becomes one sentence and exit code 2."""
    try:
        main()
    except UserError as e:
        sys.exit(_complain(str(e)))
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


def first_line(error, length=120):
    """What an exception has to say in one short line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]


def cache_dir():
    """Where trained teachers and noise-image pairs are kept: $NANO_DMD_CACHE, else ~/.cache/nano_dmd."""
    return Path(os.environ.get("NANO_DMD_CACHE") or Path.home() / ".cache" / "nano_dmd")


def write_atomic(path, data: bytes):
    """Replace path by data, or leave it untouched: temporary file, fsync, rename, fsync of the folder."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(tmp, 0o666 & ~_umask())
            os.replace(tmp, path)
        except BaseException:
            Path(tmp).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise unwritable(path, e) from e


def unwritable(path, error):
    return UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder "
                     "(--out, or $NANO_DMD_CACHE for the cache)")


def append_line(path, obj):
    """One more line of a .jsonl file."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps(obj) + "\n")
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
        path.unlink()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, obj):
    write_atomic(path, (json.dumps(obj, indent=2) + "\n").encode())


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}; is this a run folder?") from e


def save_tensors(path, tensors, **metadata):
    """Write a dict of tensors as safetensors.  All metadata in one entry: the order of several is random."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, dump_safetensors(tensors, {"nano_dmd": json.dumps(metadata)} if metadata else None))


def load_tensors(path):
    """Read a safetensors file; never executes anything in it."""
    try:
        return load_safetensors(Path(path).read_bytes())
    except FileNotFoundError as e:
        raise UserError(f"no {path}; is this the folder of a finished run?") from e
    except (OSError, SafetensorError, KeyError) as e:             # KeyError: a number format torch does not have
        raise UserError(f"cannot read {path}: {first_line(e)}; delete it to have it made again") from e


def own_state(module):
    """What of a module's state is its own: for LoRA (lora.py) the low-rank weights alone, else everything."""
    state = module.state_dict()
    return {name: t for name, t in state.items() if "lora_" in name} or state


def load_weights(module, tensors, path):
    """Strict load_state_dict, of own_state, whose complaint names the file and the first difference."""
    own = own_state(module)
    for name in sorted(own.keys() | tensors.keys()):
        have, want = tensors.get(name), own.get(name)
        if have is None or want is None or have.shape != want.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (have, want)]
            raise UserError(f"{path} does not fit this network: {name} is {shapes[0]} in the file and {shapes[1]} here")
    module.load_state_dict(tensors, strict=False)                 # the loop above was strict


def save_checkpoint(path, state):
    """torch.save of plain containers and tensors, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path, device="cpu"):
    """torch.load(weights_only=True): a hostile file cannot run code; a broken one, if by one bit, gets one sentence."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; start without --resume, or check --out")
    try:
        with zipfile.ZipFile(path) as f:
            if bad := f.testzip():                                # torch.load does not compare checksums
                raise ValueError(f"wrong checksum of {bad}")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:                                        # zip, pickle and EOF errors share no base class
        raise UserError(f"checkpoint {path} is corrupt or not ours ({first_line(e)}); delete it or restore a copy") from e


def trim_log(path, step):
    """Keep the lines up to a checkpoint's step: what a killed run logged after it will be logged again."""
    def step_of(line):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):                 # a line that a kill or a full disk cut short
            return math.inf

    lines = path.read_bytes().splitlines() if path.exists() else []
    write_atomic(path, b"".join(line + b"\n" for line in lines if step_of(line) <= step))
