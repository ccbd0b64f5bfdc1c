"""Public tests of A1.  All of them: pytest test_public.py; one task: pytest test_public.py -k A1_2"""

from tutorials.assignments.public import tests_of

test_a1 = tests_of("a1", __file__)
