"""Public tests of A7.  All of them: pytest test_public.py; one task: pytest test_public.py -k A7_2"""

from tutorials.assignments.public import tests_of

test_a7 = tests_of("a7", __file__)
