"""`runs.elsewhere`: what a configuration may not name, wherever in it that stands."""

import json

import pytest

from irpe.runs.elsewhere import is_of_timm, loading_arguments, named_elsewhere

timm = pytest.importorskip("timm")

REFUSED = [
    ({"architecture": "hf-hub:user/name"}, "architecture: 'hf-hub:user/name', which is none of timm"),
    ({"architecture": "local-dir:/tmp"}, "architecture: 'local-dir:/tmp'"),
    ({"architecture": ["resnet18"]}, "architecture: \\['resnet18'\\]"),
    ({"model_type": "timm_wrapper", "architecture": "user/resnet18"}, "architecture: 'user/resnet18'"),
    ({"model_args": {"checkpoint_path": "a.pth"}}, "model_args with checkpoint_path"),
    ({"model_args": {"pretrained_cfg_overlay": {"file": "a.pth"}}}, "model_args with pretrained_cfg_overlay"),
    ({"backbone": "user/name"}, "backbone: 'user/name', which is none of timm"),
    ({"backbone": "resnet18", "use_timm_backbone": False}, "the backbone 'resnet18', which is not timm's"),
    ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
    ({"repo_path": "user/name"}, "repo_path"),
    ({"attn_implementation": "user/kernels"}, "attn_implementation: 'user/kernels'"),
]
PLAIN = [
    {"architecture": "resnet18", "model_args": {"depth": 3, "features_only": True, "out_indices": [0, 1]}},
    {"architecture": "vit_base_patch16_224.augreg_in1k"},
    {"backbone": "resnet50", "use_timm_backbone": True},
    {"label2id": {"architecture": 0, "backbone": 1, "auto_map": 2}, "id2label": {"0": "auto_map"}},
    {"attn_implementation": "sdpa", "auto_map": None},
]


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=[json.dumps(config) for config, _ in REFUSED])
@pytest.mark.parametrize("depth", [0, 1, 2, 20_000])
def test_what_lies_elsewhere_is_found_at_any_depth(config, words, depth):
    for number in range(depth):
        config = {"vision_config": config} if number % 2 else {"parts": [{}, config]}
    with pytest.raises(ValueError, match=words):
        raise ValueError(named_elsewhere(config))


@pytest.mark.parametrize("config", PLAIN, ids=map(json.dumps, PLAIN))
def test_plain_configurations(config):
    assert named_elsewhere(config) is None and named_elsewhere({"vision_config": config}) is None


def test_what_is_no_configuration():
    assert named_elsewhere([]) == "no settings" and "none" in named_elsewhere({"backbone_config": "name"})


def test_names_of_timm():
    assert is_of_timm("resnet18") and is_of_timm("resnet18.a1_in1k")
    for name in ("hf-hub:timm/resnet18", "hf_hub:resnet18", "resnet18.a:b", "a/resnet18", "resnet18/../a", "", None, 3):
        assert not is_of_timm(name)


def test_loading_arguments():
    assert loading_arguments(["depth", "out_indices", "cache_dir", "hf_hub_id"]) == [
        "cache_dir", "hf_hub_id", "out_indices",
    ]  # fmt: skip
    assert loading_arguments(["features_only", "out_indices", "img_size"], backbone=True) == []
    # whatever create_model itself may read
    assert {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"} <= set(
        loading_arguments(timm.create_model.__annotations__)
    )
