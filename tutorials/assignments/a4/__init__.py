"""Assignment 4: what the graders compare with."""
