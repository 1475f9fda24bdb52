"""How Hugging Face modules are read: their layers, their calls, and what holds a model."""
