"""Whether an encoder still tells images apart: the effective rank of its embeddings (https://arxiv.org/abs/2210.02885)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.networks.utils import eval_mode
from torch import Tensor

from biovfm_monai import distributed
from biovfm_monai.data import MultiCrop, RandomCropDataset, RandomResizedCrop
from biovfm_monai.engines.resume import StateHandler
from biovfm_monai.engines.trainer import PretrainingTrainer
from biovfm_monai.errors import CollapseError, InputError
from biovfm_monai.networks import Embedder, SoftTokenizer, ViT

__all__ = ["CollapseHandler", "effective_rank"]

logger = logging.getLogger(__name__)

_BATCH = 32
_NEAR = 0.01
_LEAST_USAGE, _NO_GRADIENT = 0.1, 1e-8
_SPREAD = (
    "Lower --learning_rate, raise --batch_size (or DINOv2's queue), let the teacher follow more slowly (momentum), or "
    "give what spreads embeddings out more weight (koleo_weight, sigreg_weight)."
)


def effective_rank(embedding: Tensor) -> float:
    """How many directions embeddings use alike: the exponential of the entropy of their singular values, by RankMe.

    MONAI's `EmbeddingCollapseMetric` centres them first. Here they are not, since all that centring leaves of an
    encoder that has collapsed to one vector is noise, which uses all directions.

    Args:
        embedding: N x C.

    Returns:
        From 1, where all rows have one direction, to min(N, C); 0 where all are zero, NaN where one is not finite.
    """
    if not embedding.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(embedding.double())
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float((-torch.xlogy(share, share).sum()).exp()) if values.any() else 0.0


class CollapseHandler:
    """Embed the same images time and again, and say so when the encoder tells them apart no more.

    Their effective rank goes to `engine.state.metrics`, and so to TensorBoard and the log, as "effective_rank"; what
    `probe` finds as "probe". Of the last step's output "teacher_entropy" and "prototype_usage", if the method has them,
    and "gradient_norm" are looked at, too. A tokenizer has no embedding to look at.

    A run that goes back does so to the newest state, that of the epoch before, if that was found good. All learning
    rates are lower from there on: with the same ones it would come to the same end. A resumed run goes on with them,
    and goes back as one that was not disturbed does. "rewinds", how often it went back, is logged.

    Args:
        dataset: source of the images, its first crops.
        views: brings a crop to the encoder's size, without randomness.
        interval: epochs between looks; the last epoch always gets one.
        num_images: how many crops, over all processes, of which each keeps its part in memory.
        on_collapse: "warn", once for each sign, though numbers that are not finite end the run; "stop" the run, before
            the state of its epoch is written; or "rewind", go back to the newest state.
        least_rank: smallest effective rank, as a share of the way from 1 to the largest possible one.
        least_of_best: smallest effective rank, as a share of the best one after the warm-up.
        warmup: share of the run before which no finite rank, and no entropy, counts.
        probe: encoder, in evaluation mode, to a score, such as an accuracy on labelled images; run by the main process.
        states: the trainer's handler of states, for going back.
        lr_factor: of all learning rates, each time the run goes back.
        most_rewinds: how often it may.

    Raises:
        InputError: on an unknown on_collapse, fewer than 2 images, or a way of going back that there is not.
        CollapseError: in the trainer's `run`, on a sign of collapse, if that is to stop it, or it cannot go back.
    """

    def __init__(
        self,
        dataset: RandomCropDataset,
        views: RandomResizedCrop | MultiCrop,
        interval: int = 1,
        num_images: int = 128,
        on_collapse: str = "warn",
        least_rank: float = 0.005,
        least_of_best: float = 0.5,
        warmup: float = 0.1,
        probe: Callable[[ViT], float] | None = None,
        states: StateHandler | None = None,
        lr_factor: float = 0.5,
        most_rewinds: int = 3,
    ) -> None:
        if on_collapse not in ("warn", "stop", "rewind"):
            raise InputError(f"on_collapse {on_collapse!r} must be 'warn', 'stop' or 'rewind'. Give one of them.")
        if on_collapse == "rewind" and (states is None or (interval, states.interval) != (1, 1)):
            raise InputError(
                "on_collapse 'rewind' must have the StateHandler as states, and interval 1 of both, so that each state "
                "is of an epoch that was looked at. Give them, or on_collapse 'stop'."
            )
        if not 0 < lr_factor < 1:
            raise InputError(f"lr_factor {lr_factor} must be between 0 and 1, to learn more slowly. Give such as 0.5.")
        if num_images < 2:
            raise InputError(f"num_images {num_images} must be 2 or more, to tell one from another. Give more.")
        self.dataset, self.views, self.interval, self.num_images = dataset, views, interval, num_images
        self.on_collapse, self.least_rank, self.least_of_best = on_collapse, least_rank, least_of_best
        self.warmup, self.probe = warmup, probe
        self.states, self.lr_factor, self.most_rewinds = states, lr_factor, most_rewinds
        self._batches: list[tuple[Tensor, int | None]] = []
        self._rewinds = 0
        self._said: set[str] = set()

    def attach(self, engine: PretrainingTrainer) -> None:
        """Register with a trainer."""
        engine.state.best_rank, engine.state.best_usage, engine.state.rewinds = 0.0, 0.0, 0
        engine.state_dict_user_keys.extend(["best_rank", "best_usage", "rewinds"])
        engine.add_event_handler(Events.EPOCH_STARTED, self._slow_down)
        # Before the handlers of the iteration's and the epoch's end, which log what is found and write the state.
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._look)

    def _look(self, engine: PretrainingTrainer) -> None:
        epoch, ends = engine.state.epoch, engine.state.iteration % engine.state.epoch_length == 0
        if not ends or (epoch % self.interval and epoch != engine.state.max_epochs):
            return
        trained = engine.trained()
        if isinstance(trained, SoftTokenizer):
            self._say("tokenizer", "a tokenizer has no embedding, and is not watched for collapse.", logging.INFO)
            return
        with torch.random.fork_rng(devices=[]), eval_mode(trained):
            embedding = self._embed(trained, engine.state.device)
            if self.probe is not None and distributed.is_main():
                engine.state.metrics["probe"] = self.probe(trained)
        # One number on all processes, so that all of them do the same.
        rank = distributed.mean(torch.tensor(effective_rank(embedding), device=engine.state.device)).item()
        engine.state.metrics["effective_rank"] = rank
        if self.on_collapse == "rewind":
            engine.state.metrics["rewinds"] = engine.state.rewinds
        if engine.step < self.warmup * engine.total_steps and math.isfinite(rank):
            return
        judged = engine.state.best_rank > 0
        for kind, sign in self._signs(engine, rank, min(embedding.shape)):
            message = f"collapse at epoch {epoch}: {sign}"
            if self.on_collapse == "rewind":
                self.go_back(engine, message, judged)
                return
            if self.on_collapse == "stop" or kind == "finite":
                raise CollapseError(message)
            self._say(kind, message, logging.WARNING)

    def go_back(self, engine: PretrainingTrainer, message: str, judged: bool = True) -> None:
        """Let the run go back to its newest state and on with lower learning rates; all processes call it.

        Args:
            engine: of the run.
            message: why.
            judged: whether that state was found good.

        Raises:
            CollapseError: when there is no such state, or the run went back too often already.
        """
        if engine.state.rewinds >= self.most_rewinds:
            raise CollapseError(f"{message} The run went back {engine.state.rewinds} time(s) already.")
        if not judged or self.states is None or not self.states.rewind(engine):
            raise CollapseError(f"{message} There is no state to go back to of an epoch that was found good.")
        self._rewinds = engine.state.rewinds + 1
        # Lines that the log gets from there on would show what was found here.
        for name in ("effective_rank", "probe"):
            engine.state.metrics.pop(name, None)
        if distributed.is_main():
            logger.warning("%s Going back to the newest state, with learning rates times %g.", message, self.lr_factor)

    def _slow_down(self, engine: PretrainingTrainer) -> None:
        """Lower learning rates, a schedule's too, for each time that the state gone back to knows nothing of."""
        for _ in range(engine.state.rewinds, self._rewinds):
            for group in engine.optimizer.param_groups:
                group["lr"] *= self.lr_factor
                group["lr_scale"] = group.get("lr_scale", 1.0) * self.lr_factor
        engine.state.rewinds = max(engine.state.rewinds, self._rewinds)

    def _embed(self, encoder: ViT, device: torch.device) -> Tensor:
        """Embeddings of the images of all processes, images x embed_dim, the same on each of them."""
        self._batches = self._batches or self._read()
        network = Embedder(encoder)
        rows = [
            network(self.views.still_view(images.to(device), degree or 0), degree) for images, degree in self._batches
        ]
        return distributed.gather(torch.cat(rows).float()).cpu()

    def _read(self) -> list[tuple[Tensor, int | None]]:
        """This process's part of the crops, in batches of one shape and degree of anisotropy."""
        processes = distributed.world_size()
        # As many on each, so that their embeddings can be gathered.
        total = math.ceil(self.num_images / processes) * processes
        found: dict[tuple[torch.Size, int | None], list[Tensor]] = {}
        for number in range(distributed.rank(), total, processes):
            sample = self.dataset[number]
            found.setdefault((sample["image"].shape, sample.get("anisotropy")), []).append(sample["image"])
        return [(part, degree) for (_, degree), images in found.items() for part in torch.stack(images).split(_BATCH)]

    def _signs(self, engine: PretrainingTrainer, rank: float, largest: int) -> Iterator[tuple[str, str]]:
        """Kind of each sign of collapse, and what it is and what to try."""
        state, output = engine.state, engine.state.output[0]
        named = [name for name in ("teacher_entropy", "prototype_usage", "gradient_norm") if name in output]
        # The same numbers on all processes.
        seen = {name: distributed.mean(output[name].detach().float()).item() for name in named}
        entropy, usage = seen.get("teacher_entropy", 0.5), seen.get("prototype_usage", 0.0)
        state.best_rank, state.best_usage = max(state.best_rank, rank), max(state.best_usage, usage)
        if not math.isfinite(rank):
            yield "finite", "embeddings are not finite. Lower --learning_rate, set --clip_norm 1.0."
        if rank < 1 + self.least_rank * (largest - 1):
            yield "rank", f"the effective rank of embeddings is {rank:.2f} of at most {largest}. {_SPREAD}"
        if rank < self.least_of_best * state.best_rank:
            yield "best", f"the effective rank of embeddings fell from {state.best_rank:.2f} to {rank:.2f}. {_SPREAD}"
        if entropy < _NEAR:
            yield "sharp", f"the teacher's entropy is {entropy:.4f} of 1, one prototype a view. Raise teacher_temp."
        if entropy > 1 - _NEAR:
            yield "even", f"the teacher's entropy is {entropy:.4f} of 1, all prototypes alike. Lower teacher_temp."
        if usage < _LEAST_USAGE * state.best_usage:
            yield "usage", f"the share of prototypes in use fell from {state.best_usage:.4f} to {usage:.4f}. {_SPREAD}"
        if seen.get("gradient_norm", 1.0) < _NO_GRADIENT:
            yield "gradient", "no gradient reaches the weights. Look at what is frozen, and at the loss."

    def _say(self, kind: str, message: str, level: int) -> None:
        if kind not in self._said and distributed.is_main():
            logger.log(level, message)
        self._said.add(kind)
