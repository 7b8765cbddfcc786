"""``python -m moeprune`` is the ``moeprune`` program."""

from moeprune.cli import main

if __name__ == "__main__":
    main()
