"""What was made once and is kept: trained teachers, noise-image pairs, decoded images, embeddings, latents.

    python -m nano_dmd.engine.cache                     what there is, how large, and what it was made of
    python -m nano_dmd.engine.cache --clear             delete all but downloads; it will be made again when it is needed
    python -m nano_dmd.engine.cache --clear text pairs  delete the entries whose names begin so

An entry is NAME-KEY, and KEY is a digest of everything the entry depends on: no name that could mean something else
tomorrow or in another folder, but the files behind it. NAME-KEY.made.json beside it says what that was.
"""

import hashlib
import json
import os
import secrets
import time

from nano_dmd.engine.config import OWN_NAMES, parser
from nano_dmd.engine.files import (UserError, cache_dir, command, delete, replace, unwritable,
                                   write_json)


def digest(thing):
    """Ten hex digits that name some bytes, or something that json can write."""
    data = thing if isinstance(thing, bytes) else json.dumps(thing, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:10]


def visible_files(folder):
    """The files in a folder and the folders in it, "a/b.png" for example, sorted.

    Left out is what a person does not see: hidden files, the copies in .ipynb_checkpoints, what macOS keeps.  Links are
    followed, but not in circles.  raises UserError where a folder cannot be read
    """
    found, chains = [], {}
    try:
        for where, folders, files in os.walk(folder, followlinks=True, onerror=_give_up):
            real, above = os.path.realpath(where), chains.get(os.path.dirname(where), ())
            chains[where] = (*above, real)
            folders[:] = [f for f in folders if visible(f) and real not in above]
            found += [os.path.relpath(os.path.join(where, f), folder) for f in files if visible(f) and real not in above]
    except (OSError, ValueError) as e:                            # ValueError: a name that holds a zero byte
        raise UserError(f"cannot look into {folder}: {getattr(e, 'filename', '')} {getattr(e, 'strerror', e)}") from e
    return sorted(f.replace(os.sep, "/") for f in found)


def visible(name):
    return not name.startswith(".") and name != "__MACOSX"


def _give_up(error):
    raise error


def fingerprint(*files):
    """Ten hex digits that change when one of some files is another one or was written to: names, sizes and times, also the
    time of the last change of any kind, since copies may keep the other one.

    A folder stands for the files in it.  raises UserError where one cannot be looked at
    """
    stamps = []
    try:
        for path in map(os.path.abspath, files):
            for file in [os.path.join(path, f) for f in visible_files(path)] if os.path.isdir(path) else [path]:
                s = os.stat(file)
                stamps.append((file, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    except OSError as e:
        raise UserError(f"cannot look at {e.filename}: {e.strerror}; remove it, if it is a link to something gone") from e
    return digest(stamps)


def sources(cfg):
    """{setting: fingerprint} of what a run reads besides its settings: a folder or file named by --data or --prompts."""
    return {name: fingerprint(v) for name in ("data", "prompts") if (v := getattr(cfg,
        name)) and v not in OWN_NAMES and os.path.exists(v)}


def cached(name, made_of, make, suffix="", parts=("",)):
    """The path of an entry, a file or a folder; where it, or one of its parts, is not there, make(path) writes it.

    It is written under another name first, so nobody sees half of it, and of two processes that make the same one the
    slower leaves its own away.  made_of  what the entry depends on, all of it
    """
    path = cache_dir() / f"{name}-{digest(made_of)}{suffix}"
    begun = path.exists()                                         # asked first: an entry that appears now is whole
    if all((path / part).exists() for part in parts):
        return path
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if begun:                                                 # somebody deleted a part of it
            delete(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(new)
        write_json(made_file(path), made_of)
        replace(new, path)
    except OSError as e:
        if not path.exists():                                     # else another process was faster
            raise unwritable(path, e) from e
    finally:
        delete(new)
    return path


def made_file(path):
    """What the entry at path was made of, in JSON."""
    return path.with_name(path.name.partition(".")[0] + ".made.json")


def entries():
    """[(path, bytes, seconds since it was made, what it was made of)] of the cache, the largest first."""
    found = []
    for path in sorted(cache_dir().iterdir()) if cache_dir().is_dir() else []:
        if not path.name.endswith(".made.json"):
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            made = " ".join(made_file(path).read_text(errors="replace").split()) if made_file(path).is_file() else "?"
            size = sum(p.stat().st_size for p in files)
            found.append((path, size, time.time() - path.stat().st_mtime, made))
    return sorted(found, key=lambda entry: -entry[1])


def downloaded(path):
    """Whether an entry came from elsewhere, perhaps by hand: it is deleted by its name alone."""
    return path.name == "cifar10" or path.name.endswith((".pkl", ".pkl.json"))


def remove(path):
    """Delete an entry and what is said of it."""
    try:
        delete(path)
        delete(made_file(path))
    except OSError as e:
        raise UserError(f"cannot delete {path}: {e.strerror or e}") from e


def main(argv=None):
    p = parser("python -m nano_dmd.engine.cache", __doc__)
    p.add_argument("--clear", nargs="*", metavar="NAME", help="delete the entries whose names begin so; all without a name")
    args = p.parse_args(argv)
    found, total = entries(), 0
    if args.clear is not None:
        named = tuple(args.clear)
        found = [entry for entry in found if (entry[0].name.lstrip(".").startswith(named) if named else not downloaded(entry[0]))]
    if args.clear and not found:
        raise UserError(f"nothing in {cache_dir()} begins with {' or '.join(args.clear)}: see python -m nano_dmd.engine.cache")
    for path, size, age, made in found:
        total += size
        if args.clear is not None:
            remove(path)
        print(f"{size / 2**20:9.1f} MiB  {age / 86400:5.1f} days  {path.name:40}  {made:.100}")
    print(f"{total / 2**20:9.1f} MiB in {cache_dir()}{', deleted' if args.clear is not None else ''}")


if __name__ == "__main__":
    command(main)
