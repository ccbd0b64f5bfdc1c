"""2D toys: mixtures whose score is known exactly, and a race of all methods on them (python -m toy)."""
