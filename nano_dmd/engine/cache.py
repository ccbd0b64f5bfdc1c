"""What was made once and is kept: teachers, noise-image pairs, decoded images, embeddings, latents.

    python -m nano_dmd.engine.cache                     what there is, how large, made of what
    python -m nano_dmd.engine.cache --clear             delete all but downloads
    python -m nano_dmd.engine.cache --clear text pairs  delete the entries whose names begin so

An entry is NAME-KEY. KEY is a digest of everything the entry depends on, files by a fingerprint,
never by name alone. NAME-KEY.made.json beside it lists what KEY was made of.
"""

import hashlib
import json
import os
import secrets
import time
from pathlib import Path

from nano_dmd.engine.config import OWN_NAMES, parser
from nano_dmd.engine.files import (UserError, blame, cache_dir, command, delete, replace,
                                   unwritable, write_json)


def digest(thing):
    """Ten hex digits that name some bytes, or something that json can write."""
    data = thing if isinstance(thing, bytes) else json.dumps(thing, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:10]


def visible(name):
    return not name.startswith(".") and name != "__MACOSX"


def visible_files(folder, above=()):
    """Sorted paths of all files under a folder, relative to it ("a/b.png"); hidden ones left out.

    Links are followed, but not back to a folder above.  raises UserError
    """
    found = []
    with blame(f"cannot look into {folder}"):
        here = os.path.realpath(folder)            # some versions of Python refuse zeros here
        for name in os.listdir(folder) if here not in above else []:
            path = os.path.join(folder, name)
            if visible(name) and os.path.isdir(path):
                found += [f"{name}/{file}" for file in visible_files(path, (*above, here))]
            elif visible(name):
                found.append(name)
    return sorted(found)


def fingerprint(*files):
    """Ten hex digits that change when one of the files is replaced or written to.

    They come from paths, sizes and two times: of the last write, which a copy may keep, and of the
    last change of any kind.  A folder stands for the files in it.  raises UserError
    """
    stamps = []
    for path in map(os.path.abspath, files):
        for name in visible_files(path) if os.path.isdir(path) else [""]:
            file = Path(path, name)
            with blame(f"cannot look at {file}", "remove it, if it is a link to something gone"):
                s = file.stat()
            stamps.append((str(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    return digest(stamps)


def sources(cfg):
    """{setting: fingerprint} of the folders and files that --data and --prompts name."""
    named = {name: getattr(cfg, name) for name in ("data", "prompts")}
    return {name: fingerprint(v) for name, v in named.items()
            if v and v not in OWN_NAMES and os.path.exists(v)}


def made_file(path):
    """The file that says what the entry at path was made of."""
    return path.with_name(path.name.partition(".")[0] + ".made.json")


def cached(name, made_of, make, suffix="", parts=("",)):
    """The path of an entry, a file or a folder.  If it or one of its parts is missing, make(path).

    It is made under another name and then renamed, so nobody sees half of it.  If two processes
    make the same one, the slower drops its folder or replaces the file.  made_of: all it depends on
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


def entries():
    """[(path, bytes, seconds since it was made, what it was made of)], the largest first."""
    found = []
    for path in cache_dir().iterdir() if cache_dir().is_dir() else []:
        if not path.name.endswith(".made.json"):
            size = sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())
            made = made_file(path).read_text(errors="replace") if made_file(path).is_file() else "?"
            found.append((path, size, time.time() - path.stat().st_mtime, " ".join(made.split())))
    return sorted(found, key=lambda entry: (-entry[1], entry[0]))


def main(argv=None):
    p = parser("python -m nano_dmd.engine.cache", __doc__)
    p.add_argument("--clear", nargs="*", metavar="NAME", help="delete entries; all without a NAME")
    clear, total = p.parse_args(argv).clear, 0
    found = [e for e in entries() if e[0].name.lstrip(".").startswith(tuple(clear or [""]))]
    if clear and not found:
        raise UserError(f"nothing in {cache_dir()} begins with {' or '.join(clear)}")
    if clear == []:                                # keep downloads: some were put there by hand
        downloads = ("cifar10", ".pkl", ".pkl.json")
        found = [e for e in found if not e[0].name.endswith(downloads)]
    for path, size, age, made in found:
        total += size
        if clear is not None:
            with blame(f"cannot delete {path}"):
                delete(path)
                delete(made_file(path))
        print(f"{size / 2**20:9.1f} MiB  {age / 86400:5.1f} days  {path.name:40}  {made:.100}")
    deleted = "" if clear is None else ", deleted"
    print(f"{total / 2**20:9.1f} MiB in {cache_dir()}{deleted}")


if __name__ == "__main__":
    command(main)
