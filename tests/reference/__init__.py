"""The independent reference: docs/spec.md in NumPy and PyTorch float64, sharing no code with the package."""
