"""Settings of all tests."""

from hypothesis import settings

# Shared machines stall for longer than any deadline that would say something about the code.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
