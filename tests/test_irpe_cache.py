"""The one cache of bucket maps: right under every order of sizes, skips, devices, threads and kinds of tracing."""

import copy
import functools
import itertools
import random
import threading

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import irpe.irpe as source
import rpe_ops.constants as constants
from irpe import (
    RPEConfig,
    build_rpe,
    get_bucket_ids_2d,
    get_bucket_map,
    get_rpe_config,
    get_single_rpe_config,
    rpe_attention,
)

DIM, HEADS = 4, 2
GRIDS = [(2, 8), (8, 2), (4, 4), (1, 16), (3, 5), (5, 3), (7, 2), (1, 1), (6, 7)]


def law(module, x, height, width):
    """The encoding from freshly built ids, by advanced indexing or a dense sum."""
    c = module.rpe_config
    ids, n = get_bucket_ids_2d(c.method, height, width, c.skip, c.alpha, c.beta, c.gamma)
    if module.transposed:
        lut = x @ module.table
        return lut[:, :, torch.arange(len(ids)).unsqueeze(1), ids]
    one_hot = nn.functional.one_hot(ids, n).to(x.dtype)
    return torch.einsum("bhij,ijn->bhin", x, one_hot) @ module.table


def make(where="k", skip=1, ratio=1.9, **kwargs):
    config = get_rpe_config(ratio, skip=skip, rpe_on=where, **kwargs)
    (module,) = [m for m in build_rpe(config, DIM, HEADS) if m is not None]
    nn.init.normal_(module.table)
    return module


def sample(module, height, width, batch=2, **kwargs):
    tokens = module.rpe_config.skip + height * width
    return torch.randn(batch, HEADS, tokens, DIM if module.transposed else tokens, **kwargs)


def check(module, height, width, call=None):
    x = sample(module, height, width)
    torch.testing.assert_close(
        (module if call is None else call)(x, height=height, width=width), law(module, x, height, width)
    )


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Each test starts with an empty cache and leaves one that holds nothing but plain, complete tensors."""
    made = {}

    def build(*key):
        made[key] = constants._made(*key)
        return made[key]

    monkeypatch.setitem(constants._kept, "offsets", functools.lru_cache(maxsize=16)(build))
    torch._dynamo.reset()
    yield made
    for (_, _, mapping, size, _), offsets in made.items():
        assert type(offsets) is torch.Tensor and not offsets.is_inference() and not offsets.requires_grad
        method, skip, *piecewise = mapping.split()
        expected = get_bucket_map(method, size, int(skip), *map(float, piecewise)).offsets
        assert torch.equal(offsets.cpu(), expected), mapping


@pytest.mark.parametrize("where", "kv")
def test_growing_and_shrinking_sizes_and_different_skips(where):
    modules = [make(where, skip, ratio) for skip in (0, 1, 2, 5) for ratio in (1.9, 3.0)]
    order = list(itertools.product(modules, GRIDS))
    random.Random(0).shuffle(order)
    for module, (height, width) in order * 2:
        check(module, height, width)


def test_same_token_count_with_different_skips_and_grids():
    for skip, height, width in [(0, 3, 6), (2, 4, 4), (0, 6, 3), (2, 2, 8), (3, 3, 5), (4, 7, 2), (0, 9, 2)]:
        check(make(skip=skip), height, width)


def test_one_entry_serves_every_module_of_a_grid(made):
    x = torch.randn(1, HEADS, 13, DIM)
    for module in (make(), make(), make(shared_head=False)):
        module(x, 3, 4)
    assert len(made) == 1


def test_the_cache_is_bounded_and_serves_ten_sizes_in_turn(made):
    module = make()
    sizes = [(h, w) for h in range(2, 7) for w in (h + 1, 2 * h)]
    for height, width in sizes * 3:
        check(module, height, width)
    assert len(made) == constants._kept["offsets"].cache_info().misses == len(sizes)
    for width in range(1, 30):
        check(module, 1, width)
    assert constants._kept["offsets"].cache_info().currsize == 16


def test_threads():
    modules = [make("k", 0), make("k", 2), make("v", 1)]
    failures = []
    start = threading.Barrier(8)

    def work(seed):
        try:
            order = list(itertools.product(modules, GRIDS)) * 3
            random.Random(seed).shuffle(order)
            start.wait()
            for module, (height, width) in order:
                check(module, height, width)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("where", "kv")
def test_inference_mode_then_training(where):
    module = make(where)
    with torch.inference_mode():
        check(module, 3, 4)
    x = sample(module, 3, 4, requires_grad=True)
    module(x, 3, 4).square().sum().backward()
    assert module.table.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


def test_fake_tensors_pass_and_leave_no_trace():
    module = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(2, HEADS, 13, DIM))
        assert isinstance(module(x, 3, 4), FakeTensor)
    check(module, 3, 4)


def test_deepcopy_after_use():
    module = make()
    check(module, 3, 4)
    check(copy.deepcopy(module), 3, 4)
    check(copy.deepcopy(module), 4, 3)


@pytest.mark.parametrize("where", "kv")
def test_compile_fullgraph_with_static_sizes(where):
    module = make(where)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    for height, width in [(3, 4), (4, 3), (2, 6), (3, 4)]:
        check(module, height, width, compiled)
        check(module, height, width)
    square = sample(module, 4, 4)
    torch.testing.assert_close(compiled(square), law(module, square, 4, 4))


@pytest.mark.parametrize("where", "kv")
def test_compile_fullgraph_with_dynamic_sizes_compiles_once(where, made):
    module = make(where)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    check(module, 3, 4, compiled)
    frames = counter.frame_count  # dynamo may trace more than once before it is content
    for height, width in [(4, 5), (2, 7), (6, 5)]:
        check(module, height, width, compiled)
    assert counter.frame_count == frames
    assert not made


def test_compile_with_sizes_that_are_pinned_after_they_were_read():
    """As timm's patch embedding does it, which checks the image's size with torch._check."""
    module = make(skip=0)

    def f(x):
        height, width = x.shape[2], x.shape[3]
        torch._check(height == 2)
        torch._check(width == 8)
        return module(x.flatten(2, 3), height=height, width=width)

    x = torch.randn(2, HEADS, 2, 8, DIM)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), law(module, x.flatten(2, 3), 2, 8))


def test_compile_of_squares_without_sizes_follows_the_token_count():
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for side in (3, 4, 2, 5):
        x = sample(module, side, side)
        torch.testing.assert_close(compiled(x), law(module, x, side, side))


def test_compiled_graph_holds_the_ids_as_a_constant():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = make()
    check(module, 3, 4, torch.compile(module, fullgraph=True, backend=backend, dynamic=False))
    assert "log" not in graphs[0].code and "arange" not in graphs[0].code


@pytest.mark.slow
@pytest.mark.parametrize("where", "kv")
def test_compile_with_inductor_and_gradients(where):
    module = make(where)
    x = sample(module, 3, 4, requires_grad=True)
    expected = torch.autograd.grad(module(x, 3, 4).square().sum(), (x, module.table))
    compiled = torch.compile(module, fullgraph=True)
    actual = torch.autograd.grad(compiled(x, height=3, width=4).square().sum(), (x, module.table))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


class Attention(nn.Module):
    def __init__(self, rpe_on):
        super().__init__()
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(get_rpe_config(skip=1, rpe_on=rpe_on), DIM, HEADS)
        for table in self.parameters():
            nn.init.normal_(table)

    def forward(self, q, k, v, height: int = 3, width: int = 4):
        return source.rpe_attention(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, height=height, width=width)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("where", "kv")
def test_export_of_a_module_and_use_of_it_afterwards(where, strict):
    module = make(where)
    x = sample(module, 3, 4)
    program = torch.export.export(module, (x,), dict(height=3, width=4), strict=strict)
    other = sample(module, 3, 4)
    torch.testing.assert_close(program.module()(other, height=3, width=4), law(module, other, 3, 4))
    assert {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"} <= {"aten"}
    check(module, 3, 4)
    module(x.requires_grad_(), 3, 4).sum().backward()
    assert list(program.state_dict) == ["lookup_table_weight"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("where", "kv")
def test_jit_trace_holds_the_ids_as_a_constant(where):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rpe = make(where)

        def forward(self, x):
            return self.rpe(x, 3, 4)

    module = Fixed()
    traced = torch.jit.trace(module, (sample(module.rpe, 3, 4),))
    x = sample(module.rpe, 3, 4)
    torch.testing.assert_close(traced(x), law(module.rpe, x, 3, 4))
    assert "arange" not in str(traced.inlined_graph)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_batch_and_training_gradients(strict):
    attention = Attention("qkv")
    q, k, v = torch.randn(3, 2, HEADS, 13, DIM)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch} for name in ("q", "k", "v")}
    program = torch.export.export(attention, (q, k, v), dynamic_shapes=shapes, strict=strict)
    q, k, v = torch.randn(3, 5, HEADS, 13, DIM)
    torch.testing.assert_close(program.module()(q, k, v), attention(q, k, v))


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_height_and_width(strict):
    class Map(nn.Module):
        """Height and width come out of the input's shape, as in a model."""

        def __init__(self):
            super().__init__()
            self.rpe = make(skip=0)

        def forward(self, x):
            _, _, height, width, _ = x.shape
            return self.rpe(x.flatten(2, 3), height=height, width=width)

    model = Map()
    dims = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    program = torch.export.export(model, (torch.randn(1, HEADS, 3, 4, DIM),), dynamic_shapes=(dims,), strict=strict)
    for height, width in [(3, 4), (5, 2), (2, 9)]:
        x = torch.randn(1, HEADS, height, width, DIM)
        torch.testing.assert_close(program.module()(x), law(model.rpe, x.flatten(2, 3), height, width))
    check(model.rpe, 3, 4)


def test_compile_and_export_do_not_poison_each_other():
    module = make()
    x = sample(module, 3, 4)
    torch.export.export(module, (x,), dict(height=3, width=4), strict=False)
    check(module, 3, 4, torch.compile(module, fullgraph=True, backend="aot_eager"))
    with torch.inference_mode():
        check(module, 3, 4)
    torch.export.export(module, (x,), dict(height=3, width=4), strict=True)
    check(module, 3, 4)


@pytest.mark.slow
def test_first_call_ever_is_under_compile(run_python):
    """In a fresh process nothing has warmed the cache: tracing has to build the ids."""
    run_python(
        """
        import torch
        from irpe import build_rpe, get_rpe_config
        rpe = build_rpe(get_rpe_config(skip=1), 4, 2)[1]
        torch.nn.init.normal_(rpe.table)
        x = torch.randn(1, 2, 13, 4)
        compiled = torch.compile(rpe, fullgraph=True, backend="aot_eager")(x, height=3, width=4)
        torch.testing.assert_close(compiled, rpe(x, 3, 4))
        """,
        path=[ROOT],
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_have_their_own_ids(made):
    module = make()
    check(module, 3, 4)
    x = sample(module, 3, 4)
    on_cpu = module(x, 3, 4)
    on_gpu = module.cuda()(x.cuda(), 3, 4)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)
    assert {str(key[-1]) for key in made} == {"cpu", "cuda:0"}


@pytest.mark.parametrize("dynamic", [False, pytest.param(None, marks=pytest.mark.slow), True])
def test_a_graph_with_several_maps(dynamic):
    """Cross has two, other encodings have others, and so have other sizes: all of them constants of one graph."""
    configs = (get_single_rpe_config(20, "cross", skip=1), get_single_rpe_config(2.5, skip=1))
    rpe = build_rpe(RPEConfig(rpe_q=configs[0], rpe_k=configs[1], rpe_v=configs[0]), 8, 2)
    for one in rpe:
        for table in one.parameters():
            torch.nn.init.normal_(table)
    q, k, v = torch.randn(3, 1, 2, 13, 8)

    def call(q, k, v):
        return rpe_attention(rpe_attention(q, k, v, *rpe, height=3, width=4), k, v, *rpe, height=2, width=6)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
