"""moeprune: fewer experts and fewer active experts for Mixture-of-Experts language models.

The pipeline is four artifacts and one direction (see ``docs/architecture.md``)::

    checkpoint --calibrate--> stats --plan--> plan --export--> checkpoint --measure--> report

Every stage is a function of a sub-package and a command of the ``moeprune`` program. Importing this package is cheap:
torch is loaded by the functions that need it.
"""

__version__ = "0.1.0"
