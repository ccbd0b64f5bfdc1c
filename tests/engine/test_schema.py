"""What a file may hold: kinds of values, and every file of ours that is damaged in every way gets one sentence.

Without this a number written as text in somebody's config.json is a traceback, and a NaN in a weight file a grey picture.
"""

import json
import shutil
from dataclasses import fields

import pytest
import torch

from nano_dmd import evaluate, plot, sample, train
from nano_dmd.engine import runs
from nano_dmd.teachers import zoo
from nano_dmd.engine.files import UserError, load_tensors, read_json, read_lines, save_tensors
from nano_dmd.engine.config import Config, read_config
from nano_dmd.engine.schema import mismatch, wrong_tensors


@pytest.mark.parametrize("value, kind, said", [
    (3, int, ""), (True, int, "it is True, not a whole number"), (3.0, int, "it is 3.0, not a whole number"), (3, float, ""),
    (float("nan"), float, "it is nan, not a finite number"), (float("inf"), float, "it is inf, not a finite number"),
    (10**4000, int, ""), (10**4000, float, "it is a number of many digits"), ("3", float, "it is '3', not a finite number"),
    (None, (float, None), ""), ("x", (float, None), "it is 'x', not a finite number"), ([1, 2], [int], ""),
    ([1, "2"], [int], "it[1] is '2'"), ([1], [int, int], "it is a list, not a list of 2"), ([1, None], [float, (float, None)],
    ""),
    ({"a": 1}, {"a": int}, ""), ({}, {"a": int, "b": int}, "it has no a, b"), ({"a": 1, "b": []}, {"a": int}, ""),
    ({"a": {"b": "x"}}, {str: {str: int}}, "it.a.b is 'x'"), ({1: 2}, {str: int}, "it is a dict, not a table"), (3, {},
    "it is 3, not a table"),
    ("x" * 10**6, int, "it is 'x"), (torch.zeros(1), torch.Tensor, ""), (0, torch.Tensor, "it is 0, not a tensor")],
    ids=lambda v: repr(v)[:30])
def test_kinds(value, kind, said):
    found = mismatch(value, kind)
    assert found.startswith(said) and bool(found) == bool(said) and len(found) < 100


@pytest.mark.parametrize("tensors, said", [
    (dict(a=torch.zeros(2, 3)), ""), (dict(a=torch.zeros(2, 3, dtype=torch.float16)), ""),
    (dict(a=torch.zeros(9, 3)), "(9, 3) in the file"),
    ({}, "a is missing"), (dict(a=torch.zeros(2, 3), b=torch.zeros(1)), "b is not expected"), (dict(a=torch.zeros(2, 4)),
    "(2, 4) in the file"),
    (dict(a=torch.zeros(2)), "a is (2,) in the file"), (dict(a=torch.zeros(2, 3).int()), "holds torch.int32"),
    (dict(a=torch.full((2, 3), torch.inf)), "not finite"), (dict(a=torch.zeros(0, 3)), "(0, 3) in the file")], ids=repr)
def test_tensors(tensors, said):
    assert said in (found := wrong_tensors(tensors, dict(a=(torch.float32, (2, 3))))) and bool(found) == bool(said)


def refused(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    return str(error.value)


@pytest.fixture
def run(toy_run, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(toy_run, tmp_path / "run")
    return tmp_path / "run"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD = {int: (2.5, "3", True, None, [], {}, -1, 10**30), float: ("1", True, None, [], {}, 1e30), bool: ("yes", 1, 0, None, []),
       str: (5, True, None, [], {}, "a\0b", "\ud800")}


@pytest.mark.parametrize("field", fields(Config), ids=lambda f: f.name)
def test_every_field_of_a_config_has_its_type_and_range(field, run):
    for value in BAD[field.type]:
        edit(run / "config.json", **{field.name: value})
        text = refused(read_config, run)
        assert f"config.json is damaged: --{field.name}" in text and len(text) < 250
    config = json.loads((run / "config.json").read_text())
    del config[field.name]
    (run / "config.json").write_text(json.dumps(config))
    assert f"is not of this version: {field.name} is missing" in refused(read_config, run)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "{", "[" * 10**5, '{"a":' * 10**5, "1" * 5000, "\xff",
    '{"nope": 1}'],
                         ids=lambda t: t[:12])
@pytest.mark.parametrize("name", ["config.json", "teacher.json"])
def test_files_that_are_no_table_of_ours(name, text, run):
    (run / name).write_bytes(text.encode("latin-1"))
    assert name in refused(runs.load_run, run)


TEACHER = [dict(network="resnet"), dict(network=3), dict(args=[]), dict(args={"width": -1}), dict(args={"width": 2**62}),
           dict(args={"depth": 10**5}), dict(args={"octaves": -5}), dict(args={"nope": 1}), dict(args={"width": 1.5}),
           dict(shape=[3]),
           dict(shape=[]), dict(shape=[-2]), dict(shape="22"), dict(shape=[2, 2]), dict(shape=[1e400]), dict(classes=-3),
           dict(classes=10**9), dict(classes=1.9), dict(classes=10), dict(sigma_data=0), dict(sigma_data=-1),
           dict(sigma_data=1e-300),
           dict(sigma_data=float("nan")), dict(sigma_data=float("inf")), dict(seconds="x"), dict(data=None), dict(bf16="yes"),
           dict(source={}), dict(network="diffusers", args={"unet": [], "alphas_cumprod": [0.5], "prediction_type": "epsilon"}),
           dict(network="edm", args={"model_type": "SongUNet"})]


@pytest.mark.parametrize("change", TEACHER, ids=str)
def test_a_teacher_is_described_in_possible_numbers(change, run):
    """Before memory is taken for it, and before anything is drawn."""
    edit(run / "teacher.json", **change)
    assert "teacher" in refused(runs.load_run, run)


def test_networks_of_the_shipped_recipes_are_possible(run):
    shape = dict(toy=[2], flow=[2], digits=[1, 8, 8], mnist=[1, 28, 28])
    for name, recipe in zoo.RECIPES.items():
        classes = 0 if name in ("toy", "flow") else 10
        assert zoo.nonsense(recipe | dict(shape=shape.get(name, [3, 32, 32]), classes=classes)) == "", name


@pytest.mark.parametrize("name", ["generator.safetensors", "teacher.safetensors"])
def test_weights_that_are_no_numbers(name, run):
    tensors = load_tensors(run / name)
    first = next(n for n, t in tensors.items() if t.is_floating_point() and t.numel() > 1)
    for change in (lambda t: t * torch.nan, lambda t: t + torch.inf, lambda t: t + 1e38, lambda t: t.long(), lambda t: t.bool(),
                   lambda t: t.to(torch.complex64), lambda t: t.to(torch.float8_e4m3fn)):
        save_tensors(run / name, tensors | {first: change(tensors[first])})
        assert first in refused(runs.load_run, run)


def test_samples_that_are_not_finite_are_not_written(run):
    """Finite weights can still have no finite answer."""
    tensors = load_tensors(run / "generator.safetensors")
    save_tensors(run / "generator.safetensors", {n: t * 1e25 if "weight" in n else t for n, t in tensors.items()})
    assert "samples that are not finite" in refused(sample.main, [str(run), "--n", "4", "--out", str(run / "x.npy"), "--device",
        "cpu"])
    assert not (run / "x.npy").exists()


LOG = ["[]", "3", "null", "{}", "[" * 10**5, '{"step": %s}' % ("1" * 5000), dict(step="x"), dict(mesm=[]), dict(mesm=None),
    dict(mesm="xxxxx"),
       dict(fake_loss=[1, 2, 3]), dict(grad=[]), dict(grad={"sid_loss": "x"}),
       dict(x_mean="x"), dict(teacher=3), dict(teacher=[]), dict(spread=1e40)]


@pytest.mark.parametrize("change", LOG, ids=lambda v: str(v)[:30])
def test_lines_of_a_log(change, run):
    path = run / "log.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = change if isinstance(change, str) else json.dumps(json.loads(lines[1]) | change)
    path.write_text("\n".join(lines))
    assert "log.jsonl" in (text := refused(plot.main, [str(run)])) and "line 2" in text


def test_a_log_may_have_gaps(run):
    """null where something could not be told, a loss or a gradient that only some lines have: drawn."""
    path = run / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0].update(spread=None, mesm=[None] * 5, grad={"other_loss": 1.0}, by_sigma={"other_loss": [None] * 6})
    del lines[1]["sid_loss"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    plot.main([str(run), "--out", str(run / "x.png")])
    assert (run / "x.png").stat().st_size > 10_000


def test_text_is_text(tmp_path):
    """A BOM is no letter, U+2028 no line break, any line end is one; blank lines count but are left out."""
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffa red cube\r\n\r\n  fog\u2028and rain \n\rlast".encode())
    assert read_lines(path) == [(1, "a red cube"), (3, "fog\u2028and rain"), (5, "last")]
    for content, said in ((b"one\ncaf\xe9\n", "line 2, is not UTF-8 text"), ("fog".encode("utf-16"), "holds zeros"),
                          (b"f\0o\0g\0", "holds zeros")):
        path.write_bytes(content)
        assert said in refused(read_lines, path)
    assert "it is not a file" in refused(read_lines, tmp_path) and "No such file" in refused(read_lines, tmp_path / "nope")
    assert "it is not there; is this a run folder?" in refused(read_json, tmp_path / "nope.json")


def test_a_batch_of_one_has_no_spread(tmp_path, quick, capfd):
    """log.jsonl stays JSON, torch has nothing to warn of, and a word says what the log cannot tell."""
    run = ["--preset", "digits", "--method", "sid", "--device", "cpu", "--steps", "2", "--teacher_steps", "1", "--log_every", "1"]
    for i, batch in enumerate((["--batch", "1"], ["--batch", "2", "--accumulate", "2"])):
        train.main([*run, *batch, "--out", str(tmp_path / str(i))])
        lines = (tmp_path / str(i) / "log.jsonl").read_text()
        assert "NaN" not in lines and [json.loads(line)["spread"] for line in lines.splitlines()] == [None, None]
        plot.read_log(tmp_path / str(i))
    err = capfd.readouterr().err
    assert "degrees of freedom" not in err and "with one sample at a time, the log cannot tell" in err and "spread=-" in err
