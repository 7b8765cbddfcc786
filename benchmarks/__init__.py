"""The measurements that moeprune's documentation quotes: ``python -m benchmarks``."""
