"""Public tests of A8.  All of them: pytest test_public.py; one task: pytest test_public.py -k A8_2"""

from tutorials.assignments import public

test_a8 = public.tests_of("a8", __file__)
