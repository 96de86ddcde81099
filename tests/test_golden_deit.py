"""Small DeiTs of the reference release: their state dicts load strictly into equipped timm models, numbers agree."""

import pytest
import torch
from conftest import load_golden, relative_error

from irpe import equip, get_rpe_config

VisionTransformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["product_k", "product_qkv", "cross_qk"])
def test_logits_and_gradients(name, dtype, tolerance):
    arrays, meta = load_golden(f"deit_{name}")
    rpe = meta.pop("rpe")
    assert meta.pop("layer_norm_eps") == 1e-6  # timm's own
    model = equip(VisionTransformer(**meta), get_rpe_config(**rpe)).to(dtype)
    state = {key.removeprefix("state/"): torch.tensor(a) for key, a in arrays.items() if key.startswith("state/")}
    model.load_state_dict(state, strict=True)
    logits = model(torch.tensor(arrays["input"], dtype=dtype))
    assert relative_error(logits, arrays["logits"]) < tolerance
    logits.square().sum().backward()
    parameters, compared = dict(model.named_parameters()), 0
    for key, expected in arrays.items():
        # the last block's gradient on keys is zero by symmetry: only the class token's row counts, one bucket for all
        if key.startswith("grad/") and abs(expected).max() > 1e-12:
            assert relative_error(parameters[key.removeprefix("grad/")].grad, expected) < tolerance, key
            compared += 1
    assert compared >= 4
    assert any("lookup_table" in key for key in arrays if key.startswith("grad/"))
