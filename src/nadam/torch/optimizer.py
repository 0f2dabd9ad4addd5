"""`NAdam`: what a user of PyTorch sees. A steady step is one native look at all tensors, then one pass over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from nadam.core.counters import Counters
from nadam.core.exclusive import Exclusive
from nadam.core.gradient import Check
from nadam.core.hyperparameters import BiasCorrection
from nadam.core.names import known_arguments, refuse
from nadam.core.step import StepReport, step
from nadam.torch import buckets, mistakes, settings
from nadam.torch.averages import WithAverages
from nadam.torch.bucket_cache import BucketCache
from nadam.torch.checkpoints import WithCheckpoints
from nadam.torch.fallback import Row, differentiable_step
from nadam.torch.gpu import bucket_cache as gpu
from nadam.torch.offload import Offload

WITHIN_SWAP = "step: called within swap_ema, at whose end the parameters get back what they were"


class NAdam(WithAverages, WithCheckpoints):
    """Nadam in the place of `torch.optim.NAdam`: the same arguments, numbers, groups and state, in one pass.

        momentum        = beta1 * (1 - 0.96**(step * momentum_decay) / 2)
        exp_avg        += (grad - exp_avg) * (1 - beta1)
        exp_avg_sq     += (grad**2 - exp_avg_sq) * (1 - beta2)
        m_hat           = next_momentum * exp_avg / (1 - mu_product * next_momentum)
                          + (1 - momentum) * grad / (1 - mu_product)
        param          -= lr * m_hat / (sqrt(exp_avg_sq / (1 - beta2**step)) + eps)

    Moments of float16 and bfloat16 parameters are float32. The gradients are left as found.

    Args:
        params: Parameters, named parameters or dicts of them with settings of their own. float16, bfloat16, float32,
            float64 or complex, of any strides.
        lr: Learning rate, >= 0: a number or a tensor of one element.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added outside the square root of the bias-corrected second moment, >= 0.
        weight_decay: Of L2 kind, >= 0: weight_decay times the parameter is added to the gradient.
        momentum_decay: How fast the momentum warms up, >= 0.
        decoupled_weight_decay: Whether the parameter is instead multiplied by 1 - lr * weight_decay, before the step.
        foreach: Accepted and ignored: there is one pass in any case.
        maximize: Whether to go up the gradient.
        capturable: Accepted, and ignored on the CPU.
        differentiable: Whether autograd goes through the step; then without the kernel and without what follows.
        clipnorm: Largest norm of each gradient, > 0. At most one of the three clips is set.
        clipvalue: Largest magnitude of each element of a gradient, > 0.
        global_clipnorm: Largest norm of all gradients of all groups together, > 0.
        use_ema: Whether to keep a moving average of each parameter: `swap_ema` and `finalize`.
        ema_momentum: Share of the old average that is kept, in [0, 1].
        ema_overwrite_frequency: Every so many updates the parameters take their averages; None for never.
        gradient_accumulation_steps: An update every so many calls of `step`, with the mean of the gradients; at least
            2, or None.
        bias_correction: "nadam" divides the first term of ``m_hat`` by ``1 - mu_product * next_momentum``, "adam" by
            ``1 - mu_product``, as the second: with ``momentum_decay`` infinite that is the Nadam of AlgoPerf and timm.
        skip_nonfinite: Whether a step whose gradients hold NaN, infinity or a value whose square overflows changes
            nothing but ``last_step.skipped_steps``.
        track_grad_norm: Whether ``last_step`` has the norm of all gradients also without clipping, for one more read of
            them.
        remainder: 16, or True, to keep beside each bfloat16 parameter the bits by which it differs from a float32 one:
            it then moves as that would. 8 to keep the upper half of them, stochastically rounded.
        exp_avg_dtype: torch.bfloat16 to keep the first moments of all but float64 and complex parameters in two bytes,
            rounded stochastically, so that small changes add up; None for the dtype that is computed in.
        seed: Of stochastic rounding, ``0 <= seed < 2**32``; it also depends on the step: a resumed run goes on alike.
        state_bits: 8 to keep both moments of each float16, bfloat16 or float32 parameter of at least 4,096 elements in
            a byte each, stochastically rounded, with a byte more for every 32 of them; on CPUs, or by Triton.
        state_device: "cpu" to keep the state and do the step there, of parameters that are on a GPU: gradients are
            copied over, new values back. None for the parameters' device.

    Raises:
        ValueError: A value out of its range, or two clips; it is named, with what is allowed.
        TypeError: A value that is not a number; a parameter of integers; a model instead of its parameters.
        AttributeError: Setting one of these as an attribute: they are the groups', or the constructor's.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = NAdam(model.parameters(), lr=0.01, global_clipnorm=1.0)
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_step.step
        1

    Reference:
        Dozat (2016), Incorporating Nesterov Momentum into Adam.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves unscaling and skipping to the step
    _released: Any = None  # gradient_release.Release, where there is one: what does the step then

    @known_arguments()
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        gradient_accumulation_steps: int | None = None,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        bias_correction: BiasCorrection = "nadam",
        remainder: bool | int = False,
        exp_avg_dtype: torch.dtype | None = None,
        seed: int = 0,
        state_bits: int | None = None,
        state_device: str | None = None,
    ) -> None:
        given = locals()
        self._extras = {name: given[name] for name in settings.EXTRAS}
        self._options = buckets.StateOptions(remainder, exp_avg_dtype, seed, state_bits, state_device).checked()
        self._exclusive = Exclusive()
        self._forget()
        defaults = {name: given[name] for name in settings.DEFAULTS}
        settings.checked(defaults, self._extras)
        if differentiable and (self._options.needs_kernel or any(self._extras[n] for n in settings.KERNELS_ONLY)):
            names = ", ".join((*settings.KERNELS_ONLY, "state_bits", "state_device", "remainder=8"))
            raise ValueError(f"differentiable=True: expected none of {names}")
        super().__init__(mistakes.listed(params), defaults)

    def _forget(self) -> None:
        """Drop what was prepared for the parameters and state of before."""
        self._settings = settings.Settings(self._extras, self._of_all())
        steps = self._extras["gradient_accumulation_steps"]
        given = self._settings, self._options, steps, type(self).__name__
        self._buckets, self._gpu, self._offload = BucketCache(*given), gpu.GpuBucketCache(*given), Offload()
        self._position = self._skipped = 0  # calls since the last update, and those that were skipped
        self._last_step: Any = None  # StepReport, or the DeviceReport of a GPU
        self._counting: Counters | None = None  # of an accumulating step at work

    @property
    def last_step(self) -> StepReport:
        """What the last step did; before the first, where the run stands. A GPU is asked when somebody looks at it."""
        if self._last_step is not None:
            return self._last_step  # type: ignore[no-any-return]
        params = (param for group in self.param_groups for param in group["params"])
        steps = (self.state[param]["step"] for param in params if self.state.get(param))
        return StepReport(int(next(steps, 0)), float(self.param_groups[0]["lr"]), None, None, self._counters()[1])

    def _of_all(self) -> dict[str, Any]:
        """The settings of the whole optimizer."""
        return {**self._extras, **self._options._asdict()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with settings of their own, as in `torch.optim`.

        Raises:
            ValueError: A setting out of its range, or of the whole optimizer; a parameter that is in a group already.
            TypeError: A parameter that is no tensor of real or complex numbers.
        """
        mistakes.check_new_group(param_group, self._of_all(), len(self.param_groups))
        super().add_param_group(param_group)
        try:
            settings.checked(self.param_groups[-1], self._extras)
            buckets.check_trainable(self.param_groups[-1]["params"], self._options)
        except BaseException:
            self.param_groups.pop()
            raise
        self._buckets.forget()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Args:
            closure: Computes the loss again, and the gradients.

        Returns:
            What the closure gives; None without one.

        Raises:
            ValueError: A setting out of its range, or memory that overlaps. Nothing has changed.
            RuntimeError: A sparse gradient, or a call within `swap_ema`. Nothing has changed.
        """
        if torch.compiler.is_dynamo_compiling() or _is_observed(self):
            return _observed_step(self) if closure is None else _observed_step(self, closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # or PyTorch would observe it whether anybody looks or not

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if self._swapped:
            raise RuntimeError(WITHIN_SWAP)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["differentiable"]:
            self._differentiable_step()
            return loss
        self._exclusive.run("step", self._kernel_step if self._released is None else self._released.finish)
        return loss

    def _kernel_step(self) -> None:
        if self._swapped:  # by another thread, for whose call this one waited
            raise RuntimeError(WITHIN_SWAP)
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # set by GradScaler
        self._sync_counters()
        self._counting = None
        first = self.param_groups[0]["params"]
        groups, kept = self.param_groups, self.state
        if self._options.state_device is None and first and first[0].device.type in gpu.DEVICES:
            done = self._gpu.step(self.param_groups, self.state, self._position, self._skipped, scale, found)
            if done is not None:
                report, params, self._position, self._skipped = done
                if report is not None:
                    self._last_step = report
                    increment_version(params)
                    self._buckets.forget()
                return
        if self._gpu.buckets:
            self._position, self._skipped = self._counters()
            self._gpu.forget()
        if found is not None and float(found):
            self._skipped += 1
            rate, name = float(self.param_groups[0]["lr"]), buckets.nonfinite(self.param_groups, 1.0, Check.FINITE)
            self._last_step = StepReport(self.last_step.step, rate, None, None, self._skipped, True, name)
            return
        if self._options.state_device is not None:
            groups, kept = self._offload.begin(groups, kept), self._offload.state
        moving, params = self._buckets.now(groups, kept, self._position)
        if not moving:
            return
        if self._extras["gradient_accumulation_steps"] is not None:
            self._counting = moving[0].counters
        try:
            loss_scale = 1.0 if scale is None else float(scale)
            report = step(moving, loss_scale=loss_scale, combine=self._buckets.combine)
        finally:
            increment_version(params)
            if self._options.state_device is not None:
                self._offload.end(params, self.state)
            self._sync_counters()
            self._counting = None
            self._buckets.release()
        if report.skipped:
            self._skipped += 1
            name = buckets.nonfinite(self.param_groups, 1.0 / loss_scale, moving[0].h.check())
            report = report._replace(nonfinite_param=name)
        self._last_step = report._replace(skipped_steps=self._skipped) if self._skipped else report

    def _sync_counters(self) -> None:
        """Take over the calls since the last update, which the kernel counts; also after an interrupted step."""
        if self._counting is not None:
            self._position = self._counting.calls % self._extras["gradient_accumulation_steps"]

    def _counters(self) -> tuple[int, int]:
        """Calls since the last update, and calls that were skipped."""
        self._sync_counters()
        return self._gpu.position(self._position), self._skipped + self._gpu.skipped()

    def _differentiable_step(self) -> None:
        for index, group in enumerate(self.param_groups):
            h, now = self._settings.now(index, group)
            present = [param for param in group["params"] if param.grad is not None]
            rows = [Row(param, buckets.entry(self.state, param, h, self._options), param.grad) for param in present]
            differentiable_step(h, now._replace(lr=group["lr"]), rows)

    def __repr__(self) -> str:
        shown = mistakes.shown(self._of_all())
        return str(super().__repr__()).replace("(\n", f"(\n{shown}", 1)


refuse(NAdam, mistakes.SETTINGS, mistakes.where_it_belongs)


def _is_observed(optimizer: Optimizer) -> bool:
    """Whether there are hooks around a step, or a profiler."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()
    )


# Dynamo breaks its graph here; PyTorch's own wrapper calls the hooks and names the step to the profiler.
_observed_step = torch.compiler.disable(Optimizer.profile_hook_step(NAdam._step))
