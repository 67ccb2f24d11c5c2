"""The core: schedules, tokens, scoring, selection, fusion, and the model around a host's blocks."""
