"""Which engine can serve a pruned model, and how well: one small rule for each constraint. Imports no torch."""
