"""Images and their captions, in a folder or in WebDataset shards.

    a folder   NAME.txt beside each image, or a metadata.jsonl with file_name and text
    .tar       a shard, or a folder of shards: KEY.jpg with KEY.txt or KEY.json
"""

import tarfile
from pathlib import Path
from typing import NamedTuple

from nano_dmd.engine.files import (UserError, blame, note, parse_json, read_bytes, read_lines,
                                   text_of)
from nano_dmd.engine.schema import mismatch
from nano_dmd.teachers import data

COLUMNS = ("text", "prompt", "caption")            # what a caption may be called


class Place(NamedTuple):
    """Where an image is: a file, or `size` bytes of a shard from `start`."""

    path: Path
    start: int = 0
    size: int = 0

    def read(self):
        """Its bytes."""
        if not self.start:
            return read_bytes(self.path)
        with blame(f"cannot read {self}"), open(self.path, "rb") as f:
            f.seek(self.start)
            return f.read(self.size)

    def __str__(self):
        return f"{self.path}" + f", byte {self.start}" * bool(self.start)


def captioned(place):
    """([Place of an image], [caption]) of a folder of images or shards, or of one shard."""
    place = Path(place)
    shards = [place] if place.suffix == ".tar" else sorted(place.glob("*.tar"))
    found = in_shards(shards) if shards else in_folder(place)
    images, captions = map(list, found)
    if not images:
        raise UserError(f"no images in {place}: it should hold KEY.jpg and KEY.txt")
    if "" in captions:
        note(f"{captions.count('')} captions in {place} are empty, that of "
             f"{images[captions.index('')].path.name} for example")
    if None in captions:
        raise UserError(f"{captions.count(None)} of {len(images)} images have no caption, "
                        f"{images[captions.index(None)]} for example: put NAME.txt beside each "
                        "image, or a metadata.jsonl with file_name and text in the folder")
    return images, captions


def in_folder(folder):
    """(places, captions) of a folder of images; None for an image without a caption."""
    files, listed = data.image_files(folder), folder / "metadata.jsonl"
    places = [Place(f) for f in files]
    if not listed.is_file():
        texts = [f.with_suffix(".txt") for f in files]
        return places, [" ".join(line for _, line in read_lines(t)) if t.is_file() else None
                        for t in texts]
    rows = {}
    for i, line in read_lines(listed):
        name, caption = caption_of(line, f"{listed}, line {i}")
        if name in rows:
            raise UserError(f"{listed}, line {i}: {name} has a caption already; give it one")
        rows[name] = caption
    captions = [rows.pop(f.relative_to(folder).as_posix(), None) for f in files]
    if rows:
        note(f"{listed} has captions for {len(rows)} images that are not there, "
             f"{next(iter(rows))} for example")
    return places, captions


def caption_of(line, where):
    """(file name, caption) of a line of metadata.jsonl; text may be called prompt or caption."""
    row = parse_json(line, where)
    column = column_of(row)
    if problem := mismatch(row, {"file_name": str, column: str}):
        raise UserError(f"cannot use {where}: {problem}; it needs file_name and text")
    return row["file_name"].replace("\\", "/").removeprefix("./"), row[column].strip()


def column_of(row):
    named = row if isinstance(row, dict) else {}
    return next((c for c in COLUMNS if c in named), COLUMNS[0])


def in_shards(shards):
    """(places, captions) in the order of the shards and of their members."""
    places, captions = [], []
    left = []
    for shard in shards:
        images, texts = {}, {}                     # by key: a name up to its first dot
        with blame(f"cannot read {shard}", "give uncompressed .tar files of images and captions"):
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    key, _, suffix = member.name.rpartition("/")[2].partition(".")
                    key = f"{member.name.rpartition('/')[0]}/{key}"
                    new = f".{suffix.lower()}" in data.SUFFIXES and key not in images
                    if member.isfile() and new:
                        images[key] = Place(shard, member.offset_data, member.size)
                    elif member.isfile() and suffix in ("txt", "json"):
                        caption = caption_in(archive, member, suffix, shard)
                        texts[key] = caption if caption is not None else texts.get(key)
                    elif member.isfile():
                        left.append(member.name)
        places += images.values()
        captions += [texts.get(key) for key in images]
    if left:
        note(f"{len(left)} files in these shards are left out, {left[0]} for example")
    return places, captions


def caption_in(archive, member, suffix, shard):
    """The caption in a member KEY.txt or KEY.json of a shard; None if the .json has none."""
    words, where = archive.extractfile(member).read(), f"{member.name} in {shard}"
    if suffix == "txt":
        return " ".join(text_of(words, where).split())
    row = parse_json(words, where)
    return row[column_of(row)].strip() if not mismatch(row, {column_of(row): str}) else None
