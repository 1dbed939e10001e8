"""Transforms of gradients, one idea a file."""
