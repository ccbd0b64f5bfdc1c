"""Public tests of A4.  All of them: pytest test_public.py; one task: pytest test_public.py -k A4_2"""

from tutorials.assignments.public import tests_of

test_a4 = tests_of("a4", __file__)
