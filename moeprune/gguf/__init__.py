"""GGUF files of llama.cpp: inspect, prune by copying bytes, verify. Imports no torch."""
