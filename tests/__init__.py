"""The tests mirror the package. ``check`` checks the shapes, dtypes and types of numerical code while they run."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in the annotations of the language
