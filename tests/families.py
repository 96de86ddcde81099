"""Tiny models of every family that equip knows, and what the tests of all of them need."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from equipped import QKV, fill
from torch import nn

from irpe import get_bucket_ids_2d
from irpe.equip import equip

pytest.importorskip("timm")

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

SMALL = dict(img_size=(8, 12), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
SWIN = dict(img_size=(16, 24), patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), num_classes=5)
SWIN |= dict(window_size=(4, 3), drop_path_rate=0.0)
ROPE = dict(use_rot_pos_emb=True, dynamic_img_size=True)
NO_BIAS = dict(use_abs_pos_emb=False, use_rel_pos_bias=False)

# sizes that a model takes, and the map that each becomes
STATIC = (((8, 12), (2, 3)),)
DYNAMIC = (((8, 12), (2, 3)), ((8, 32), (2, 8)), ((16, 16), (4, 4)), ((4, 24), (1, 6)))
PADDED = (((9, 31), (3, 8)), ((32, 12), (8, 3)))
# two maps of 16 tokens: whoever mixes them up gets no error from the shapes
SHARED = ((8, 32), (16, 16))


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family, and the sizes (of the image, of the map) that it takes."""

    adapter: str
    make: Callable[..., nn.Module]
    options: dict = field(default_factory=dict)
    sizes: tuple = STATIC

    @property
    def dynamic(self):
        return {size for size, _ in self.sizes} >= set(SHARED)

    def build(self, dtype=torch.float64, **options):
        """The model in evaluation mode, every parameter random, also what timm sets to zero."""
        torch.manual_seed(0)
        model = self.make(**{**self.options, **options})
        with torch.no_grad():
            for one in model.parameters():
                if not one.is_meta:
                    one.add_(torch.randn_like(one), alpha=0.1)
        return model.to(dtype).eval()


def vit(options, sizes=STATIC, cls=VisionTransformer):
    return Family("timm_vit", cls, {**SMALL, **options}, sizes)


def eva(options, sizes=STATIC):
    return Family("timm_eva", Eva, {**SMALL, **options}, sizes)


def beit(options, sizes=STATIC):
    return Family("timm_beit", make_beit, {**SMALL, **options}, sizes)


def make_beit(any_size=False, **options):
    model = Beit(**options)
    model.patch_embed.strict_img_size = not any_size  # without positions nothing in it depends on the size
    return model


def swin(options, sizes=(((16, 24), (8, 12)),)):
    return Family("timm_swin", SwinTransformer, {**SWIN, **options}, sizes)


FAMILIES = {
    "vit": vit({}),
    "deit distilled": vit({}, cls=VisionTransformerDistilled),
    "deit distilled dynamic": vit(dict(dynamic_img_size=True), DYNAMIC, VisionTransformerDistilled),
    "deit3": vit(dict(no_embed_class=True, init_values=1e-1)),
    "registers": vit(dict(reg_tokens=4, no_embed_class=True, init_values=1e-1)),
    "registers dynamic": vit(
        dict(reg_tokens=4, no_embed_class=True, dynamic_img_size=True, global_pool="avg"), DYNAMIC
    ),
    "no prefix": vit(dict(class_token=False, global_pool="avg")),
    "map pooling": vit(dict(class_token=False, global_pool="map")),
    "no positions": vit(dict(pos_embed="none")),
    "dynamic": vit(dict(dynamic_img_size=True), DYNAMIC),
    "dynamic padded": vit(dict(dynamic_img_size=True, dynamic_img_pad=True), PADDED),
    "pre norm": vit(dict(pre_norm=True)),
    "qk norm": vit(dict(qk_norm=True)),
    "scale norms": vit(dict(scale_attn_norm=True, scale_mlp_norm=True)),
    "residual post norm": vit(dict(block_fn=ResPostBlock, init_values=0.5)),
    "fixed heads": vit(dict(qkv_bias=False, proj_bias=False)),
    "eva": eva({}),
    "eva post norm": eva(dict(use_post_norm=True, class_token=False)),
    "eva02": eva(dict(use_rot_pos_emb=True, ref_feat_shape=(4, 4), swiglu_mlp=True)),
    "eva02 dynamic": eva(dict(ROPE, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True), DYNAMIC),
    "dinov3": eva(
        dict(ROPE, rope_type="dinov3", rope_rotate_half=True, use_abs_pos_emb=False, num_reg_tokens=4)
        | dict(qkv_bias=False, init_values=0.1, dynamic_img_pad=True),
        (*DYNAMIC, *PADDED),
    ),
    "rope": eva(dict(ROPE, attn_type="rope", rope_grid_indexing="xy", init_values=0.1), DYNAMIC),
    "rope mixed": eva(
        dict(ROPE, attn_type="rope", rope_type="mixed", use_abs_pos_emb=False, rope_grid_indexing="xy"), DYNAMIC
    ),
    "rope mixed fixed": eva(dict(use_rot_pos_emb=True, rope_type="mixed")),
    "mrope": eva(dict(ROPE, attn_type="rope", rope_type="mrope", rope_mrope_section=(1, 1, 2)), DYNAMIC),
    "perception encoder": eva(
        dict(use_rot_pos_emb=True, attn_type="rope", global_pool="map", use_pre_transformer_norm=True)
        | dict(rope_grid_offset=1.0, rope_grid_indexing="xy", attn_pool_num_heads=3)
    ),
    "grouped queries": eva(
        dict(ROPE, attn_type="rope", embed_dim=32, num_heads=4, num_kv_heads=(2, 4), qkv_fused=False, qk_norm=True)
        | dict(init_values=0.1, attn_only_layer_scale=True),
        DYNAMIC,
    ),
    "beit": beit(dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)),
    "beit shared bias": beit(dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)),
    "beit both biases": beit(dict(use_shared_rel_pos_bias=True, use_rel_pos_bias=True, swiglu_mlp=True)),
    "beit positions": beit(dict(qkv_bias=False, global_pool="token")),
    "beit dynamic": beit(dict(NO_BIAS, any_size=True), DYNAMIC),
    "swin": swin({}),
    "swin dynamic": swin(
        dict(dynamic_img_size=True), (((16, 24), (8, 12)), ((8, 32), (4, 16)), ((16, 16), (8, 8)), ((10, 26), (5, 13)))
    ),
    "swin small windows": swin(dict(window_size=2, always_partition=True, head_dim=5, qkv_bias=False)),
    "swin stages": swin(dict(window_size=((2, 4), (4, 2)))),
}


def of(adapter):
    return {name: family for name, family in FAMILIES.items() if family.adapter == adapter}


def make(family, config=QKV, **options):
    """An equipped tiny model in evaluation mode with random tables."""
    return fill(equip(FAMILIES[family].build(**options), config))


def attention_names(model):
    return [name for name, _ in model.named_modules() if name.endswith(".attn")]


def images(*size, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(sum(size)))


def attention_by_hand(attn, q, k, v, height, width, skip, added=None):
    """The formula of the paper with a vector for each pair of tokens: (B, H, L, D) each, (B, L, H * D) in the end."""

    def vectors(rpe, dim):
        c = rpe.rpe_config
        ids, _ = get_bucket_ids_2d(c.method, height, width, skip, c.alpha, c.beta, c.gamma)
        table = rpe.lookup_table_weight.movedim(dim, 1)  # (H', N, D)
        return table[:, ids].expand(q.shape[1], -1, -1, -1)  # (H, L, L, D)

    scale = q.shape[-1] ** -0.5
    scores = scale * torch.einsum("bhid,bhjd->bhij", q, k)
    scores = scores + scale * torch.einsum("bhid,hijd->bhij", q, vectors(attn.rpe_k, 2))
    scores = scores + scale * torch.einsum("bhjd,hjid->bhij", k, vectors(attn.rpe_q, 2))
    weights = (scores if added is None else scores + added).softmax(-1)
    out = torch.einsum("bhij,bhjd->bhid", weights, v) + torch.einsum("bhij,hijd->bhid", weights, vectors(attn.rpe_v, 1))
    return out.transpose(1, 2).flatten(2)
