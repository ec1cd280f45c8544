"""The average of a model's weights over its training. It is validated and saved."""

import copy
from itertools import compress

import torch
from torch import Tensor, nn

_NUM_NAME = "n_averaged"
_PREFIX = "module."


class AveragedWeights:
    """A moving average whose decay rises, so that the first weights are soon forgotten.

    Formula: the warm-up of TensorFlow's ExponentialMovingAverage, min(decay, (1 + n) / (10 + n)) at update n.

    Attributes:
        module: the model with the average of the weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self._decay = decay
        self._num_updates = 0
        own, current = _tensors(self.module), _tensors(model)
        # Integers, such as BatchNorm's count of steps, are not averaged.
        is_float = [tensor.is_floating_point() for tensor in own]
        self._averages, self._averaged = list(compress(own, is_float)), list(compress(current, is_float))
        is_other = [not each for each in is_float]
        self._copies, self._copied = list(compress(own, is_other)), list(compress(current, is_other))

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's present weights to the average."""
        n = self._num_updates
        if n:
            decay = min(self._decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(self._averages, self._averaged, 1 - decay)
        else:
            _copy(self._averages, self._averaged)
        _copy(self._copies, self._copied)
        self._num_updates = n + 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages and the number of updates, with the names of `torch.optim.swa_utils.AveragedModel`."""
        averages = {_PREFIX + name: tensor for name, tensor in self.module.state_dict().items()}
        return {_NUM_NAME: torch.tensor(self._num_updates), **averages}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self._num_updates = int(state[_NUM_NAME])
        self.module.load_state_dict(
            {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name != _NUM_NAME}
        )


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
