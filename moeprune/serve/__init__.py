"""What a model costs when it serves: throughput."""
