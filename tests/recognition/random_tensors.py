"""Random weights under given names."""

import torch

Tensors = dict[str, torch.Tensor]


def random_like(tensors: Tensors, seed: int) -> Tensors:
    """Return random tensors of these names, with statistics that are not those of a new network."""
    torch.manual_seed(seed)
    made = {}
    for name, tensor in tensors.items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            made[name] = torch.rand_like(tensor) + 0.5
        elif tensor.is_floating_point():
            made[name] = torch.randn_like(tensor) / max(1, tensor[0].numel()) ** 0.5
        else:
            made[name] = tensor + 7
    return made
