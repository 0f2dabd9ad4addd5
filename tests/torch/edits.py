"""What users do to parameters, state and groups between steps, done to ours and to `torch.optim.NAdam` alike."""

import copy

import torch
from training import DEVICE, apart, drawn, seeded

from nadam.torch import NAdam

SHAPES = [(3, 4), (5,), (), (2, 3, 2), (40, 50)]
NAMES = ("exp_avg", "exp_avg_sq", "step", "mu_product")
# PyTorch keeps the momentum product in float32, six digits of which are left in a step; an edit that is missed shows in
# the first three.
UNITS = 1e-6 / torch.finfo(torch.float64).eps


class Pair:
    """An optimizer of ours and PyTorch's, which have begun alike."""

    def __init__(self, seed=0, groups=2, shapes=SHAPES, dtype=torch.float64):
        self.generator = seeded(seed)
        numbers = [drawn(self.generator, shape, dtype) for shape in shapes]
        self.params = [[torch.nn.Parameter(n.clone()) for n in numbers] for _ in range(2)]
        settings = {"lr": 0.01, "weight_decay": 0.01}
        self.optimizers = [
            kind([{"params": own[i::groups], "lr": 0.01 * (i + 1)} for i in range(groups)], **settings)
            for kind, own in zip((NAdam, torch.optim.NAdam), self.params, strict=True)
        ]

    def sides(self):
        return zip(self.optimizers, self.params, strict=True)

    def edit(self, edit, *args):
        """The same on both sides; numbers that are drawn, too."""
        start = self.generator.get_state()
        for optimizer, params in self.sides():
            self.generator.set_state(start)
            edit(optimizer, params, *args, generator=self.generator)

    def step(self, missing=(), strided=()):
        count = len(self.params[0])
        grads = [drawn(self.generator, self.params[0][i].shape, self.params[0][i].dtype) for i in range(count)]
        for optimizer, params in self.sides():
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                param.grad = None if i in missing else grad.clone()
                if i in strided and param.grad is not None and param.dim() > 1:
                    param.grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
            optimizer.step()
        self.compare()

    def compare(self):
        ours, theirs = self.optimizers
        # Copies, since PyTorch resizes no storage that NumPy has seen.
        assert apart(*([param.detach().clone() for param in own] for own in self.params)) < UNITS
        for one, two in zip(*self.params, strict=True):
            entry, expected = ours.state.get(one, {}), theirs.state.get(two, {})
            assert entry.keys() == expected.keys()
            for name, value in entry.items():
                kept = expected[name].to(value.dtype)
                assert apart([value.clone()], [kept.clone()]) < UNITS, name
            if entry:
                assert float(entry["step"]) == float(expected["step"])
        assert shown(ours) == shown(theirs)


def shown(optimizer):
    """Numbers of steps in the next checkpoint; none while there is state of a parameter that is in no group."""
    try:
        return {key: float(entry["step"]) for key, entry in optimizer.state_dict()["state"].items()}
    except KeyError:
        return None


def place(optimizer, param):
    """The list that holds a parameter, and where."""
    for group in optimizer.param_groups:
        for i, other in enumerate(group["params"]):
            if other is param:
                return group["params"], i
    return None, None


def entries(optimizer, params):
    return [optimizer.state[param] for param in params if optimizer.state.get(param)]


def on_every_tensor(exchange):
    """An exchange of the memory of all that is kept, and of the parameters."""

    def edit(optimizer, params, *, generator):
        for entry in entries(optimizer, params):
            for name in NAMES:
                if name in entry:
                    exchange(entry[name])

    return edit


def on_one_tensor(exchange, name):
    def edit(optimizer, params, *, generator):
        kept = entries(optimizer, params)
        if kept:
            exchange(kept[-1][name])

    return edit


def on_entries(change):
    """What replaces entries: all, or those of the names that it gives."""

    def edit(optimizer, params, *, generator):
        for entry in entries(optimizer, params):
            entry.update(
                {name: change(name, value) for name, value in entry.items() if change(name, value) is not None}
            )

    return edit


def shared(tensor):
    if tensor.is_cpu:
        tensor.share_memory_()


def data(tensor):
    tensor.data = tensor.data.clone()


def reset(tensor):
    with torch.no_grad():
        tensor.set_(tensor.clone())


def swapped(tensor):
    torch.utils.swap_tensors(tensor, tensor.clone())


def resized(tensor):
    """Memory that is given back, and other memory with the same values."""
    if not tensor.dim():  # ours shows counters that lie side by side
        return
    if tensor.is_shared():  # PyTorch itself crashes: resized to 0 and back, its memory is at address 0
        return
    kept, storage = tensor.clone(), tensor.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    tensor.copy_(kept)


def new_param(optimizer, params, *, generator):
    """A parameter takes another's place in its group; the old one stays where it is, with its state."""
    where, i = place(optimizer, params[1])
    if where is not None:
        params[1] = where[i] = torch.nn.Parameter(drawn(generator, params[1].shape, params[1].dtype))


def removed(optimizer, params, *, generator):
    where, i = place(optimizer, params[2])
    if where is not None:
        del where[i]


def last_removed(optimizer, params, *, generator):
    where, i = place(optimizer, params[-1])
    if where is not None:
        del where[i]


def moved(optimizer, params, *, generator):
    """A parameter is exchanged and its state goes to the new one."""
    where, i = place(optimizer, params[1])
    if where is not None:
        new = torch.nn.Parameter(params[1].detach().clone() + 1)
        if params[1] in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(params[1])
        params[1] = where[i] = new


def states_exchanged(optimizer, params, *, generator):
    """Two parameters of one shape exchange their state."""
    alike = [p for p in params if p.shape == params[0].shape and p in optimizer.state]
    if len(alike) > 1:
        one, two = alike[0], alike[-1]
        optimizer.state[one], optimizer.state[two] = optimizer.state[two], optimizer.state[one]


def popped(optimizer, params, *, generator):
    optimizer.state.pop(params[0], None)


def cleared(optimizer, params, *, generator):
    if params[1] in optimizer.state:
        optimizer.state[params[1]].clear()


def all_cleared(optimizer, params, *, generator):
    optimizer.state.clear()


def reordered(optimizer, params, *, generator):
    optimizer.param_groups[0]["params"].reverse()


def another_list(optimizer, params, *, generator):
    group = optimizer.param_groups[-1]
    group["params"] = list(group["params"])


def added(optimizer, params, *, generator):
    params.append(torch.nn.Parameter(drawn(generator, (3, 4), params[0].dtype)))
    optimizer.param_groups[0]["params"].append(params[-1])


def new_group(optimizer, params, *, generator):
    params.append(torch.nn.Parameter(drawn(generator, (2, 2), params[0].dtype)))
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.03})


def to_the_other_group(optimizer, params, *, generator):
    where, i = place(optimizer, params[0])
    if where is not None:
        del where[i]
        optimizer.param_groups[-1]["params"].append(params[0])


def counted(value):
    def edit(optimizer, params, *, generator):
        for entry in entries(optimizer, params[:1]):
            entry["step"].fill_(value)

    return edit


def one_entry(name, change):
    def edit(optimizer, params, *, generator):
        for entry in entries(optimizer, params[1:2]):
            entry[name] = change(entry[name])

    return edit


def in_place(name, change):
    def edit(optimizer, params, *, generator):
        for entry in entries(optimizer, params[1:3]):
            change(entry[name])

    return edit


def loaded(optimizer, params, *, generator):
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if not {id(param) for param in optimizer.state} <= trained:  # PyTorch's own state_dict has a KeyError then
        return
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def parameters_data(optimizer, params, *, generator):
    for param in params:
        param.data = param.data.clone()


def setting(name, value):
    def edit(optimizer, params, *, generator):
        optimizer.param_groups[0][name] = value

    return edit


EXCHANGES = {"share_memory_": shared, "data": data, "set_": reset, "swap_tensors": swapped, "resize_": resized}
EDITS = {
    **{f"{name} on all": on_every_tensor(exchange) for name, exchange in EXCHANGES.items()},
    **{f"{how} on one {n}": on_one_tensor(exchange, n) for how, exchange in EXCHANGES.items() for n in NAMES},
    "every entry a clone": on_entries(lambda name, value: value.clone()),
    "counters replaced": on_entries(lambda name, value: value.clone() if name in ("step", "mu_product") else None),
    "moments replaced": on_entries(lambda name, value: value * 2 if name == "exp_avg_sq" else None),
    "step of float32": on_entries(lambda name, value: value.float() if name == "step" else None),
    "strides": on_entries(lambda name, value: value.mT.contiguous().mT if value.dim() > 1 else None),
    "parameter exchanged": new_param,
    "parameter removed": removed,
    "last parameter removed": last_removed,
    "state moved along": moved,
    "states exchanged": states_exchanged,
    "state popped": popped,
    "state cleared": cleared,
    "all state cleared": all_cleared,
    "parameters reordered": reordered,
    "another list of parameters": another_list,
    "parameter added": added,
    "group added": new_group,
    "to the other group": to_the_other_group,
    "step filled": counted(1000.0),
    "step set back": counted(0.0),
    "one second moment": one_entry("exp_avg_sq", lambda value: value * 4),
    "one first moment": one_entry("exp_avg", torch.zeros_like),
    "one step": one_entry("step", lambda value: torch.tensor(7.0)),
    "one product": one_entry("mu_product", lambda value: value * 0.5),
    "product in place": in_place("mu_product", lambda value: value.mul_(0.5)),
    "moment in place": in_place("exp_avg", torch.Tensor.zero_),
    "loaded": loaded,
    "data of parameters": parameters_data,
    "lr": setting("lr", 0.05),
    "betas": setting("betas", (0.8, 0.99)),
}
if DEVICE != "cpu":  # nothing is shared between processes there
    EDITS = {name: edit for name, edit in EDITS.items() if "share_memory_" not in name}
