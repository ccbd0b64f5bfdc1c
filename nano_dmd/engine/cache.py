"""What was made once and is kept: teachers, noise-image pairs, decoded images, embeddings, latents.

    python -m nano_dmd.engine.cache                     what there is, how large, made of what
    python -m nano_dmd.engine.cache --clear             delete all but downloads
    python -m nano_dmd.engine.cache --clear text pairs  delete the entries whose names begin so

An entry is NAME-KEY. KEY is a digest of everything the entry depends on: the files behind a name,
not the name. NAME-KEY.made.json beside it says what that was.
"""

import hashlib
import json
import os
import secrets
import time

from nano_dmd.engine.config import OWN_NAMES, parser
from nano_dmd.engine.files import (UserError, blame, cache_dir, command, delete, replace,
                                   unwritable, write_json)


def digest(thing):
    """Ten hex digits that name some bytes, or something that json can write."""
    data = thing if isinstance(thing, bytes) else json.dumps(thing, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:10]


def visible(name):
    return not name.startswith(".") and name != "__MACOSX"


def visible_files(folder):
    """The files in a folder and the folders in it, "a/b.png" for example, sorted; no hidden ones.

    Links are followed, but not in circles.  raises UserError where a folder cannot be read
    """
    def stop(error):
        raise error

    found, chains = [], {}
    with blame(f"cannot look into {folder}"):
        for where, folders, files in os.walk(folder, followlinks=True, onerror=stop):
            real, above = os.path.realpath(where), chains.get(os.path.dirname(where), ())
            chains[where] = (*above, real)
            if real in above:
                folders.clear()
                continue
            folders[:] = filter(visible, folders)
            found += [os.path.relpath(os.path.join(where, f), folder) for f in files if visible(f)]
    return sorted(f.replace(os.sep, "/") for f in found)


def fingerprint(*files):
    """Ten hex digits that change when one of some files is another one or was written to.

    They come from names, sizes and times, also the time of the last change of any kind: copies may
    keep the other one.  A folder stands for the files in it.  raises UserError
    """
    stamps = []
    for path in map(os.path.abspath, files):
        folder = os.path.isdir(path)
        for name in visible_files(path) if folder else [""]:
            file = os.path.join(path, name) if folder else path
            with blame(f"cannot look at {file}", "remove it, if it is a link to something gone"):
                s = os.stat(file)
            stamps.append((file, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    return digest(stamps)


def sources(cfg):
    """{setting: fingerprint} of the folders and files that --data and --prompts name."""
    named = {name: getattr(cfg, name) for name in ("data", "prompts")}
    return {name: fingerprint(v) for name, v in named.items()
            if v and v not in OWN_NAMES and os.path.exists(v)}


def cached(name, made_of, make, suffix="", parts=("",)):
    """The path of an entry, a file or a folder.  If it or one of its parts is missing, make(path).

    It is made under another name and then renamed, so nobody sees half of it.  Of two processes
    that make the same one, the slower drops its own.  made_of: everything the entry depends on
    """
    path = cache_dir() / f"{name}-{digest(made_of)}{suffix}"
    begun = path.exists()                          # asked first: an entry that appears now is whole
    if all((path / part).exists() for part in parts):
        return path
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if begun:                                  # somebody deleted a part of it
            delete(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(new)
        write_json(made_file(path), made_of)
        replace(new, path)
    except OSError as e:
        if not path.exists():                      # else another process was faster
            raise unwritable(path, e) from e
    finally:
        delete(new)
    return path


def made_file(path):
    """What the entry at path was made of, in JSON."""
    return path.with_name(path.name.partition(".")[0] + ".made.json")


def entries():
    """[(path, bytes, seconds since it was made, what it was made of)], the largest first."""
    found = []
    for path in cache_dir().iterdir() if cache_dir().is_dir() else []:
        if not path.name.endswith(".made.json"):
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            made = made_file(path).read_text(errors="replace") if made_file(path).is_file() else "?"
            size, age = sum(p.stat().st_size for p in files), time.time() - path.stat().st_mtime
            found.append((path, size, age, " ".join(made.split())))
    return sorted(found, key=lambda entry: (-entry[1], entry[0]))


def downloaded(path):
    """Whether an entry came from elsewhere, perhaps by hand: only its name deletes it."""
    return path.name == "cifar10" or path.name.endswith((".pkl", ".pkl.json"))


def main(argv=None):
    p = parser("python -m nano_dmd.engine.cache", __doc__)
    p.add_argument("--clear", nargs="*", metavar="NAME", help="delete entries; all without a NAME")
    clear = p.parse_args(argv).clear
    found, total = entries(), 0
    if clear:
        found = [e for e in found if e[0].name.lstrip(".").startswith(tuple(clear))]
        if not found:
            raise UserError(f"nothing in {cache_dir()} begins with {' or '.join(clear)}: see "
                            "python -m nano_dmd.engine.cache")
    elif clear is not None:
        found = [e for e in found if not downloaded(e[0])]
    for path, size, age, made in found:
        total += size
        if clear is not None:
            with blame(f"cannot delete {path}"):
                delete(path)
                delete(made_file(path))
        print(f"{size / 2**20:9.1f} MiB  {age / 86400:5.1f} days  {path.name:40}  {made:.100}")
    deleted = ", deleted" if clear is not None else ""
    print(f"{total / 2**20:9.1f} MiB in {cache_dir()}{deleted}")


if __name__ == "__main__":
    command(main)
