"""What a file may hold, by kinds.  A file is checked once, where it is read.

A kind is one of these:

    int, str, bool, dict, Tensor   a value of this type; True is no int
    float                          a finite number, whole ones too
    None                           null
    (kind, kind)                   a value of one of these kinds
    [kind]                         a list of any length; [kind, kind] a list of exactly two
    {"name": kind}                 a dict with at least these names
    {str: kind}                    a dict with any names
"""

import torch

LARGEST = 1e30                                                    # of any number in a file of ours

WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false",
         None: "null", dict: "a table", list: "a list", torch.Tensor: "a tensor"}


def mismatch(value, kind, where="it"):
    """What is wrong with a value: "steps is 'many', not a whole number".  "" if nothing is."""
    if isinstance(kind, tuple):
        found = [mismatch(value, k, where) for k in kind]
        return "" if "" in found else found[0]
    if isinstance(kind, list):
        if type(value) not in (list, tuple) or len(kind) > 1 and len(value) != len(kind):
            return f"{where} is {shown(value)}, not a list" + f" of {len(kind)}" * (len(kind) > 1)
        return first(mismatch(v, kind[i % len(kind)], f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(kind, dict):
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            return f"{where} is {shown(value)}, not a table"
        if missing := [name for name in kind if name is not str and name not in value]:
            return f"{where} has no {', '.join(missing)}"
        known = [name for name in value if name in kind or str in kind]
        kinds = {name: kind.get(name, kind.get(str)) for name in known}
        return first(mismatch(value[name], k, f"{where}.{name}") for name, k in kinds.items())
    if kind is float and type(value) in (int, float):
        return "" if abs(value) < LARGEST else f"{where} is {shown(value)}, not a finite number"
    if kind in (dict, torch.Tensor):
        right = isinstance(value, kind)
    else:
        right = value is None if kind is None else type(value) is kind
    return "" if right else f"{where} is {shown(value)}, not {WORDS.get(kind, kind)}"


def first(complaints):
    return next(filter(None, complaints), "")


def shown(value):
    """A short word for a value, however long it is."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of many digits"
    plain = value is None or isinstance(value, (int, float, str))
    return f"{value!r:.40}" if plain else f"a {type(value).__name__}"


def wrong_tensors(tensors, wanted):
    """What is wrong with a dict of tensors, "" if nothing is.  wanted {name: (dtype, shape)}.

    A weight may come in another floating-point format of at least 16 bits; it must be finite.
    """
    if strange := first(sorted(wanted.keys() ^ tensors.keys())):
        return f"{strange} is {'missing' if strange in wanted else 'not expected'}"
    for name, (dtype, shape) in wanted.items():
        have = tensors[name]
        if tuple(have.shape) != tuple(shape):
            return f"{name} is {tuple(have.shape)} in the file and {tuple(shape)} here"
        floats = have.is_floating_point() and dtype.is_floating_point and have.dtype.itemsize > 1
        if have.dtype != dtype and not floats:
            return f"{name} holds {have.dtype} numbers, not {dtype}"
        if floats and have.numel() and not have.abs().max() < LARGEST:
            return f"{name} holds a number that is not finite"
    return ""
