"""Public tests of A6.  All of them: pytest test_public.py; one task: pytest test_public.py -k A6_2"""

from tutorials.assignments.public import tests_of

test_a6 = tests_of("a6", __file__)
