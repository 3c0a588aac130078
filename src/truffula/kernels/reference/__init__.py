"""The reference backend: plain torch, op by op. It is the specification of every op."""

from truffula.kernels.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
