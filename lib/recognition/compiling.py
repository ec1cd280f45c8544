"""Finds the parts of a model that are compiled."""

from torch import nn


def repeated_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a backbone such as a ConvNeXt or a transformer. None if other parts hold many weights.

    Blocks are the members of the innermost sequences of modules of one class, if that class is not torch's own.
    """
    blocks: list[nn.Module] = []

    def collect(module: nn.Module) -> bool:
        found = False
        for child in module.children():
            found = collect(child) or found
        members = list(module.children())
        is_sequence = isinstance(module, nn.Sequential | nn.ModuleList) and len({type(each) for each in members}) == 1
        if not found and is_sequence and not type(members[0]).__module__.startswith("torch."):
            blocks.extend(members)
            return True
        return found

    collect(backbone)
    in_blocks = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    return blocks if 2 * in_blocks > sum(parameter.numel() for parameter in backbone.parameters()) else []
