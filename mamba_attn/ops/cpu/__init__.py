"""The native CPU backend: one C++ file, compiled at first use and called on plain tensors."""
