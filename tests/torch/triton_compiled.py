"""The GPU kernels compiled to PTX, without a GPU; see test_triton.py."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from nadam.core.dtypes import COMPRESSED, COMPUTE_DTYPE, HALF, SPLIT, SPLIT8, WIDE
from nadam.core.hyperparameters import Hyperparameters
from nadam.kernels.gpu import formats as triton_formats
from nadam.kernels.gpu import passes as kernels
from nadam.kernels.gpu import prepare as preparing
from nadam.torch import buckets
from nadam.torch.gpu import step as on_gpu
from nadam.torch.gpu.tables import Kind

CAPABILITIES = [80, 90, 100]
POINTERS = {
    "rows": "*i64", "chunks": "*i64", "ends": "*i64", "partials": "*fp64", "entries": "*fp64", "own_entries": "*fp64",
    "counters": "*fp64", "active": "*fp64", "key": "*i32", "step_key": "*i32", "report": "*fp64", "scalars32": "*fp32",
    "scalars64": "*fp64", "factors32": "*fp32", "factors64": "*fp64", "found": "*fp32", "scale": "*fp32",
    "lr_at": "*fp32", "tensors": "i32", "count": "i32", "seed": "i64",
}  # fmt: skip
PLAIN = dict.fromkeys(["ACCUMULATED", "LIMITED", "AVERAGED", "COUPLED", "EACH"], False) | {"KEPT": WIDE}
FORMATS = [("float32", "float32"), ("bfloat16", "bfloat16"), (SPLIT, "bfloat16"), ("float16", "float16"),
           ("float32", "bfloat16"), ("float64", "float64"), (SPLIT8, "bfloat16")]  # fmt: skip


def compiled(kernel, capability, constants, warps, **pointers):
    known = {**POINTERS, **pointers}
    signature = {name: "constexpr" if name in constants else known.get(name, "fp64") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


def one_pass(param, grad, capability=90, **options):
    constants = {
        "PARAM": param,
        "GRAD": grad,
        "COMPUTE": COMPUTE_DTYPE[param],
        "ELEMENT": triton_formats.ELEMENT[param],
    }
    of_kind = Kind(param, grad, options.get("KEPT", WIDE), 0, 0, None)
    constants |= {**PLAIN, **options, "BLOCK": of_kind.block}
    kind = {"float32": "*fp32", "float64": "*fp64"}[COMPUTE_DTYPE[param]]
    return compiled(kernels.one_pass, capability, constants, of_kind.warps, scalars=kind, factors=kind)


def accesses(ptx, kind):
    """How often the memory is loaded from, or stored to, by bytes at once."""
    found = re.findall(rf"\b{kind}\.global\S*?\.(?:v(\d)\.)?[bfus](\d+)\b", ptx)
    sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in found]
    return {size: sizes.count(size) for size in set(sizes)}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_float32_goes_16_bytes_at_once_and_in_float32(capability):
    ptx = one_pass("float32", "float32", capability)["ptx"]
    assert f".target sm_{capability}" in ptx
    # Parameter, gradient and two moments; twice 16 bytes of each for each thread.
    assert accesses(ptx, "ld")[16] == 8
    assert accesses(ptx, "st")[16] == 6
    assert "f64" not in ptx
    assert "sqrt.rn.f32" in ptx
    assert "sqrt.approx" not in ptx
    assert "div.full.f32" in ptx  # right for all divisors; div.approx is not, below 2**-126 and above 2**126
    assert ".ftz" not in ptx


@pytest.mark.parametrize(("param", "grad"), FORMATS)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_all_formats_are_compiled(param, grad, full):
    options = dict.fromkeys(PLAIN, True) | {"KEPT": WIDE if param == "float64" else HALF} if full else PLAIN
    asm = one_pass(param, grad, **options)
    loads, stores = accesses(asm["ptx"], "ld"), accesses(asm["ptx"], "st")
    assert loads[16] >= 1 + (not full)
    assert stores[16] >= 1 + (not full)
    if param != "float64":
        assert "f64" not in asm["ptx"].replace("setp.neu.f64", "").replace("setp.eq.f64", "").replace(
            "ld.global.f64", ""
        )
    # Where whole blocks go, no element changes from one thread to another.
    wide = asm["ttgir"][: asm["ttgir"].rindex("scf.for")]
    assert full or "convert_layout" not in wide


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize(("param", "grad"), [formats for formats in FORMATS if "float64" not in formats])
def test_moments_of_8_bits_are_compiled(param, grad, full):
    flags = dict.fromkeys(PLAIN, full) | {"KEPT": COMPRESSED}
    for capability in CAPABILITIES if param in ("float32", SPLIT8) else [90]:
        asm = one_pass(param, grad, capability, **flags)
        loads, stores = accesses(asm["ptx"], "ld"), accesses(asm["ptx"], "st")
        # Four elements for each thread: 4 bytes of codes of both moments, 8 or 16 of parameter and gradient.
        widest = 16 if "float32" in (param, grad) or full else 8
        assert max(loads) == widest
        assert stores[4] >= 2
        assert full or loads[8] + loads.get(16, 0) >= 2
        assert "f64" not in asm["ptx"]
        # Where whole blocks go, nothing but scales changes from one thread to another.
        wide = asm["ttgir"][: asm["ttgir"].rindex("scf.for")]
        moved = [line for line in wide.splitlines() if "convert_layout" in line]
        assert full or all("tensor<64xi8" in line for line in moved)
        assert 'ttg.num-warps" = 16' in asm["ttgir"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_reads_the_gradients(capability):
    constants = {"GRAD": "float32", "COMPUTE": "float32", "ACCUMULATED": False, "CHECKED": True, "BLOCK": 1024}
    ptx = compiled(kernels.measure, capability, constants, kernels.WARPS)["ptx"]
    assert accesses(ptx, "ld")[16] == 2
    assert "fma.rn.f64" in ptx


@pytest.mark.parametrize("clip", ["EACH", None])
def test_what_decides(clip):
    given = clip is not None
    constants = dict.fromkeys(["COUPLED", "ADAM", "ACCUMULATED", "ROUNDED", "MEASURED"], given)
    constants |= {"EACH": clip == "EACH", "GLOBAL": given, "FREQUENCY": 3 if given else None}
    if not given:
        constants |= dict.fromkeys(["entries", "own_entries", "found", "scale", "lr_at"])
    for capability in CAPABILITIES if given else [90]:
        asm = compiled(preparing.prepare, capability, {**constants, "BLOCK": preparing.BLOCK}, preparing.WARPS)
        assert "div.rn.f64" in asm["ptx"]
    sums = compiled(preparing.sums, 90, {"BLOCK": preparing.BLOCK}, preparing.WARPS)["ptx"]
    assert "add.f64" in sums or "add.rn.f64" in sums


def test_numbers_of_the_host_arrive_in_float64():
    for kernel, names in (
        (kernels.measure, ["inv_scale", "largest", "steps"]),
        (preparing.prepare, ["lr", "eps", "clip"]),
    ):
        kinds = {param.name: param.annotation_type for param in kernel.params}
        assert [kinds[name] for name in names] == ["fp64"] * len(names)


def test_the_rule_is_the_one_of_the_core():
    update = triton_formats.ELEMENT["float32"].fn.__globals__["update"]
    steps = [line.strip() for line in update.src.splitlines()[1:]]
    assert steps[-1] == "return (param - (param * decay + step), exp_avg, exp_avg_sq)"


STEPS = {
    "plain": {},
    "each": {"clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 2, "gradient_accumulation_steps": 2},
    "global": {"global_clipnorm": 0.5, "skip_nonfinite": True, "weight_decay": 0.1},
    "8 bits": {"global_clipnorm": 0.5},
}


@pytest.fixture
def launched(monkeypatch):
    """What a step launches, compiled for a GPU from the very arguments, but not run."""
    target = GPUTarget("cuda", 90, 32)
    backend, names = make_backend(target), []

    def run(self, *args, grid, warmup, **options):
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, found = binder(*args, **options, debug=False)
        packed = self._pack_args(backend, {**options, "debug": False}, bound, specialization, found)
        triton.compile(ASTSource(self, *packed[1:]), target=target, options=packed[0].__dict__)
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    return names


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_launches(launched, name):
    h = Hyperparameters(lr=0.0, **STEPS[name])
    params = [torch.zeros(5), torch.zeros(5000), torch.zeros(0)]
    options = buckets.StateOptions(False, None, 0, 8 if name == "8 bits" else None)
    states = [buckets.new_state(param, h, options) for param in params]
    plan = on_gpu.DevicePlan(params, states, [torch.zeros_like(param) for param in params], h)
    on_gpu.step([on_gpu.Bucket(plan, h, 0.0, 0.9, 0.999)])
    middle = {"plain": [], "each": ["measure", "sums"], "global": ["measure"], "8 bits": 2 * ["measure"]}[name]
    last = ["one_pass"] * (2 if name == "8 bits" else 1)  # small tensors keep moments of float32
    assert launched == [*middle, "prepare", *last]
    one = torch.ones(())
    on_gpu.step([on_gpu.Bucket(plan, h, one, 0.9, 0.999)], scale=one, found=one)
    assert launched == 2 * [*middle, "prepare", *last]
