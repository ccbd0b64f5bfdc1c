"""Files that survive: atomic writes, safe reads, one-sentence errors.  Infrastructure, not on the reading path."""

import io
import json
import os
import sys
import tempfile
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
    except (torch.OutOfMemoryError, MemoryError) as e:
        sys.exit(_complain(f"out of memory ({str(e).splitlines()[0][:100] if str(e) else 'CPU'}); try a smaller --batch"))
    except KeyboardInterrupt:
        print("\nstopped; add --resume to go on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _complain(sentence):
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def cache_dir():
    """Where trained teachers and noise-image pairs are kept: $NANO_DMD_CACHE, else ~/.cache/nano_dmd."""
    return Path(os.environ.get("NANO_DMD_CACHE") or Path.home() / ".cache" / "nano_dmd")


def write_atomic(path, data: bytes):
    """Replace path by data, or leave it untouched: temporary file, fsync, rename, fsync of the folder."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(tmp, 0o666 & ~_umask())
            os.replace(tmp, path)
        except BaseException:
            os.unlink(tmp)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; free some space or choose another --out") from e


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
    """Write a dict of tensors as safetensors; metadata values become strings."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, dump_safetensors(tensors, {k: str(v) for k, v in metadata.items()}))


def load_tensors(path):
    """Read a safetensors file; never executes anything in it."""
    try:
        return load_safetensors(Path(path).read_bytes())
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read {path}: {e}; delete it to have it made again") from e


def load_weights(module, tensors, path):
    """Strict load_state_dict whose complaint names the file and the first difference."""
    own = module.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        have, want = tensors.get(name), own.get(name)
        if have is None or want is None or have.shape != want.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (have, want)]
            raise UserError(f"{path} does not fit this network: {name} is {shapes[0]} in the file and {shapes[1]} here")
    module.load_state_dict(tensors)


def save_checkpoint(path, state):
    """torch.save of plain containers and tensors, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path, device="cpu"):
    """torch.load(weights_only=True): a hostile file cannot run code; a broken one gets one sentence."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; start without --resume, or check --out")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:                                        # zip, pickle and EOF errors share no base class
        reason = str(e).splitlines()[0][:120]
        raise UserError(f"checkpoint {path} is corrupt or not ours ({reason}); delete it or restore a copy") from e
