"""The released DeiTs with iRPE as models of timm: `import irpe.models`, then `timm.create_model(NAME)`.

>>> import timm, irpe.models
>>> model = timm.create_model("deit_small_patch16_224_ctx_product_50_shared_k")
>>> model = timm.create_model("deit_small_patch16_224_ctx_product_50_shared_k", pretrained=True, num_classes=10,
...                           pretrained_cfg_overlay=dict(file="deit_small_patch16_224_ctx_product_50_shared_k.pth"))

With `pretrained=True` weights come from `file=`, or from the published address. What timm does for its own models it
does for these: `features_only=True`, `img_size=384` or `(224, 320)`, new heads, `pretrained_cfg_overlay`. It resamples
absolute positions to another size; the tables of iRPE stay as they are, for they speak of offsets in tokens.

Checkpoints are read as tensors and plain containers alone (`torch.load(weights_only=True)`, or safetensors).
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._hub import download_cached_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .equip import equip

# the three DeiTs that the variants are made of
BASES: dict[str, dict[str, int]] = {
    "deit_tiny_patch16_224": dict(patch_size=16, depth=12, embed_dim=192, num_heads=3),
    "deit_small_patch16_224": dict(patch_size=16, depth=12, embed_dim=384, num_heads=6),
    "deit_base_patch16_224": dict(patch_size=16, depth=12, embed_dim=768, num_heads=12),
}


class Published(NamedTuple):
    """What was published with the weights: millions of parameters and multiply-adds, ImageNet-1K accuracy, address."""

    params_M: float  # noqa: N815
    macs_M: int  # noqa: N815
    top1: float
    top5: float
    url: str


class Variant(NamedTuple):
    """A model: which DeiT, which encodings, and the figures where weights were released."""

    base: str
    config: str
    published: Published | None = None


_ZOO = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/"
_TINY, _SMALL, _BASE = BASES

VARIANTS: dict[str, Variant] = {
    "deit_tiny_patch16_224_ctx_product_50_shared_k": Variant(
        _TINY, "rpe-1.9-product-ctx-1-k",
        Published(5.76, 1284, 73.7, 92.0, _ZOO + "deit_tiny_patch16_224_ctx_product_50_shared_k.pth"),
    ),
    "deit_small_patch16_224_ctx_product_50_shared_k": Variant(
        _SMALL, "rpe-1.9-product-ctx-1-k",
        Published(22.09, 4659, 80.9, 95.4, _ZOO + "deit_small_patch16_224_ctx_product_50_shared_k.pth"),
    ),
    "deit_small_patch16_224_ctx_product_50_shared_qk": Variant(
        _SMALL, "rpe-1.9-product-ctx-1-qk",
        Published(22.13, 4706, 81.0, 95.5, _ZOO + "deit_small_patch16_224_ctx_product_50_shared_qk.pth"),
    ),
    "deit_small_patch16_224_ctx_product_50_shared_qkv": Variant(
        _SMALL, "rpe-1.9-product-ctx-1-qkv",
        Published(22.17, 4885, 81.2, 95.5, _ZOO + "deit_small_patch16_224_ctx_product_50_shared_qkv.pth"),
    ),
    "deit_base_patch16_224_ctx_product_50_shared_k": Variant(
        _BASE, "rpe-1.9-product-ctx-1-k",
        Published(86.61, 17684, 82.3, 95.9, _ZOO + "deit_base_patch16_224_ctx_product_50_shared_k.pth"),
    ),
    "deit_base_patch16_224_ctx_product_50_shared_qkv": Variant(
        _BASE, "rpe-1.9-product-ctx-1-qkv",
        Published(86.68, 18137, 82.8, 96.1, _ZOO + "deit_base_patch16_224_ctx_product_50_shared_qkv.pth"),
    ),
    "deit_small_patch16_224_ctx_euc_20_shared_k": Variant(_SMALL, "rpe-20-euc-ctx-1-k"),
    "deit_small_patch16_224_ctx_quant_51_shared_k": Variant(_SMALL, "rpe-33-quant-ctx-1-k"),
    "deit_small_patch16_224_ctx_cross_56_shared_k": Variant(_SMALL, "rpe-20-cross-ctx-1-k"),
}  # fmt: skip


def count_macs(model: nn.Module, image: tuple[int, int, int] = (3, 224, 224)) -> int:
    """Number of multiply-adds in the matrix products and convolutions of one forward pass over one image.

    >>> count_macs(timm.create_model("deit_small_patch16_224_ctx_product_50_shared_k")) / 1e6
    4644.271104

    Counted on a copy on the meta device: nothing is computed, and as no fused operator runs there, the counter sees all
    products. Looking buckets up and summing by bucket are not multiply-adds, nor are norms, softmax and activations, so
    figures that take those in are larger: the published ones on keys and queries by 0.2 to 0.6%.

    On values the release multiplied each weight with its row of the table, L * L * D multiply-adds a head. Here weights
    are summed by bucket first, L * N * D: 4735 instead of 4885 million for DeiT-S with encodings on q, k and v (3.1%
    less), and 17836 instead of 18137 million for DeiT-B (1.7% less), at L = 197 and N = 50.

    Args:
        model: takes a batch of images; any device, any equipped or plain model.
        image: (channels, height, width).
    """
    twin = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, *image, device="meta"))
    return counter.get_total_flops() // 2  # it counts a multiply-add as two


def _cfg(variant: Variant) -> dict[str, Any]:
    return dict(
        url=variant.published.url if variant.published else "",
        num_classes=1000, input_size=(3, 224, 224), fixed_input_size=True, interpolation="bicubic",
        crop_pct=0.875,  # the figures were measured on 224 x 224 out of 256
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="patch_embed.proj", classifier="head",
    )  # fmt: skip


def _same_tables(state_dict: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """timm's filter (positions resampled), and an error where the tables of checkpoint and model are not the same."""
    try:
        state_dict = checkpoint_filter_fn(state_dict, model)
    except Exception as error:  # timm takes for granted that the weights are of this family
        keys, reason = ", ".join(list(map(str, state_dict))[:3]), f"{type(error).__name__} {error}".splitlines()[0]
        raise ValueError(f"the checkpoint does not fit a DeiT: {reason}; it begins with {keys}") from None
    # timm loads without `strict` as soon as the head is new, so keys that are missing would go unnoticed
    has, needs = ({name for name in state if "lookup_table" in name} for state in (state_dict, model.state_dict()))
    if has != needs:
        raise ValueError(
            f"the checkpoint has {len(has)} tables of iRPE, {len(has - needs)} of them not in the model, which needs "
            f"{len(needs)} and misses {len(needs - has)}, such as {min(has ^ needs)}: create the variant of the "
            "checkpoint; to begin with the weights of a plain DeiT, load those, then equip that model"
        )
    return state_dict


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    variant = VARIANTS[name]
    source = resolve_pretrained_cfg(
        name, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    )
    if pretrained and source.custom_load:
        raise ValueError(f"custom_load={source.custom_load!r} reads files of other libraries, which hold no tables")
    if pretrained and source.url and not (source.source or source.state_dict or source.file or source.hf_hub_id):
        # timm reads a file with weights_only=True and nothing else, but an address a second time without it when the
        # first attempt ends in a TypeError, which a crafted checkpoint can bring about
        source = dataclasses.replace(
            source,
            file=download_cached_file(source.url, check_hash=False, progress=True, cache_dir=kwargs.get("cache_dir")),
        )
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        lambda **model: equip(VisionTransformer(**model), variant.config),
        name,
        pretrained,
        pretrained_cfg=source.to_dict(),
        pretrained_filter_fn=_same_tables,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **{**BASES[variant.base], **kwargs},
    )


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{VARIANTS[name].base} with {VARIANTS[name].config}."
    return create


__all__ = ["BASES", "VARIANTS", "Published", "Variant", "count_macs"]
default_cfgs = generate_default_cfgs({name: _cfg(variant) for name, variant in VARIANTS.items()})
for _name in VARIANTS:
    globals()[_name] = register_model(_entrypoint(_name))  # timm adds it to __all__
