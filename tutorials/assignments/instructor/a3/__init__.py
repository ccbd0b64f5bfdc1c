"""Assignment A3, for instructors: the solution, and wrong answers that the checks reject."""
