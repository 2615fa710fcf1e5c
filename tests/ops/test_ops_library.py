"""The compiled library: memory, threads, compilers, its selection and its build."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension
from torch.utils.flop_counter import FlopCounterMode

from dsnet_mm.ops import co_attention, native, sdpa_co_attention, select_path
from tests.conftest import REPO, needs_native, run_python, run_with_instructions
from tests.ops.conftest import native_op, outputs_and_gradients, streams, worst

# ------------------------------------------------------ memory, threads, FLOPs


@needs_native
def test_no_allocation_is_near_the_attention_matrix():
    length, rest = 16800, 1050
    local, global_ = streams(1, length, rest, 1, 32, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        h_l, h_g = native.co_attention(local, global_, 1, 0.1)
        (h_l.sum() + h_g.sum()).backward()
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    inputs = 4 * (local.numel() + global_.numel())
    matrix = 4 * length * rest
    # What is allocated, whether freed or not: outputs and gradients among it.
    assert inputs < sum(size for size in sizes if size > 0) < 3 * inputs < matrix / 3
    assert max(sizes) <= inputs


@needs_native
def test_peak_of_the_process_is_linear_in_the_tokens():
    done = run_python(
        'import torch; from resource import *; from dsnet_mm.ops import native\n'
        'from tests.ops.conftest import *\n'
        'def run(*shape):\n'
        '    outs = native.co_attention(*streams(*shape, torch.float32), shape[3])\n'
        '    sum(o.sum() for o in outs).backward()\n'
        'run(1, 64, 64, 1, 32)\n'
        'before = getrusage(RUSAGE_SELF).ru_maxrss\n'
        'run(1, 16800, 1050, 4, 32)\n'
        'print(getrusage(RUSAGE_SELF).ru_maxrss - before)'
    )
    assert done.returncode == 0, done.stderr
    # In KiB; one matrix of attention weights of one direction takes 275625.
    assert int(done.stdout) < 275625 / 2


@needs_native
def test_scratch_memory_is_what_the_type_needs():
    sizes = []
    for dtype in ('float32', 'float64'):
        done = run_python(
            'import torch; import dsnet_mm.ops; from tests.ops.conftest import *\n'
            f'qkv = streams(1, 64, 1, 1, 32, torch.{dtype}, grad=False)[0]\n'
            'with torch.profiler.profile(profile_memory=True) as profile:\n'
            '    torch.ops.dsnet_mm.self_attention(qkv, seed(), 1, 0.0)\n'
            'print(max(event.self_cpu_memory_usage for event in profile.events()))',
            OMP_NUM_THREADS='1',
        )
        assert done.returncode == 0, done.stderr
        sizes.append(int(done.stdout))
    assert sizes[0] < 0.7 * sizes[1]


@needs_native
def test_result_does_not_depend_on_the_number_of_threads():
    local, global_ = streams(1, 1500, 600, 2, 32, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(native_op, local, global_, 2, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@needs_native
@pytest.mark.skipif(sys.platform != 'linux', reason='OpenMP is linked on Linux only')
def test_the_library_has_threads():
    # Compiled without OpenMP, at::parallel_for runs on one thread and says nothing.
    library = sys.modules['dsnet_mm.ops._C'].__file__
    assert b'GOMP_parallel' in Path(library).read_bytes()


@needs_native
def test_flops_are_those_of_sdpa():
    local, global_ = streams(2, 50, 20, 2, 8)
    counts = []
    for path in (native_op, sdpa_co_attention):
        with FlopCounterMode(display=False) as counter:
            sum(o.sum() for o in path(local, global_, 2)).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == 8 * 2 * 50 * 20 * 16 * 7 // 2
    assert counts[1] == counts[0]


@needs_native
@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_older_instruction_sets(capability):
    code = (
        'import torch; from tests.ops.test_ops import *\n'
        'for shape in SHAPES[2:6]:\n'
        '    for dtype in TOLERANCE:\n'
        '        test_native_equals_reference(shape, dtype, 0.3)\n'
    )
    run_with_instructions(capability, code)


@needs_native
def test_products_of_others_are_left_alone():
    """The bfloat16 kernel sets AMX's tiles, which oneDNN's products use too."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 200, 200).bfloat16()
    local, global_ = streams(1, 300, 100, 1, 32, torch.bfloat16, grad=False)
    product, attended = a @ b, native_op(local, global_, 1)
    for _ in range(3):
        assert torch.equal(a @ b, product)
        for measured, expected in zip(
            native_op(local, global_, 1), attended, strict=True
        ):
            assert torch.equal(measured, expected)


# ------------------------------------------------- compile, export, autocast


@needs_native
def test_compiles_to_one_graph():
    torch._dynamo.reset()
    inputs = streams(1, 20, 10, 2, 8, torch.float32)
    # Everything but inductor, whose first kernel takes minutes to compile.
    compiled = torch.compile(co_attention, fullgraph=True, backend='aot_eager')
    measured = outputs_and_gradients(compiled, *inputs, 2)
    expected = outputs_and_gradients(co_attention, *inputs, 2)
    assert worst(measured, [e.double() for e in expected]) < 1e-6
    torch.manual_seed(0)
    dropped = compiled(*inputs, 2, 0.5)
    assert not torch.equal(dropped[0], measured[0])


class Module(torch.nn.Module):
    def forward(self, local, global_):
        return co_attention(local, global_, 2)


def test_exports_to_operators_of_pytorch():
    inputs = streams(1, 20, 10, 2, 8, torch.float32, grad=False)
    program = torch.export.export(Module(), inputs)
    assert 'dsnet_mm' not in str(program.graph)
    for m, e in zip(program.module()(*inputs), co_attention(*inputs, 2), strict=True):
        torch.testing.assert_close(m, e)


@needs_native
def test_autocast_runs_the_op_in_its_dtype():
    local, global_ = streams(1, 20, 10, 2, 8, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        outs = co_attention(local, global_.bfloat16(), 2)
    assert {o.dtype for o in outs} == {torch.bfloat16}
    expected = native_op(local.bfloat16(), global_.bfloat16(), 2)
    assert all(map(torch.equal, outs, expected))
    sum(o.sum() for o in outs).backward()
    assert local.grad.dtype == torch.float32


# --------------------------------------------------------- selection, messages


HIDE = 'import sys; sys.modules["dsnet_mm.ops._C"] = None\n'


def test_without_extension():
    done = run_python(
        HIDE + 'import dsnet_mm, dsnet_mm.ops as ops, torch\n'
        'local, rest = torch.randn(1, 6, 48), torch.randn(1, 4, 48)\n'
        'ops.co_attention(local, rest, 2, 0.1)\n'
        'print(*ops.select_path("cpu"))'
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    assert done.stdout.startswith('sdpa the compiled op is not there: ')


def test_native_without_extension():
    done = run_python(
        HIDE + 'import dsnet_mm.ops; dsnet_mm.ops.select_path("cpu")',
        DSNET_MM_OPS='native',
    )
    assert 'pip install --no-build-isolation -e .' in done.stderr.splitlines()[-1]


def test_extension_of_another_torch_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(native, '__file__', str(tmp_path / 'native.py'))
    (tmp_path / 'build_info.json').write_text(json.dumps(dict(torch='1.0.0')))
    assert native._load() == f'built for torch 1.0.0, you have {torch.__version__}'


@needs_native
def test_forced_paths(monkeypatch):
    local, global_ = streams(1, 6, 4, 2, 8)
    operators = dict(reference='aten::softmax', sdpa='scaled_dot', native='dsnet_mm::')
    for path, operator in operators.items():
        monkeypatch.setenv('DSNET_MM_OPS', path)
        with torch.profiler.profile() as profile:
            co_attention(local, global_, 2)
        ran = {name for name in operators.values() for e in profile.events()
               if name in e.name}  # fmt: skip
        assert operator in ran
        assert path == 'sdpa' or ran == {operator}
        assert select_path('cpu') == (path, f'DSNET_MM_OPS={path}')
    monkeypatch.setenv('DSNET_MM_OPS', 'fast')
    with pytest.raises(ValueError, match="'fast'"):
        co_attention(local, global_, 2)


@needs_native
def test_native_is_chosen(monkeypatch):
    monkeypatch.delenv('DSNET_MM_OPS', raising=False)
    assert select_path('cpu') == ('native', 'compiled')
    assert select_path('meta')[0] == 'sdpa'


@needs_native
def test_a_library_of_older_sources_is_not_taken(monkeypatch):
    assert native._load() is None
    monkeypatch.setattr(native, '_OPS', (*native._OPS, 'of_tomorrow'))
    assert native._load() == 'built from older sources'


@pytest.mark.parametrize(
    ('info', 'why_not', 'sentence'),
    [
        (dict(torch='2'), None, 'compiled for the CPU'),
        (dict(torch='2', cuda=None), None, 'compiled for the CPU'),
        (
            dict(torch='2', cuda=None, no_cuda='nvcc is old'),
            None,
            'compiled for the CPU only, because nvcc is old',
        ),
        (dict(torch='2', cuda='13.0'), None, 'compiled for CPU and CUDA 13.0'),
        (dict(reason='no compiler'), 'not compiled (no compiler)', 'not compiled (no'),
    ],
)
def test_doctor_tells_what_the_op_is_compiled_for(
    info, why_not, sentence, tmp_path, monkeypatch
):
    from dsnet_mm.__main__ import ops_build

    (tmp_path / 'build_info.json').write_text(json.dumps(info))
    monkeypatch.setattr(native, '__file__', str(tmp_path / 'native.py'))
    monkeypatch.setattr(native, 'WHY_NOT', why_not)
    assert ops_build().startswith(sentence)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    if info.get('cuda'):
        assert native.why_not_cuda() is None
    else:
        reason = why_not or info.get('no_cuda') or 'CPU only'
        reason = re.escape(f'not for it ({reason}); ')
        assert re.match(f'there is a GPU.*{reason}.*pip install', native.why_not_cuda())


def run_setup(folder, monkeypatch):
    """Runs setup.py up to the call of setup. Returns its names and the arguments."""
    arguments = {}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(setuptools, 'setup', arguments.update)
    return runpy.run_path(str(REPO / 'setup.py')), arguments


@pytest.mark.parametrize(
    ('of_torch', 'nvcc', 'facts'),
    [
        ('13.0', '13.0', None),
        ('12.8', '12.4', None),  # of one major version
        ('13.0', '12.4', ('13.0', '12.4')),
        ('13.0', None, ('13.0',)),
        (None, '13.0', ('CPU',)),
    ],
)
def test_which_nvcc_can_compile_for_torch(of_torch, nvcc, facts, tmp_path, monkeypatch):
    names, _ = run_setup(tmp_path, monkeypatch)
    reason = names['why_not_cuda'](of_torch, nvcc)
    assert reason is None if facts is None else all(fact in reason for fact in facts)


@pytest.mark.parametrize(
    ('of_torch', 'nvcc', 'cuda'),
    [(None, '13.0', None), ('13.0', '13.0', '13.0'), ('13.0', '12.4', None)],
)
def test_the_build_notes_what_it_is_for(
    of_torch, nvcc, cuda, tmp_path, monkeypatch, capsys
):
    (tmp_path / 'dsnet_mm' / 'ops').mkdir(parents=True)
    program = tmp_path / 'bin' / 'nvcc'
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho Cuda compilation tools, release {nvcc}, V1\n')
    program.chmod(0o755)
    monkeypatch.setenv('FORCE_CUDA', '1')
    monkeypatch.setattr(torch.version, 'cuda', of_torch)
    monkeypatch.setattr(cpp_extension, 'CUDA_HOME', str(tmp_path))
    monkeypatch.setattr(cpp_extension.BuildExtension, 'run', lambda self: None)
    names, arguments = run_setup(tmp_path, monkeypatch)
    if 'ext_modules' not in arguments:
        pytest.skip('nothing to build the ops with')
    sources = arguments['ext_modules'][0].sources
    assert any(source.endswith('.cu') for source in sources) == bool(cuda)
    arguments['cmdclass']['build_ext'](setuptools.Distribution()).run()
    info = json.loads((tmp_path / 'dsnet_mm/ops/build_info.json').read_text())
    reason = names['why_not_cuda'](of_torch, nvcc)
    assert info == dict(torch=torch.__version__, cuda=cuda, no_cuda=reason)
    assert (reason or '') in capsys.readouterr().err


def test_doctor_tells_the_path_and_why(monkeypatch):
    from dsnet_mm.__main__ import co_attention_path

    monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
    assert co_attention_path('cpu') == 'sdpa (DSNET_MM_OPS=sdpa)'
    monkeypatch.setenv('DSNET_MM_OPS', 'none')
    assert co_attention_path('cpu').startswith('DSNET_MM_OPS is one of')


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (lambda a, b: (a[0], b, 2), ValueError, r'takes projections of shape'),
        (lambda a, b: (a[:1], b, 2), ValueError, r'different batch sizes'),
        (lambda a, b: (a[..., :24], b, 2), ValueError, r'different widths'),
        (lambda a, b: (a, b, 3), ValueError, r'num_heads=3 heads'),
        (lambda a, b: (a, b, 0), ValueError, r'num_heads=0 heads'),
        (lambda a, b: (a, b[:, :0], 2), ValueError, r'one token at least'),
        (lambda a, b: (a, b, 2, 1.0), ValueError, r'lies in \[0, 1\), got 1.0'),
        (lambda a, b: (a, b.to('meta'), 2), ValueError, r'on different devices'),
        (lambda a, b: (a, b.float(), 2), TypeError, r'different dtypes'),
        (lambda a, b: (a.int(), b.int(), 2), TypeError, r'floating point'),
    ],
)
def test_wrong_inputs(change, error, message):
    with pytest.raises(error, match=message):
        co_attention(*change(*streams(2, 6, 4, 2, 8, grad=False)))


@needs_native
def test_the_op_itself_checks_shapes():
    for one, other, heads in (
        ((1, 6, 48), (1, 4, 24), 2),
        ((1, 6, 48), (2, 4, 48), 2),
        ((1, 0, 48), (1, 4, 48), 2),
        ((0, 6, 48), (0, 4, 48), 2**64 // 3 + 1),  # three times as many are 2
    ):
        with pytest.raises(RuntimeError, match='co_attention takes'):
            native_op(torch.randn(one), torch.randn(other), heads)
