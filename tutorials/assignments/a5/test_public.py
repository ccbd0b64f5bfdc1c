"""Public tests of A5.  All of them: pytest test_public.py; one task: pytest test_public.py -k A5_2"""

from tutorials.assignments import public

test_a5 = public.tests_of("a5", __file__)
