"""What filbert knows about other people's models; ``import filbert`` imports none of it."""
