"""What fine-tuning asks of MONAI's `SupervisedTrainer` besides: schedules, an encoder frozen at first, flips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from biovfm_monai.data.preprocessing import degree_of
from biovfm_monai.errors import InputError, require_within

__all__ = ["AnisotropyInferer", "FlipInferer", "FreezeHandler", "ScheduleHandler"]


class ScheduleHandler:
    """Set an optimizer's settings before each step by a run's progress, as `PretrainingTrainer` does by itself.

    Args:
        optimizer: whose groups are set; a group's "<name>_scale", as of `parameter_groups`, multiplies the value.
        schedules: name of a setting ("lr") -> value as a function of progress in [0, 1], such as `WarmupCosine`.
    """

    def __init__(self, optimizer: Optimizer, schedules: Mapping[str, Callable[[float], float]]) -> None:
        self.optimizer, self.schedules = optimizer, dict(schedules)

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._set)

    def _set(self, engine: Engine) -> None:
        progress = (engine.state.iteration - 0.5) / (engine.state.max_epochs * engine.state.epoch_length)
        for name, schedule in self.schedules.items():
            value = schedule(progress)
            for group in self.optimizer.param_groups:
                group[name] = value * group.get(f"{name}_scale", 1.0)


class FreezeHandler:
    """Keep an encoder as it is for the first epochs, so that a fresh head does not spoil it.

    Args:
        encoder: what is trained of it gets no gradients meanwhile.
        epochs: how many; those of the whole run for a frozen encoder. With 0 nothing is changed.

    Raises:
        InputError: when epochs is negative, or, as the run starts, it is above 0 with several processes, which wait for
            all weights' gradients.
    """

    def __init__(self, encoder: nn.Module, epochs: int) -> None:
        require_within(0, whole=True, epochs=epochs)
        self.trained, self.epochs = [p for p in encoder.parameters() if p.requires_grad], epochs

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._freeze)

    def _freeze(self, engine: Engine) -> None:
        if not self.epochs:
            return
        if isinstance(engine.network, DistributedDataParallel):
            raise InputError("several processes cannot freeze an encoder. Train with one, or --frozen_epochs 0.")
        for parameter in self.trained:
            parameter.requires_grad_(int(engine.state.epoch) > self.epochs)


class AnisotropyInferer(Inferer):
    """Tell the network how thick an image's slices are, where its windows carry no geometry.

    Args:
        inferer: makes the logits, such as a sliding window.
    """

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Logits of a batch of one image, by its degree of anisotropy; without geometry as the network decides."""
        if isinstance(inputs, MetaTensor):
            affine = inputs.affine if inputs.affine.ndim == 2 else inputs.affine[0]
            kwargs["anisotropy"] = degree_of(MetaTensor(inputs[0].as_tensor(), affine=affine))
        return self.inferer(inputs, network, *args, **kwargs)


class FlipInferer(Inferer):
    """Mean logits of an image and of its mirror images, each turned back.

    Args:
        inferer: makes the logits of one, such as a sliding window.
        axes: of the batch, 2 for depth to 4 for width; all combinations of them are used.

    Raises:
        InputError: when an axis is none of a batch's volumes.
    """

    def __init__(self, inferer: Inferer, axes: Sequence[int] = (4,)) -> None:
        super().__init__()
        require_within(2, 4, whole=True, axes=axes)
        self.inferer, self.axes = inferer, tuple(axes)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Logits of a batch, of its size."""
        flips: list[tuple[int, ...]] = [()]
        for axis in self.axes:
            flips += [(*flip, axis) for flip in flips]
        found = self.inferer(inputs, network, *args, **kwargs)
        for flip in flips[1:]:
            found = found + torch.flip(self.inferer(torch.flip(inputs, flip), network, *args, **kwargs), flip)
        return found / len(flips)
