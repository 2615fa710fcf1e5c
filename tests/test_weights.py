"""Files of weights are read without running what is in them, and checked."""

import copy
import io
import os
import pickle
import random
import struct
import threading
import zipfile
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsnet_mm import weights
from dsnet_mm.weights import (
    DamagedCheckpointError,
    check_finite,
    check_kinds,
    read_paddle,
    read_pickled,
    read_torchscript,
    restricted_loading,
)

from .conftest import run_python

# ------------------------------------------------------- pickles, opcode by opcode


class Name:
    """A name in a pickle."""

    def __init__(self, name: str) -> None:
        self.module, _, self.name = name.rpartition('.')


class Call:
    """A call of a name in a pickle, and a state that the result is built with."""

    def __init__(self, name: str, *arguments: Any, state: Any = None) -> None:
        self.name, self.arguments, self.state = Name(name), arguments, state


class Storage(Call):
    """The values of a tensor."""


def opcodes(value: Any) -> bytes:
    """Writes a value, and calls of any name with any arguments."""
    match value:
        case None | True | False:
            return {None: b'N', True: b'\x88', False: b'\x89'}[value]
        case int():
            data = pickle.encode_long(value)
            return b'\x8a' + bytes([len(data)]) + data
        case float():
            return b'G' + struct.pack('>d', value)
        case str():
            return b'X' + struct.pack('<I', len(value.encode())) + value.encode()
        case bytes():
            return opcodes(Call('_codecs.encode', value.decode('latin1'), 'latin1'))
        case tuple():
            return b'(' + b''.join(map(opcodes, value)) + b't'
        case list():
            return b'](' + b''.join(map(opcodes, value)) + b'e'
        case dict():
            return b'}(' + b''.join(map(opcodes, sum(value.items(), ()))) + b'u'
        case Name():
            return f'c{value.module}\n{value.name}\n'.encode()
        case Storage():
            return opcodes(value.arguments) + b'Q'
    state = b'' if value.state is None else opcodes(value.state) + b'b'
    return opcodes(value.name) + opcodes(value.arguments) + b'R' + state


def written(value: Any) -> bytes:
    """A pickle of protocol 2."""
    return b'\x80\x02' + opcodes(value) + b'.'


def archive(value: Any, records: dict[str, bytes], **kwargs: Any) -> io.BytesIO:
    """An archive, as ``torch.save`` writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', **kwargs) as found:
        parts = {'data.pkl': written(value), 'version': b'3'}
        for name, data in (parts | records).items():
            found.writestr(f'a/{name}', data)
    return file


def dtype(code: str, *state: Any) -> Call:
    return Call('numpy.dtype', code, False, True, state=state or None)


FLOAT = dtype('f8', 3, '<', None, None, None, -1, -1, 0)
# A type with a field of objects that tells NumPy to count no references by its list.
POINTERS = dtype('V8', 3, '|', None, ('a',), {'a': (dtype('O'), 0)}, 8, 1, 1)


def array(kind: Any, shape: Any, data: Any, by_column: Any = False) -> Call:
    start = (Name('numpy.ndarray'), (0,), b'b')
    return Call(
        'numpy.core.multiarray._reconstruct',
        *start,
        state=(1, shape, kind, by_column, data),
    )


def tensor(count: Any = 6, offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1)):
    values = Storage('', 'storage', Name('torch.FloatStorage'), '0', 'cpu', count)
    hooks = Call('collections.OrderedDict')
    return Call(
        'torch._utils._rebuild_tensor_v2', values, offset, size, stride, False, hooks
    )


def number(kind: Any, data: Any) -> Call:
    return Call('numpy.core.multiarray.scalar', kind, data)


SIX = {'data/0': np.arange(6, dtype=np.float32).tobytes()}


def test_pickles_by_opcode_are_read() -> None:
    """What the tests below change is otherwise read."""
    six = np.arange(6, dtype=float)
    found = read_paddle(io.BytesIO(written([array(FLOAT, (2, 3), six.tobytes())])))
    assert np.array_equal(found[0], six.reshape(2, 3))
    assert read_paddle(io.BytesIO(written(number(FLOAT, six[1:2].tobytes())))) == 1
    found = read_pickled(archive(tensor(), SIX))
    assert torch.equal(found, torch.arange(6.0).view(2, 3))


REFUSED = [
    array(POINTERS, (1,), b'A' * 8),
    number(POINTERS, b'A' * 8),
    array(dtype('O'), (1,), b'A' * 8),
    array(dtype('O', 3, '|', None, None, None, -1, -1, 0), (1,), [None]),
    array(dtype('V8'), (1,), b'A' * 8),
    array(dtype('U2'), (1,), b'A' * 8),
    array(Call('numpy.dtype', [('a', 'O')], False, True), (1,), b'A' * 8),
    array(dtype('f8', 3, '>', None, None, None, -1, -1, 0), (1,), b'A' * 8),
    array(FLOAT, (2,), b'A' * 8),
    array(FLOAT, (-1,), b'A' * 8),
    array(FLOAT, (2**62, 4), b''),
    array(FLOAT, (1,), [1.0]),
    number(FLOAT, b'A' * 7),
    number(FLOAT, None),
    tensor(offset=1),
    tensor(offset=-1),
    tensor(size=(2, 4)),
    tensor(size=(2**40,), stride=(0,)),
    tensor(size=(2**33, 2**33), stride=(2**33, 2**33)),
    tensor(stride=(-3, 1)),
    tensor(size=(1,) * 70, stride=(1,) * 70),
    tensor(count=7),
    tensor(count=2**50),
    Call('torch.storage.UntypedStorage', 2**50),
    Call('builtins.getattr', Name('collections.OrderedDict'), '__base__'),
    Call('collections.OrderedDict', state={'__class__': Name('torch.Size')}),
    Call('_codecs.encode', 'text', 'rot13'),
]
NASTY = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**63, 2**200, -(2**63), 0.5, float('nan')),
    *('', 'f8', 'O', 'V8', '<', 'latin1', 'min', 'storage', b'', b'A' * 8, b'A' * 48),
    *((), (0,), (2, 3), (2**62, 4), [], [[]], [('a', 'O')], {}, {'a': (1, 2)}),
    *(FLOAT, POINTERS, dtype('O'), dtype('b1'), array(FLOAT, (0,), b''), tensor()),
    Call('mmengine.logging.history_buffer.HistoryBuffer'),
    Call('builtins.getattr', Name('collections.OrderedDict'), '__base__'),
]


def use(value: Any, depth: int = 0) -> None:
    """Looks at all numbers of what was read."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        repr(value + value)
    elif isinstance(value, dict | list | tuple) and depth < 9:
        for part in value.values() if isinstance(value, dict) else value:
            use(part, depth + 1)


def changed(value: Any, rng: random.Random) -> Any:
    """Replaces a part of a value, at any depth."""
    if isinstance(value, Call) and rng.random() < 0.9:
        other = copy.copy(value)
        if value.state is not None and rng.random() < 0.5:
            other.state = changed(value.state, rng)
        elif rng.random() < 0.1:
            other.name = Name(rng.choice([*weights._NAMES]))
        else:
            other.arguments = changed(value.arguments, rng)
        return other
    if isinstance(value, tuple) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return (*value[:i], changed(value[i], rng), *value[i + 1 :])
    return rng.choice(NASTY)


def attack(count: int = 1500) -> None:
    """Reads what no library writes. It must be refused, and end no process."""
    rng, counts = random.Random(0), Counter()
    for value in REFUSED:
        for read, data in (
            (read_paddle, io.BytesIO(written(value))),
            (read_pickled, archive(value, SIX)),
        ):
            with pytest.raises(ValueError):
                raise AssertionError(f'{value.name.name} gave {read(data)}')
    deep = b'N' + b'\x85' * 300_000  # to hash it overflows the stack
    named = opcodes(Name('collections.OrderedDict')), opcodes(Name('builtins.set'))
    for content in (
        b'}' + deep + b'Ns',
        b'}(' + deep + b'Nu',
        named[0] + b'](](' + deep + b'Nee\x85R',
        named[1] + b'](' + deep + b'e\x85R',
    ):
        with pytest.raises(ValueError):
            read_paddle(io.BytesIO(b'\x80\x02' + content + b'.'))
    history = Call(
        'mmengine.logging.history_buffer.HistoryBuffer',
        state={
            '_log_history': array(FLOAT, (1,), b'A' * 8),
            '_count_history': array(FLOAT, (1,), b'A' * 8),
            'max_length': 9,
        },
    )
    seeds = [*REFUSED, history, array(FLOAT, (1,), b'A' * 8), tensor()]
    for _ in range(count):
        value = rng.choice(seeds)
        for _ in range(rng.randrange(1, 4)):
            value = changed(value, rng)
        content = written(value)
        if rng.random() < 0.3:
            content = bytearray(content)
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        for read, data in (
            (read_paddle, io.BytesIO(content)),
            (read_pickled, archive(value, SIX)),
        ):
            try:
                use(read(data))
                counts['read'] += 1
            except ValueError:
                counts['refused'] += 1
    assert min(counts['read'], counts['refused']) > 100, counts


def test_no_pickle_ends_the_process() -> None:
    done = run_python('from tests.test_weights import attack; attack()')
    assert done.returncode == 0, done.stderr[-2000:]


# ------------------------------------------------------------------- what is written


def saved(value: Any, path: Path, old: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    return path


@pytest.mark.parametrize('old', [False, True], ids=['zip', 'before 1.6'])
def test_tensors_are_read_as_torch_reads_them(old: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    layer, marked = nn.BatchNorm1d(3), torch.ones(2)
    marked.origin = 'FSDP'
    value = dict(
        marked=marked,
        shared=[base, base[1:, ::2], base.t()],
        kinds=[
            base.to(kind)
            for kind in (
                *(torch.float16, torch.bfloat16, torch.float64, torch.complex64),
                *(torch.uint8, torch.int8, torch.int16, torch.int64, torch.bool),
            )
        ],
        small=[torch.tensor(3.0), torch.empty(0, 4), nn.Parameter(torch.ones(2))],
        state=layer.state_dict(),
        plain=[None, True, 2**70, 0.5, 'ä', b'', b'\xff', (1, [2]), {3}],
        counts=Counter({3: 1}),
        kind=torch.float32,
        size=torch.Size([1, 2]),
    )
    path = saved(value, tmp_path / 'a.pth', old)
    found = read_pickled(path)
    expected = torch.load(path, weights_only=False)
    assert repr(found) == repr(expected).replace(', requires_grad=True', '').replace(
        'Parameter containing:\n', ''
    )
    assert found['state']._metadata == expected['state']._metadata
    first, part, _ = found['shared']
    first += 1
    assert torch.equal(part, first[1:, ::2])


@pytest.mark.parametrize('core', ['numpy.core.', 'numpy._core.'])
def test_arrays_of_numpy_are_read(core: str, tmp_path: Path) -> None:
    """NumPy 2 renamed ``numpy.core``."""
    values = [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        *(np.arange(3).astype(code) for code in '?bhiBHIQefdFD'),
        *(np.array(5), np.empty((0, 3)), np.float64(0.5), np.float32(0.5), np.bool_(1)),
    ]
    for protocol in (2, 4):
        content = pickle.dumps(values, protocol)
        for name in ('numpy.core.', 'numpy._core.'):
            old, new = (f'c{n}multiarray'.encode() for n in (name, core))
            content = content.replace(old, new)
        found = read_paddle(io.BytesIO(content))
        for measured, expected in zip(found, values, strict=True):
            assert np.array_equal(measured, expected)
            assert measured.dtype == expected.dtype


# --------------------------------------------------------------------------- damage


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """It is refused, or was in a part of the file that is not read."""
    state = nn.Linear(100, 100).state_dict()
    path = saved(state, tmp_path / 'a.pth')
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        try:
            found = read_pickled(io.BytesIO(damaged))
            assert all(torch.equal(found[key], state[key]) for key in state)
        except ValueError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize('old', [False, True], ids=['zip', 'before 1.6'])
def test_a_part_of_a_file_is_refused(old: bool, tmp_path: Path) -> None:
    content = saved(nn.Linear(30, 30).state_dict(), tmp_path / 'a', old).read_bytes()
    for end in range(0, len(content), 97):
        with pytest.raises(DamagedCheckpointError):
            read_pickled(io.BytesIO(content[:end]))


def test_a_small_file_does_not_become_large() -> None:
    zeros = {'data/0': bytes(2**24)}
    value = tensor(2**22, 0, (2**22,), (1,))
    assert len(read_pickled(archive(value, zeros))) == 2**22
    file = archive(value, zeros, compression=zipfile.ZIP_DEFLATED)
    assert len(file.getvalue()) < 10**5
    with pytest.raises(DamagedCheckpointError):
        read_pickled(file)


def test_sentences_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='none'):
        read_pickled(tmp_path / 'none.pth')
    (tmp_path / 'a.pth').write_bytes(b'no checkpoint')
    with pytest.raises(DamagedCheckpointError, match=r'a\.pth'):
        read_pickled(tmp_path / 'a.pth')
    path = saved(Path('x'), tmp_path / 'b.pth')
    with pytest.raises(ValueError, match=r'b\.pth.*pathlib\.PosixPath'):
        read_pickled(path)


# ---------------------------------------------------------------------- TorchScript


class Harmful(nn.Module):
    """Writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.register_buffer('count', torch.tensor(5))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, Tensor, bool]:
        return self.path, self.count, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, Tensor, bool]) -> None:
        self.path = state[0]
        self.count = state[1]
        self.training = state[2]
        torch.save(state[1], state[0])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.count


class Plain(nn.Module):
    """Parameters, a buffer, and a tensor that is neither."""

    def __init__(self, harmful: nn.Module | None = None) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.mask = torch.ones(2)
        self.names = ['a', 'b']
        self.numbers = {'a': 1}
        if harmful is not None:
            self.harmful = harmful

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.mask.sum() + len(self.names) + self.numbers['a']


@pytest.fixture
def harmful(tmp_path: Path) -> tuple[Path, Path]:
    """An archive that overwrites a file, and the file."""
    target = tmp_path / 'thesis.tex'
    target.write_text('mine')
    torch.jit.script(Plain(Harmful(str(target)))).save(tmp_path / 'a.pt')
    torch.jit.load(tmp_path / 'a.pt')
    assert target.read_bytes() != b'mine', 'it is harmful'
    target.write_text('mine')
    return tmp_path / 'a.pt', target


def test_a_torchscript_archive_is_not_run(harmful: tuple[Path, Path]) -> None:
    path, target = harmful
    found = read_torchscript(path)
    expected = torch.jit.load(path).state_dict()
    target.write_text('mine')
    for key in ('part.0.weight', 'part.0.bias', 'part.1.running_mean'):
        assert torch.equal(found[key], expected[key])
    for read in (read_torchscript, read_pickled):
        with suppress(ValueError):
            read(path)
        assert target.read_text() == 'mine'


def test_tensors_of_a_torchscript_archive(tmp_path: Path) -> None:
    module = torch.jit.script(Plain().half())
    module.save(tmp_path / 'a.pt')
    found, expected = read_torchscript(tmp_path / 'a.pt'), module.state_dict()
    assert found.keys() == expected.keys() | {'mask'}
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# -------------------------------------------------------------------------- threads


class Runs:
    """Pickles to a call of a function that leaves a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('first', ['trusting', 'restricted'])
@pytest.mark.parametrize('order', ['nested', 'crossed'])
def test_threads_do_not_share_their_trust(
    first: str, order: str, tmp_path: Path
) -> None:
    """Whoever comes and leaves first, the other loads as before."""
    before = torch.load
    for who in ('trusting', 'restricted'):
        saved(Runs(tmp_path / who), tmp_path / f'{who}.pth')
    entered, left = threading.Event(), threading.Event()
    errors = []

    def load(who: str) -> None:
        try:
            torch.load(tmp_path / f'{who}.pth', weights_only=False)
        except ValueError as error:
            errors.append((who, str(error)))

    def one(who: str) -> None:  # comes first, and leaves last if nested
        with restricted_loading(trust=who == 'trusting'):
            entered.set()
            inside.wait()
            if order == 'nested':
                left.wait()
            load(who)
        left.set()

    def other(who: str) -> None:
        entered.wait()
        with restricted_loading(trust=who == 'trusting'):
            inside.set()
            if order == 'crossed':
                left.wait()
            load(who)
        left.set()

    inside = threading.Event()
    second = {'trusting': 'restricted', 'restricted': 'trusting'}[first]
    threads = [
        threading.Thread(target=one, args=[first], daemon=True),
        threading.Thread(target=other, args=[second], daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert (tmp_path / 'trusting').is_dir()
    assert not (tmp_path / 'restricted').exists()
    assert [who for who, _ in errors] == ['restricted'] and 'mkdir' in errors[0][1]
    assert torch.load is before


def test_a_thread_without_a_context_loads_as_outside(tmp_path: Path) -> None:
    path, found = saved(torch.ones(2), tmp_path / 'a.pth'), []

    def load() -> None:
        try:
            found.append(torch.load(saved(Runs(tmp_path / 'x'), tmp_path / 'b.pth')))
        except pickle.UnpicklingError as error:
            found.append(error)
        found.append(torch.load(path, map_location='meta'))

    with restricted_loading(trust=True):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    refused, tensor_found = found
    assert isinstance(refused, pickle.UnpicklingError), 'as torch.load has it'
    assert tensor_found.is_meta and not (tmp_path / 'x').exists()


def test_tensors_of_other_processes_are_read() -> None:
    """They are pickled, and their storages are read by ``torch.load``."""
    values = [torch.arange(6.0).view(2, 3).t(), torch.ones(2, dtype=torch.bfloat16)]
    with restricted_loading():
        found = pickle.loads(pickle.dumps(values))
    assert all(map(torch.equal, found, values))


# --------------------------------------------------------------------------- checks


def test_values_and_kinds_are_checked() -> None:
    own = nn.BatchNorm1d(2).state_dict()
    check_finite(own, 'a.pth')
    check_kinds(own, own, 'a.pth')
    double = OrderedDict((k, v.double()) for k, v in own.items() if 'num' not in k)
    check_kinds(own, double, 'a.pth')
    for value in (torch.nan, torch.inf, -torch.inf):
        damaged = dict(own, running_var=torch.tensor([1.0, value]))
        with pytest.raises(DamagedCheckpointError, match=r'a\.pth.*running_var'):
            check_finite(damaged, 'a.pth')
    for kind in (torch.int64, torch.bool, torch.complex64):
        other = dict(own, bias=own['bias'].to(kind))
        with pytest.raises(ValueError, match=rf'a\.pth.*{kind}.*bias'):
            check_kinds(own, other, 'a.pth')
    other = dict(own, num_batches_tracked=torch.tensor(1.5))
    with pytest.raises(ValueError, match='num_batches_tracked'):
        check_kinds(own, other, 'a.pth')
