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
    """(place, commit) of OWNER/MODEL[@REVISION]; the hub is asked once.

    place is OWNER/MODEL, or a folder: an earlier download, if the hub does not answer.
    raises UserError if there is neither
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    model, _, revision = name.partition("@")
    asked = dict(repo_id=model, revision=revision or None)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        HfApi().model_info(**asked, timeout=5)     # a download would try for half a minute
        refused = None
    except Exception as e:                         # network, name, permission: no common base class
        refused = e
    for file in ("model_index.json", "config.json"):
        try:
            path = Path(hf_hub_download(**asked, filename=file, local_files_only=bool(refused)))
            return (str(path.parent) if refused else model), path.parent.name
        except Exception as e:
            error = refused or e
            if not refused and not absent(e):
                break
    raise UserError(f"no model {name} in a folder here or in {constants.HF_HUB_CACHE}, and the hub "
                    f"does not give it ({first_line(error)}): {advice(error, model)}")


def absent(error):
    """Whether the hub says that a model has no such file."""
    from huggingface_hub import errors

    local = isinstance(error, errors.LocalEntryNotFoundError)     # it was not asked
    return isinstance(error, errors.EntryNotFoundError) and not local


def advice(error, model):
    """What to do about a model that the hub does not give."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):  # the hub says 401 for a name that does not exist, too
        return (f"check the name; if it is gated, accept its terms at huggingface.co/{model} and "
                "log in by `hf auth login` or $HF_TOKEN")
    if status:
        return "check the name and --revision"
    return ("without a network give --teacher the pipeline's folder, or load it once with a "
            "network: it stays in $HF_HOME")


def folder_here(name):
    """The Path of a model that is here, None for one that comes from the hub.  raises UserError."""
    place = name if Path(name).is_dir() else on_the_hub(name)[0]
    return Path(place) if Path(place).is_dir() else None


def source(name):
    """The arguments of from_pretrained for a folder or a hub name."""
    if folder := folder_here(name):
        return dict(pretrained_model_name_or_path=str(folder))
    place, commit = on_the_hub(name)
    return dict(pretrained_model_name_or_path=place, revision=commit)


def locations(name, subfolder):
    """[arguments of from_pretrained] for a pipeline's part, and for a bare model's own folder."""
    if folder := folder_here(name):
        inside = [p for p in (folder / subfolder, folder) if p.is_dir()]
        return [dict(pretrained_model_name_or_path=str(p)) for p in inside]
    place = source(name)
    return [place | {"subfolder": subfolder}, place]


def version(name, *parts):
    """What changes when (parts of) a model does: a fingerprint of its files, or its commit."""
    if not Path(name).is_dir():
        return on_the_hub(name)[1]
    folders = [os.path.join(name, p) for p in parts if os.path.isdir(os.path.join(name, p))]
    return fingerprint(*(folders or [name]))


def file_of(name, *path):
    """The local path of a small file of a model, None if it has no such file.  raises UserError."""
    if folder := folder_here(name):
        found = folder.joinpath(*path)
        return found if found.is_file() else None
    from huggingface_hub import hf_hub_download

    place, commit = on_the_hub(name)
    try:
        return Path(hf_hub_download(repo_id=place, filename="/".join(path), revision=commit))
    except Exception as e:                         # no such file, no permission, no network
        if absent(e):
            return None
        raise UserError(f"the hub does not give {name} ({first_line(e)}): "
                        f"{advice(e, place)}") from e


def index_of(name):
    """model_index.json of a pipeline, {} for a model without one."""
    path = file_of(name, "model_index.json")
    return read_json(path, {"_class_name": str}) if path else {}


def declared(name, part_name):
    """The class of a part by model_index.json, "" if there is none."""
    entry = index_of(name).get(part_name)
    right = isinstance(entry, list) and len(entry) > 1 and isinstance(entry[1], str)
    return entry[1] if right else ""


def component_config(name, subfolder):
    """The config of a pipeline's part, or of a bare model, without weights.  raises UserError."""
    kind = "scheduler_config.json" if subfolder == "scheduler" else "config.json"
    path = file_of(name, subfolder, kind) or file_of(name, kind)
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
                said = None
                if hasattr(kind, "load_config"):
                    said = kind.load_config(**where).get("_class_name")
                if said not in (None, kind.__name__):
                    raise UserError(f"the {subfolder} of {name} is a {said}: give a {wanted}")
                found = kind.from_pretrained(**where, **more)
            except UserError:
                raise
            except Exception as e:                 # hub, network, json, weights
                problems.append(first_line(e))
                continue
            return complete(*found, f"the {subfolder} of {name}") if network else found
    raise UserError(f"cannot load the {subfolder} of {name}: {problems[0]}; give a {wanted}.  "
                    "Weights are read from .safetensors alone, as a pickle (.bin) could run code: "
                    "convert one by diffusers' from_pretrained(...).save_pretrained(FOLDER)")


def component(name, part_name, kinds=()):
    """A part of a pipeline, of the class that model_index.json names.  raises UserError.

    kinds  the classes it may be; without, a text encoder or tokenizer of transformers
    """
    kind = declared(name, part_name)
    if kinds:
        import diffusers

        found = getattr(diffusers, kind, None) if kind in kinds else None
        if found is None:
            raise UserError(f"the {part_name} of {name} is {kind or 'missing'}: "
                            f"{' or '.join(kinds)} of a recent diffusers is supported")
        return part(found, name, part_name, "complete pipeline")
    try:
        import transformers
    except ImportError as e:
        raise UserError(f'models that listen to text need more packages ({e}): pip install '
                        '"nano_dmd[sd]"') from e
    found = getattr(transformers, kind, None)
    if kind == "T5GemmaEncoder":                   # PRX's: diffusers has it, and finds its config
        from diffusers.pipelines.prx import T5GemmaEncoder as found     # in a folder alone
        from huggingface_hub import snapshot_download

        if not folder_here(name):
            place, commit = on_the_hub(name)
            name = snapshot_download(place, revision=commit, allow_patterns=f"{part_name}/*")
    bases = transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
    if not isinstance(found, type) or not issubclass(found, bases):
        raise UserError(f"the {part_name} of {name} is {kind or 'missing'!r:.80}: no text encoder "
                        "or tokenizer of transformers")
    return part(found, name, part_name, "complete pipeline")


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
