"""Measures networks: operations, times in turns, and memory.

- ``complexity``: parameters and operations. ``memory``: the memory of a call.
- ``turns``: the times of calls. ``calls``: the network and the call of DS-Net.
- ``rows``, ``detectors``, ``against``, ``page``: parts of
  ``tools/analysis_tools/benchmark.py``.
"""
