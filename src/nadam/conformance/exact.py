"""Trajectories of the four members of the Nadam family in 50 decimal digits, rounded to float64.

    python -m nadam.conformance.exact > src/nadam/conformance/trajectories.json

writes the file again. It uses nothing of this package, and the standard library alone.
"""

import json
from decimal import Decimal, localcontext

# Member -> psi (None where momentum is constant), and whether both terms of m_hat have Adam's bias correction.
MEMBERS: dict[str, tuple[float | None, bool]] = {
    "keras": (1.0, False),
    "torch": (0.004, False),
    "optax": (None, False),
    "adam": (None, True),
}
PLAIN = {"lr": 0.0078125, "beta1": 0.9, "beta2": 0.999, "eps": 1e-30}
CASES: dict[str, dict[str, float]] = {
    "plain": PLAIN,
    "betas": {**PLAIN, "lr": 0.003, "beta1": 0.7, "beta2": 0.95},
    "eps": {**PLAIN, "eps": 0.125},
    "weight_decay": {**PLAIN, "weight_decay": 0.5},
    "coupled_weight_decay": {**PLAIN, "coupled_weight_decay": 0.5},
}
BASE = Decimal.from_float(0.96)
STEPS = 40
PARAM = [1.0, -0.75, 0.5]


def gradients() -> list[list[float]]:
    """Multiples of 1/4096 below 2, so exact in float32: noise around 0, noise around 0.25, and small noise."""
    rows, seed = [], 1
    for _ in range(STEPS):
        draws = []
        for _ in PARAM:
            seed = (1103515245 * seed + 12345) % 2**31
            draws.append((seed >> 16) % 513 - 256)  # the low bits of such a generator repeat too soon
        rows.append([draws[0] / 256, 0.25 + draws[1] / 512, draws[2] / 4096])
    rows[4][0] = 0.0
    return rows


def trajectory(
    member: str,
    param: list[float],
    gradients: list[list[float]],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    coupled_weight_decay: float = 0.0,
) -> list[list[float]]:
    """The parameters after each step; every setting counts as the float64 that it is."""
    psi, adam = MEMBERS[member]
    with localcontext() as context:
        context.prec = 50
        one = Decimal(1)
        rate, b1, b2, floor = Decimal(lr), Decimal(beta1), Decimal(beta2), Decimal(eps)

        def momentum(step: int) -> Decimal:
            if psi is None:
                return b1
            return b1 * (one - Decimal("0.5") * BASE ** (step * Decimal(psi)))

        params = [Decimal(value) for value in param]
        exp_avg, exp_avg_sq = [Decimal(0)] * len(param), [Decimal(0)] * len(param)
        product, rows = one, []
        for step, grads in enumerate(gradients, 1):
            now, following = momentum(step), momentum(step + 1)
            product *= now
            ahead = one - product if adam else one - product * following
            for i, value in enumerate(grads):
                grad = Decimal(value) + Decimal(coupled_weight_decay) * params[i]
                params[i] -= rate * Decimal(weight_decay) * params[i]
                exp_avg[i] = b1 * exp_avg[i] + (one - b1) * grad
                exp_avg_sq[i] = b2 * exp_avg_sq[i] + (one - b2) * grad * grad
                m_hat = following * exp_avg[i] / ahead + (one - now) * grad / (one - product)
                v_hat = exp_avg_sq[i] / (one - b2**step)
                params[i] -= rate * m_hat / (v_hat.sqrt() + floor)
            rows.append([float(value) for value in params])
        return rows


def text() -> str:
    """The file: one step of one member to a line."""

    def block(rows: list[list[float]], indent: str) -> str:
        return "[\n" + ",\n".join(f"{indent}  {json.dumps(row)}" for row in rows) + f"\n{indent}]"

    draws, cases = gradients(), []
    for name, settings in CASES.items():
        members = ",\n".join(
            f'      "{member}": {block(trajectory(member, PARAM, draws, **settings), " " * 6)}' for member in MEMBERS
        )
        head = f'    {{\n      "name": "{name}",\n      "settings": {json.dumps(settings)},\n'
        cases.append(f"{head}{members}\n    }}")
    grads = block(draws, "  ")
    joined = ",\n".join(cases)
    return f'{{\n  "param": {json.dumps(PARAM)},\n  "grads": {grads},\n  "cases": [\n{joined}\n  ]\n}}\n'


if __name__ == "__main__":
    print(text(), end="")
