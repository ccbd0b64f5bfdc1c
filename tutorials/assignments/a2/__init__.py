"""A2: fake score, TTUR and the train step."""
