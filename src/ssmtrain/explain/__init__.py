"""What a run read and did at a step: its rows and documents, and the step once more."""
