"""One DINOv2 training step, from images of eight bits to new weights: ours against lightly's published design.

    python benchmarks/dinov2_speed.py [--rounds 5] [--batch 8] [--img_size 224] [--local_size 96] [--prototypes 65536]

Two large and eight small views, ViT-S/16, heads of 2048-2048-256. The peer is lightly's example of DINOv2
(https://docs.lightly.ai/self-supervised-learning/examples/dinov2.html) rebuilt from torch and Pillow, since
torchvision, which lightly needs, is no dependency of ours: views one by one (`views_speed.py`), student passes of
large and small views apart, DINO's head with weight norm, centred teacher, losses of DINO, iBOT and KoLeo, AdamW,
the teacher's weights one by one. Its encoder and its masks
are ours, which leaves both the same blocks, with a mean drop-path rate of lightly's 0.1. Ours are `MultiCrop`,
`DINOv2`, which packs views and shares out by Sinkhorn, and a fused AdamW. All variants take turns, and medians are
compared. `--ready` makes the views once, as if enough other processes made them. On a GPU ours is measured with
ViT-L/16, too; bf16 is left out on processors without; "share" is as in `mae_speed.py`, of the operations of one draw
of drop-path.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs
from timing import PRODUCT, medians, product
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode
from views_speed import ours as our_views
from views_speed import peers as peers_views
from views_speed import peers_changes

from biovfm_monai.engines import fast_precision
from biovfm_monai.methods import DINOv2
from biovfm_monai.networks import ViT, vit_large, vit_small
from biovfm_monai.networks.masking import block_mask

Batch = dict[str, Tensor]


class PeersHead(nn.Module):
    """DINO's head, the last layer with weights of unit length."""

    def __init__(self, embed_dim: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        self.last = weight_norm(nn.Linear(256, prototypes, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1)
        self.last.parametrizations.weight.original0.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """Map N x embed_dim to N x prototypes."""
        return self.last(F.normalize(self.layers(x), dim=-1))


class PeersBlock(nn.Module):
    """A block of ours in which what drop-path leaves out is computed and set to zero, as in timm."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, turn: None = None, lengths: None = None) -> Tensor:
        """Map B x N x embed_dim to the same."""
        own = self.block
        x = x + own.drop_path(own.attn(own.norm1(x), turn, lengths))
        return x + own.drop_path(own.mlp(own.norm2(x)))


class Peer(nn.Module):
    """The published design: student and teacher, each an encoder and a head."""

    def __init__(self, encoder: ViT, prototypes: int) -> None:
        super().__init__()
        encoder.blocks = nn.ModuleList(PeersBlock(block) for block in encoder.blocks)
        self.student = nn.ModuleDict({"encoder": encoder, "head": PeersHead(encoder.embed_dim, prototypes)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.mask_token = nn.Parameter(torch.zeros(encoder.embed_dim))
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("patch_center", torch.zeros(prototypes))

    def forward(self, batch: Batch) -> Tensor:
        """The loss of batch["global_crops"] and batch["local_crops"], views x B x C x H x W each."""
        crops, local = batch["global_crops"], batch["local_crops"]
        encoder, head = self.student["encoder"], self.student["head"]
        patches = encoder.patchify(crops.flatten(0, 1))
        n, tokens = patches.voxels.shape[:2]
        keys = torch.randint(2**62, (n,))
        chosen, share = torch.rand(2, n)
        count = ((0.1 + 0.4 * share) * tokens).int() * (chosen < 0.5)
        mask = block_mask(keys, patches.grid_size, count).to(crops.device)
        with torch.no_grad():
            teacher = self.teacher["encoder"]
            taught = teacher.encode(*teacher.embed(patches))[0]
            shown = self.teacher["head"](taught[:, 0]).chunk(2)
            hidden = self.teacher["head"](taught[:, 1:][mask])
        x, angles = encoder.embed(patches)
        x = torch.cat([x[:, :1], torch.where(mask[..., None], self.mask_token.to(x.dtype), x[:, 1:])], dim=1)
        large = encoder.encode(x, angles)[0]
        small = encoder(local.flatten(0, 1))[:, 0]
        scores = [*head(large[:, 0]).chunk(2), *head(small).chunk(len(local))]
        dino = self._dino(shown, scores)
        ibot = self._ibot(hidden, head(large[:, 1:][mask]), mask)
        spread = torch.stack([self._koleo(one) for one in large[:, 0].chunk(2)]).sum()
        return dino + ibot + 0.1 * spread

    def _dino(self, shown: tuple[Tensor, ...], scores: list[Tensor]) -> Tensor:
        target = torch.stack([((one.float() - self.center) / 0.04).softmax(-1) for one in shown])
        logs = torch.stack([(one.float() / 0.1).log_softmax(-1) for one in scores])
        pairs = -torch.einsum("tbk,sbk->ts", target, logs)
        pairs = pairs * (1 - torch.eye(len(target), len(logs), device=pairs.device))
        self.center.lerp_(torch.cat(shown).float().mean(0), 0.1)
        return pairs.sum() / ((pairs.numel() - len(target)) * target.shape[1])

    def _ibot(self, hidden: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        target = ((hidden.float() - self.patch_center) / 0.04).softmax(-1)
        loss = -(target * (scores.float() / 0.1).log_softmax(-1)).sum(-1)
        weight = (1 / mask.sum(1).clamp(min=1))[:, None].expand_as(mask)[mask]
        self.patch_center.lerp_(hidden.float().mean(0), 0.1)
        return (loss * weight).sum() / len(mask)

    @staticmethod
    def _koleo(tokens: Tensor) -> Tensor:
        rows = F.normalize(tokens.float(), dim=-1)
        with torch.no_grad():
            nearest = (rows @ rows.T).fill_diagonal_(-1).argmax(1)
        return -(F.pairwise_distance(rows, rows[nearest]) + 1e-8).log().mean()

    @torch.no_grad()
    def follow(self) -> None:
        """Let the teacher follow."""
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            own.data = own.data * 0.992 + other.data * 0.008


def our_step(method: DINOv2, batch: Callable[[], Batch], dtype: torch.dtype | None, device: str) -> Callable[[], None]:
    """A function that takes one step of ours."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        images = batch()
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = method(images)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.5)

    return step


def peers_step(peer: Peer, batch: Callable[[], Batch], dtype: torch.dtype | None, device: str) -> Callable[[], None]:
    """A function that takes one step of the peer."""
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        images = batch()
        peer.follow()
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = peer(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sources(arguments: argparse.Namespace) -> tuple[Callable[[], Batch], Callable[[], Batch]]:
    """How each makes its views: ours, and the peer's."""
    photograph, device = photographs.astronaut(), torch.device(arguments.device)
    starts = np.random.default_rng(0).integers(0, 256, (arguments.batch, 2))
    cuts = np.stack([photograph[y : y + 256, x : x + 256] for y, x in starts])
    image = torch.from_numpy(cuts).permute(0, 3, 1, 2)[:, :, None].contiguous()
    pictures = [Image.fromarray(cut) for cut in cuts]
    views = our_views(peers_changes(), arguments.img_size, arguments.local_size)

    def peers() -> Batch:
        made = [view.to(device) for view in peers_views(pictures, arguments.img_size, arguments.local_size)]
        return {"global_crops": torch.stack(made[:2]), "local_crops": torch.stack(made[2:])}

    def ours() -> Batch:
        return views({"image": image}, device)

    if arguments.ready:
        our_batch, peers_batch = ours(), peers()
        return lambda: our_batch, lambda: peers_batch
    return ours, peers


def count_flops(method: DINOv2, batch: Batch) -> int:
    """Floating-point operations of forward and backward; the plain attention kernel, since torch counts that one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        method(batch)["loss"].backward()
    method.zero_grad()
    return counter.get_total_flops()


def our_method(encoder: ViT, arguments: argparse.Namespace) -> DINOv2:
    """DINOv2 on an encoder."""
    return DINOv2(encoder, arguments.prototypes, freeze_last_layer=0.0).to(arguments.device)


def report(name: str, batch: int, seconds: dict[str, float], base: float, flops: int) -> None:
    """Print the row of one variant."""
    share = ""
    if flops:
        share = f"{flops / seconds[name] * seconds[f'product {name[-4:]}'] / (2 * PRODUCT**3):7.0%}"
    print(f"{name:16} {batch / seconds[name]:9.2f} {base / seconds[name]:8.2f}x {share}", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rounds": 5, "batch": 8, "img_size": 224, "local_size": 96, "prototypes": 65536}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ready", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, bf16, size = arguments.device, torch.bfloat16, (arguments.img_size, arguments.img_size)
    print(f"torch {torch.__version__}, {device}, {arguments.threads} threads, {arguments.rounds} rounds")
    ours, peers = sources(arguments)
    method = our_method(vit_small(3, size, drop_path_rate=0.2), arguments)
    peer = Peer(vit_small(3, size, drop_path_rate=0.2), arguments.prototypes).to(device)
    flops = {"ViT-S": count_flops(method, ours())}
    dtypes: dict[str, torch.dtype | None] = {"fp32": None}
    if fast_precision(torch.device(device)) == "bf16":
        dtypes["bf16"] = bf16
    calls = {f"ours {name}": our_step(method, ours, dtype, device) for name, dtype in dtypes.items()}
    calls |= {f"peer {name}": peers_step(peer, peers, dtype, device) for name, dtype in dtypes.items()}
    calls |= {f"product {name}": product(dtype or torch.float32, device) for name, dtype in dtypes.items()}
    if device != "cpu":
        large = our_method(vit_large(3, size), arguments)
        flops["ViT-L"] = count_flops(large, ours())
        calls["ours, ViT-L bf16"] = our_step(large, ours, bf16, device)
    seconds = medians(calls, arguments.rounds, device)
    print(f"{'variant':16} {'images/s':>9} {'vs peer':>9} {'share':>7}")
    for name in ("ours fp32", "ours bf16", "peer fp32", "peer bf16", "ours, ViT-L bf16"):
        if name in seconds:
            counted = flops["ViT-L" if "ViT-L" in name else "ViT-S"] if name.startswith("ours") else 0
            report(name, arguments.batch, seconds, seconds["peer fp32"], counted)


if __name__ == "__main__":
    main()
