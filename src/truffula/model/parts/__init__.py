"""The parts of a layer: one file per kind, with its spec, its weights and its operations."""
