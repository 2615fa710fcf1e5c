"""Files of weights: reading without running what is in them, and checks.

A pickle can name any function, and a TorchScript archive brings methods that run when
it is loaded. Here a pickle gives plain values, tensors, arrays of numbers and the
histories of MMEngine's log. Every name in it stands for a function of this module,
which checks its arguments. Nothing is decompressed, and the checksum of each tensor is
compared.
"""

import io
import math
import os
import pickle
import re
import struct
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

# -------------------------------------------------------------------------- checks


class DamagedCheckpointError(ValueError):
    """A file is no checkpoint, a part of one, or one with weights that are no numbers.

    Not raised for files that are not safe to load.
    """


def check_finite(state: dict[str, Any], path: Any) -> None:
    """Checks that all weights of a state dict are finite.

    Args:
        state: The state dict. What is no tensor is not looked at.
        path: Its file, for the error message.

    Raises:
        DamagedCheckpointError: If one is not. The sentence names the first.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise DamagedCheckpointError(
                f'{path} holds values that are not finite (in {name}); it is damaged, '
                f'or its training diverged'
            )


def check_kinds(own: dict[str, Any], given: dict[str, Any], path: Any) -> None:
    """Checks that weights are of the kind that a model has, such as real numbers.

    PyTorch casts integers, booleans and complex numbers without a word.

    Args:
        own: State dict of the model.
        given: State dict to load.
        path: Its file, for the error message.

    Raises:
        ValueError: If one is of another kind. The sentence names the first.
    """

    def kind(x: Tensor) -> tuple[bool, bool, bool]:
        return x.is_floating_point(), x.is_complex(), x.dtype == torch.bool

    for name, value in given.items():
        wanted = own.get(name)
        both = isinstance(value, Tensor) and isinstance(wanted, Tensor)
        if both and kind(value) != kind(wanted):
            raise ValueError(
                f'{path} has {value.dtype} for {name}, which is {wanted.dtype} in the '
                f'model; it is damaged, or of another model'
            )


# ------------------------------------------------------------ what a pickle may build


class _UnsafeNameError(pickle.UnpicklingError):
    """A pickle names what is not in :data:`_NAMES`."""


class _Object(dict):
    """The attributes of an object whose class is not built."""


def _require(condition: bool) -> None:
    if not condition:
        raise pickle.UnpicklingError('a value is not as PyTorch writes it')


def _key(value: Any) -> Any:
    # To hash a tuple of tuples of tuples ... overflows the stack of the interpreter.
    _require(type(value) in (str, int, float, bool, bytes, type(None)))
    return value


def _naturals(values: Any) -> bool:
    return type(values) is tuple and all(type(n) is int and n >= 0 for n in values)


def _ordered_dict(items: Any = ()) -> OrderedDict:
    return OrderedDict((_key(key), value) for key, value in items)


def _set_metadata(state_dict: OrderedDict, attributes: Any) -> None:
    """Sets the versions of the modules of a state dict, its only attribute."""
    versions = attributes['_metadata']
    _require(all(type(v.get('version', 1)) is int for v in versions.values()))
    state_dict._metadata = versions


def _counter(counts: Any) -> Counter:
    _require(type(counts) is dict)
    return Counter(counts)


def _encode(text: Any, encoding: Any) -> bytes:
    _require(type(text) is str and encoding in ('latin1', 'latin-1'))
    return text.encode('latin-1')


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    _require(isinstance(storage, Tensor) and _naturals((offset,)))
    _require(_naturals(size) and _naturals(stride) and len(size) == len(stride) < 32)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    _require(math.prod(size) <= len(storage) and (0 in size or last < len(storage)))
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def _tensor_with_attributes(rebuild: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    _require(rebuild is _tensor and kind is _first and type(arguments) is tuple)
    return _tensor(*arguments)


_NUMBERS = {np.dtype(code).str[1:]: np.dtype(code) for code in '?bhiqBHIQefdFD'}


def _dtype(code: Any, *_: Any) -> np.dtype:
    if type(code) is not str or code not in _NUMBERS:
        raise _UnsafeNameError(f'numpy.dtype({code!r:.20})')
    return _NUMBERS[code]


def _array(*_: Any) -> np.ndarray:
    return np.empty(0)


def _fill_array(array: np.ndarray, state: Any) -> None:
    _, shape, dtype, by_column, data = state
    _require(_naturals(shape) and len(shape) < 32 and isinstance(dtype, np.dtype))
    _require(type(data) is bytes and array.size == 0)
    _require(math.prod(shape) * dtype.itemsize == len(data))
    array.__setstate__((1, shape, dtype, bool(by_column), data))


def _number(dtype: Any, data: Any) -> np.generic:
    _require(type(data) is bytes and isinstance(dtype, np.dtype))
    (value,) = np.frombuffer(data, dtype)
    return value


def _history(*_: Any) -> Any:
    from mmengine.logging import HistoryBuffer

    return HistoryBuffer()


def _fill_history(history: Any, state: Any) -> None:
    arrays = [state[name] for name in ('_log_history', '_count_history')]
    _require(all(isinstance(x, np.ndarray) and x.ndim == 1 for x in arrays))
    _require(len(arrays[0]) == len(arrays[1]) and type(state['max_length']) is int)
    history._log_history, history._count_history = arrays
    history.max_length = state['max_length']


def _statistic(owner: Any, name: Any) -> None:
    """Stands for ``getattr``, by which a history names functions that it has anyway."""
    if owner is not _history or name not in ('min', 'max', 'current', 'mean'):
        raise _UnsafeNameError('getattr')


# What the names in a pickle stand for: functions, and types of numbers of PyTorch.
_NAMES: dict[str, Any] = {
    'builtins.bytes': lambda: b'',
    'builtins.getattr': _statistic,
    'builtins.set': lambda values: {_key(value) for value in values},
    'collections.Counter': _counter,
    'collections.OrderedDict': _ordered_dict,
    '_codecs.encode': _encode,
    'mmengine.logging.history_buffer.HistoryBuffer': _history,
    'numpy.core.multiarray._reconstruct': _array,
    'numpy.core.multiarray.scalar': _number,
    'numpy.dtype': _dtype,
    'numpy.ndarray': _array,
    'torch._tensor._rebuild_from_type_v2': _tensor_with_attributes,
    'torch._utils._rebuild_parameter': _first,
    'torch._utils._rebuild_parameter_with_state': _first,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch.Tensor': _first,
    'torch.Size': lambda values: torch.Size(values),
}
_NAMES |= {f'torch.{k}': v for k, v in vars(torch).items() if type(v) is torch.dtype}
_PLAIN = ('Double', 'Float', 'Half', 'BFloat16', 'Long', 'Int', 'Short', 'Bool')
_STORAGES = {name: name.lower() for name in _PLAIN}
_STORAGES |= dict(Byte='uint8', Char='int8', ComplexDouble='cdouble')
_STORAGES['ComplexFloat'] = 'cfloat'
_NAMES |= {
    f'torch.{module}{name}Storage': getattr(torch, kind)
    for module in ('', 'cuda.')
    for name, kind in _STORAGES.items()
}
_LISTS = ('intlist', 'doublelist', 'boollist', 'tensorlist')
_TORCHSCRIPT = {f'torch.jit._pickle.build_{name}': _first for name in _LISTS}
_TORCHSCRIPT |= {'torch.jit._pickle.restore_type_tag': _first, '__torch__': None}

# Those of protocols 2 to 4, without the ones that :class:`_Unpickler` has itself.
_OPCODES = (
    *('PROTO', 'FRAME', 'STOP', 'MARK', 'NONE', 'NEWTRUE', 'NEWFALSE', 'BINFLOAT'),
    *('BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINSTRING', 'SHORT_BINSTRING'),
    *('BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'EMPTY_LIST', 'EMPTY_DICT'),
    *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'STACK_GLOBAL', 'BINPERSID'),
    *('EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'),
    *('BINGET', 'LONG_BINGET', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'),
)


class _Unpickler(pickle._Unpickler):
    """Builds what :data:`_NAMES` has, by the opcodes of protocols 2 to 4.

    Args:
        file: The pickle.
        storage: Returns the values of a storage by type, key and number of elements.
        names: What the names in the pickle stand for.
    """

    dispatch = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _OPCODES)
    }

    def __init__(
        self,
        file: BinaryIO,
        storage: Callable[[torch.dtype, str, int], Tensor] | None = None,
        names: dict[str, Any] = _NAMES,
    ) -> None:
        super().__init__(file, encoding='utf-8')
        self._storage, self._names = storage, names
        self._storages: dict[str, Tensor] = {}

    def load(self) -> Any:
        """Reads the pickle. A storage alone is what tensors in other pickles need."""
        value = super().load()
        alone = any(value is values for values in self._storages.values())
        return value._typed_storage() if alone else value

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a name stands for."""
        name = f'{module}.{name}'.replace('__builtin__.', 'builtins.', 1)
        name = name.replace('numpy._core.', 'numpy.core.', 1)
        if name in self._names:
            return self._names[name]
        if name.startswith('__torch__.') and '__torch__' in self._names:
            return lambda *_: _Object()
        raise _UnsafeNameError(name.removeprefix('builtins.'))

    def persistent_load(self, pid: Any) -> Tensor:
        """Returns the values of a storage."""
        kind, dtype, key, _, count, *view = pid
        _require(kind == 'storage' and type(key) is str and view in ([], [None]))
        _require(type(dtype) is torch.dtype and _naturals((count,)))
        if key not in self._storages:
            self._storages[key] = self._storage(dtype, key, count)
        values = self._storages[key]
        _require(values.dtype == dtype and len(values) == count)
        return values

    def _global(self) -> None:
        lines = self.readline(), self.readline()
        _require(all(line.endswith(b'\n') for line in lines))  # the file goes on
        self.append(self.find_class(*(line[:-1].decode() for line in lines)))

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        _require(type(function) is FunctionType and type(arguments) is tuple)
        self.append(function(*arguments))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype):
            _require(state[1] in ('<', '|', '='))  # the order of bytes
        elif type(target) is np.ndarray:
            _fill_array(target, state)
        elif type(target) is OrderedDict:
            _set_metadata(target, state)
        elif type(target) is _Object:
            target.update(state if type(state) is dict else {})
        else:
            _require(type(target).__name__ == 'HistoryBuffer')
            _fill_history(target, state)

    def _update(self, items: list) -> None:
        target = self.stack[-1]
        _require(type(target) in (dict, OrderedDict))
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def _extend(self, items: list) -> None:
        _require(type(self.stack[-1]) is list)
        self.stack[-1].extend(items)

    dispatch |= {
        pickle.GLOBAL[0]: _global,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: lambda self: self._update(
            [self.stack.pop(-2), self.stack.pop()]
        ),
        pickle.SETITEMS[0]: lambda self: self._update(self.pop_mark()),
        pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
    }


# ---------------------------------------------------------------------- file formats


def _read_zip(file: BinaryIO, size: int, names: dict[str, Any]) -> Any:
    """Reads what ``torch.save`` and ``torch.jit.save`` write since PyTorch 1.6."""
    archive, left = zipfile.ZipFile(file), size
    found = (re.fullmatch('([^/]+)/data.pkl', name) for name in archive.namelist())
    (root,) = {match[1] for match in found if match}

    def read(name: str) -> bytes:
        nonlocal left
        part = archive.getinfo(f'{root}/{name}')
        left -= part.file_size
        _require(left >= 0 and part.compress_type == zipfile.ZIP_STORED)
        return archive.read(part)  # compares the checksum

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        data = bytearray(read(f'data/{key}') if count else b'')
        _require(len(data) == count * dtype.itemsize)
        return _values(data, dtype)

    if f'{root}/byteorder' in archive.namelist():
        _require(read('byteorder') == b'little')
    return _Unpickler(io.BytesIO(read('data.pkl')), storage, names).load()


def _read_stream(file: BinaryIO, size: int, names: dict[str, Any]) -> Any:
    """Reads what ``torch.save`` wrote before PyTorch 1.6. It has no checksums."""
    left, parts = size, {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        nonlocal left
        left -= count * dtype.itemsize
        _require(left >= 0)
        parts[key] = bytearray(count * dtype.itemsize), dtype
        return _values(*parts[key])

    def load() -> Any:
        return _Unpickler(file, storage, names).load()

    _require((load(), load()) == (0x1950A86A20F9469CFC6C, 1001))
    _require(load()['little_endian'] is True)
    checkpoint, keys = load(), load()
    _require(all(type(key) is str for key in keys) and {*keys} == {*parts})
    for data, dtype in (parts[key] for key in keys):
        (count,) = struct.unpack('<q', file.read(8))
        _require(count * dtype.itemsize == len(data) == file.readinto(data))
        if dtype == torch.bool:
            data[:] = bytes(map(bool, data))
    return checkpoint


def _values(data: bytearray, dtype: torch.dtype) -> Tensor:
    """Returns the values of a storage, (N,), which share its memory."""
    if dtype == torch.bool:  # other bytes than 0 and 1 are undefined behaviour
        data[:] = bytes(map(bool, data))
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


@contextmanager
def _opened(file: Any) -> Iterator[tuple[BinaryIO, int, bytes]]:
    """Gives a file with its size and its start, and one sentence for what is wrong."""
    is_path = isinstance(file, str | os.PathLike)
    try:
        with open(file, 'rb') if is_path else nullcontext(file) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            start = stream.read(4)
            stream.seek(0)
            yield stream, size, start
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no file {file}') from None
    except _UnsafeNameError as error:
        name = re.sub(r'[^\w.()\']', '?', str(error))[:100]
        raise ValueError(
            f'{file} is not safe to load: it names {name}, which is neither a '
            f'tensor nor what MMEngine writes, and could run any program; if you trust '
            f'its source, add --trust-checkpoint where a tool has it, or load it in '
            f'Python within dsnet_mm.checkpoint.restricted_loading(trust=True)'
        ) from None
    except Exception as error:  # damaged pickles and archives raise nearly anything
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise DamagedCheckpointError(
            f'{file} cannot be read as a checkpoint; it is damaged or something else '
            f'({reason})'
        ) from error


def read_pickled(file: Any, ignore: tuple[str, ...] = ()) -> Any:
    """Reads a file of ``torch.save`` without running what is in it.

    Args:
        file: The file, or a binary stream.
        ignore: Names of further classes, whose objects become dicts.

    Returns:
        What was saved, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If it cannot be read.
        ValueError: If it is not safe to load.
    """
    names = _NAMES | {name: lambda *_: _Object() for name in ignore}
    with _opened(file) as (stream, size, start):
        read = _read_zip if start == b'PK\3\4' else _read_stream
        return read(stream, size, names)


def read_paddle(file: Any) -> Any:
    """Reads a file of ``paddle.save`` with arrays. Arguments as :func:`read_pickled`.

    Returns:
        What was saved, with arrays of numbers of NumPy.
    """
    # Some versions of Paddle store a pair of name and array.
    names = _NAMES | {'builtins.tuple': lambda values: tuple(values)}
    with _opened(file) as (stream, *_):
        return _Unpickler(stream, names=names).load()


def read_torchscript(file: Any) -> dict[str, Tensor]:
    """Reads the tensors of a TorchScript archive without running its methods.

    Args:
        file: As of :func:`read_pickled`.

    Returns:
        The tensors of its modules by name: parameters, buffers and other attributes.
    """
    tensors, seen = {}, set()

    def collect(module: _Object, prefix: str) -> None:
        seen.add(id(module))
        for name, value in module.items():
            if isinstance(value, Tensor):
                tensors[f'{prefix}{name}'] = value
            elif type(value) is _Object and id(value) not in seen:
                collect(value, f'{prefix}{name}.')

    with _opened(file) as (stream, size, _):
        module = _read_zip(stream, size, _NAMES | _TORCHSCRIPT)
        _require(type(module) is _Object)
        collect(module, '')
    return tensors


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """Reads a ``.safetensors`` file as a checkpoint.

    Returns:
        ``state_dict``, with half precision made single, and ``meta``, the texts of the
        file by name.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If it cannot be read.
    """
    with _opened(path), safe_open(str(path), framework='pt') as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = dict(file.metadata() or {})
    for name, value in state.items():
        if value.is_floating_point() and value.dtype.itemsize < 4:
            state[name] = value.float()
    return dict(state_dict=state, meta=meta)


# ------------------------------------------------------------------------ torch.load

_trust: ContextVar[bool | None] = ContextVar('trust', default=None)
_lock, _depth, _outside = threading.Lock(), 0, torch.load


@contextmanager
def restricted_loading(trust: bool = False) -> Iterator[None]:
    """Lets ``torch.load`` build tensors and what MMEngine writes, nothing else.

    It reads ``.safetensors`` files too. It raises ValueError for a file that holds
    anything else. Where two of these contexts are nested, the outer one decides. Other
    threads load as they do without.

    Args:
        trust: Load any file, which can then run any program.
    """
    global _depth, _outside
    if _trust.get() is not None:
        yield
        return
    token = _trust.set(trust)
    with _lock:
        _depth += 1
        if _depth == 1:
            _outside, torch.load = torch.load, _load
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                torch.load = _outside
        _trust.reset(token)


@wraps(torch.load)
def _load(file: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of ``torch.load`` while a context is active in any thread."""
    if _trust.get() is None:
        return _outside(file, *args, **kwargs)
    return read_file(file)


def read_file(file: Any) -> Any:
    """Reads a file as :func:`restricted_loading` says, restricted outside of it.

    Args:
        file: A file of ``torch.save`` or a ``.safetensors`` file, or a binary stream.

    Returns:
        What was saved, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If it cannot be read.
        ValueError: If it is not safe to load.
    """
    if str(file).endswith('.safetensors'):
        checkpoint = read_safetensors(file)
    elif _trust.get():
        with _opened(file) as (stream, *_):
            checkpoint = _outside(stream, 'cpu', weights_only=False)
    else:
        checkpoint = read_pickled(file)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
        # Runner.resume would run this text as Python. MMEngine writes `cfg`.
        checkpoint['meta'].pop('config', None)
    return checkpoint
