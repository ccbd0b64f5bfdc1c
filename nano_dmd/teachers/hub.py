"""Models of diffusers and transformers, in folders and on the hub; nothing foreign is executed.

Weights come from safetensors alone.  A name is a folder, or OWNER/MODEL[@REVISION] on the hub.
"""

import functools
import os
from pathlib import Path

from torch import nn

from nano_dmd.engine.cache import fingerprint
from nano_dmd.engine.files import UserError, blame, first_line, read_json


@functools.lru_cache
def on_the_hub(name):
    """(OWNER/MODEL or folder of its copy, commit) of OWNER/MODEL[@REVISION]; the hub is asked once.

    raises UserError if the hub does not give it and there is no copy here
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    model, _, revision = name.partition("@")
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        return model, HfApi().model_info(model, revision=revision or None, timeout=5).sha
    except Exception as e:                         # network, name, permission: no common base class
        for file in ("model_index.json", "config.json"):
            copy = try_to_load_from_cache(model, file, revision=revision or None)
            if isinstance(copy, str):
                return str(Path(copy).parent), Path(copy).parent.name
        raise UserError(f"no model {name} in a folder here or in {constants.HF_HUB_CACHE}, and "
                        f"the hub does not give it ({first_line(e)}): {advice(e, name)}") from e


def advice(error, name):
    """What to do about a model that the hub does not give."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):  # the hub says 401 for a name that does not exist, too
        return (f"check the name; if it is gated, accept its terms at huggingface.co/"
                f"{name.partition('@')[0]} and log in by `hf auth login` or $HF_TOKEN")
    if status:
        return "check the name and --revision"
    return ("without a network give --teacher the pipeline's folder, or load it once with a "
            "network: it stays in $HF_HOME")


def source(name):
    """The arguments of from_pretrained for a folder or a hub name."""
    if Path(name).is_dir():
        return dict(pretrained_model_name_or_path=name)
    place, commit = on_the_hub(name)
    revision = {} if Path(place).is_dir() else {"revision": commit}
    return dict(pretrained_model_name_or_path=place, **revision)


def locations(name, subfolder):
    """[arguments of from_pretrained] for a pipeline's part, and for a bare model's own folder."""
    place = source(name)
    folder = Path(place["pretrained_model_name_or_path"])
    if not folder.is_dir():
        return [place | {"subfolder": subfolder}, place]
    inside = [p for p in (folder / subfolder, folder) if p.is_dir()]
    return [dict(pretrained_model_name_or_path=str(p)) for p in inside]


def downloaded(name, subfolder):
    """A local folder of a model that holds one part of it, without pickles.  raises UserError."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    place, commit = on_the_hub(name)
    if Path(place).is_dir():
        return place
    with blame(f"the hub does not give the {subfolder} of {name}"):
        return snapshot_download(place, revision=commit, allow_patterns=f"{subfolder}/*",
                                 ignore_patterns=["*.bin", "*.fp16.*", "*.onnx*", "*.msgpack"])


def version(name, *parts):
    """What changes when (parts of) a model does: a fingerprint of its files, or its commit."""
    if not Path(name).is_dir():
        return on_the_hub(name)[1]
    folders = [os.path.join(name, p) for p in parts if os.path.isdir(os.path.join(name, p))]
    return fingerprint(*(folders or [name]))


def file_of(name, *path):
    """The local path of a small file of a model, None if it has no such file.  raises UserError."""
    if Path(name).is_dir():
        found = Path(name).joinpath(*path)
        return found if found.is_file() else None
    from huggingface_hub import errors, hf_hub_download

    place, commit = on_the_hub(name)
    if Path(place).is_dir():
        return file_of(place, *path)
    try:
        return Path(hf_hub_download(place, "/".join(path), revision=commit))
    except Exception as e:                         # no such file, no permission, no network
        absent = isinstance(e, errors.EntryNotFoundError)
        if absent and not isinstance(e, errors.LocalEntryNotFoundError):
            return None
        raise UserError(f"the hub does not give {name} ({first_line(e)}): {advice(e, name)}") from e


def index_of(name):
    """model_index.json of a pipeline, {} for a model without one."""
    path = file_of(name, "model_index.json")
    return read_json(path, {"_class_name": str}) if path else {}


def component_config(name, subfolder):
    """The config of a part of a pipeline, without its weights.  raises UserError."""
    kind = "scheduler_config.json" if subfolder == "scheduler" else "config.json"
    path = file_of(name, subfolder, kind)
    if path is None:
        raise UserError(f"{name} has no {subfolder}/{kind}: is it a complete pipeline?")
    return read_json(path, dict)


def part(kind, name, subfolder, wanted="diffusers pipeline with a UNet2DModel"):
    """kind.from_pretrained of a pipeline's subfolder, or of a bare model's own folder.

    A network is returned in float32, complete and finite.  If only the variant "fp16" is there, it
    is read.  raises UserError that asks for a `wanted`
    """
    network, problems = issubclass(kind, nn.Module), []
    for variant in (None, "fp16") if network else (None,):
        for where in locations(name, subfolder):
            more = dict(variant=variant, output_loading_info=True, use_safetensors=True)
            more = more if network else {}
            try:
                declared = None
                if hasattr(kind, "load_config"):
                    declared = kind.load_config(**where).get("_class_name")
                if declared not in (None, kind.__name__):
                    raise UserError(f"the {subfolder} of {name} is a {declared}: give a {wanted}")
                found = kind.from_pretrained(**where, **more)
            except UserError:
                raise
            except Exception as e:                 # hub, network, json, weights
                problems.append(first_line(e))
                continue
            return complete(*found, f"the {subfolder} of {name}") if network else found
    if pickled := [*Path(name, subfolder).glob("*.bin"), *Path(name).glob("*.bin")]:
        raise UserError(f"{pickled[0]} is a pickle, which could run code, and there is no "
                        ".safetensors beside it: convert it where you trust it, by "
                        "from_pretrained(...).save_pretrained(FOLDER) of diffusers")
    raise UserError(f"cannot load the {subfolder} of {name}: {problems[0]}; give a {wanted}, on "
                    "the hub (needs a network the first time) or as a local folder")


def component(name, part_name, kinds=()):
    """A part of a pipeline, of the class that model_index.json names.  raises UserError.

    kinds  the classes it may be; without, a text encoder or tokenizer of transformers
    """
    import diffusers

    library, declared = (index_of(name).get(part_name) or [None, None])[:2]
    if kinds:
        if declared not in kinds:
            raise UserError(f"the {part_name} of {name} is {declared and f'a {declared}'}: "
                            f"{' or '.join(kinds)} is supported")
        return part(getattr(diffusers, declared), name, part_name, "complete pipeline")
    try:
        import transformers
    except ImportError as e:
        raise UserError(f'models that listen to text need more packages ({e}): pip install '
                        '"nano_dmd[sd]"') from e
    found = getattr(transformers, str(declared), None)
    bases = transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
    if not isinstance(found, type) or not issubclass(found, bases):
        raise UserError(f"the {part_name} of {name} is {declared!r:.80} of {library!r:.80}: no "
                        "text encoder or tokenizer of transformers")
    return part(found, downloaded(name, part_name), part_name, "complete pipeline")


def complete(model, info, what):
    """A network just read, in float32; a text encoder of billions of weights stays as saved.

    raises UserError unless all weights came, finite
    """
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    ours = type(model).__module__.startswith("diffusers")
    strange = sorted(map(str, info["unexpected_keys"])) if ours else []
    if absent or strange:
        why = ", ".join([f"no {n}" for n in absent[:1]] + [f"an unknown {n}" for n in strange[:1]])
        if strange and strange[0].startswith(("module.", "_orig_mod.")):
            why += ", so a wrapped network was saved: save the one inside"
        kind = type(model).__name__
        raise UserError(f"{what} is no {kind} as its config describes: it has {why}")
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{what} is damaged: {name} holds a number that is not finite")
    billions = sum(p.numel() for p in model.parameters()) > 1e9
    return model if billions and not ours else model.float()       # a text encoder: half is enough
