"""The plan: which experts stay and how many are active. Data, not code; imports no torch."""
