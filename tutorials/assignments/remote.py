"""Call functions of another process as if they were here: values cross as data, and gradients follow.

Two peers share a socket.  A message is JSON; a tensor is its dtype, shape and bytes; nothing is pickled or executed.
A function, an object or a module stays where it was made.  The other side gets a stand-in that asks for each call:

    grader                                          student
    student.denoiser_of(log_prob)(x, sigma)   ->    denoiser_of(stand-in of log_prob)
                                              <-    "call log_prob with this x": the grader answers with a tensor
                                              ->    ...
                                              <-    the result, a tensor

Gradients: whoever answers keeps the graph of its answer.  The asking side puts a Node in its own graph, and the Node's
backward asks for the gradients.  The answer to that can have a Node too, so second derivatives work as well.

Tensors that the grader passes, and the weights of modules, are shared: before each message the sender adds what has
changed in them (flags, .grad, values).  The student's changes of values are refused, unless a check allows them.
"""

import base64
import builtins
import functools
import json
import traceback
import types

import torch
from torch import nn

LARGEST = 64 * 2**20                                              # bytes of one message
DTYPES = {str(d).split(".")[1]: d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                                            torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)}


class Broken(Exception):
    """The other side is gone, late, or sent what is no message."""


def data(t):
    raw = torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().reshape(-1)).view(torch.uint8).numpy().tobytes()
    return [str(t.dtype).split(".")[1], list(t.shape), base64.b64encode(raw).decode()]


def tensor(found):
    """The tensor of data(t)."""
    dtype, shape, raw = DTYPES[found[0]], [int(n) for n in found[1]], bytearray(base64.b64decode(found[2], validate=True))
    return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).reshape(shape)


def state(t):
    return [t.requires_grad, data(t), None if not (t.is_leaf or t.retains_grad) or t.grad is None else data(t.grad)]


def within(thing, seen):
    """All tensors with requires_grad inside a thing that a check passes: a function, a module or an object."""
    if id(thing) in seen or isinstance(thing, (str, type, types.ModuleType, Remote, RemoteModule, Peer)):
        return
    seen[id(thing)] = thing
    inside = []
    if isinstance(thing, torch.Tensor):
        if thing.requires_grad:
            yield thing
    elif isinstance(thing, types.FunctionType):
        inside = [c.cell_contents for c in thing.__closure__ or ()] + [thing.__defaults__, thing.__kwdefaults__]
    elif isinstance(thing, types.MethodType):
        inside = [thing.__self__]
    elif isinstance(thing, functools.partial):
        inside = [thing.func, thing.args, thing.keywords]
    elif isinstance(thing, dict):
        inside = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        inside = list(thing)
    elif hasattr(thing, "__dict__"):
        inside = list(vars(thing).values())
    for part in inside:
        yield from within(part, seen)


class Node(torch.autograd.Function):
    """What the other side computed, in this side's graph."""

    @staticmethod
    def forward(ctx, peer, number, values, once, *inputs):
        ctx.peer, ctx.number, ctx.inputs, ctx.once = peer, number, inputs, once
        ctx.save_for_backward(*inputs[-1:] * once)                # once: the graph can be used up, as any can
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads):
        inputs = ctx.inputs[:-1] if not ctx.once or ctx.saved_tensors else ()
        reply = ctx.peer.ask(dict(do="grad", node=ctx.number, grads=[data(g) for g in grads], create=torch.is_grad_enabled()))
        return (None, None, None, None, *ctx.peer.result(reply, [*grads, *inputs]), None)


class Remote:
    """Stands for a function or an object of the other side."""

    def __init__(self, peer, key):
        self._peer, self._key = peer, key

    def __call__(self, *args, **kwargs):
        return self._peer.call(self._key, args, kwargs)

    def __getattr__(self, name):
        if name[:2] == "__":
            raise AttributeError(name)
        return self._peer.get(self._key, name)

    def __enter__(self):
        return self._peer.get(self._key, "__enter__")()

    def __exit__(self, kind, error, trace):
        return self._peer.get(self._key, "__exit__")(*describe(error)[:2] if error else ())


class RemoteModule(nn.Module):
    """Stands for a module of the other side: its weights are shared, its computing is asked for."""

    def __init__(self, peer, key):
        super().__init__()
        self.__dict__.update(_peer=peer, _key=key)

    def forward(self, *args, **kwargs):
        return self._peer.call(self._key, args, kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self._peer.get(self._key, name)


def describe(error, file=None):
    """[type, text, line in the file or None] of an exception."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = getattr(error, "line", None) or (lines[-1] if lines else getattr(error, "lineno", None))
    return [getattr(error, "kind", type(error).__name__), str(error)[:2000], line]


def rebuild(kind, text, line=None):
    """An exception from its description; one that is no Exception here becomes a RuntimeError with .kind."""
    known = getattr(builtins, str(kind), None)
    known = known if isinstance(known, type) and issubclass(known, Exception) else RuntimeError
    try:
        error = known(text)
    except TypeError:                                             # a UnicodeDecodeError wants five arguments
        error = RuntimeError(text)
    error.kind, error.line = str(kind), line
    return error


class Peer:
    """One end.  me "p": the grader, who shares the tensors it passes and trusts nothing; me "c": the student's process."""

    def __init__(self, me, send, receive, file=None):
        self.me, self.write, self.read, self.file, self.writes = me, send, receive, file, False
        self.clear()

    def clear(self):
        """Forget everything but the student's module, which is always c0."""
        module = getattr(self, "known", {}).get("c0")
        self.known, self.keys, self.tensors, self.last, self.linked, self.nodes, self.new = {}, {}, {}, {}, {}, [], []
        self.rng, self.fault, self.used = None, None, set()
        if module is not None:
            self.remember("c0", module)

    def remember(self, key, thing):
        self.known[key], self.keys[id(thing)] = thing, key
        return thing

    def number(self, thing):
        key = f"{self.me}{len(self.known)}"
        self.remember(key, thing)
        return key

    # ---- asking

    def ask(self, message):
        """The reply; what the other side asks meanwhile is answered."""
        self.send(message)
        while True:
            got = self.receive()
            if "do" not in got:
                return got
            self.send(self.answer(got))

    def call(self, key, args, kwargs):
        graph, grad, self.used = [], torch.is_grad_enabled(), set()
        if self.me == "p":
            self.share(args, kwargs)
        packed = self.pack([list(args), kwargs], graph)
        keys = [k for k, t in self.tensors.items() if t.requires_grad and k not in self.linked and (t.is_leaf or k in self.used)]
        inputs = [self.tensors[k] for k in keys] + graph
        return self.result(self.ask(dict(do="call", on=key, args=packed, graph=[data(t) for t in graph], inputs=keys, grad=grad)),
                           inputs)

    def get(self, key, name):
        return self.result(self.ask(dict(do="get", on=key, name=name)), [])

    def result(self, reply, inputs):
        """What a reply holds.  Tensors that carry a graph become outputs of a Node; its inputs are `inputs`."""
        if self.fault and self.me == "p":
            raise AssertionError(str(self.fault)[:200])
        if "raised" in reply:
            raise rebuild(*reply["raised"])
        values = [tensor(d) for d in reply["graph"]]
        if values:
            anchor = torch.zeros((), requires_grad=True)          # the answer may carry a graph where no input does
            with torch.enable_grad():
                values = Node.apply(self, reply["node"], values, False, *inputs, anchor)
        return self.unpack(reply["done"], values)

    # ---- answering

    def answer(self, got):
        try:
            return getattr(self, "answer_" + got["do"])(got)
        except Broken:
            raise
        except BaseException as e:                                # the student's exit() too
            if self.me == "p" and not isinstance(e, Exception):
                raise
            return self.failed(e)

    def failed(self, error):
        return dict(raised=describe(error, self.file))

    def answer_call(self, got):
        leaves = [tensor(d).requires_grad_() for d in got["graph"]]
        args, kwargs = self.unpack(got["args"], leaves)
        with torch.set_grad_enabled(bool(got["grad"])):
            done = self.known[got["on"]](*args, **kwargs)
        return self.reply(done, [self.tensors[k] for k in got["inputs"]] + leaves)

    def answer_get(self, got):
        thing, name = self.known[got["on"]], got["name"]
        if name == "__exit__" and self.me == "c":                 # an exception has crossed as its description
            leave = thing.__exit__
            return self.reply(lambda *e: leave(*((type(rebuild(*e)), rebuild(*e), None) if e else (None,) * 3)), [])
        if self.me == "p" and not offered(thing, name):
            raise AttributeError(f"{type(thing).__name__} has no {name!r} for you")
        return self.reply(getattr(thing, name), [])

    def answer_grad(self, got):
        create, (inputs, outputs) = bool(got["create"]), self.nodes[got["node"]]
        grads = [tensor(d).requires_grad_(create) for d in got["grads"]]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, retain_graph=True, create_graph=create, allow_unused=True)
                     if wanted else ())
        return self.reply([next(found) if t.requires_grad else None for t in inputs], [*grads, *inputs])

    def reply(self, done, inputs):
        graph = []
        packed = self.pack(done, graph)
        self.nodes.append((inputs, graph))
        return dict(done=packed, graph=[data(t) for t in graph], node=len(self.nodes) - 1)

    # ---- values

    def pack(self, value, graph):
        """JSON of a value; tensors that carry a graph go to the list `graph`."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self.keys:
            return {"ref": self.keys[id(value)]}
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                graph.append(value)
                return {"graph": len(graph) - 1}
            return {"tensor": data(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).split(".")[1]}
        if isinstance(value, dict):
            return {"dict": [[self.pack(k, graph), self.pack(v, graph)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [self.pack(v, graph) for v in value]}
        if isinstance(value, (list, range, map, zip, types.GeneratorType)):
            return [self.pack(v, graph) for v in value]
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.pack(value.item(), graph)
        return self.introduce(value, graph)

    def introduce(self, value, graph):
        """Describe a function, an object or a module that the other side does not know yet.  The thing itself stays here."""
        for t in within(value, {}) if self.me == "p" else ():
            self.declare(t)
        key, module = self.number(value), None
        if isinstance(value, nn.Module):
            named = [*value._parameters.items(), *value._buffers.items()]
            module = [[n, t if t is None else self.declare(t), n in value._parameters] for n, t in named]
            module = [module, [[n, self.pack(m, graph)] for n, m in value._modules.items()]]
        return {"new": key, "name": type(value).__name__, "module": module}

    def unpack(self, packed, values):
        if isinstance(packed, list):
            return [self.unpack(p, values) for p in packed]
        if not isinstance(packed, dict):
            return packed
        (kind, inside), = [(k, v) for k, v in packed.items() if k not in ("name", "module")]
        if kind == "ref":
            return self.known[inside]
        if kind == "graph":
            return values[inside]
        if kind == "tensor":
            return tensor(inside)
        if kind == "dtype":
            return DTYPES[inside]
        if kind == "tuple":
            return tuple(self.unpack(inside, values))
        if kind == "dict":
            return {self.unpack(k, values): self.unpack(v, values) for k, v in inside}
        return self.meet(inside, packed["name"], packed["module"], values)

    def theirs(self, key):
        """key, if it is one that the other side may give to something new."""
        if not isinstance(key, str) or key[:1] == self.me or key in self.known:
            raise Broken(f"a new thing with the name {key!r}")
        return key

    def meet(self, key, name, module, values):
        """A stand-in for something new of the other side."""
        key = self.theirs(key)
        if module is None:
            return self.remember(key, type(name, (Remote,), {})(self, key))
        made = self.remember(key, type(name, (RemoteModule,), {})(self, key))
        for n, at, parameter in module[0]:
            (made._parameters if parameter else made._buffers)[n] = at and self.tensors[at]
        for n, child in module[1]:
            made._modules[n] = self.unpack(child, values)
        return made

    # ---- shared tensors

    def share(self, args, kwargs):
        """Declare all tensors among the arguments, those first that others were computed from."""
        flat, todo = {}, [args, kwargs]
        while todo:
            value = todo.pop()
            todo += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if isinstance(value, torch.Tensor):
                flat[id(value)] = value
        grown = [t for t in flat.values() if t.grad_fn is not None]
        for t in sorted(flat.values(), key=lambda t: len(sources(t, [u for u in grown if u is not t]))):
            self.declare(t)

    def declare(self, t):
        if id(t) in self.keys:
            self.use(self.keys[id(t)])
            return self.keys[id(t)]
        others = [u for k, u in self.tensors.items() if u.requires_grad and k not in self.linked]
        made_from, key, now = sources(t, others), self.number(t), state(t)
        self.nodes.append((made_from, [t]))
        self.new.append([key, now, isinstance(t, nn.Parameter), [self.keys[id(u)] for u in made_from], len(self.nodes) - 1])
        self.tensors[key], self.last[key] = t, now
        if made_from:
            self.linked[key] = [self.keys[id(u)] for u in made_from]
        self.use(key)
        return key

    def use(self, key):
        """This call uses a shared tensor.  Its gradient goes to the tensors from which that one was computed, if any."""
        self.used |= {key, *self.linked.get(key, ())}

    def accept(self, key, found, parameter, made_from, node):
        """The copy of a shared tensor; if it was computed from others, its gradient goes on to them."""
        flag, value, grad = found
        t = tensor(value)
        t = nn.Parameter(t, requires_grad=flag) if parameter else t.requires_grad_(bool(flag))
        t.grad = None if grad is None else tensor(grad)
        if made_from:
            anchor = torch.zeros((), requires_grad=True)
            t, = Node.apply(self, node, [t.detach()], True, *[self.tensors[k] for k in made_from], anchor)
            self.linked[key] = ()
        self.tensors[key] = self.remember(self.theirs(key), t)
        self.last[key] = state(t)

    def changes(self):
        found = {key: state(t) for key, t in self.tensors.items()}
        found = {key: now for key, now in found.items() if now != self.last[key]}
        self.last.update(found)
        return found

    def misuse(self):
        """What was done to the stand-ins here that the other side cannot see in values."""
        if any(spent(self.tensors[k]) for k in self.linked if k[0] != self.me):
            return "the code used up the graph of an argument, which others need: retain_graph=True keeps it"
        modules = [m for m in self.known.values() if isinstance(m, RemoteModule)]
        if any(p is not None and id(p) not in self.keys for m in modules for p in m._parameters.values()):
            return "the code replaced a weight of a module that it was given: change weights in place"

    def apply(self, key, found):
        (flag, value, grad), t = found, self.tensors[key]
        if value != data(t):
            if self.me == "p" and key[0] == "p" and not self.writes:
                self.fault = "the code changed one of its arguments in place: work on a copy"
            else:
                t.data.copy_(tensor(value))
        if t.is_leaf:
            t.requires_grad_(bool(flag))
            t.grad = None if grad is None else tensor(grad)
        elif grad is not None and t.requires_grad:                # backward() goes on to what t was computed from
            t.backward(tensor(grad), retain_graph=True)
        self.last[key] = state(t)

    # ---- messages

    def send(self, message):
        rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        message |= dict(state=self.changes(), new=self.new, rng=None if rng == self.rng else rng,
                        fault=self.misuse())
        self.new, self.rng = [], rng
        self.write(json.dumps(message).encode())

    def receive(self):
        """The next message.  Whatever is wrong with it, the other side is to blame."""
        try:
            got = json.loads(self.read())
            for shared in got["new"]:
                self.accept(*shared)
            for key, found in got["state"].items():
                self.apply(key, found)
            self.fault = self.fault or got["fault"]
            if got["rng"] is not None:
                torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(got["rng"])), dtype=torch.uint8))
                self.rng = got["rng"]
            return got
        except (Broken, EOFError, OSError):
            raise
        except Exception as e:
            raise Broken(f"what came from the code's process is no message ({type(e).__name__})") from e


def spent(t):
    """Has a backward without retain_graph gone through the Node that made t?"""
    try:
        return not t.grad_fn.saved_tensors
    except RuntimeError:
        return True


def sources(t, others):
    """Those of the other tensors that t was computed from."""
    if t.grad_fn is None or not others:
        return []
    with torch.enable_grad():
        found = torch.autograd.grad(t.sum(), others, retain_graph=True, allow_unused=True)
    return [u for u, g in zip(others, found) if g is not None]


def offered(thing, name):
    """May the student's process see this attribute?  What a check or the library defines, and nothing private."""
    own = [vars(c) for c in type(thing).__mro__ if c.__module__.split(".")[0] in ("tutorials", "nano_dmd", "toy")]
    return isinstance(name, str) and name[:1] != "_" and any(name in names for names in [getattr(thing, "__dict__", {}), *own])
