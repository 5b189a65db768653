"""What fastclip has beyond torch.nn.utils, in torch's ops: foreach where torch has it, and as timm has it."""

import torch


def get_tensor_norms(grads: list[torch.Tensor], *, foreach: bool) -> torch.Tensor:
    return torch.stack(torch._foreach_norm(grads) if foreach else [torch.linalg.vector_norm(grad) for grad in grads])


def clip_by_norm_(grads: list[torch.Tensor], max_norm: float, *, foreach: bool) -> torch.Tensor:
    norms = get_tensor_norms(grads, foreach=foreach)
    coefs = (max_norm / norms).clamp(max=1.0)
    if foreach:
        torch._foreach_mul_(grads, list(coefs.unbind()))
    else:
        for grad, coef in zip(grads, coefs, strict=True):
            grad.mul_(coef)
    return norms


@torch.no_grad()
def adaptive_clip_grad_(
    parameters: list[torch.nn.Parameter], clip_factor: float, eps: float = 1e-3, *, foreach: bool
) -> None:
    """timm.utils.agc, which has one way."""

    def unitwise(x: torch.Tensor) -> torch.Tensor:
        return x.norm() if x.dim() <= 1 else x.norm(dim=tuple(range(1, x.dim())), keepdim=True)

    for parameter in parameters:
        bound = unitwise(parameter).clamp_(min=eps).mul_(clip_factor)
        norm = unitwise(parameter.grad)
        clipped = parameter.grad * (bound / norm.clamp(min=1e-6))
        parameter.grad.copy_(torch.where(norm < bound, parameter.grad, clipped))
