"""Damages the content of files, by hypothesis, and judges what readers make of it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples in each run, and no folder of examples.
quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
"""Values of JSON, with NaN and Infinity as Python writes them."""


def places_in(node: Any) -> list[tuple[Any, Any]]:
    """Lists all containers with their keys, in and below a node."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    return [
        place
        for key in keys
        for place in (
            (node, key),
            *(places_in(node[key]) if isinstance(node[key], dict | list) else ()),
        )
    ]


@st.composite
def damaged_json(draw: st.DrawFn, content: dict) -> dict:
    """JSON with one or two values removed, doubled, or replaced by others."""
    content, others = deepcopy(content), [node[key] for node, key in places_in(content)]
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        places = places_in(content)
        if not places:
            break
        node, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(('remove', 'double', 'replace', 'replace')))
        if how == 'remove':
            del node[key]
        elif how == 'double' and isinstance(node, list):
            node.append(deepcopy(node[key]))
        else:
            alike = [value for value in others if type(value) is type(node[key])]
            known = st.sampled_from(alike or others) | st.sampled_from(others)
            node[key] = deepcopy(draw(known | values))
    return content


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with up to three changed bytes, or without its end."""
    if draw(st.integers(0, 4)) == 0:
        return content[: draw(st.integers(0, len(content) - 1))]
    changed = bytearray(content)
    for _ in range(draw(st.sampled_from((1, 1, 3)))):
        byte = st.sampled_from(content) | st.integers(0, 255)
        changed[draw(st.integers(0, len(content) - 1))] = draw(byte)
    return bytes(changed)


def read_or_refuse(read: Callable[[], Any], *names: str) -> Any:
    """Returns what a reader gives, or None if it raises one sentence.

    Args:
        read: The reader.
        names: Words of which the sentence has one, such as the name of the file.
    """
    try:
        return read()
    except (FileNotFoundError, ValueError) as error:
        # Not a subclass, such as an error of decoding.
        assert type(error) in (FileNotFoundError, ValueError), repr(error)
        assert any(name in str(error) for name in names) and '\n' not in str(error)
        return None
