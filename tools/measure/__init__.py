"""Parts of ``tools/analysis_tools/benchmark.py``.

- ``calls``: the model of DS-Net, and the call that is timed.
- ``models``: the rows of a table: DS-Net in its forms, and its peers.
- ``timing``: times the rows in turns.
- ``memory``: measures the memory of a row in a process of its own.
- ``against``: times this checkout against another one.
- ``table``, ``plot``: show the results.
"""
