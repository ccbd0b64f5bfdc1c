"""The cache: a key names all that the value depends on, nobody sees half an entry, and a person can see what is there.

Without this somebody's run goes on with the images, embeddings or teacher of another project, and says nothing.
"""

import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from nano_dmd import evaluate
from nano_dmd.engine import cache, find
from nano_dmd.metrics.images import is_digits
from nano_dmd.teachers import data, zoo
from nano_dmd.engine.cache import cached, fingerprint, visible_files
from nano_dmd.engine.files import UserError, cache_dir, command, load_tensors, save_tensors
from nano_dmd.engine.config import resolve
from nano_dmd.denoiser import FromEps, FromV
from nano_dmd.teacher import Teacher, load_teacher
from toy.mixtures import MIXTURES, ring


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))


def images(folder, value, count=8):
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value, i, 0)).save(path)


def weight(net):
    return sum(p.double().abs().sum().item() for p in net.parameters())


# ---- keys


def test_fingerprints_see_names_sizes_and_times(tmp_path):
    """Each change gives another one; hidden files and reading the files change nothing; one byte more or a touch does."""
    folder, seen = tmp_path / "f", []

    def look():
        seen.append(fingerprint(folder))

    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a").write_text("1")
    look()
    (folder / ".hidden").write_text("x")
    (folder / "sub" / "a").read_text()
    assert fingerprint(folder) == seen[0]
    (folder / "sub" / "a").write_text("12")
    look()
    os.utime(folder / "sub" / "a", ns=(0, 1))
    look()
    (folder / "sub" / "a").write_text("34")                       # of the same size, and given the old time by its copier
    os.utime(folder / "sub" / "a", ns=(0, 1))
    look()
    (folder / "sub" / "a").rename(folder / "sub" / "b")
    look()
    shutil.move(folder, tmp_path / "g")
    seen.append(fingerprint(tmp_path / "g"))
    assert len(set(seen)) == 6


def test_a_mixture_is_its_numbers(monkeypatch):
    """A network fitted to a mixture that was edited since is of no use: ring8 with other widths is another ring8."""
    def fit():
        zoo.fit_or_load("toy:ring8", "toy:ring8", zoo.RECIPES["toy"], torch.device("cpu"), steps=1, show=False)
        return len([*cache_dir().glob("teacher-toy-ring8-*.made.json")])

    count = fit()
    assert fit() == count
    monkeypatch.setitem(MIXTURES, "ring8", lambda: ring([0.5] + [0.5 / 7] * 7))
    assert fit() == count + 1


def test_visible_files_follow_links_but_not_in_circles(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").write_text("")
    (tmp_path / "a" / "b" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "twin").symlink_to(tmp_path / "a" / "b")
    for name in (".ipynb_checkpoints/x-checkpoint.png", "__MACOSX/x.png", "a/._x.png", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert visible_files(tmp_path) == ["a/b/x.png", "twin/x.png"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_folders_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o000)
    with pytest.raises(UserError, match="cannot look into .*shut"):
        visible_files(tmp_path)


def test_a_teacher_is_of_the_images_that_are_there(tmp_path, monkeypatch):
    """The same name in two projects, and images changed in place: three teachers; the same again: none is trained."""
    seen = []
    for place, value in (("p", 0), ("q", 255), ("p", 128)):
        images(tmp_path / place / "imgs", value)
        monkeypatch.chdir(tmp_path / place)
        teacher = load_teacher("cifar10-small", data="imgs", steps=2, show=False)
        seen.append(weight(teacher.net))
        assert teacher.data == str(tmp_path / place / "imgs")     # to be found from anywhere
    assert len(set(seen)) == 3
    monkeypatch.setattr(zoo, "train_denoiser", lambda *a: pytest.fail("trained again"))
    assert weight(load_teacher("cifar10-small", data="imgs", steps=2, show=False).net) == seen[2]


def pairs_key(teacher, **changes):
    """The name of the entry that these pairs would have; nothing is computed."""
    cfg = resolve(dict(preset="digits", teacher="digits", pairs=2) | changes)
    def stop(name, made_of, make, suffix):
        raise KeyError(cache.digest(made_of))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError) as key:
        patch.setattr(find, "cached", stop)
        find.cached_pairs(cfg, teacher, "cpu")
    return key.value.args[0]


def test_pairs_depend_on_all_that_the_teacher_computes_with(tmp_path):
    """The same weights under another schedule, another prediction, other steps: other pairs."""
    torch.manual_seed(0)
    net = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
                      layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    keys = []
    for beta, prediction in ((0.02, "epsilon"), (0.01, "epsilon"), (0.02, "v_prediction")):
        folder = tmp_path / f"{beta}{prediction}"
        DDPMPipeline(net, DDIMScheduler(beta_end=beta, prediction_type=prediction)).save_pretrained(folder)
        teacher = load_teacher(str(folder))
        assert type(teacher.denoiser) is {"epsilon": FromEps, "v_prediction": FromV}[prediction]
        keys.append(pairs_key(teacher))
    path = folder / "unet" / "config.json"                        # nothing of it is a weight
    path.write_text(path.read_text().replace('"flip_sin_to_cos": true', '"flip_sin_to_cos": false'))
    assert pairs_key(load_teacher(str(folder))) not in keys
    keys += [pairs_key(teacher, pairs=3), pairs_key(teacher, pair_steps=5), pairs_key(teacher, pair_sigma=3.0)]
    assert len(set(keys)) == 6 and pairs_key(teacher) == keys[2]


def test_other_peoples_small_grey_sets_are_not_the_digits():
    """Ten classes of 8x8 pixels have the metrics of any images, and leave the classifier of the digits alone."""
    rng = np.random.default_rng(0)
    mine = data.TensorData(torch.from_numpy(rng.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)), torch.arange(20) % 10)
    assert not is_digits(mine) and is_digits(data.load_digits())
    assert set(evaluate.measure(lambda z, cond: 0 * z[0], mine, 1, n=20)) == set(evaluate.IMAGES)


# ---- writing


def test_two_writers_of_one_entry_both_end_well():
    """Each sees the entry absent and makes it; the slower leaves its own away. A reader meets no half of it."""
    both, found = threading.Barrier(2), []

    def make(path):
        path.mkdir()
        both.wait(10)
        (path / "a").write_text("whole")
        assert not (cache_dir() / path.name).exists() or (cache_dir() / path.name / "a").read_text() == "whole"

    threads = [threading.Thread(target=lambda: found.append(cached("thing", [1], make))) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found[0] == found[1] and (found[0] / "a").read_text() == "whole"
    assert sorted(p.name for p in cache_dir().iterdir()) == [found[0].name, f"{found[0].name}.made.json"]
    assert cached("thing", [1], lambda path: pytest.fail("made again")) == found[0]


def test_an_entry_that_fails_leaves_nothing():
    def make(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("thing", [2], make, ".npy")
    assert list(cache_dir().iterdir()) == []


DAMAGE = {"empty": lambda p: p.write_bytes(b""), "cut": lambda p: p.write_bytes(p.read_bytes()[:-5]),
          "text": lambda p: p.write_text("hello"), "other": lambda p: np.save(p, np.zeros((3, 2))),
          "objects": lambda p: np.save(p, np.array([{}] * 3), allow_pickle=True)}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_damaged_tables_are_a_sentence(tmp_path, name, damage):
    images(tmp_path / "imgs", 3)
    data.load_data(str(tmp_path / "imgs"))
    path, = cache_dir().glob(f"data-*/{name}")
    path.unlink()
    with open(path, "wb"):
        DAMAGE[damage](path)
    with pytest.raises(UserError, match="delete it to have it made again"):
        data.load_data(str(tmp_path / "imgs"))


@pytest.mark.parametrize("wrong", [dict(labels=[0, 99, 1]), dict(labels=[-1, 0, 1]), dict(labels=[0, 1]),
                                   *(dict(pixels=np.zeros(shape, np.uint8)) for shape in ((3, 4, 8, 8), (3, 3, 8, 9), (0, 3, 8,
                                   8)))])
def test_tables_that_do_not_belong_together(tmp_path, wrong):
    content = dict(pixels=np.zeros((3, 3, 8, 8), np.uint8), labels=[0, 1, 2]) | wrong

    def make(path):
        path.mkdir()
        np.save(path / "images.npy", content["pixels"])
        np.save(path / "labels.npy", np.array(content["labels"], dtype=np.int64))

    folder = cached("data", ["x"], make)
    if wrong.get("labels") == [0, 99, 1]:                         # a hundred classes can be meant
        assert data.decoded("data", ["x"], None)[1].tolist() == [0, 99, 1]
        return
    with pytest.raises(UserError, match=f"{folder} is damaged"):
        data.decoded("data", ["x"], None)


@pytest.mark.parametrize("change", [lambda t: t.pop("x"), lambda t: t.update(z=t["z"][:1]), lambda t: t.update(x=t["x"].long()),
                                    lambda t: t["x"].fill_(torch.nan), lambda t: t["cond"].fill_(10), lambda t: t.pop("cond"),
                                    lambda t: t.update(cond=t["cond"].float()), lambda t: t["cond"].fill_(-1)])
def test_damaged_pairs_are_a_sentence(change, monkeypatch):
    monkeypatch.setattr(find, "make_pairs", lambda denoiser, z, cond, batch, **args: 0 * z)
    net = torch.nn.Identity()
    teacher = Teacher("images", net, (1, 8, 8), 10, 0.5, "digits", net, {"network": "unet", "args": {}})
    cfg = resolve(dict(preset="digits", pairs=3))
    assert find.cached_pairs(cfg, teacher, torch.device("cpu"))["z"].shape == (3, 1, 8, 8)
    path, = cache_dir().glob("pairs-*.safetensors")
    change(tensors := load_tensors(path))
    save_tensors(path, tensors)
    with pytest.raises(UserError, match="is damaged: .*delete it to have it made again"):
        find.cached_pairs(cfg, teacher, torch.device("cpu"))


# ---- seeing and clearing


def test_the_cache_can_be_seen_and_cleared(tmp_path, capsys):
    images(tmp_path / "imgs", 3)
    data.load_data(str(tmp_path / "imgs"))
    cached("text", {"model": "sd"}, lambda path: path.write_bytes(bytes(2**20)), ".npy")
    next(cache_dir().glob("data-*.made.json")).write_text("imgs {")                   # damaged: shown as it is
    (cache_dir() / ".text-abc.tmp").mkdir()                       # what a killed process left
    cache.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "1.0 MiB" in lines[0] and '"model": "sd"' in lines[0] and "imgs" in lines[1] and len(lines) == 4
    cache.main(["--clear", "text"])
    assert [p.name[:5] for p in sorted(cache_dir().iterdir())] == ["data-", "data-"]
    (cache_dir() / "edm.pkl").write_bytes(b"a download")
    cache.main(["--clear"])
    assert [p.name for p in cache_dir().iterdir()] == ["edm.pkl"]
    cache.main(["--clear", "edm"])
    assert list(cache_dir().iterdir()) == [] and "deleted" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command(lambda: cache.main(["--clear", "nope"]))
    shutil.rmtree(cache_dir())
    cache.main([])
    assert "0.0 MiB" in capsys.readouterr().out


def test_what_made_an_entry_stands_beside_it():
    path = cached("thing", {"a": "b", "n": 3}, lambda path: path.write_text(""), ".npy")
    assert json.loads((cache_dir() / f"{path.stem}.made.json").read_text()) == {"a": "b", "n": 3}


def test_a_folder_that_no_system_can_name():
    """Some versions of Python refuse it in realpath, others later."""
    with pytest.raises(UserError, match="cannot look into"):
        cache.visible_files("\0")
