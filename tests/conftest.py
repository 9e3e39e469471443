"""For all tests: property tests that repeat themselves exactly and never measure time on a shared machine."""

from hypothesis import HealthCheck, settings

settings.register_profile("mill", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mill")
