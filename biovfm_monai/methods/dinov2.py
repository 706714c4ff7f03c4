"""DINOv2 (https://arxiv.org/abs/2304.07193): views of an image, and hidden patches, get their teacher's prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai import distributed
from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.draws import Use, forked, uniform
from biovfm_monai.errors import InputError, require_pair, require_within
from biovfm_monai.losses.dino import koleo, prototype_usage, row_entropy, sinkhorn, soft_cross_entropy
from biovfm_monai.methods.base import (
    SSLMethod,
    images_of_batch,
    keep_finite,
    keys_of_batch,
    small_views,
)
from biovfm_monai.methods.prototype_head import PrototypeHead
from biovfm_monai.methods.teacher import Teacher, rising
from biovfm_monai.networks import Patches, ViT, encode_together
from biovfm_monai.networks.masking import block_mask

__all__ = ["DINOv2"]

_CENTER_MOMENTUM = 0.9
_LEAST_IMAGES, _LEAST_TEMPERATURE = 2, 0.03
_VIEW = 1000


class DINOv2(SSLMethod):
    """A student predicts how its moving average shares out other views, and patches hidden from it, over prototypes.

    The student sees small views, and large ones of which blocks are hidden; the teacher the large ones, whole.

    Args:
        encoder: the student's; has a class token.
        prototypes, hidden_dim, bottleneck_dim: sizes of the head.
        separate_heads: whether patches have a head of their own.
        centering: "sinkhorn", or "mean" for scores less their moving average.
        queue: rows of earlier batches that take part in Sinkhorn's sharing of class tokens, as many whole batches as
            there is room for; for small batches.
        dino_weight, ibot_weight, koleo_weight: of the losses of views, of hidden patches, and of spreading out.
        student_temp: of the student's scores.
        teacher_temp: of the teacher's, at the start, and after the warm-up; 0.03 or more.
        warmup: share of the run over which teacher_temp rises.
        momentum: share of its weights that the teacher keeps in a step; it rises to 1.
        mask_probability: share of the large views of which blocks are hidden.
        mask_ratio: least and largest share of their patches that is hidden.
        freeze_last_layer: share of the run over which the prototypes stay as they are.

    Raises:
        InputError: when the encoder has no class token, or a size or choice means nothing.
    """

    encoder: ViT

    def __init__(
        self,
        encoder: ViT,
        prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        separate_heads: bool = False,
        centering: str = "sinkhorn",
        queue: int = 0,
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        student_temp: float = 0.1,
        teacher_temp: tuple[float, float] = (0.04, 0.07),
        warmup: float = 0.3,
        momentum: float = 0.992,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        freeze_last_layer: float = 0.01,
    ) -> None:
        super().__init__()
        if encoder.cls_token is None:
            raise InputError("DINOv2 compares class tokens, and the encoder has none. Build it with class_token=True.")
        require_within(2, whole=True, prototypes=prototypes)
        require_within(1, whole=True, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        require_within(0, dino_weight=dino_weight, ibot_weight=ibot_weight, koleo_weight=koleo_weight)
        if centering not in ("sinkhorn", "mean"):
            raise InputError(f"centering {centering!r} must be 'sinkhorn' or 'mean'. Give one of them.")
        require_within(0, whole=True, queue=queue)
        if queue and centering == "mean":
            raise InputError(f"centering 'mean' has no use for a queue, which is {queue}. Give queue 0, or 'sinkhorn'.")
        require_within(0, above=True, student_temp=student_temp)
        # Scores are cosines: below, their exponentials are no float32 numbers any more, and Sinkhorn loses rows.
        require_within(_LEAST_TEMPERATURE, teacher_temp=teacher_temp)
        require_within(0, 1, momentum=momentum, mask_probability=mask_probability, freeze_last_layer=freeze_last_layer)
        require_within(0, 1, above=True, warmup=warmup)
        require_pair(0, 1, mask_ratio=mask_ratio)
        self.encoder = encoder
        self.progress: Tensor
        self.centers: Tensor
        self.queue: Tensor
        sizes = (encoder.embed_dim, prototypes, hidden_dim, bottleneck_dim)
        self.head = PrototypeHead(*sizes)
        self.patch_head = PrototypeHead(*sizes) if separate_heads else None
        self.mask_token = nn.Parameter(torch.zeros(encoder.embed_dim))
        self.teacher = Teacher(self._student())
        self.centering, self.weights = centering, (dino_weight, ibot_weight, koleo_weight)
        self.student_temp, self.teacher_temp, self.warmup = student_temp, teacher_temp, warmup
        self.momentum, self.freeze_last_layer = momentum, freeze_last_layer
        self.mask_probability, self.mask_ratio = mask_probability, mask_ratio
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        self.register_buffer("centers", torch.zeros(2, prototypes if centering == "mean" else 0))
        self.register_buffer("queue", F.normalize(torch.randn(queue, bottleneck_dim), dim=1))

    def _student(self) -> nn.ModuleDict:
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "head": self.head}
        return nn.ModuleDict(parts | ({"patch_head": self.patch_head} if self.patch_head is not None else {}))

    @property
    def trained(self) -> ViT:
        """The teacher's encoder."""
        encoder: ViT = self.teacher.network["encoder"]
        return encoder

    def after_step(self, progress: float) -> None:
        """Let the teacher follow."""
        self.teacher.follow(self._student(), rising(self.momentum, 1.0, progress))
        self.progress.fill_(progress)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses of batch["global_crops"] and, if there, batch["local_crops"], as in `SSLMethod.forward`.

        Returns:
            "loss", its parts "dino", "ibot" and "koleo", and of how the teacher shares out large views over prototypes
            "teacher_entropy", a view's as a share of its largest value, and "prototype_usage", of those that are the
            likeliest of some view.

        Raises:
            InputError: when there are no two views to compare, small ones do not divide into patches, or Sinkhorn has
                one image to share out.
        """
        crops = images_of_batch(batch, "global_crops")
        views, b = crops.shape[:2]
        degree = degree_of_batch(batch)
        local = small_views(batch, self.encoder.patch_embed, degree)
        if views < 2 and local is None:
            raise InputError(
                "DINOv2 compares views, and there is one. Give MultiCrop two global_views, or a local_view."
            )
        patches = self.encoder.patchify(crops.flatten(0, 1), degree)
        hidden = self._hidden(batch, views, patches)
        large, small = self._learn(patches, hidden, local, degree)
        taught = self._teach(patches)
        shares, usage = self._shares(taught[:, 0], b)
        rows = hidden.flatten().nonzero()[:, 0].to(taught.device, non_blocking=True)
        of_large, of_small, of_patches = self._scores(large, small, rows)
        dino = self._dino(shares.unflatten(0, (views, b)), of_large, of_small)
        ibot = self._ibot(taught, of_patches, hidden, rows)
        # As in DINOv2's own code the weight is of each large view, and views without hidden patches count.
        spread = torch.stack([koleo(one) for one in large[:, 0].unflatten(0, (views, b))]).sum()
        loss = self.weights[0] * dino + self.weights[1] * ibot + self.weights[2] * spread
        watched = {"teacher_entropy": row_entropy(shares).mean(), "prototype_usage": usage}
        return {"loss": loss, "dino": dino, "ibot": ibot, "koleo": spread, **watched}

    def _hidden(self, batch: Mapping[str, Any], views: int, patches: Patches) -> Tensor:
        """Which patches the student does not see: (views B) x L, on the CPU, so that no device is waited for."""
        keys = keys_of_batch(batch, len(patches.voxels) // views, torch.device("cpu"))
        keys = torch.cat([forked(keys, _VIEW + view) for view in range(views)])
        chosen, share = uniform(keys, 2, Use.SHARE).unbind(1)
        low, high = self.mask_ratio
        count = ((low + (high - low) * share) * math.prod(patches.grid_size)).int().clamp(min=1)
        return block_mask(keys, patches.grid_size, count * (chosen < self.mask_probability))

    def _learn(
        self, patches: Patches, hidden: Tensor, local: Tensor | None, degree: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The student's tokens of the large views, and class tokens of the small ones."""
        mask = hidden.to(patches.voxels.device, non_blocking=True)[..., None]
        x, angles = self.encoder.embed(patches._replace(voxels=patches.voxels.masked_fill(mask, 0.0)))
        prefix = self.encoder.num_prefix_tokens
        x = torch.cat([x[:, :prefix], x[:, prefix:] + mask * self.mask_token.to(x.dtype)], dim=1)
        if local is None:
            return self.encoder.encode(x, angles)[0], None
        small = self.encoder.embed(self.encoder.patchify(local.flatten(0, 1), degree))
        large_tokens, small_tokens = encode_together(self.encoder, [(x, angles), small])
        return large_tokens, small_tokens[:, 0]

    @torch.no_grad()
    def _teach(self, patches: Patches) -> Tensor:
        encoder = self.trained
        return encoder.encode(*encoder.embed(patches))[0]

    @torch.no_grad()
    def _shares(self, tokens: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """How the teacher shares out class tokens over prototypes, N x K with rows of sum 1, and how many it uses."""
        head = self.teacher.network["head"]
        embedding = head.embed(tokens)
        # All processes hold one queue, and each brings in its part of it: whole batches, since the order of rows within
        # one depends on how many processes there are.
        step = len(embedding) * distributed.world_size()
        earlier = self.queue[: len(self.queue) // step * step][distributed.rank() :: distributed.world_size()]
        if not len(earlier):
            if self.centering == "sinkhorn" and images * distributed.world_size() < _LEAST_IMAGES:
                raise InputError(
                    f"Sinkhorn gives each prototype as many images, and a step has {images}. Raise --batch_size, give "
                    "--method::queue 2048, or --method::centering mean."
                )
            scores = head.likeness(embedding)
            shares = self._centred(scores, 0)
            # Sinkhorn evens out how often prototypes are used, even for images that are all alike.
            return shares, prototype_usage(scores if self.centering == "sinkhorn" else shares)
        scores = head.likeness(torch.cat([embedding, earlier]))
        shares = sinkhorn(scores, self._temperature())[: len(embedding)]
        if self.training:
            keep_finite(self.queue, torch.cat([distributed.gather(embedding), self.queue])[: len(self.queue)])
        return shares, prototype_usage(scores[: len(embedding)])

    def _centred(self, scores: Tensor, kind: int) -> Tensor:
        """Shares of N x K scores; of class tokens where kind is 0, of patches where it is 1."""
        if self.centering == "sinkhorn":
            return sinkhorn(scores, self._temperature())
        shares = ((scores - self.centers[kind]) / self._temperature()).softmax(dim=1)
        if self.training:
            rows = distributed.total(torch.tensor(float(len(scores)), device=scores.device))
            # Where a step hides no patch, the sum of none is no mean to go to.
            pace = (1 - _CENTER_MOMENTUM) * rows.clamp(max=1)
            center = self.centers[kind]
            keep_finite(center, center.lerp(distributed.total(scores.sum(0)) / rows.clamp(min=1), pace))
        return shares

    def _temperature(self) -> Tensor:
        start, end = self.teacher_temp
        return (start + (end - start) * (self.progress / self.warmup).clamp(max=1)).float()

    def _scores(self, large: Tensor, small: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The student's for prototypes: of class tokens of large and small views, and of some patches, by number."""
        free = self.progress >= self.freeze_last_layer
        tokens = [large[:, 0]] if small is None else [large[:, 0], small]
        patches = large[:, self.encoder.num_prefix_tokens :].flatten(0, 1).index_select(0, rows)
        # One call, since what is done to the prototypes costs as much as many rows.
        together = [*tokens, patches] if self.patch_head is None else tokens
        scores = self.head(torch.cat(together), free).split([len(rows) for rows in together])
        of_patches = scores[-1] if self.patch_head is None else self.patch_head(patches, free)
        return scores[0], None if small is None else scores[1], of_patches

    def _dino(self, shares: Tensor, large: Tensor, small: Tensor | None) -> Tensor:
        """Mean over pairs of a teacher's view and another one of the student's, by shares and scores."""
        views, b = shares.shape[:2]
        every = shares.sum(0)
        scores = large.unflatten(0, (views, b))
        parts = [soft_cross_entropy(every - shares[n], scores[n], self.student_temp).mean() for n in range(views)]
        pairs = views * (views - 1)
        if small is not None:
            parts.append(soft_cross_entropy(every.repeat(len(small) // b, 1), small, self.student_temp).sum() / b)
            pairs += views * (len(small) // b)
        return torch.stack(parts).sum() / pairs

    def _ibot(self, taught: Tensor, scores: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        """Sum over views of the mean over their hidden patches, per view: iBOT (https://arxiv.org/abs/2111.07832)."""
        prefix, device = self.encoder.num_prefix_tokens, taught.device
        count = hidden.sum(1)
        weight = (1 / count.clamp(min=1)).repeat_interleave(count).to(device, non_blocking=True)
        name = "head" if self.patch_head is None else "patch_head"
        with torch.no_grad():
            teacher = self.teacher.network[name](taught[:, prefix:].flatten(0, 1).index_select(0, rows))
            shares = self._centred(teacher, 1)
        return (weight * soft_cross_entropy(shares, scores, self.student_temp)).sum() / len(hidden)
