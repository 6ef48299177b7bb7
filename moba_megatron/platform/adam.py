"""Adam with the state layout of FusedAdam, for machines without Transformer Engine and apex.

megatron-core's distributed optimizer saves and reshards the state of FusedAdam: `exp_avg` and `exp_avg_sq` for each
parameter, and one integer `step` for each parameter group. PyTorch's own Adam keeps a step tensor in each parameter's
state instead; with it, resuming a distributed optimizer fails, or leaves all parameters sharing one step tensor. The
arithmetic here is PyTorch's functional Adam, so the numbers are those of `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980), with decoupled weight decay (AdamW, arXiv 1711.05101) unless `adam_w_mode` is false.

    Args:
        params: parameters or parameter groups, of any floating dtype, on CPU or CUDA.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: term added to the denominator.
        weight_decay: decoupled decay, or an L2 term in the gradient if `adam_w_mode` is false.
        adam_w_mode: as in FusedAdam.
        capturable: as in FusedAdam; megatron-core from 0.17 on passes it. Only False.

    Raises:
        ValueError: for `capturable`, a negative lr, eps or weight_decay, or a beta outside [0, 1).
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if capturable:
            raise ValueError(
                "capturable = True (the optimizer in a CUDA graph) needs FusedAdam: install Transformer Engine, or "
                "leave optimizer_cuda_graph off"
            )
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr = {lr}, eps = {eps} and weight_decay = {weight_decay} must not be negative, "
                f"betas = {betas} must lie in [0, 1)"
            )
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One update of every parameter that has a gradient; `closure` as in `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self._step_group(group)
        return loss

    def _step_group(self, group: dict) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        # The functional form counts the step itself, in one tensor per parameter that it changes in place.
        previous = [torch.full((), group["step"] - 1.0, device=parameter.device) for parameter in parameters]
        update = adamw if self.adam_w_mode else adam
        update(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            previous,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
