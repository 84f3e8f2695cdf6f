"""Operators on packed tensors. One op has one name here and in tests/ops/."""
