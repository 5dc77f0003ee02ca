"""Planted faults: tiny mechanisms, each wrong in one way that was published or shipped somewhere or nearly."""

from faulty import causality, decoding, device, independence, interface, numerics
from faulty.registry import FAULTS

__all__ = ["FAULTS", "causality", "decoding", "device", "independence", "interface", "numerics"]
