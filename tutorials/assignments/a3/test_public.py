"""Public tests of A3.  All of them: pytest test_public.py; one task: pytest test_public.py -k A3_2"""

from tutorials.assignments.public import tests_of

test_a3 = tests_of("a3", __file__)
