"""Tests, arranged as the package is. Helpers: `distributed.spawn` runs a function on Gloo ranks."""
