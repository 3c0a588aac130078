"""Models without a native implementation, computed by transformers' own modeling code.

``plan.py`` plans such a model from its files' metadata. ``backend.py`` loads it as an ``Executable``: packed, with
paged attention, or serial, one sequence at a time, where its code cannot tell sequences of one batch apart.
"""
