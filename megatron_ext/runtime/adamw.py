"""AdamW on torch's fused kernel, with the interface megatron-core expects of Apex's and TE's FusedAdam."""

from typing import Any

import torch


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the step counted per parameter group.

    torch's own AdamW keeps one step tensor per parameter, which megatron's distributed optimizer cannot reload; here each
    group holds an int `step`, and a parameter's state is just `exp_avg` and `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        """Arguments as megatron passes them: `torch.optim.AdamW`'s, and two of FusedAdam's that may only have one value."""
        assert adam_w_mode, "only decoupled weight decay is implemented"
        assert not capturable, "CUDA graphs are not implemented"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._is_bad: torch.Tensor | None = None
        self._divisor: torch.Tensor | None = None
        self._skipped: torch.Tensor | None = None
        """Steps that were left out and that the groups' `step` counts as yet; on the device."""

    def decide(self, is_bad: torch.Tensor, divisor: torch.Tensor | None) -> None:
        """Say on the device what becomes of the next step.

        Args:
            is_bad: float32 scalar; 1 leaves the step out: weights and moments stay as they are.
            divisor: float32 scalar by which the gradients are divided in the update itself, which spares clipping a pass over them.
        """
        self._is_bad, self._divisor = is_bad, divisor

    def count_skipped(self, steps: int) -> None:
        """Take so many steps, all that `decide` has left out since the last call, off the groups' count."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) - steps
        self._skipped = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        is_bad, self._is_bad = self._is_bad, None
        divisor, self._divisor = self._divisor, None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, divisor, is_bad)
        if is_bad is not None:
            self._skipped = is_bad if self._skipped is None else self._skipped + is_bad

    def _update(
        self, group: dict[str, Any], params: list[torch.Tensor], divisor: torch.Tensor | None, is_bad: torch.Tensor | None
    ) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        beta1, beta2 = group["betas"]
        # Filled on the device: a copy of a number from the host would wait.
        step = torch.full((), float(group["step"]), device=params[0].device)
        if self._skipped is not None:
            step -= self._skipped
        torch._fused_adamw_(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=is_bad,
        )
