"""2D toys: mixtures whose score is known exactly, and a race of the methods (python -m toy)."""
