"""A warning for optimizers that do not train a prefix: their eps is larger than its gradients."""

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

_MIN_SHARE = 0.1  # of the gradients' entries that are larger than eps, or hardly anything moves
_new: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_hook: RemovableHandle | None = None


def watch(prefix: nn.Module) -> None:
    """Warns at the first step of an optimizer with the parameters of `prefix` if its eps is too large for them."""
    global _hook
    _new.add(prefix)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_look)


def _look(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _hook
    ready = [
        (prefix, [parameter for parameter in prefix.parameters() if type(parameter.grad) is Tensor])
        for prefix in list(_new)
    ]
    if not any(parameters for _, parameters in ready):
        return
    eps_of = {id(p): group.get("eps") for group in optimizer.param_groups for p in group["params"]}
    small: list[tuple[float, float]] = []  # eps, and the share of entries above it
    for prefix, parameters in ready:
        of_optimizer = [p for p in parameters if id(p) in eps_of]
        if of_optimizer:
            _new.discard(prefix)
            small += _too_small(of_optimizer, eps_of[id(of_optimizer[0])])
    if small:
        eps, share = small[0]
        warnings.warn(
            f"{type(optimizer).__name__} hardly moves {len(small)} of its NTKPrefix: eps={eps} is larger than most of "
            f"their gradients (but for {share:.1%} of the entries); give the optimizer eps=1e-15",
            stacklevel=3,
        )
    if not _new and _hook is not None:
        _hook.remove()
        _hook = None


def _too_small(parameters: list[Tensor], eps: Any) -> list[tuple[float, float]]:
    if not isinstance(eps, float) or eps <= 0:
        return []
    sizes = torch.cat([parameter.grad.detach().abs().flatten() for parameter in parameters])
    sizes = sizes[sizes > 0]  # a factor of a pair has none as long as the other is 0
    share = (sizes > eps).float().mean().item() if sizes.numel() else 1.0
    return [(eps, share)] if share < _MIN_SHARE else []
