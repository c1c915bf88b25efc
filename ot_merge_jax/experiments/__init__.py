"""Did the source do the work? Controls, the choice of the strength, verdicts."""
