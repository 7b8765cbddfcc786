"""The rules, one file a subject. A new one is a decorated function here, two tests, and a new ``docs/engines.md``."""

from moeprune.deploy.rules import config, counts, groups, kernels, parallel, remarks  # noqa: F401
