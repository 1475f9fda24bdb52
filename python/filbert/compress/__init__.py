"""Smaller models: what filbert can make of a model by training it, in eager PyTorch."""
