"""A package of a user's own, as a recipe sees it once it is installed: see tests/test_own_methods.py."""
