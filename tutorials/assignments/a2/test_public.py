"""Public tests of A2.  All of them: pytest test_public.py; one task: pytest test_public.py -k A2_2"""

from tutorials.assignments import public

test_a2 = public.tests_of("a2", __file__)
