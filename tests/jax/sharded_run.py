"""Take steps on several devices, in one process or two, and write what came of them; run by test_jax_sharding.py.

sharded_run.py ways FOLDER                          all that `cases` names, on the devices that there are
sharded_run.py save FOLDER, sharded_run.py restore FOLDER    an orbax checkpoint, on one mesh and onto another
sharded_run.py process FOLDER RANK ADDRESS          one of two processes

How many devices the CPU is made into is set when JAX starts, so each of these has a process of its own.
"""

import sys
from math import prod
from pathlib import Path

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nadam.jax import fused, nadam, nadamw

STEPS, BATCH = 6, 4
CLIP, BAD_STEP = 0.5, 2
# By shape, which tells a parameter and its state from the others.
SPECS = {
    (8, 12): P("row", "column"),
    (16, 3): P("row"),
    (8,): P(("row", "column")),
    (5,): P(),
    (64, 80): P("row", "column"),  # large enough for 8 bits
}
OPTIMIZERS = {
    "nadam": lambda: nadam(0.05, eps=1e-3, momentum_decay=0.004),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(CLIP), nadamw(0.05, eps=1e-3, weight_decay=0.1)),
    "fused": lambda: fused(0.05, eps=1e-3, global_clipnorm=CLIP, weight_decay=0.1, use_ema=True),
    "accumulated": lambda: fused(0.05, eps=1e-3, clipnorm=CLIP, gradient_accumulation_steps=2),
    "skip": lambda: fused(0.05, eps=1e-3, global_clipnorm=CLIP, skip_nonfinite=True),
    "8 bits": lambda: fused(0.05, eps=1e-3, state_bits=8, skip_nonfinite=True),
}
# How state is made, and for which of them.
WAYS = {
    "init": list(OPTIMIZERS),
    "jitted init": ["nadam", "chain", "fused"],
    "explicit": ["nadam", "chain", "fused", "8 bits"],
}
# What is split between two processes, with the mesh for that, and for which of them.
BETWEEN = {"batches": ((2, 1, 2), ["chain", "fused"]), "parameters": ((1, 2, 2), ["chain", "fused", "skip"])}


def draw(name):
    """The first parameters, and a batch of inputs for each step; of "skip", one element of one input is NaN."""
    rng = np.random.default_rng(5)
    params = {f"p{i}": rng.standard_normal(shape).astype("float32") for i, shape in enumerate(SPECS)}
    batches = [
        {key: 3 + rng.standard_normal((BATCH, *param.shape)).astype("float32") for key, param in params.items()}
        for _ in range(STEPS)
    ]
    if name == "skip":
        batches[BAD_STEP]["p0"][-1, -1, -1] = np.nan
    return params, batches


def loss(params, batch):
    """Its gradient of a parameter is that parameter less the mean of its inputs."""
    parts = jax.tree.map(lambda param, x: ((param - x) ** 2).sum() / (2 * BATCH), params, batch)
    return sum(jax.tree.leaves(parts))


def make_step(optimizer):
    """(params, state, batch) -> (params, state), compiled, with the first two donated."""

    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        if hasattr(optimizer, "finalize"):
            return optimizer.step(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def on_mesh(mesh, tree, lead=()):
    """A tree placed on a mesh by the shapes of its leaves; of batches, whose first axis is split along another."""

    def place(leaf):
        sharding = NamedSharding(mesh, P(*lead, *SPECS[leaf.shape[len(lead) :]]))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree)


def shardings(mesh, tree):
    return jax.tree.map(lambda leaf: NamedSharding(mesh, SPECS.get(leaf.shape, P())), tree)


def first_state(optimizer, params, way, mesh):
    if way != "jitted init":
        return optimizer.init(params)
    wanted = shardings(mesh, jax.eval_shape(optimizer.init, params))
    return jax.jit(optimizer.init, out_shardings=wanted)(params)


def places(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def train(name, mesh=None, way="init", steps=range(STEPS), start=None):
    """Steps, on a mesh or on one device.

    Returns:
        Parameters, state, and a dictionary of what else there is to see.
    """
    optimizer = OPTIMIZERS[name]()
    params, batches = draw(name)
    params = jax.tree.map(jnp.asarray, params) if mesh is None else on_mesh(mesh, params)
    params, state = start or (params, first_state(optimizer, params, way, mesh))
    step, before, norms = make_step(optimizer), places((params, state)), []
    for i in steps:
        batch = batches[i] if mesh is None else on_mesh(mesh, batches[i], ("batch",))
        params, state = step(params, state, batch)
        if getattr(getattr(state, "last_step", None), "grad_norm", None) is not None:
            norms.append(float(state.last_step.grad_norm))
    seen = {"norms": np.array(norms), "compiled": np.array(step._cache_size())}
    if mesh is not None:
        wanted = jax.tree.leaves(shardings(mesh, (params, state)))
        for when, found in (("before", before), ("after", places((params, state)))):
            pairs = zip(found, wanted, jax.tree.leaves((params, state)), strict=True)
            seen[f"placed {when}"] = np.array([place.is_equivalent_to(of, leaf.ndim) for place, of, leaf in pairs])
    return params, state, seen


def whole(leaf):
    """An array of NumPy, gathered from other processes where there are some."""
    return np.asarray(leaf if leaf.is_fully_addressable else process_allgather(leaf, tiled=True))


def write(path, params, state, seen=()):
    arrays = {f"params {i:02}": whole(leaf) for i, leaf in enumerate(jax.tree.leaves(params))}
    arrays |= {f"state {i:02}": whole(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(path, **arrays, **dict(seen))


def make_mesh(*shape, kind=AxisType.Auto):
    devices = np.array(jax.devices()[: prod(shape)]).reshape(shape)
    return Mesh(devices, ("batch", "row", "column"), axis_types=(kind,) * 3)


def all_ways(folder):
    for way, names in WAYS.items():
        mesh = make_mesh(2, 2, 2, kind=AxisType.Explicit if way == "explicit" else AxisType.Auto)
        for name in names:
            write(folder / f"{way} {name}.npz", *train(name, mesh, way))


def checkpointed(folder, what):
    """Save half-way on a mesh of four devices; restore onto one of eight, split otherwise, and go on."""
    import orbax.checkpoint as ocp

    mesh = make_mesh(1, 4, 1) if what == "save" else make_mesh(1, 2, 4)
    for name in OPTIMIZERS:
        path = folder / name
        with ocp.StandardCheckpointer() as checkpointer:
            if what == "save":
                params, state, _ = train(name, mesh, steps=range(STEPS // 2))
                checkpointer.save(path, {"params": params, "state": state})
                write(folder / f"saved {name}.npz", params, state)
                continue
            params = jax.eval_shape(lambda name=name: jax.tree.map(jnp.asarray, draw(name)[0]))
            like = {"params": params, "state": jax.eval_shape(OPTIMIZERS[name]().init, params)}
            wanted = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                like,
                shardings(mesh, like),
            )
            found = checkpointer.restore(path, wanted)
        start = found["params"], found["state"]
        write(folder / f"restored {name}.npz", *start)
        write(folder / f"resumed {name}.npz", *train(name, mesh, steps=range(STEPS // 2, STEPS), start=start))


def process(folder, rank, address):
    """One of two, each with half of the devices of a mesh of four."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    for between, (shape, names) in BETWEEN.items():
        for name in names:
            write(folder / f"{between} {name} {rank}.npz", *train(name, make_mesh(*shape)))
    jax.distributed.shutdown()


def main():
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "ways":
        all_ways(folder)
    elif what == "process":
        process(folder, int(sys.argv[3]), sys.argv[4])
    else:
        checkpointed(folder, what)


if __name__ == "__main__":
    main()
