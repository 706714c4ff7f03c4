"""The Ignite engine that trains any `SSLMethod` (https://pytorch.org/ignite), on MONAI's `SupervisedTrainer`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, EventEnum, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents, default_prepare_batch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from biovfm_monai import distributed
from biovfm_monai.data import GlobalBatchSampler
from biovfm_monai.engines.precision import autocast_dtype
from biovfm_monai.engines.settings import settings_of
from biovfm_monai.errors import InputError, NonFiniteLossError
from biovfm_monai.methods import SSLMethod
from biovfm_monai.networks import SoftTokenizer, ViT
from biovfm_monai.parallelism import Sharded, inner, whole

__all__ = ["PretrainingTrainer", "StepEvents"]


class StepEvents(EventEnum):
    """What a `PretrainingTrainer` fires beside the events of Ignite and MONAI."""

    GRADIENTS_COMPLETED = "gradients_completed"
    """All gradients of a step are there, `engine.state.gradient_norm` is theirs: `leave_out_step` can be called."""
    RUN_ENDED = "run_ended"
    """`run` is about to return or to raise, whatever ended it: what goes on beside it is to be waited for."""


class PretrainingTrainer(SupervisedTrainer):
    """Train a self-supervised method on unlabelled batches.

    Differs from its parent where self-supervision needs it: the network returns its own loss; autocast follows the
    device (bf16 on CPU and GPU, fp16 with a loss scaler on GPU); gradients are clipped after unscaling; schedules move
    once per optimizer step; the method is told of each step; every iteration draws its random numbers from its own
    seed, so that a resumed run repeats what an undisturbed one does; a loss that is not finite ends the run; SIGTERM
    and SIGUSR1 end it after a step, with `stopped` set, so that handlers of `Events.TERMINATE` can write where it is.

    Args:
        device, max_epochs, train_data_loader, epoch_length, non_blocking, inferer, train_handlers,
            key_train_metric, additional_metrics, accumulation_steps: as in `SupervisedTrainer`. A `GlobalBatchSampler`
            of the loader is set to where the run is; epoch_length counts its micro-batches.
        network: the method, or what `parallelism.parallel` has made of it.
        optimizer: over the method's parameters.
        prepare_batch: (batch, device, non_blocking) -> batch on the device, views made.
        precision: "fp32", "bf16" or "fp16".
        clip_norm: largest norm of all gradients together; None for no clipping.
        schedules: name of an optimizer setting ("lr", "weight_decay") -> value as a function of progress in [0, 1],
            taken at the middle of each optimizer step; a parameter group's "<name>_scale" multiplies it.
        seed: of masks and views.

    Raises:
        InputError: on an unknown precision, fp16 without a GPU, no epoch, or an epoch_length other than the sampler's.
        NonFiniteLossError: in `run`, when the loss is not finite.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: nn.Module,
        optimizer: Optimizer,
        prepare_batch: Callable[..., Mapping[str, Any]] = default_prepare_batch,
        epoch_length: int | None = None,
        non_blocking: bool = True,
        inferer: Inferer | None = None,
        train_handlers: Sequence | None = None,
        key_train_metric: dict | None = None,
        additional_metrics: dict | None = None,
        precision: str = "fp32",
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        schedules: Mapping[str, Callable[[float], float]] | None = None,
        seed: int = 0,
    ) -> None:
        self.dtype = autocast_dtype(precision)
        device = torch.device(device)
        if precision == "fp16" and device.type != "cuda":
            raise InputError(f"precision 'fp16' needs a CUDA GPU, the device is {device}. Give --precision bf16.")
        if not isinstance(max_epochs, int) or max_epochs < 1:
            raise InputError(f"max_epochs {max_epochs!r} must be a whole number above 0. Correct --max_epochs.")
        _require_length(train_data_loader, epoch_length)
        self.loss_scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.clip_norm = clip_norm
        self.schedules = dict(schedules or {})
        self.seed = seed
        self.stopped = False
        self.settings: dict[str, Any] = {}
        self._unchecked: deque[tuple[int, Tensor]] = deque()
        self._graph_known = False
        self._asked: deque[Tensor] = deque()
        self._again = self._left_out = False
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=_own_loss,
            epoch_length=epoch_length,
            non_blocking=non_blocking,
            prepare_batch=prepare_batch,
            inferer=inferer,
            key_train_metric=key_train_metric,
            additional_metrics=additional_metrics,
            train_handlers=train_handlers,
            decollate=False,
            accumulation_steps=accumulation_steps,
            event_names=[*StepEvents],
        )
        self.add_event_handler(Events.EPOCH_STARTED, _place_sampler)

    def run(self) -> None:
        """Train to the end, beginning again as often as a handler asks for it by `begin_again`.

        Raises:
            InputError: when processes were started with different settings.
        """
        # Those of gradients talk to each other.
        judges = self._event_handlers[StepEvents.GRADIENTS_COMPLETED]
        names = [getattr(handler, "__qualname__", type(handler).__name__) for handler, *_ in judges]
        own = {"accumulation_steps": self.accumulation_steps, "handlers of gradients": names}
        self.settings = settings_of(self)
        distributed.require_same(self.settings | own, self.state.device)
        self._again, self.stopped = True, False
        with distributed.heeding_signals():
            try:
                while self._again:
                    self._again = False
                    super().run()
            finally:
                self.fire_event(StepEvents.RUN_ENDED)

    def begin_again(self) -> None:
        """End the run after this iteration, and let it begin again where handlers of `Events.STARTED` put it."""
        self._again = True
        self.terminate(skip_completed=True)

    def leave_out_step(self) -> None:
        """Leave the weights as they are in this step: on all processes, at `StepEvents.GRADIENTS_COMPLETED`."""
        self._left_out = True

    def losses_of_step(self) -> Tensor:
        """The losses of this step's micro-batches on this process, on its device."""
        return torch.stack([loss for iteration, loss in self._unchecked if self._is_of_step(iteration)])

    @property
    def method(self) -> SSLMethod:
        """The method itself, out of its parallel wrapper."""
        method: Any = inner(self.network)
        return method

    def trained(self) -> ViT | SoftTokenizer:
        """The network to keep, whole on each process, for looking at and for writing: all processes call it.

        It is a copy where the method's own is sharded.
        """
        trained = self.method.trained
        if not isinstance(self.network, Sharded):
            return trained
        copy = type(trained)(**trained.arguments).to(self.state.device)
        copy.load_state_dict(whole(trained.state_dict()))
        return copy.eval()

    @property
    def step(self) -> int:
        """Optimizer steps that are complete."""
        return int(self.state.iteration) // self.accumulation_steps

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.state.max_epochs * self.state.epoch_length) // self.accumulation_steps

    @property
    def samples_seen(self) -> int:
        """Images used so far by all processes together, when the loader has a `GlobalBatchSampler`; else iterations."""
        sampler = getattr(self.data_loader, "batch_sampler", None)
        return self.step * sampler.batch_size if isinstance(sampler, GlobalBatchSampler) else int(self.state.iteration)

    def _iteration(self, _: SupervisedTrainer, batchdata: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One micro-batch: forward and backward, and at the end of a group the optimizer's step.

        The output is a list of one dict, which is what MONAI's handlers take by default: the method's, and after a step
        "gradient_norm", that of all gradients before they were clipped.
        """
        iteration = int(self.state.iteration)
        stream = np.random.SeedSequence((self.seed, iteration, distributed.rank()))
        torch.manual_seed(int(stream.generate_state(1)[0]))
        batch = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        self.network.train()
        if (iteration - 1) % self.accumulation_steps == 0:
            self.optimizer.zero_grad(set_to_none=True)
        steps_now = iteration % self.accumulation_steps == 0
        with self._gradient_sync(steps_now):
            with torch.autocast(self.state.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                output = self.inferer(batch, self.network)
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss = self.loss_function(output, None)
            self.fire_event(IterationEvents.LOSS_COMPLETED)
            self.loss_scaler.scale(loss / self.accumulation_steps).backward()
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self._unchecked.append((iteration, loss.detach()))
        epoch_ends = iteration % self.state.epoch_length == 0
        norm = self._optimizer_step(epoch_ends) if steps_now else None
        shown = output if norm is None else {**output, "gradient_norm": norm}
        # What happens at the end of an epoch is not left out: the run then stops one step later.
        if steps_now and self._asked_to_stop() and not epoch_ends:
            self._check_losses(0)
            self.stopped = True
            distributed.leave_unfinished()
            self.terminate(skip_completed=True)
        self.state.output = [{name: x.detach() if isinstance(x, Tensor) else x for name, x in shown.items()}]
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output

    def _gradient_sync(self, steps_now: bool) -> AbstractContextManager:
        network: Any = self.network
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(steps_now)
        if isinstance(network, DistributedDataParallel) and not steps_now:
            # Of a static graph DDP learns in its first backward pass, in which all processes have to be together.
            if not network.static_graph or self._graph_known:
                return network.no_sync()
            self._graph_known = True
        return nullcontext()

    def _optimizer_step(self, epoch_ends: bool) -> Tensor:
        """Step, unless a handler leaves it out, and return the norm of the gradients before they were clipped."""
        for name, schedule in self.schedules.items():
            value = schedule((self.step - 0.5) / self.total_steps)
            for group in self.optimizer.param_groups:
                group[name] = value * group.get(f"{name}_scale", 1.0)
        self.loss_scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        self.state.gradient_norm = norm = whole(nn.utils.get_total_norm(gradients))
        self._left_out = False
        self.fire_event(StepEvents.GRADIENTS_COMPLETED)
        if self._left_out:
            self._unchecked = deque(entry for entry in self._unchecked if not self._is_of_step(entry[0]))
            self.loss_scaler.update()
            return norm
        # On a GPU the newest losses are still being computed, and reading them would make the host wait. At the end of
        # an epoch handlers write files, which must not hold what a bad loss did to the weights.
        waits = self.state.device.type == "cpu" or epoch_ends
        self._check_losses(0 if waits else self.accumulation_steps)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), self.clip_norm, norm)
        scale = self.loss_scaler.get_scale()
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()
        # The scale falls when gradients overflowed and the step was left out.
        if self.loss_scaler.get_scale() >= scale:
            self.method.after_step(self.step / self.total_steps)
        return norm

    def _is_of_step(self, iteration: int) -> bool:
        return iteration > self.state.iteration - self.accumulation_steps

    def _asked_to_stop(self) -> bool:
        """Whether all processes are to stop now; on a GPU by what was asked one step ago, so as not to wait for it."""
        self._asked.append(distributed.asked_to_stop(self.state.device))
        return len(self._asked) > (self.state.device.type != "cpu") and bool(self._asked.popleft())

    def _check_losses(self, leave: int) -> None:
        """Raise NonFiniteLossError if a loss is not finite, the newest `leave` of them not looked at yet."""
        while len(self._unchecked) > leave:
            iteration, loss = self._unchecked.popleft()
            if not torch.isfinite(loss):
                raise NonFiniteLossError(
                    f"the loss is {loss.item()} at iteration {iteration}. Lower --learning_rate, set --clip_norm 1.0, "
                    "or train with --precision fp32; if it is the first one, look for images that are not finite. "
                    "The last checkpoint is from before."
                )


def _own_loss(output: Mapping[str, Tensor], _: None) -> Tensor:
    return output["loss"]


def _require_length(loader: Iterable, epoch_length: int | None) -> None:
    """Raise InputError when it is not clear how long an epoch is, or the sampler's epochs are of another length."""
    if epoch_length is None:
        try:
            len(loader)  # type: ignore[arg-type]
        except TypeError as error:
            raise InputError("the data loader has no length. Give the trainer an epoch_length.") from error
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, GlobalBatchSampler) and epoch_length not in (None, len(sampler)):
        raise InputError(
            f"epoch_length {epoch_length} is not the sampler's {len(sampler)} micro-batches per epoch, so images would "
            "repeat. Leave epoch_length out, and give the sampler steps_per_epoch."
        )


def _place_sampler(engine: Engine) -> None:
    sampler = getattr(engine.data_loader, "batch_sampler", None)
    if isinstance(sampler, GlobalBatchSampler):
        sampler.samples_seen = engine.samples_seen
