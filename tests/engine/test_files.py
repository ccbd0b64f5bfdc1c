"""Files: a kill or a full disk costs nothing that was there, a hostile file does nothing, a broken one says so.

Without these a user loses a night of training to a half-written checkpoint, or a machine to somebody's pickle.
"""

import errno
import json
import os
import pickle
import random
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch

from nano_dmd import methods
from nano_dmd.engine import files, runs
from nano_dmd.engine.find import cached_pairs, find_teacher
from nano_dmd.engine.files import (UserError, append_line, check_writable, load_checkpoint,
                                   load_tensors, load_weights, read_json, remove_leftovers,
                                   save_checkpoint, save_tensors, write_atomic)
from nano_dmd.engine.config import resolve
from nano_dmd.teacher import load_teacher
from nano_dmd.engine.prepare import prepare

STATE = dict(step=3, seconds=[1.0, 2.0], nets={"fake": {"w": torch.arange(150.0).view(50, 3)}}, config={}, processes=1, opts={},
             rng=[torch.get_rng_state(), [], torch.get_rng_state()])


def sentence(function, *args):
    """The UserError that function(*args) raises, as one line."""
    with pytest.raises(UserError) as error:
        function(*args)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- writing


def test_write_atomic_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and names(path.parent) == ["file"]
    (other := path.with_name("other")).touch()                    # readable like any other new file
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("module, call", [(files.os, "fsync"), (files, "open"), (files.os, "replace")],
                         ids=["fsync", "open", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_write_atomic_keeps_the_old_file(tmp_path, monkeypatch, module, call, error):
    """Whatever goes wrong before the rename, the old content stays and no temporary file does."""
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(module, call, fail, raising=False)
    if isinstance(error, OSError):
        assert "No space left on device; free some space" in sentence(write_atomic, path, b"new")
    else:
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_write_atomic_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """A power cut after the rename must not find an empty file: data, then name, then the folder are synced."""
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, lambda *a, f=getattr(os, name), n=name: (calls.append(n), f(*a))[1])
    write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_append_line(tmp_path):
    append_line(tmp_path / "log.jsonl", {"a": 1})
    append_line(tmp_path / "log.jsonl", {"a": 2})
    assert (tmp_path / "log.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
    assert "cannot write" in sentence(append_line, tmp_path, {"a": 3})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always full device")
def test_append_line_to_a_full_disk():
    assert "No space left" in sentence(append_line, "/dev/full", {"a": 1})


def test_check_writable(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "x" / "y")
    assert names(tmp_path) == ["file"]
    assert "file is no folder to write to" in sentence(check_writable, tmp_path / "file")
    assert "file is no folder to write to" in sentence(check_writable, tmp_path / "file" / "x")


def test_remove_leftovers(tmp_path):
    """A save that was killed leaves its temporary file; the next run of the folder removes it and nothing else."""
    (tmp_path / "samples").mkdir()
    for name in (".checkpoint.pt.abc.tmp", "samples/.000010.png.x.tmp", "notes.tmp", ".hidden", "checkpoint.pt"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "checkpoint.pt", "notes.tmp", "samples"] and names(tmp_path / "samples") == []
    remove_leftovers(tmp_path / "nowhere")


# ---- checkpoints


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", STATE)
    return tmp_path / "checkpoint.pt"


def test_checkpoint_round_trip(saved):
    state = load_checkpoint(saved)
    assert state["step"] == 3 and state["seconds"] == [1.0, 2.0]
    torch.testing.assert_close(state["nets"]["fake"]["w"], STATE["nets"]["fake"]["w"], rtol=0, atol=0)
    assert torch.equal(state["rng"][0], STATE["rng"][0])


def test_missing_checkpoint(tmp_path):
    assert "no checkpoint" in sentence(load_checkpoint, tmp_path / "checkpoint.pt")
    assert "no checkpoint" in sentence(load_checkpoint, tmp_path)                     # a folder in its place


def test_a_full_memory_is_no_corrupt_checkpoint(saved, monkeypatch):
    """Nobody is told to delete a good file."""
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        monkeypatch.setattr(torch, "load", lambda *args, error=error, **more: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            load_checkpoint(saved)


def test_truncated_checkpoint(saved):
    raw = saved.read_bytes()
    for cut in [0, 1, 2, 100, *range(200, len(raw), 97), len(raw) - 1]:
        saved.write_bytes(raw[:cut])
        assert "corrupt or not ours" in sentence(load_checkpoint, saved)


def test_flipped_bits_are_noticed(saved):
    """torch.load alone reads most flipped bits as other weights, without a word."""
    raw, rng = saved.read_bytes(), random.Random(0)
    for _ in range(150):
        flipped = bytearray(raw)
        flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        saved.write_bytes(flipped)
        try:
            state = load_checkpoint(saved)
        except UserError as e:
            assert "corrupt or not ours" in str(e) and "\n" not in str(e)
        else:                                                     # the bit was in the padding between records
            assert state["step"] == 3 and torch.equal(state["nets"]["fake"]["w"], STATE["nets"]["fake"]["w"])
            assert torch.equal(state["rng"][0], STATE["rng"][0])


class Payload:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("dump", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))],
                         ids=["torch", "pickle"])
def test_hostile_checkpoint_runs_nothing(tmp_path, dump):
    path, victim = tmp_path / "checkpoint.pt", tmp_path / "victim"
    dump({"step": 1, "nets": Payload(victim)}, path)
    assert "corrupt or not ours" in sentence(load_checkpoint, path)
    assert not victim.exists()


def parts(sources):
    """(Config, Nets, optimisers, what is left of a Draw) of a run after one step: a Linear for each network."""
    cfg = resolve(dict(preset="toy", steps=5))
    made = [torch.nn.Linear(2, 2, bias=False) for _ in range(4)]
    nets = methods.Nets(None, *made, 0.5)
    opts = {name: torch.optim.AdamW(net.parameters(), fused=True) for name, net in (("generator", made[2]), ("critic", made[0]))}
    for opt in opts.values():
        opt.param_groups[0]["params"][0].grad = torch.ones(2, 2)
        opt.step()
    return cfg, nets, opts, SimpleNamespace(rng=torch.Generator(), sources=sources, device=torch.device("cpu"))


def restored(path, change=lambda saved: None, before={}, after={}):
    """What restore says of a checkpoint, once changed, that fits otherwise; all through its file.

    before, after: fingerprints of what the run reads, at its start and when it is resumed.
    """
    cfg, nets, opts, draw = parts(before)
    saved = runs.state(cfg, 3, [1.0, 2.0], nets, opts, draw)
    change(saved)
    save_checkpoint(path, saved)
    cfg, nets, opts, draw = parts(after)
    found = runs.restore(load_checkpoint(path), cfg, nets, opts, draw, path)
    return found, nets, opts, saved


def test_restore_is_the_inverse_of_state(tmp_path):
    """Weights and moments to the bit; a setting that only another version of torch knows does not matter."""
    with torch.random.fork_rng():
        found, nets, opts, saved = restored(tmp_path / "ck.pt", lambda s: s["opts"]["critic"]["param_groups"][0].update(new=1))
    assert found == (3, [1.0, 2.0], 1)
    assert torch.equal(nets.ema.weight, saved["nets"]["ema"]["weight"])
    for name, opt in opts.items():
        moments, = opt.state.values()
        assert all(torch.equal(v, saved["opts"][name]["state"][0][k]) for k, v in moments.items())


def test_moments_come_back_in_the_memory_order_of_their_weights(tmp_path):
    """A run with --shard saves them in another order; fused Adam would pair them with other weights, without a word."""
    first = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
    with torch.random.fork_rng():
        _, nets, opts, _ = restored(tmp_path / "ck.pt", lambda s: moments_of(s).update(exp_avg=first.t().contiguous().t()))
    weight, opt = nets.fake.weight, opts["critic"]
    assert torch.equal(opt.state[weight]["exp_avg"], first)
    before, weight.grad, opt.param_groups[0]["weight_decay"] = weight.detach().clone(), torch.zeros(2, 2), 0
    opt.step()
    moved = before - weight.detach()
    torch.testing.assert_close(3 * moved / moved[1, 1], first, rtol=1e-4, atol=1e-4)


def settings_of(saved):
    return saved["opts"]["critic"]["param_groups"][0]


def moments_of(saved):
    return saved["opts"]["critic"]["state"][0]


WRONG = {
    "nothing": lambda s: s.clear(), "step is text": lambda s: s.update(step="3"), "step 2.5": lambda s: s.update(step=2.5),
    "step -5": lambda s: s.update(step=-5), "step beyond the run": lambda s: s.update(step=10**9),
    "step is a tensor": lambda s: s.update(step=torch.tensor(3)), "seconds text": lambda s: s.update(seconds="ab"),
    "seconds nan": lambda s: s.update(seconds=[torch.nan, 1.0]), "seconds 3": lambda s: s.update(seconds=[1.0, 2.0, 3.0]),
    "processes": lambda s: s.update(processes="two"), "no networks": lambda s: s.update(nets={}),
    "no ema": lambda s: s["nets"].pop("ema"), "network is a number": lambda s: s["nets"].update(fake=3),
    "weight is text": lambda s: s["nets"].update(fake={"weight": "x"}),
    "weight of another shape": lambda s: s["nets"].update(fake={"weight": torch.zeros(7, 2)}),
    "weight of whole numbers": lambda s: s["nets"].update(fake={"weight": torch.zeros(2, 2, dtype=torch.int8)}),
    "complex weight": lambda s: s["nets"].update(fake={"weight": torch.zeros(2, 2, dtype=torch.complex64)}),
    "weight nan": lambda s: s["nets"]["generator"]["weight"].fill_(torch.nan),
    "no optimisers": lambda s: s.update(opts={}), "another optimiser": lambda s: s["opts"].update(nobody={"state": {}}),
    "moment of another shape": lambda s: moments_of(s).update(exp_avg=torch.zeros(3)),
    "moment is text": lambda s: moments_of(s).update(exp_avg="x"), "no moment": lambda s: moments_of(s).pop("exp_avg_sq"),
    "moment of whole numbers": lambda s: moments_of(s).update(exp_avg=torch.zeros(2, 2, dtype=torch.int64)),
    "moments of another weight": lambda s: s["opts"]["critic"]["state"].update({7: {}}),
    "betas are text": lambda s: settings_of(s).update(betas="x"), "no eps": lambda s: settings_of(s).pop("eps"),
    "uphill": lambda s: settings_of(s).update(maximize=True), "other weights": lambda s: settings_of(s).update(params=[0, 1]),
    "no settings": lambda s: s["opts"]["critic"].update(param_groups=[]),
    "random state": lambda s: s.update(rng=[torch.zeros(3)] * 3), "random state is a list": lambda s: s.update(rng=[1]),
    "another seed": lambda s: s["config"].update(seed=9), "no config": lambda s: s.update(config={}),
    "config of another version": lambda s: s["config"].update(nope=1),
}


@pytest.mark.parametrize("case", WRONG)
def test_restore_of_something_else(tmp_path, case):
    """A checkpoint that loads but holds something else, such as another network, is refused by name."""
    before = torch.get_rng_state()
    assert "ck.pt" in sentence(restored, tmp_path / "ck.pt", WRONG[case])
    torch.set_rng_state(before)


def test_restore_names_the_difference(tmp_path):
    for case, words in {"weight of another shape": "weight is (7, 2) in the file and (2, 2) here", "no ema": "KeyError: 'ema'",
                        "another seed": "seed 9, not 0",
                        "no moment": "the optimiser of the critic: exp_avg_sq is missing"}.items():
        assert words in sentence(restored, tmp_path / "ck.pt", WRONG[case])


def test_a_resumed_run_is_told_when_its_data_changed(tmp_path, capsys):
    restored(tmp_path / "ck.pt", before={"data": "before"}, after={"data": "after"})
    assert "--data is not as it was when this run was started" in capsys.readouterr().err


def test_a_checkpoint_that_grows_is_not_unpacked(tmp_path):
    """300 MB of zeros in a file of 300 KB; torch never compresses, so this is no checkpoint, and no memory is taken for it."""
    with zipfile.ZipFile(tmp_path / "ck.pt", "w", zipfile.ZIP_DEFLATED) as f, f.open("archive/data/0", "w") as part:
        for _ in range(300):
            part.write(bytes(2**20))
    assert "it would grow" in sentence(load_checkpoint, tmp_path / "ck.pt")


# ---- safetensors and json


def test_tensors_round_trip(tmp_path):
    tensors = {"a": torch.randn(4, 3), "b": torch.zeros(0), "c": torch.arange(3)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)


def test_broken_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.randn(4, 3)})
    raw = path.read_bytes()
    for cut in range(len(raw)):
        path.write_bytes(raw[:cut])
        assert "cannot read" in sentence(load_tensors, path)
    header = b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "cannot read" in sentence(load_tensors, path)
    assert "cannot read" in sentence(load_tensors, tmp_path)
    assert "no " in sentence(load_tensors, tmp_path / "nowhere")


def test_weights_must_fit(tmp_path):
    net = torch.nn.Linear(2, 2, bias=False)
    good = torch.ones(2, 2)
    assert "f does not fit this network: weight is missing" in sentence(load_weights, net, {}, "f")
    assert "bias is not expected" in sentence(load_weights, net, {"weight": good, "bias": torch.zeros(2)}, "f")
    assert "(2, 3) in the file and (2, 2) here" in sentence(load_weights, net, {"weight": torch.zeros(2, 3)}, "f")
    for value in (torch.nan, torch.inf, -torch.inf, 1e38):
        assert "weight holds a number that is not finite" in sentence(load_weights, net, {"weight": good * value}, "f")
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        assert f"weight holds {dtype} numbers, not torch.float32" in sentence(load_weights, net, {"weight": good.to(dtype)}, "f")
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        load_weights(net, {"weight": good.to(dtype)}, "f")
        assert torch.equal(net.weight, good) and net.weight.dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1'])
def test_broken_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert "cannot read" in sentence(read_json, tmp_path / "config.json")
    assert "cannot read" in sentence(read_json, tmp_path / "nowhere.json")


# ---- teachers and the cache


@pytest.fixture
def teacher_folder(toy_run, tmp_path):
    for name in ("teacher.json", "teacher.safetensors"):
        shutil.copy(toy_run / name, tmp_path / name)
    return tmp_path


def test_teacher_folder_loads(teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    assert teacher.shape == (2,) and teacher.data == "toy:ring8" and teacher.recipe["steps"] == 50


def test_teacher_without_weights(teacher_folder):
    (teacher_folder / "teacher.safetensors").unlink()
    assert "teacher.safetensors" in sentence(load_teacher, str(teacher_folder))


def test_teacher_with_broken_weights(teacher_folder):
    path = teacher_folder / "teacher.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "teacher.safetensors" in sentence(load_teacher, str(teacher_folder))


def test_teacher_of_another_shape(teacher_folder):
    tensors = load_tensors(teacher_folder / "teacher.safetensors")
    save_tensors(teacher_folder / "teacher.safetensors", {**tensors, "net.out.bias": torch.zeros(3)})
    assert "net.out.bias is (3,) in the file and (2,) here" in sentence(load_teacher, str(teacher_folder))


def test_teacher_json_is_not_json(teacher_folder):
    (teacher_folder / "teacher.json").write_text("not json")
    assert "teacher.json" in sentence(load_teacher, str(teacher_folder))


RECIPE_DEFECTS = {
    "missing network": lambda r: r.pop("network"), "missing args": lambda r: r.pop("args"),
    "missing data": lambda r: r.pop("data"), "missing sigma_data": lambda r: r.pop("sigma_data"),
    "missing seconds": lambda r: r.pop("seconds"), "missing CPU seconds": lambda r: r.pop("cpu_seconds"),
    "unknown network": lambda r: r.update(network="vit"), "unknown argument": lambda r: r.update(args={"heads": 3}),
    "number for args": lambda r: r.update(args=3), "text for sigma_data": lambda r: r.update(sigma_data="half"),
}


@pytest.mark.parametrize("defect", RECIPE_DEFECTS)
def test_teacher_json_with_a_wrong_key(teacher_folder, defect):
    recipe = read_json(teacher_folder / "teacher.json")
    RECIPE_DEFECTS[defect](recipe)
    (teacher_folder / "teacher.json").write_text(json.dumps(recipe))
    assert "teacher.json" in sentence(load_teacher, str(teacher_folder))


@pytest.mark.parametrize("data", ["nowhere", "toy:nowhere"])
def test_teacher_json_with_unknown_data(teacher_folder, data):
    recipe = read_json(teacher_folder / "teacher.json")
    (teacher_folder / "teacher.json").write_text(json.dumps({**recipe, "data": data}))
    load_teacher(str(teacher_folder))                             # a teacher can be used without its data
    cfg = resolve(dict(preset="toy", teacher=str(teacher_folder), data=data))
    assert repr(data) in sentence(prepare, cfg, torch.device("cpu"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


TINY = dict(preset="toy", method="dmd", teacher_steps=2, pairs=20, pair_steps=2)


def test_cache_files_that_are_broken(own_cache):
    """Named in full, with what to do: delete it, and it is made again."""
    cfg = resolve(TINY)
    teacher = find_teacher(cfg, torch.device("cpu"))
    pairs = cached_pairs(cfg, teacher, torch.device("cpu"))
    assert pairs["z"].shape == pairs["x"].shape == (20, 2)
    files = sorted(own_cache.rglob("*.safetensors"))
    assert [f.name.split("-")[0] for f in files] == ["pairs", "teacher.safetensors"]
    for path in files:
        path.write_bytes(path.read_bytes()[:-1])
    again = (lambda: cached_pairs(cfg, teacher, torch.device("cpu"))), (lambda: find_teacher(cfg, torch.device("cpu")))
    for path, function in zip(files, again):
        assert str(path) in (text := sentence(function)) and "delete it to have it made again" in text
        path.unlink()
        function()
    torch.testing.assert_close(cached_pairs(cfg, teacher, torch.device("cpu")), pairs, rtol=0, atol=0)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "file" / "cache"))
    assert "NANO_DMD_CACHE" in sentence(find_teacher, resolve(TINY), torch.device("cpu"))
