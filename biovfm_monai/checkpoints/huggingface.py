"""Weights of Hugging Face's ViT, ViTMAE, Dinov2 (with registers) and DINOv3ViT.

https://huggingface.co/docs/transformers; only files are read and written, the package is not needed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from biovfm_monai.checkpoints.dinov3 import DINOV3_HEADS, interleave
from biovfm_monai.checkpoints.layout import Layout, require
from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["from_huggingface", "read_config", "to_huggingface"]

_TOKENS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens?",
    "pos_embed": "embeddings.position_embeddings?",
}
_QKV = "encoder.layer.{n}.attention.attention"
_VIT = _TOKENS | {
    "patch_embed.{k}": "embeddings.patch_embeddings.projection.{k}",
    "blocks.{n}.attn.qkv.{k}": f"{_QKV}.query.{{k}} {_QKV}.key.{{k}} {_QKV}.value.{{k}}?",
    "blocks.{n}.attn.proj.{k}": "encoder.layer.{n}.attention.output.dense.{k}",
    "norm.{k}": "layernorm.{k}",
}
_CLASSIC_NAMES = _VIT | {
    "blocks.{n}.norm1.{k}": "encoder.layer.{n}.layernorm_before.{k}",
    "blocks.{n}.norm2.{k}": "encoder.layer.{n}.layernorm_after.{k}",
    "blocks.{n}.mlp.fc1.{k}": "encoder.layer.{n}.intermediate.dense.{k}",
    "blocks.{n}.mlp.fc2.{k}": "encoder.layer.{n}.output.dense.{k}",
}
_DINOV2_NAMES = _VIT | {
    "blocks.{n}.norm1.{k}": "encoder.layer.{n}.norm1.{k}",
    "blocks.{n}.norm2.{k}": "encoder.layer.{n}.norm2.{k}",
    "blocks.{n}.mlp.fc1.{k}": "encoder.layer.{n}.mlp.fc1.{k}",
    "blocks.{n}.mlp.fc2.{k}": "encoder.layer.{n}.mlp.fc2.{k}",
    "blocks.{n}.ls1.gamma": "encoder.layer.{n}.layer_scale1.lambda1",
    "blocks.{n}.ls2.gamma": "encoder.layer.{n}.layer_scale2.lambda1",
}
_DINOV3_NAMES = _TOKENS | {
    "patch_embed.{k}": "embeddings.patch_embeddings.{k}",
    "blocks.{n}.norm1.{k}": "layer.{n}.norm1.{k}",
    "blocks.{n}.attn.qkv.weight": " ".join(f"layer.{{n}}.attention.{part}_proj.weight" for part in "qkv"),
    "blocks.{n}.attn.qv_bias": "layer.{n}.attention.q_proj.bias layer.{n}.attention.v_proj.bias?",
    "blocks.{n}.attn.proj.{k}": "layer.{n}.attention.o_proj.{k}",
    "blocks.{n}.ls1.gamma": "layer.{n}.layer_scale1.lambda1",
    "blocks.{n}.norm2.{k}": "layer.{n}.norm2.{k}",
    "blocks.{n}.mlp.fc1.{k}": "layer.{n}.mlp.up_proj.{k}",
    "blocks.{n}.mlp.fc2.{k}": "layer.{n}.mlp.down_proj.{k}",
    "blocks.{n}.ls2.gamma": "layer.{n}.layer_scale2.lambda1",
    "norm.{k}": "norm.{k}",
}
_GATED = {"blocks.{n}.mlp.fc1.{k}": "layer.{n}.mlp.gate_proj.{k} layer.{n}.mlp.up_proj.{k}"}
_CLASSIC = Layout(
    "huggingface",
    _CLASSIC_NAMES,
    published={192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24},
    left_out=(r"decoder\..*", r"pooler\..*", r"classifier\..*", r"embeddings\.mask_token"),
    options={"norm_eps": 1e-12, "global_pool": "token"},
)
_DINOV2 = replace(_CLASSIC, names=_DINOV2_NAMES, options={"norm_eps": 1e-6, "global_pool": "token"})
_DINOV3 = replace(
    _CLASSIC, names=_DINOV3_NAMES, published=DINOV3_HEADS,
    options={"norm_eps": 1e-5, "rope": "normalised", "global_pool": "token"},
)  # fmt: skip
_DINOV3_GATED = replace(_DINOV3, names=_DINOV3_NAMES | _GATED)


def from_huggingface(
    tensors: Mapping[str, Tensor],
    num_heads: int | None = None,
    norm_eps: float | None = None,
    img_size: Sequence[int] | None = None,
) -> tuple[ViT, list[str]]:
    """As `Layout.read`, from weights as `save_pretrained` writes them.

    norm_eps is what the model's config.json says; None for 1e-12 (ViT, ViTMAE), 1e-6 (Dinov2) or 1e-5 (DINOv3).
    """
    named = renamed(tensors, _plain)
    if "layer.0.attention.q_proj.weight" in named:
        layout = _DINOV3_GATED if "layer.0.mlp.gate_proj.weight" in named else _DINOV3
    else:
        layout = _DINOV2 if "encoder.layer.0.norm1.weight" in named else _CLASSIC
    given: dict[str, Any] = {} if norm_eps is None else {"norm_eps": norm_eps}
    if any(name.startswith("decoder.") for name in named):
        given["global_pool"] = "avg"
    encoder, left_out = replace(layout, options={**layout.options, **given}).read(named, num_heads, img_size)
    if encoder.rope != "none":
        interleave(encoder)
    return encoder, left_out


def _plain(name: str) -> str:
    """Without the model's own prefix, and with one name for the layers of both kinds of MLP."""
    name = re.sub(r"^(vit|dinov2|dinov2_with_registers|model)\.", "", name)
    return name.replace("mlp.weights_in", "mlp.fc1").replace("mlp.weights_out", "mlp.fc2")


def read_config(path: Path) -> dict[str, Any]:
    """Options of `from_huggingface` that the config.json in a folder, or beside a file, tells; none without one.

    Raises:
        InputError: when it cannot be read, or the network computes what `ViT` does not.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: no readable config ({error}). Download it again.") from error
    gated = config.get("use_gated_mlp", False)
    activation = config.get("hidden_act", "gelu")
    if activation != ("silu" if gated else "gelu"):
        raise InputError(f"{file}: hidden_act {activation!r} is not what our {'SwiGLU' if gated else 'MLP'} computes.")
    if config.get("rope_theta", 100.0) != 100.0:
        raise InputError(f"{file}: rope_theta {config['rope_theta']} is not our rotary positions' 100.")
    size = config.get("image_size")
    return {
        "num_heads": config.get("num_attention_heads"), "norm_eps": config.get("layer_norm_eps"),
        "img_size": [size, size] if isinstance(size, int) else size,
    }  # fmt: skip


def to_huggingface(encoder: ViT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An encoder of 2D images as the weights and config of the Hugging Face model that computes the same.

    That is `ViTModel`; with LayerScale `Dinov2Model`, or `Dinov2WithRegistersModel`; with normalised rotary positions
    `DINOv3ViTModel`.

    Raises:
        InputError: when none does.
    """
    size, patch, arguments = encoder.img_size, encoder.patch_size, encoder.arguments
    require(encoder, "huggingface", spatial_dims=2, class_token=True, qk_norm=False, final_norm=True, scale_mlp=False)
    if size[0] != size[1] or patch[0] != patch[1]:
        raise InputError(f"Hugging Face's ViTs are made for squares; this encoder's are {size} in patches of {patch}.")
    config = {
        "hidden_size": encoder.embed_dim, "num_hidden_layers": len(encoder.blocks), "image_size": size[0],
        "num_attention_heads": arguments["num_heads"], "patch_size": patch[0], "num_channels": encoder.in_channels,
        "layer_norm_eps": arguments["norm_eps"], "hidden_act": "gelu",
    }  # fmt: skip
    if encoder.rope == "normalised":
        return _to_dinov3(encoder, config)
    require(encoder, "huggingface", rope="none", k_bias=True)
    if encoder.arguments["pos_embed"] == "none":
        raise InputError("an encoder with pos_embed 'none' cannot be written as huggingface, which has positions.")
    config["qkv_bias"] = arguments["qkv_bias"]
    if arguments["init_values"] is not None:
        return _to_dinov2(encoder, config)
    require(encoder, "huggingface", reg_tokens=0, swiglu_mlp=False)
    state = _CLASSIC.write(encoder)
    return state, _named("ViT", "vit", config | {"intermediate_size": _hidden(encoder)})


def _to_dinov2(encoder: ViT, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    width, hidden, gated = encoder.embed_dim, _hidden(encoder), encoder.arguments["swiglu_mlp"]
    ratio = round(hidden / width * (1.5 if gated else 1))
    if hidden != ((ratio * width * 2 // 3 + 7) // 8 * 8 if gated else ratio * width):
        raise InputError(f"Hugging Face's Dinov2 has no MLP with {hidden} hidden numbers at a width of {width}.")
    config |= {"mlp_ratio": ratio, "use_swiglu_ffn": gated}
    require(encoder, "huggingface", pos_antialias=encoder.arguments["reg_tokens"] > 0)
    state = _DINOV2.write(encoder)
    if gated:
        state = renamed(state, lambda n: n.replace("mlp.fc1", "mlp.weights_in").replace("mlp.fc2", "mlp.weights_out"))
    # The models hold a mask token that their encoders do not use.
    state["embeddings.mask_token"] = state["embeddings.cls_token"].new_zeros(1, width)
    registers = encoder.arguments["reg_tokens"]
    if registers:
        return state, _named(
            "Dinov2WithRegisters", "dinov2_with_registers", config | {"num_register_tokens": registers}
        )
    return state, _named("Dinov2", "dinov2", config)


def _to_dinov3(encoder: ViT, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    require(encoder, "huggingface", pos_embed="none", k_bias=False)
    biased, gated = encoder.arguments["qkv_bias"], encoder.arguments["swiglu_mlp"]
    config |= {
        "query_bias": biased, "value_bias": biased, "key_bias": False, "use_gated_mlp": gated,
        "intermediate_size": _hidden(encoder), "num_register_tokens": encoder.arguments["reg_tokens"],
        "hidden_act": "silu" if gated else "gelu",
    }  # fmt: skip
    apart = copy.deepcopy(encoder)
    interleave(apart, back=True)
    state = (_DINOV3_GATED if gated else _DINOV3).write(apart)
    state["embeddings.mask_token"] = state["embeddings.cls_token"].new_zeros(1, 1, encoder.embed_dim)
    state.setdefault("embeddings.register_tokens", state["embeddings.cls_token"].new_zeros(1, 0, encoder.embed_dim))
    return state, _named("DINOv3ViT", "dinov3_vit", config)


def _hidden(encoder: ViT) -> int:
    return int(encoder.state_dict()["blocks.0.mlp.fc2.weight"].shape[1])


def _named(model: str, model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"architectures": [f"{model}Model"], "model_type": model_type, **config}
