"""Other systems, emulated: what Windows, FUSE and network drives answer, and what they lack. Everything still works there.

Without this a user of Colab's Google Drive or of Windows cannot write a file, though the file is there.
"""

import builtins
import errno
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nano_dmd import compare, evaluate, plot, sample, train
from nano_dmd.engine import cache, files
from nano_dmd.teachers import data
from nano_dmd.engine.files import write_atomic

RUN = ["--preset", "toy", "--method", "sid", "--device", "cpu", "--teacher_steps", "2", "--batch", "8", "--log_every", "1",
       "--save_every", "2"]


def on_windows(patch):
    """A folder cannot be opened as a file, no folder is renamed onto another, and there is no resource."""
    opened, replaced, imported, held = os.open, os.replace, builtins.__import__, []

    def open_(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *args, **kwargs)

    def replace(old, new):
        if os.path.isdir(new) or not held:                        # the first time, a virus scanner looks at the file
            held.append(new)
            raise PermissionError(errno.EACCES, "Access is denied", str(new))
        return replaced(old, new)

    def import_(name, *args, **kwargs):
        if name == "resource":
            raise ImportError("No module named 'resource'")
        return imported(name, *args, **kwargs)

    patch.setattr(os, "open", open_)
    patch.setattr(os, "replace", replace)
    patch.setattr(builtins, "__import__", import_)


def on_a_network_drive(patch):
    """Nothing can be synced, permissions cannot be changed, and files cannot be mapped."""
    load = np.load

    def fsync(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    def load_(path, mmap_mode=None, **kwargs):
        if mmap_mode:
            raise OSError(errno.ENODEV, "No such device")
        return load(path, **kwargs)

    def refuse(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    patch.setattr(os, "fsync", fsync)
    patch.setattr(os, "chmod", refuse)
    patch.setattr(np, "load", load_)


@pytest.mark.parametrize("system", [on_windows, on_a_network_drive])
def test_everything_works_there(system, tmp_path, monkeypatch, quick):
    """A run, its resume, samples, a plot and a data set, with a cache of its own."""
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "photos" / "a.png")
    system(monkeypatch)
    train.main([*RUN, "--steps", "2", "--out", "run"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    train.main(["--resume", "--out", "run"])
    sample.main(["run", "--n", "4", "--out", "x.npy", "--device", "cpu"])
    plot.main(["run", "--out", "x.svg"])
    assert [data.load_data("photos").pixels[0, 0, 0, 0].item() for _ in range(2)] == [9, 9]
    cache.main([])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["peak_memory_mib"] is None) == (system is on_windows)
    assert not list(tmp_path.rglob("*.tmp"))


def test_rows_that_differ_in_case_have_folders_of_their_own():
    """macOS and Windows take runs/A and runs/a for one folder; long rows are cut, and stay different."""
    rows = ["sid --data A", "sid --data a", "sid --data=a", "sid", "dmd " + 90 * "--flip ", "dmd " + 91 * "--flip "]
    names = compare.folder_names(rows)
    assert len({name.casefold() for name in names.values()}) == len(rows) and names["sid"] == "sid"
    assert max(map(len, names.values())) < 120 and names == compare.folder_names(rows[::-1])


def test_devices_are_not_replaced_by_files(tmp_path):
    """Renaming onto /dev/full would put a file there."""
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(files.UserError, match="it exists and is not a file"):
            write_atomic(target, b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_errors_of_the_system_are_one_sentence(tmp_path, monkeypatch, capsys):
    """Names longer than the file system takes, wherever they are given."""
    monkeypatch.chdir(tmp_path)
    long = "A" * 300
    for main, argv in ((plot.main, [long]), (sample.main, [long]), (evaluate.main, [long]), (cache.main, ["--clear", long]),
                       (train.main, ["--out", long]), (train.main, ["--data", long]), (train.main, ["--init", long])):
        with pytest.raises(SystemExit, match="2"):
            files.command(lambda: main(argv))
        assert capsys.readouterr().err.startswith("error: ")


def test_letters_that_a_console_lacks(tmp_path, monkeypatch):
    """A Windows pipe in cp1252 and a folder with a Japanese name: shown by its number, and the run goes on."""
    done = subprocess.run([sys.executable, "-m", "nano_dmd.train", "--preset", "toy", "--out", "\u56f3", "--dry-run"],
                          capture_output=True, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"\\u56f3" in done.stdout


def test_a_user_without_a_home_says_where_to_keep_things(monkeypatch):
    monkeypatch.delenv("NANO_DMD_CACHE")
    monkeypatch.setattr(files.Path, "home",
        lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(files.UserError, match="say by .NANO_DMD_CACHE"):
        files.cache_dir()
