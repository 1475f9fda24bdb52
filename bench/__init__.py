"""filbert's measurements: every contestant is checked first, then timed next to the others.

``python -m bench list`` names the cases; ``python -m bench run CASE`` runs one.
"""
